"""Contingency table of two label images: the shared pixels of reference and predicted cells, the basis of all scores.

The table is sparse: only pairs that share pixels are stored, so its size is proportional to the number of cells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Integer, UInt64

# Pixels processed at once: the temporary arrays fit into the processor's cache.
_BLOCK_PIXELS = 1 << 18

LabelImage = Integer[np.ndarray, "_ _"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ContingencyTable:
    """The cells of two label images of the same size, and the pairs that overlap.

    Attributes
    ----------
    reference_ids, predicted_ids
        Labels, ascending, without 0.
    reference_areas, predicted_areas
        Area of each in pixels.
    reference_index, predicted_index
        The two cells of each overlapping pair, as indices into the arrays above; sorted by reference, then prediction.
    intersections
        Shared pixels of each pair.
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
        """Number of reference cells."""
        return len(self.reference_ids)

    @property
    def num_predicted(self) -> int:
        """Number of predicted cells."""
        return len(self.predicted_ids)

    @property
    def unions(self) -> Int64[np.ndarray, " k"]:
        """Pixels in either cell of each pair."""
        areas = self.reference_areas[self.reference_index] + self.predicted_areas[self.predicted_index]
        return np.asarray(areas - self.intersections)

    @property
    def ious(self) -> Float64[np.ndarray, " k"]:
        """Intersection over union of each pair, in (0, 1]."""
        return np.asarray(self.intersections / self.unions)


def contingency_table(reference: LabelImage, prediction: LabelImage) -> ContingencyTable:
    """Count the shared pixels of each pair of cells.

    0 is background, every other id one cell, connected or not. Ids may have gaps and be as large as their type allows;
    the two images may differ in type. Temporary memory does not grow with the image. A ValueError if an image is not
    two-dimensional, is not of an integer type, or has negative ids, or if the sizes differ.
    """
    _check(reference, "reference")
    _check(prediction, "prediction")
    if reference.shape != prediction.shape:
        got = f"got {reference.shape} and {prediction.shape}"
        raise ValueError(f"expected a reference and a prediction of the same size, {got}")
    blocks = [_sum_pairs(*_runs(*block)) for block in _blocks(reference, prediction)]
    ids, others, pixels = _sum_pairs(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))

    reference_ids, row = np.unique(ids, return_inverse=True)
    predicted_ids, column = np.unique(others, return_inverse=True)
    # Exact: bincount sums in float64, which represents integers up to 9e15.
    reference_areas = np.bincount(row, pixels, len(reference_ids)).astype(np.int64)
    predicted_areas = np.bincount(column, pixels, len(predicted_ids)).astype(np.int64)
    both = (ids != 0) & (others != 0)
    # The background, if present, is the first id.
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

    A ValueError as in `contingency_table`, or if the two lists differ in length.
    """
    references = [reference] if isinstance(reference, np.ndarray) else reference
    predictions = [prediction] if isinstance(prediction, np.ndarray) else prediction
    if isinstance(reference, np.ndarray) != isinstance(prediction, np.ndarray) or len(references) != len(predictions):
        kinds = ("one image" if isinstance(x, np.ndarray) else f"{len(x)} frames" for x in (reference, prediction))
        raise ValueError("expected two label images, or two lists of the same length, got {} and {}".format(*kinds))
    return [contingency_table(*frames) for frames in zip(references, predictions, strict=True)]


def _check(labels: np.ndarray, name: str) -> None:
    problem = None
    if labels.ndim != 2:
        problem = f"an array of shape {labels.shape}; pass frames as a list, list(array)"
    elif labels.dtype.kind not in "iu":
        problem = f"values of type {labels.dtype}; label the cells of a mask with scipy.ndimage.label"
    elif labels.size and labels.dtype.kind == "i" and labels.min() < 0:
        problem = f"id {labels.min()}"
    if problem:
        raise ValueError(f"{name}: expected a label image (h w) of one integer id per cell; got {problem}")


def _blocks(reference: np.ndarray, prediction: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split both images into the same groups of whole rows, at least one, flattened."""
    height, width = reference.shape
    rows = max(1, _BLOCK_PIXELS // max(width, 1))
    for top in range(0, max(height, 1), rows):
        yield reference[top : top + rows].ravel(), prediction[top : top + rows].ravel()


def _runs(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two ids and the length of each run of equal pixels without background; runs are fewer than pixels."""
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
    """Sort by the two ids and sum the pixels of equal pairs."""
    if ids.size == 0:
        return ids, others, pixels
    num_bits = [int(largest).bit_length() for largest in (ids.max(), others.max(), ids.size - 1)]
    if sum(num_bits) <= 64:
        # Both ids and the position packed into one integer: sorting these is several times faster than argsort.
        packed = (ids << np.uint64(num_bits[1]) | others) << np.uint64(num_bits[2])
        packed |= np.arange(ids.size, dtype=np.uint64)
        packed.sort()
        order = (packed & np.uint64((1 << num_bits[2]) - 1)).astype(np.intp)
    else:
        order = np.lexsort((others, ids))
    ids, others = ids[order], others[order]
    first = np.flatnonzero(np.concatenate([[True], (ids[1:] != ids[:-1]) | (others[1:] != others[:-1])]))
    return ids[first], others[first], np.add.reduceat(pixels[order], first)
