"""Mend what the plain watershed cannot give back: cells in several pieces, and the border below the fill threshold."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import ndtr

from dinocell.errors import DinocellError
from dinocell.labelled.distance import distance_to_boundary
from dinocell.runtime.jit import compiled

# --- measure -------------------------------------------------------------------------------------------------------
#
# What mending needs to know of each label: how wide it is, and how high the map stands in it.

_Array = np.ndarray


@dataclass(frozen=True, eq=False)
class CellMeasures:
    """One entry a label; entry 0 is the background's and 0.

    Attributes
    ----------
    radius_px
        Of the largest disc inside the label, to half a pixel.
    middle
        The map's value at that disc's centre.
    peak
        The map's highest value in the label.
    """

    radius_px: _Array
    middle: _Array
    peak: _Array

    @property
    def full_radius_px(self) -> _Array:
        """The radius at which the map would be 1: it falls by 1 / this with every pixel towards the cell's boundary."""
        radius_px: _Array = self.radius_px / np.maximum(self.middle, np.float32(1e-3))
        return radius_px


def measure_cells(labels: _Array, distance: _Array, num_labels: int) -> CellMeasures:
    """Measure labels 1 to ``num_labels``; those that are missing have 0 everywhere.

    A label that fills the whole image has no boundary: it is given half the image's longer side as its radius.
    """
    depth = distance_to_boundary(labels)
    if np.isinf(depth[0, 0]):
        depth.fill(max(depth.shape) / 2)
    return CellMeasures(*_measure(labels, distance, depth, num_labels))


def measure_selected(labels: _Array, distance: _Array, which: _Array) -> CellMeasures:
    """Measure the labels where ``which``, one entry a label, is True; the others have 0 everywhere.

    The same numbers as `measure_cells`: the pixel nearest to a label's inside lies in its bounding box or beside it.
    """
    boxes = ndimage.find_objects(labels, max_label=len(which) - 1)
    wanted = [(label, boxes[label - 1]) for label in np.flatnonzero(which).tolist() if label and boxes[label - 1]]
    if sum((rows.stop - rows.start) * (columns.stop - columns.start) for _, (rows, columns) in wanted) > labels.size:
        return measure_cells(np.where(which[labels], labels, 0), distance, len(which) - 1)
    found = CellMeasures(*(np.zeros(len(which), np.float32) for _ in range(3)))
    for label, box in wanted:
        wider = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
        own = np.ascontiguousarray(labels[wider] == label, np.int32)
        depth = distance_to_boundary(own)
        if np.isinf(depth[0, 0]):
            depth.fill(max(labels.shape) / 2)
        radius, middle, peak = _measure(own, distance[wider], depth, 1)
        found.radius_px[label], found.middle[label], found.peak[label] = radius[1], middle[1], peak[1]
    return found


@compiled
def _measure(labels: _Array, distance: _Array, depth: _Array, num_labels: int) -> tuple[_Array, _Array, _Array]:
    radius = np.zeros(num_labels + 1, np.float32)
    middle = np.zeros(num_labels + 1, np.float32)
    peak = np.zeros(num_labels + 1, np.float32)
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            label = labels[row, column]
            if label > 0:
                value, deep = distance[row, column], depth[row, column]
                peak[label] = max(peak[label], value)
                if deep > radius[label] or (deep == radius[label] and value > middle[label]):
                    radius[label], middle[label] = deep, value
    return radius, middle, peak


MERGE_PX = 3.0
# By trial on the real masks under benchmarks/round_trip.py: a network's noise lies below, two cells' valley above.
MERGE_DEPTH = 0.1


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What is done after the flood. `dinocell.eval.segmentation.watershed.distance_to_labels` explains the fields.

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


PLAIN = Refinement(merge_px=None, restore_border=False)


def refine_labels(
    labels: Int32[np.ndarray, "h w"],
    distance: Float32[np.ndarray, "h w"],
    *,
    cell_fill: int | float,
    refinement: Refinement,
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
    if num_labels and (refinement.merge_px is not None or refinement.restore_border):
        measures = measure_cells(labels, distance, num_labels)
        if refinement.merge_px is not None:
            ids = merged_ids(
                labels, distance, measures, merge_px=refinement.merge_px, merge_depth=refinement.merge_depth
            )
            labels, measures = _merge(labels, distance, measures, ids)
        if refinement.restore_border:
            labels = refine_boundaries(labels, distance, measures, cell_fill=cell_fill, blur_px=refinement.blur_px)
    return _numbered(labels, refinement.min_area_px)


def _merge(labels: _Array, distance: _Array, measures: CellMeasures, ids: _Array) -> tuple[_Array, CellMeasures]:
    """Give every label its new id, and measure the merged ones anew."""
    is_merged = np.bincount(ids, minlength=len(ids))[ids] > 1
    if not is_merged.any():
        return labels, measures
    labels = ids[labels]
    merged = measure_selected(labels, distance, is_merged)
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


# --- merging -------------------------------------------------------------------------------------------------------
#
# Merge the pieces of one cell: several peaks above the threshold need not be several cells.
#
# Two rules, each for what the other cannot see.
#
# - A long or bent cell is wide in several places, and the map has a peak in each. Between them it falls to the width of
#   the waist, while between two cells it falls to their common border, that is to about one pixel. So pixels are
#   compared: the map's saddle times the cell's radius.
# - Noise makes peaks of its own beside a true one. They rise next to nothing above the saddle.


def merged_ids(
    labels: _Array, distance: _Array, measures: CellMeasures, *, merge_px: int | float, merge_depth: int | float
) -> _Array:
    """Return for every label the smallest label of the cell that it belongs to, as one array from old id to new.

    Two labels that share a border (4-connected) are one cell if its saddle, the highest value on both of its sides,
    times the smaller of their full radii is more than ``merge_px``; or if the lower of their peaks is less than
    ``merge_depth`` above the saddle. All borders are judged as the flood left them, whatever else merges.
    """
    num_labels = len(measures.peak) - 1
    first, second, saddle = _highest_contacts(labels, distance, num_labels)
    full_radius = measures.full_radius_px
    half_width_px = saddle * np.minimum(full_radius[first], full_radius[second])
    rise = np.minimum(measures.peak[first], measures.peak[second]) - saddle
    same = (half_width_px > merge_px) | (rise < merge_depth)
    size = num_labels + 1
    graph = coo_array((np.ones(same.sum(), np.int8), (first[same], second[same])), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    _, smallest = np.unique(group, return_index=True)
    ids: _Array = smallest[group].astype(np.int32)
    return ids


def _highest_contacts(labels: _Array, distance: _Array, num_labels: int) -> tuple[_Array, _Array, _Array]:
    """Return each pair of neighbouring labels once, the smaller first, with the saddle between them."""
    stride = num_labels + 1
    pairs, heights = [], []
    for one, other in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        meet = (labels[one] != labels[other]) & (labels[one] != 0) & (labels[other] != 0)
        left, right = labels[one][meet], labels[other][meet]
        pairs.append(np.minimum(left, right).astype(np.int64) * stride + np.maximum(left, right))
        heights.append(np.minimum(distance[one][meet], distance[other][meet]))
    pair, height = np.concatenate(pairs), np.concatenate(heights)
    order = np.argsort(pair, kind="stable")
    pair = pair[order]
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    saddle = np.maximum.reduceat(height[order], starts) if starts.size else height
    return *np.divmod(pair[starts], stride), saddle


# --- border --------------------------------------------------------------------------------------------------------
#
# Give each cell the border back that the fill threshold cut off.
#
# A distance map falls from 1 to 0 over a cell's radius R, so ``distance > cell_fill`` leaves out a ring of cell_fill x
# R
# pixels. On a perfect map growing each label by that much undoes it. A network's map is smoother than a perfect one: at
# the cell's boundary it does not reach 0, and a small cell's contour at ``cell_fill`` may lie on the ring's outer side.
# For a ramp of slope 1 / R that is smoothed by a Gaussian of sigma s, the value at e pixels inside the boundary is
#
#     (s / R) ramp(e / s),    ramp(z) = z Phi(z) + phi(z)    (Phi, phi: the normal distribution and its density)
#
# and the peak of a round cell falls from 1 by sqrt(pi / 2) s / R, of a long one by sqrt(2 / pi) s / R (the mean
# distance
# from the centre, or from the middle line). The second gives s, the first where the contour lies.

# Between the two shapes above, 1.25 and 0.80: by trial on the real masks of nuclei and of elongated cells.
_PEAK_LOSS = 1.1
# Cells of fewer pixels across are too coarse to tell blur by.
_SMALLEST_RADIUS_PX = 3
# The boundary runs half a pixel outside the centres of the outermost pixels, which are 1 from the background's.
_BOUNDARY_PX = 0.5

_STEEP = np.linspace(-6, 6, 2401)
_RAMP = _STEEP * ndtr(_STEEP) + np.exp(-(_STEEP**2) / 2) / math.sqrt(2 * math.pi)


def refine_boundaries(
    labels: _Array, distance: _Array, measures: CellMeasures, *, cell_fill: int | float, blur_px: int | float | None
) -> _Array:
    """Move each label's border from where the map crosses ``cell_fill`` to where the cell ends.

    Outwards into free background only, Euclidean; where two labels could take a pixel the nearer one does, of two as
    near the one with the smaller id. Inwards, where the blur has pushed the contour out of the cell, by a higher cut of
    the map, though never above half of the label's peak.

    Parameters
    ----------
    blur_px
        Sigma of the smoothing that the map has undergone; 0 is a perfect map; None estimates it from the peaks.
    """
    blur = estimate_blur_px(measures, cell_fill) if blur_px is None else blur_px
    radius = measures.radius_px.astype(np.float64) / (1 - cell_fill)
    # The full radius and the ring's width depend on each other; on a perfect map the start is the solution.
    for _ in range(3):
        ring = _contour_px(cell_fill * radius, blur)
        radius = measures.radius_px + np.maximum(ring, 0)
    ring = _contour_px(cell_fill * radius, blur)
    exists = measures.radius_px > 0
    inwards = exists & (ring < _BOUNDARY_PX) & (blur > 0)
    if inwards.any():
        level = np.zeros(len(ring), np.float32)
        boundary_value = blur * np.interp(_BOUNDARY_PX / blur, _STEEP, _RAMP)
        level[inwards] = np.minimum(boundary_value / radius[inwards], measures.peak[inwards] / 2)
        labels = np.where(distance > level[labels], labels, 0)
    growth = np.where(inwards, 0, np.maximum(ring, 0))
    # Rounding must not decide whether a ring of exactly two pixels is two pixels wide.
    grown: _Array = _grow(labels, np.floor(growth**2 + 1e-4).astype(np.int64))
    return grown


def estimate_blur_px(measures: CellMeasures, cell_fill: int | float) -> float:
    """Return how far the map is smoothed, as the sigma in pixels that lowers the median cell's peak as much."""
    wide = measures.radius_px > _SMALLEST_RADIUS_PX
    if not wide.any():
        return 0.0
    missing = np.maximum(1 - measures.middle[wide], 0)
    return float(np.median(missing * measures.radius_px[wide] / (1 - cell_fill)) / _PEAK_LOSS)


def _contour_px(height_px: _Array, blur_px: int | float) -> _Array:
    """Return how far inside the boundary a smoothed ramp of slope 1 has this height."""
    if blur_px == 0:
        return height_px
    scaled = height_px / blur_px
    # Beyond the table the smoothing no longer shows.
    inside: _Array = blur_px * np.where(scaled < _RAMP[-1], np.interp(scaled, _RAMP, _STEEP), scaled)
    return inside


@compiled
def _grow(labels: _Array, squared_reach: _Array) -> _Array:
    """Give each free pixel to the nearest label within that label's reach.

    The pixel of a label that is nearest to a free one has no neighbour of its own label on that side, left or right and
    above or below: from a straight edge only a line of pixels has to be looked at, not a disc.
    """
    height, width = labels.shape
    grown = labels.copy()
    nearest = np.full(labels.shape, np.iinfo(np.int32).max, np.int32)
    for row in range(height):
        for column in range(width):
            label = labels[row, column]
            reach = squared_reach[label]
            if label == 0 or reach == 0:
                continue
            up = row > 0 and labels[row - 1, column] != label
            down = row < height - 1 and labels[row + 1, column] != label
            left = column > 0 and labels[row, column - 1] != label
            right = column < width - 1 and labels[row, column + 1] != label
            if not (up or down or left or right):
                continue
            side = int(math.sqrt(reach))
            for target_row in range(max(row - side * up, 0), min(row + side * down, height - 1) + 1):
                for target_column in range(max(column - side * left, 0), min(column + side * right, width - 1) + 1):
                    squared = (target_row - row) ** 2 + (target_column - column) ** 2
                    if labels[target_row, target_column] != 0 or squared > reach:
                        continue
                    best = nearest[target_row, target_column]
                    if squared < best or (squared == best and label < grown[target_row, target_column]):
                        nearest[target_row, target_column] = squared
                        grown[target_row, target_column] = label
    return grown
