"""Instance masks in the encodings that people use, as label images: 0 is background, each other number one cell."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from dinocell.errors import ImageError
from dinocell.images.read import read_image

ENCODINGS = ("labels", "regions", "instances")


class PairError(ImageError):
    """An image and its mask that cannot enter a labelled set; ``kind`` is what reports count by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Piece(NamedTuple):
    """One cell: its mask within its bounding box, and where that box begins."""

    top: int
    left: int
    mask: Bool[np.ndarray, "h w"]


def read_labels(path: str | Path) -> Integer[np.ndarray, "h w"]:
    """Read a label image: one number a cell, in a grey or palette image (or one stored as red = green = blue).

    Raises
    ------
    PairError
        If the values are not whole numbers, or tell cells from background and nothing more.
    ImageError
        If the file cannot be read.
    """
    planes = _planes(path)
    if len(planes) > 1:
        raise PairError(
            "not a label image",
            f"{path}: {len(planes)} channels that differ, where one number a cell was expected; "
            "if colours tell the cells apart, the encoding is 'regions'",
        )
    labels: np.ndarray = planes[0]
    if labels.dtype.kind not in "ui" and labels.dtype != np.bool_:
        raise PairError("not a label image", f"{path}: values of type {labels.dtype}; save the labels as whole numbers")
    if labels.dtype == np.bool_ or (labels.dtype.kind == "u" and _is_black_and_white(labels)):
        raise PairError(
            "not a label image",
            f"{path}: a mask of two values, in which cells that touch are one; "
            "if its connected pieces are the cells, the encoding is 'regions'",
        )
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise PairError("not a label image", f"{path}: negative labels (down to {labels.min()})")
    return labels


def read_regions(path: str | Path) -> Integer[np.ndarray, "h w"]:
    """Read a colour-coded mask: every connected region (4 neighbours) of one colour or value is a cell; black is not.

    BBBC039 is such a set: small numbers in the red plane only keep nuclei that touch apart. A mask of 0 and 255 gives
    its connected pieces.

    Raises
    ------
    PairError
        If the values are not whole numbers.
    ImageError
        If the file cannot be read.
    """
    from skimage.measure import label

    planes = _planes(path)
    if planes.dtype.kind not in "uib" or planes.dtype.itemsize * 8 * len(planes) > 64:
        raise PairError(
            "not a label image", f"{path}: {len(planes)} channel(s) of type {planes.dtype}; expected colours"
        )
    code = np.zeros(planes.shape[1:], np.uint64)
    for plane in planes:
        code = code << np.uint64(8 * planes.dtype.itemsize) | plane.astype(np.uint64)
    _, code_numbers = np.unique(code, return_inverse=True)
    regions = code_numbers.reshape(code.shape).astype(np.int32) + 1
    regions[code == 0] = 0
    numbered = label(regions, background=0, connectivity=1)  # type: ignore[no-untyped-call]
    return np.asarray(numbered, dtype=np.int32)


def read_instances(paths: Sequence[Path], notes: Counter[str]) -> Integer[np.ndarray, "h w"]:
    """Read one mask file a cell: what is not 0 is the cell. Ids follow the order of the paths, from 1.

    Raises
    ------
    PairError
        If the files differ in size.
    ImageError
        If one cannot be read.
    """
    pieces: list[Piece] = []
    shape: tuple[int, int] | None = None
    for path in paths:
        mask = (_planes(path) != 0).any(axis=0)
        if shape is not None and mask.shape != shape:
            raise PairError("sizes differ", f"{path}: {_size(mask.shape)}, the mask of another cell is {_size(shape)}")
        shape = mask.shape
        pieces.append(cropped(mask))
    if shape is None:
        raise ValueError("paths: expected at least one")
    return paint(pieces, shape, notes)


def paint(pieces: Sequence[Piece], shape: tuple[int, int], notes: Counter[str]) -> Integer[np.ndarray, "h w"]:
    """Draw cells into one label image; where several claim a pixel it goes to the smallest of them.

    So a small cell on a large one stays, whatever the order of the file. Ids follow that order, from 1. What cannot be
    shown is counted in ``notes``.
    """
    labels = np.zeros(shape, np.int32)
    areas = [int(piece.mask.sum()) for piece in pieces]
    shared = 0
    for index in sorted(range(len(pieces)), key=lambda k: -areas[k]):
        top, left, mask = pieces[index]
        window = labels[top : top + mask.shape[0], left : left + mask.shape[1]]
        shared += int(np.count_nonzero(window[mask]))
        window[mask] = index + 1
    seen = np.bincount(labels.ravel(), minlength=len(pieces) + 1)[1:]
    empty = sum(area == 0 for area in areas)
    notes["cells without a pixel"] += empty
    notes["cells hidden under others"] += int((seen == 0).sum()) - empty
    notes["pixels of two or more cells, given to the smaller"] += shared
    return labels


