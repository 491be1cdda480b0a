"""Instance masks in the encodings that people use, as label images: 0 is background, each other number one cell."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from dinocell.data_shards.images import read_image
from dinocell.errors import ImageError

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
    picture = read_image(path, palette_as_colour=False).grey()
    if picture.channel_names[-1:] == ("alpha",):
        return picture.pixels[:-1]
    return picture.pixels


def _is_black_and_white(labels: np.ndarray) -> bool:
    """Say whether all that is not 0 is the largest number of the type: 255, or 65,535 where 16 bits were made of it."""
    white = np.iinfo(labels.dtype).max
    return bool(labels.max() == white and np.isin(labels, (0, white)).all())


def _size(shape: tuple[Any, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"
