"""Instance masks in common encodings, read as label images: 0 is background, each other integer one cell."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Bool, Float64, Int32, Integer, Shaped

from dinocell.errors import ImageError, one_line
from dinocell.images.read import read_image


class PairError(ImageError):
    """An image and its mask that cannot be part of a labelled set; reports count by ``kind``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def reject(kind: str, message: str, cause: Exception | None = None) -> NoReturn:
    """Raise a PairError."""
    raise PairError(kind, message) from cause


class Piece(NamedTuple):
    """One cell: its mask in its bounding box, and the first row and column of that."""

    top: int
    left: int
    mask: Bool[np.ndarray, "h w"]


def read_labels(path: str | Path) -> Integer[np.ndarray, "h w"]:
    """Read a label image: one integer per cell, in a grey or palette image (or stored as red = green = blue).

    PairError if the values are not integers, or only separate cells from background.
    """
    planes = _planes(path)
    labels = np.asarray(planes[0])
    if len(planes) > 1:
        problem = f"{len(planes)} channels that differ; for cells of one colour each, use the encoding 'regions'"
    elif labels.dtype.kind not in "uib":
        problem = f"values of type {labels.dtype}; save the labels as integers"
    elif labels.dtype.kind == "b" or (labels.dtype.kind == "u" and _is_black_and_white(labels)):
        problem = "a binary mask; if its connected components are the cells, use the encoding 'regions'"
    elif labels.min() < 0:
        problem = f"negative labels (minimum {labels.min()})"
    else:
        return labels
    reject("not a label image", f"{path}: {problem}")


def read_regions(path: str | Path) -> Int32[np.ndarray, "h w"]:
    """Read a mask in which every connected region (4 neighbours) of one colour or value is a cell; black is background.

    In BBBC039, for example, small integers in the red plane only separate touching nuclei. A mask of 0 and 255 gives
    its connected components. Other values than integers are a PairError.
    """
    from skimage.measure import label

    planes = _planes(path)
    bits = 8 * planes.dtype.itemsize
    if planes.dtype.kind not in "uib" or bits * len(planes) > 64:
        reject("not a label image", f"{path}: {len(planes)} channel(s) of type {planes.dtype}; expected colours")
    # One integer per colour, then consecutive ones, because `label` takes small integers.
    code = np.zeros(planes.shape[1:], np.uint64)
    for plane in planes:
        code = code << np.uint64(bits) | plane.astype(np.uint64)
    colours = np.unique(code, return_inverse=True)[1].reshape(code.shape).astype(np.int32) + 1
    colours[code == 0] = 0
    return np.asarray(label(colours, background=0, connectivity=1), np.int32)  # type: ignore[no-untyped-call]


def read_instances(paths: Sequence[Path], notes: Counter[str]) -> Int32[np.ndarray, "h w"]:
    """Read one mask file per cell, in which non-zero pixels are the cell. Ids are 1, 2... in the order of the paths."""
    pieces: list[Piece] = []
    shape = (0, 0)
    for path in paths:
        mask = (_planes(path) != 0).any(axis=0)
        if pieces and mask.shape != shape:
            sizes = f"{mask.shape[0]} x {mask.shape[1]}, the mask of another cell is {shape[0]} x {shape[1]}"
            reject("sizes differ", f"{path}: {sizes}")
        shape = mask.shape
        pieces.append(cropped(mask))
    return paint(pieces, shape, notes)


def paint(pieces: Sequence[Piece], shape: tuple[int, int], notes: Counter[str]) -> Int32[np.ndarray, "h w"]:
    """Draw cells into one label image; a pixel of several cells goes to the smallest of them.

    A small cell on a large one thus stays visible, whatever the order of the file. Ids are 1, 2... in that order. What
    the label image cannot represent is counted in ``notes``.
    """
    labels = np.zeros(shape, np.int32)
    areas = [int(piece.mask.sum()) for piece in pieces]
    shared = 0
    for index in sorted(range(len(pieces)), key=lambda k: -areas[k]):
        top, left, mask = pieces[index]
        window = labels[top : top + mask.shape[0], left : left + mask.shape[1]]
        shared += int(np.count_nonzero(window[mask]))
        window[mask] = index + 1
    visible = np.bincount(labels.ravel(), minlength=len(pieces) + 1)[1:]
    empty = sum(area == 0 for area in areas)
    notes["cells without a pixel"] += empty
    notes["cells hidden under others"] += int((visible == 0).sum()) - empty
    notes["pixels of two or more cells, given to the smaller"] += shared
    return labels


def cropped(mask: Bool[np.ndarray, "h w"], top: int = 0, left: int = 0) -> Piece:
    """Crop a mask to its bounding box; ``top`` and ``left`` are the position of the mask in the image."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return Piece(top, left, mask[:0, :0])
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return Piece(top + int(rows[0]), left + int(columns[0]), mask[box])


def _planes(path: str | Path) -> Shaped[np.ndarray, "c h w"]:
    return read_image(path, palette_as_colour=False).grey().without_alpha().pixels


def _is_black_and_white(labels: Integer[np.ndarray, "h w"]) -> bool:
    """Return whether the only non-zero value is the type's maximum: 255, or 65,535 after conversion to 16 bits."""
    white = np.iinfo(labels.dtype).max
    return bool(labels.max() == white and np.isin(labels, (0, white)).all())