def cropped(mask: Bool[np.ndarray, "h w"], top: int = 0, left: int = 0) -> Piece:
    """Return a mask cut to its bounding box, as a piece of an image in which it begins at ``top`` and ``left``."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return Piece(top, left, mask[:0, :0])
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return Piece(top + int(rows[0]), left + int(columns[0]), mask[box])


def _planes(path: str | Path) -> np.ndarray:
    image = read_image(path, palette_as_colour=False).grey()
    if image.channel_names[-1:] == ("alpha",):
        return image.pixels[:-1]
    return image.pixels


def _is_black_and_white(labels: np.ndarray) -> bool:
    """Say whether all that is not 0 is the largest number of the type: 255, or 65,535 where 16 bits were made of it."""
    white = np.iinfo(labels.dtype).max
    return bool(labels.max() == white and np.isin(labels, (0, white)).all())


def _size(shape: tuple[Any, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"


# --- coco ----------------------------------------------------------------------------------------------------------
#
# COCO instance annotations (LIVECell, Roboflow...): polygons and run lengths, drawn as label images.
#
# A pixel belongs to a polygon if its centre does; pixel (row r, column c) has its centre at (r + 0.5, c + 0.5) in
# COCO's
# coordinates. Regions marked as crowd are no cells: they are counted and stay background.


def read_coco(path: Path) -> tuple[list[dict[str, Any]], dict[Any, list[dict[str, Any]]]]:
    """Return the images of an annotation file, and the annotations of each by image id.

    Raises
    ------
    ImageError
        If the file is not COCO JSON, or has annotations and not one for an image of its own.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSON and text encoding
        raise ImageError(f"{path}: not JSON ({error}); fetch it again") from error
    try:
        images = list(content["images"])
        annotations = content["annotations"]
        # LIVECell's files hold a list or an object with the ids as keys.
        annotations = list(annotations.values() if isinstance(annotations, dict) else annotations)
        by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
        for annotation in annotations:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        for image in images:
            if not isinstance(image["file_name"], str):
                raise TypeError
        if annotations and not any(by_image[image["id"]] for image in images):
            ids = f"{annotations[0]['image_id']!r} among {', '.join(repr(image['id']) for image in images[:3])}"
            raise ImageError(f"{path}: no annotation belongs to an image (no image_id {ids}...); mend the ids")
    except (KeyError, TypeError):
        raise ImageError(f"{path}: not COCO instances; expected 'images' and 'annotations' with their ids") from None
    return images, by_image


def draw(annotations: list[dict[str, Any]], shape: tuple[int, int], notes: Counter[str]) -> Integer[np.ndarray, "h w"]:
    """Draw the annotations of one image; ids follow their order, from 1; overlaps go to the smaller cell.

    Raises
    ------
    PairError
        If an annotation cannot be understood, or was made for an image of another size.
    """
    pieces = []
    for annotation in annotations:
        if annotation.get("iscrowd"):
            notes["crowd regions left out"] += 1
            continue
        try:
            pieces.append(_piece(annotation["segmentation"], shape))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            if isinstance(error, ImageError):
                raise
            raise PairError("bad annotation", f"annotation {annotation.get('id')}: no polygon or run lengths") from None
    return paint(pieces, shape, notes)


def _piece(segmentation: Any, shape: tuple[int, int]) -> Piece:
    if isinstance(segmentation, Mapping):
        size = tuple(segmentation["size"])
        if size != shape:
            raise PairError(
                "sizes differ", f"run lengths for {size[0]} x {size[1]}, the image is {shape[0]} x {shape[1]}"
            )
        counts = segmentation["counts"]
        return cropped(decode_run_lengths(uncompressed(counts) if isinstance(counts, str) else counts, shape))
    return polygons_piece([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation], shape)


def polygons_piece(polygons: list[np.ndarray], shape: tuple[int, int]) -> Piece:
    """Draw the union of polygons, each (vertices 2) of x and y; what lies outside the image is cut off.

    Raises
    ------
    ValueError
        If there is no polygon, or one with fewer than 3 vertices or values that are not finite.
    """
    from skimage.draw import polygon2mask

    if not polygons or any(len(polygon) < 3 or not np.isfinite(polygon).all() for polygon in polygons):
        raise ValueError("polygons: expected at least one, of at least 3 finite vertices each")
    corners = np.concatenate(polygons)
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, (shape[1], shape[0]))
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int), (left, top), (shape[1], shape[0]))
    mask = np.zeros((bottom - top, right - left), np.bool_)
    if mask.size == 0:
        return Piece(0, 0, mask[:0, :0])
    for polygon in polygons:
        # polygon2mask takes (row, column) of pixel centres at whole numbers.
        corners = polygon[:, ::-1] - (top + 0.5, left + 0.5)
        mask |= polygon2mask(mask.shape, corners)  # type: ignore[no-untyped-call]
    return cropped(mask, int(top), int(left))


def decode_run_lengths(counts: list[int], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Return the mask of run lengths: background and cell in turn, down the columns, background first.

    Raises
    ------
    ValueError
        If a run is negative or the runs do not add up to the image.
    """
    runs = np.asarray(counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != shape[0] * shape[1]:
        raise ValueError(f"run lengths: expected them to add up to {shape[0]} x {shape[1]}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(shape[1], shape[0]).T


def uncompressed(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed string.

    A number is a row of characters, least significant first: 5 bits of value and 1 that says whether more follow, plus
    48. The highest bit of its last character is the sign. From the fourth number on, each is the difference to the
    number two before it.

    Raises
    ------
    ValueError
        If the string ends within a number or has characters that do not occur.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"compressed run lengths: unexpected character {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths: the string ends within a number")
    return counts
