"""Mend what the plain watershed cannot give back: cells in several pieces, and the border below the fill threshold."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from dinocell.errors import DinocellError
from dinocell.eval.border import restore_borders
from dinocell.eval.measure import CellMeasures, measure_cells, measure_some
from dinocell.eval.merging import merged_ids

MERGE_PX = 3.0
# By trial on the real masks under benchmarks/round_trip.py: a network's noise lies below, two cells' valley above.
MERGE_DEPTH = 0.1

_Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Mending:
    """What is done after the flood. `dinocell.eval.watershed.distance_to_labels` explains the fields.

    Raises
    ------
    DinocellError
        If a number is out of its range.
    """

    min_area_px: int = 0
    merge_px: int | float | None = MERGE_PX
    merge_depth: int | float = MERGE_DEPTH
    restore_border: bool = True
    blur_px: int | float | None = None

    def __post_init__(self) -> None:
        if self.min_area_px < 0:
            raise DinocellError(f"min_area_px: expected at least 0, got {self.min_area_px}")
        if self.merge_px is not None and not 0 < self.merge_px < math.inf:
            raise DinocellError(f"merge_px: expected more than 0 pixels, or None to merge nothing, got {self.merge_px}")
        if not 0 <= self.merge_depth <= 1:
            raise DinocellError(f"merge_depth: expected 0 to 1, got {self.merge_depth}")
        if self.blur_px is not None and not 0 <= self.blur_px < math.inf:
            raise DinocellError(f"blur_px: expected at least 0 pixels, or None to estimate it, got {self.blur_px}")


PLAIN = Mending(merge_px=None, restore_border=False)


def mend(
    labels: Int32[np.ndarray, "h w"], distance: Float32[np.ndarray, "h w"], *, cell_fill: int | float, mending: Mending
) -> Int32[np.ndarray, "h w"]:
    """Merge, restore borders, drop small cells, and number the rest from 1 without gaps, in the order of their ids.

    ``labels`` are those of a flood: 0 and ids from 1, at most as many as pixels. They are not written to.

    Raises
    ------
    DinocellError
        If the shapes differ.
    """
    if labels.shape != distance.shape:
        raise DinocellError(f"labels: expected the shape of the distance map, {distance.shape}, got {labels.shape}")
    num_labels = int(labels.max(initial=0))
    if num_labels and (mending.merge_px is not None or mending.restore_border):
        measures = measure_cells(labels, distance, num_labels)
        if mending.merge_px is not None:
            ids = merged_ids(labels, distance, measures, merge_px=mending.merge_px, merge_depth=mending.merge_depth)
            labels, measures = _merge(labels, distance, measures, ids)
        if mending.restore_border:
            labels = restore_borders(labels, distance, measures, cell_fill=cell_fill, blur_px=mending.blur_px)
    return _numbered(labels, mending.min_area_px)


def _merge(labels: _Array, distance: _Array, measures: CellMeasures, ids: _Array) -> tuple[_Array, CellMeasures]:
    """Give every label its new id, and measure the merged ones anew."""
    is_merged = np.bincount(ids, minlength=len(ids))[ids] > 1
    if not is_merged.any():
        return labels, measures
    labels = ids[labels]
    merged = measure_some(labels, distance, is_merged)
    return labels, CellMeasures(
        radius_px=np.where(is_merged, merged.radius_px, measures.radius_px),
        middle=np.where(is_merged, merged.middle, measures.middle),
        peak=np.where(is_merged, merged.peak, measures.peak),
    )


def _numbered(labels: _Array, min_area_px: int) -> _Array:
    area_px = np.bincount(labels.reshape(-1))
    keep = area_px >= max(min_area_px, 1)
    keep[0] = False
    numbers = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    numbered: _Array = numbers[labels]
    return numbered