# --- COCO instance annotations (LIVECell, Roboflow...) --------------------------------------------------------------
#
# A pixel belongs to a polygon if its centre does; pixel (row r, column c) has its centre at (r + 0.5, c + 0.5) in
# COCO's coordinates. Crowd regions are not cells: they are counted and stay background.
#
# Not pycocotools.mask: it draws polygons at 5 times the resolution, with other pixels on the outline, and leaves
# memory uninitialised where the run lengths of a damaged file do not fill the image.


def read_coco(path: Path) -> tuple[list[dict[str, Any]], dict[Any, list[dict[str, Any]]]]:
    """Return the images of an annotation file, and the annotations of each by image id.

    PairError if the file is not COCO JSON, or none of its annotations belongs to one of its images.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: JSON and text encoding
        reject("no pairs", f"{path}: cannot be read as JSON ({one_line(error)})", error)
    try:
        images = list(content["images"])
        annotations = content["annotations"]
        # LIVECell's files have a list, or an object with the ids as keys.
        annotations = list(annotations.values() if isinstance(annotations, dict) else annotations)
        by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
        for annotation in annotations:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        has_names = all(isinstance(image["file_name"], str) for image in images)
    except (KeyError, TypeError):
        has_names = False
    if not has_names:
        reject("no pairs", f"{path}: not COCO instances; expected 'images' and 'annotations' with their ids")
    if annotations and not any(by_image[image["id"]] for image in images):
        ids = f"{annotations[0]['image_id']!r} among {', '.join(repr(image['id']) for image in images[:3])}"
        reject("no pairs", f"{path}: no annotation belongs to an image (no image_id {ids}...); correct the ids")
    return images, by_image


def draw(annotations: list[dict[str, Any]], shape: tuple[int, int], notes: Counter[str]) -> Int32[np.ndarray, "h w"]:
    """Draw the annotations of one image, as in `paint`; PairError if one is malformed or for another image size."""
    pieces = []
    for annotation in annotations:
        if annotation.get("iscrowd"):
            notes["crowd regions skipped"] += 1
            continue
        try:
            pieces.append(_piece(annotation["segmentation"], shape))
        except PairError as error:
            reject(error.kind, f"annotation {annotation.get('id')}: {error}", error)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            reject("bad annotation", f"annotation {annotation.get('id')}: no polygon or run lengths", error)
    return paint(pieces, shape, notes)


def _piece(segmentation: Any, shape: tuple[int, int]) -> Piece:
    if isinstance(segmentation, Mapping):
        height, width = segmentation["size"]
        if (height, width) != shape:
            reject("sizes differ", f"run lengths for {height} x {width}, the image is {shape[0]} x {shape[1]}")
        counts = segmentation["counts"]
        return cropped(decode_run_lengths(uncompressed(counts) if isinstance(counts, str) else counts, shape))
    return polygons_piece([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation], shape)


def polygons_piece(polygons: list[Float64[np.ndarray, "vertices 2"]], shape: tuple[int, int]) -> Piece:
    """Draw the union of polygons of x and y; parts outside the image are cut off. PairError if one is malformed."""
    from skimage.draw import polygon2mask

    if not polygons or any(len(polygon) < 3 or not np.isfinite(polygon).all() for polygon in polygons):
        reject("bad annotation", "expected at least one polygon, of at least 3 finite vertices each")
    corners = np.concatenate(polygons)
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, (shape[1], shape[0]))
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int), (left, top), (shape[1], shape[0]))
    mask = np.zeros((bottom - top, right - left), np.bool_)
    if mask.size == 0:
        return Piece(0, 0, mask[:0, :0])
    for polygon in polygons:
        # polygon2mask expects (row, column), with pixel centres at integers.
        mask |= polygon2mask(mask.shape, polygon[:, ::-1] - (top + 0.5, left + 0.5))  # type: ignore[no-untyped-call]
    return cropped(mask, int(top), int(left))


def decode_run_lengths(counts: list[int], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Return the mask of run lengths: background and cell alternate, column by column, background first."""
    runs = np.asarray(counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != shape[0] * shape[1]:
        reject("bad annotation", f"expected run lengths that add up to {shape[0]} x {shape[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape[1], shape[0]).T


def uncompressed(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed string.

    Each number is a sequence of characters, least significant first: code 48 plus 5 bits of value plus 32 if another
    character follows. The highest value bit of the last one is the sign. From the fourth number on, each is the
    difference from the number two before it.
    """
    numbers = re.findall("[P-o]*[0-O]", text)
    if "".join(numbers) != text:
        reject("bad annotation", "compressed run lengths: an invalid character, or the string ends within a number")
    counts: list[int] = []
    for number in numbers:
        digits = [(ord(character) - 48) & 31 for character in number]
        value = sum(digit << 5 * place for place, digit in enumerate(digits))
        if digits[-1] & 16:
            value -= 1 << 5 * len(digits)
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts
