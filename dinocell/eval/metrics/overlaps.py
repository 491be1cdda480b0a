"""Which cell of a reference shares how many pixels with which predicted cell: the one table behind every score.

Only pairs that do share pixels are kept, a few for each cell: 60,000 cells cost what their number does, not its square.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Integer, UInt64

# Pixels that are looked at together: their temporary arrays stay in the processor's cache, and memory stays small.
_BLOCK_PIXELS = 1 << 18

LabelImage = Integer[np.ndarray, "_ _"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ContingencyTable:
    """The cells of two label images of one size, and the pairs of them that overlap.

    Attributes
    ----------
    reference_ids, predicted_ids
        The labels, growing, without 0.
    reference_areas, predicted_areas
        Pixels of each.
    reference_index, predicted_index
        The two cells of each overlapping pair, as positions in the arrays above; sorted by reference, then prediction.
    intersections
        Pixels that each pair shares.
    """

    reference_ids: UInt64[np.ndarray, " n"]
    reference_areas: Int64[np.ndarray, " n"]
    predicted_ids: UInt64[np.ndarray, " m"]
    predicted_areas: Int64[np.ndarray, " m"]
    reference_index: Int64[np.ndarray, " k"]
    predicted_index: Int64[np.ndarray, " k"]
    intersections: Int64[np.ndarray, " k"]

    @property
    def num_reference(self) -> int:
        """Cells of the reference."""
        return len(self.reference_ids)

    @property
    def num_predicted(self) -> int:
        """Predicted cells."""
        return len(self.predicted_ids)

    @property
    def unions(self) -> Int64[np.ndarray, " k"]:
        """Pixels that belong to either cell of each pair."""
        areas = self.reference_areas[self.reference_index] + self.predicted_areas[self.predicted_index]
        unions: np.ndarray = areas - self.intersections
        return unions

    @property
    def ious(self) -> Float64[np.ndarray, " k"]:
        """Intersection over union of each pair, in (0, 1]."""
        ious: np.ndarray = self.intersections / self.unions
        return ious


def contingency_table(reference: LabelImage, prediction: LabelImage) -> ContingencyTable:
    """Count the pixels that each pair of cells shares.

    0 is background, every other number one cell, whether it is in one piece or in several. Ids may have gaps and be as
    large as their type allows; the two images may differ in type. Temporary memory does not grow with the image.

    Raises
    ------
    ValueError
        If an image is not two-dimensional, is not of an integer type, or has negative ids, or if the sizes differ.
    """
    _check(reference, "reference")
    _check(prediction, "prediction")
    if reference.shape != prediction.shape:
        raise ValueError(
            f"expected a reference and a prediction of one size, got {reference.shape} and {prediction.shape}"
        )
    blocks = [_sum_pairs(*_runs(*block)) for block in _blocks(reference, prediction)]
    ids, others, pixels = _sum_pairs(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))

    reference_ids, row = np.unique(ids, return_inverse=True)
    predicted_ids, column = np.unique(others, return_inverse=True)
    # Exact: bincount adds in float64, whose whole numbers reach 9e15.
    reference_areas = np.bincount(row, pixels, len(reference_ids)).astype(np.int64)
    predicted_areas = np.bincount(column, pixels, len(predicted_ids)).astype(np.int64)
    both = (ids != 0) & (others != 0)
    # Background, where there is any, is the first of its ids.
    first = int(reference_ids.size > 0 and reference_ids[0] == 0)
    first_predicted = int(predicted_ids.size > 0 and predicted_ids[0] == 0)
    return ContingencyTable(
        reference_ids=reference_ids[first:],
        reference_areas=reference_areas[first:],
        predicted_ids=predicted_ids[first_predicted:],
        predicted_areas=predicted_areas[first_predicted:],
        reference_index=row[both] - first,
        predicted_index=column[both] - first_predicted,
        intersections=pixels[both],
    )


def contingency_tables(
    reference: LabelImage | Sequence[LabelImage], prediction: LabelImage | Sequence[LabelImage]
) -> list[ContingencyTable]:
    """Return one table for each pair of frames; a single image is a list of one.

    Raises
    ------
    ValueError
        As ``contingency_table``, or if the two lists differ in length.
    """
    if isinstance(reference, np.ndarray) != isinstance(prediction, np.ndarray):
        raise ValueError("expected two label images or two lists of them, got one image and one list")
    if isinstance(reference, np.ndarray) and isinstance(prediction, np.ndarray):
        return [contingency_table(reference, prediction)]
    if len(reference) != len(prediction):
        raise ValueError(f"expected as many predictions as references, got {len(prediction)} and {len(reference)}")
    return [contingency_table(*frames) for frames in zip(reference, prediction, strict=True)]


def _check(labels: np.ndarray, name: str) -> None:
    if labels.ndim != 2:
        raise ValueError(
            f"{name}: expected one label image (h w), got an array of shape {labels.shape}; "
            "frames go in as a list, list(array)"
        )
    if labels.dtype == np.bool_:
        raise ValueError(
            f"{name}: expected one integer id a cell, got a bool mask, in which touching cells are one: "
            "number its pieces first (scipy.ndimage.label)"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected one integer id a cell, got values of type {labels.dtype}")
    if labels.size and labels.dtype.kind == "i" and labels.min() < 0:
        raise ValueError(f"{name}: expected ids of at least 0 (0 is background), got {labels.min()}")


def _blocks(reference: np.ndarray, prediction: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut both images into the same groups of whole rows, at least one, flat."""
    height, width = reference.shape
    rows = max(1, _BLOCK_PIXELS // max(width, 1))
    for top in range(0, max(height, 1), rows):
        yield reference[top : top + rows].ravel(), prediction[top : top + rows].ravel()


def _runs(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two ids and the length of each run of equal pixels, which are far fewer to sort; no background."""
    if reference.size == 0:
        return np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64)
    is_first = np.empty(reference.size, np.bool_)
    is_first[0] = True
    np.not_equal(reference[1:], reference[:-1], out=is_first[1:])
    is_first[1:] |= prediction[1:] != prediction[:-1]
    first = np.flatnonzero(is_first)
    ids, others = reference[first].astype(np.uint64), prediction[first].astype(np.uint64)
    pixels = np.diff(first, append=reference.size)
    is_cell = (ids | others) != 0
    return ids[is_cell], others[is_cell], pixels[is_cell]


def _sum_pairs(ids: np.ndarray, others: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort by the two ids and add up the pixels of equal pairs."""
    if ids.size == 0:
        return ids, others, pixels
    num_bits = [int(largest).bit_length() for largest in (ids.max(), others.max(), ids.size - 1)]
    if sum(num_bits) <= 64:
        # Both ids and the position in one number: to sort these is several times faster than to ask for the order.
        packed = (ids << np.uint64(num_bits[1]) | others) << np.uint64(num_bits[2])
        packed |= np.arange(ids.size, dtype=np.uint64)
        packed.sort()
        order = (packed & np.uint64((1 << num_bits[2]) - 1)).astype(np.intp)
    else:
        order = np.lexsort((others, ids))
    ids, others = ids[order], others[order]
    first = np.flatnonzero(np.concatenate([[True], (ids[1:] != ids[:-1]) | (others[1:] != others[:-1])]))
    return ids[first], others[first], np.add.reduceat(pixels[order], first)
