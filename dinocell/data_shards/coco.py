"""COCO instance annotations (LIVECell, Roboflow...): polygons and run lengths, drawn as label images.

A pixel belongs to a polygon if its centre does; pixel (row r, column c) has its centre at (r + 0.5, c + 0.5) in COCO's
coordinates. Regions marked as crowd are no cells: they are counted and stay background.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from dinocell.data_shards.masks import PairError, Piece, cropped, paint
from dinocell.errors import ImageError


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
