"""Refine the labels of the watershed: merge the fragments of one cell, and correct the boundaries.

The watershed alone gets neither right, not even on a perfect distance map.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer, Shaped
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import ndtr

from dinocell.errors import require
from dinocell.labelled.distance import distance_to_boundary
from dinocell.runtime.jit import compiled

MERGE_PX = 3.0
# By trial on the real masks of benchmarks/round_trip.py: above the noise of networks, below valleys between two cells.
MERGE_DEPTH = 0.1
# Loss of a peak by blur, see `refine_boundaries`: between round cells, 1.25, and long ones, 0.80, by trial on the real
# masks of nuclei and of elongated cells.
_PEAK_LOSS = 1.1
# The blur cannot be estimated from smaller cells.
_SMALLEST_RADIUS_PX = 3
# The boundary is half a pixel outside the centres of the outermost pixels, which are 1 from the background's.
_BOUNDARY_PX = 0.5

_STEEP = np.linspace(-6, 6, 2401)
_RAMP = _STEEP * ndtr(_STEEP) + np.exp(-(_STEEP**2) / 2) / math.sqrt(2 * math.pi)

_Labels = Int32[np.ndarray, "h w"]
_Map = Float32[np.ndarray, "h w"]
_PerLabel = Shaped[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Steps after the flood; `dinocell.eval.segmentation.watershed.distance_to_labels` explains the fields."""

    min_area_px: int = 0
    merge_px: int | float | None = MERGE_PX
    merge_depth: int | float = MERGE_DEPTH
    restore_border: bool = True
    blur_px: int | float | None = None

    def __post_init__(self) -> None:
        merge_px, blur_px = self.merge_px, self.blur_px
        checks = (
            ("min_area_px", self.min_area_px >= 0, "at least 0"),
            ("merge_px", merge_px is None or 0 < merge_px < math.inf, "more than 0 pixels, or None to merge nothing"),
            ("merge_depth", 0 <= self.merge_depth <= 1, "0 to 1"),
            ("blur_px", blur_px is None or 0 <= blur_px < math.inf, "at least 0 pixels, or None to estimate it"),
        )
        for name, is_valid, expected in checks:
            require(is_valid, f"{name}: expected {expected}, got {getattr(self, name)}")


PLAIN = Refinement(merge_px=None, restore_border=False)


class CellMeasures(NamedTuple):
    """One entry per label; entry 0, the background, is 0."""

    radius_px: _PerLabel  # of the largest disc inside the label, to half a pixel
    middle: _PerLabel  # the map's value at the centre of that disc
    peak: _PerLabel  # the map's maximum in the label

    @property
    def full_radius_px(self) -> _PerLabel:
        """The radius at which the map would be 1: per pixel towards the boundary it falls by 1 / this."""
        return np.asarray(self.radius_px / np.maximum(self.middle, np.float32(1e-3)))


def refine_labels(
    labels: Int32[np.ndarray, "h w"],
    distance: Float32[np.ndarray, "h w"],
    *,
    cell_fill: int | float,
    refinement: Refinement,
) -> Int32[np.ndarray, "h w"]:
    """Merge fragments, refine boundaries, drop small cells; the rest is relabelled from 1 in the order of the ids.

    ``labels`` are those of a flood: 0 and ids from 1, at most as many as pixels. They are not written to. A
    DinocellError if the shapes differ.
    """
    expected = f"expected the shape of the distance map, {distance.shape}"
    require(labels.shape == distance.shape, f"labels: {expected}, got {labels.shape}")
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
    areas_px = np.bincount(labels.ravel())
    return relabel(labels, areas_px >= max(refinement.min_area_px, 1))


def relabel(labels: Integer[np.ndarray, "h w"], is_kept: Bool[np.ndarray, " n"]) -> Int32[np.ndarray, "h w"]:
    """Return the labels without those that ``is_kept``, by label, excludes; the rest from 1 in the order of the ids."""
    is_kept[0] = False
    return np.take(np.where(is_kept, np.cumsum(is_kept), 0).astype(np.int32), labels)


def measure_cells(labels: _Labels, distance: _Map, num_labels: int) -> CellMeasures:
    """Measure labels 1 to ``num_labels``; missing ones are 0.

    A label that fills the whole image has no boundary: its radius is half the longer side of the image.
    """
    depth = distance_to_boundary(labels)
    if np.isinf(depth[0, 0]):
        depth.fill(max(depth.shape) / 2)
    return CellMeasures(*_measure(labels, distance, depth, num_labels))


def measure_selected(labels: _Labels, distance: _Map, which: Bool[np.ndarray, " n"]) -> CellMeasures:
    """Measure the labels where ``which``, one entry per label, is True; the others are 0.

    The same numbers as `measure_cells`: the pixel nearest to a label's inside is in its bounding box or next to it.
    """
    boxes = ndimage.find_objects(labels, max_label=len(which) - 1)
    selected = [(label, boxes[label - 1]) for label in np.flatnonzero(which).tolist() if label and boxes[label - 1]]
    if sum((rows.stop - rows.start) * (columns.stop - columns.start) for _, (rows, columns) in selected) > labels.size:
        return measure_cells(np.where(which[labels], labels, 0), distance, len(which) - 1)
    measures = CellMeasures(*np.zeros((3, len(which)), np.float32))
    for label, box in selected:
        wider = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
        own = np.ascontiguousarray(labels[wider] == label, np.int32)
        depth = distance_to_boundary(own)
        if np.isinf(depth[0, 0]):
            depth.fill(max(labels.shape) / 2)
        for values, measured in zip(measures, _measure(own, distance[wider], depth, 1), strict=True):
            values[label] = measured[1]
    return measures


@compiled
def _measure(labels: _Labels, distance: _Map, depth: _Map, num_labels: int) -> tuple[_PerLabel, _PerLabel, _PerLabel]:
    radius = np.zeros(num_labels + 1, np.float32)
    middle, peak = np.zeros_like(radius), np.zeros_like(radius)
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            label = labels[row, column]
            if label > 0:
                value, deep = distance[row, column], depth[row, column]
                peak[label] = max(peak[label], value)
                if deep > radius[label] or (deep == radius[label] and value > middle[label]):
                    radius[label], middle[label] = deep, value
    return radius, middle, peak


def _merge(labels: _Labels, distance: _Map, measures: CellMeasures, ids: _PerLabel) -> tuple[_Labels, CellMeasures]:
    """Give every label its new id, and measure the merged ones."""
    is_merged = np.bincount(ids, minlength=len(ids))[ids] > 1
    if not is_merged.any():
        return labels, measures
    labels = ids[labels]
    merged = measure_selected(labels, distance, is_merged)
    return labels, CellMeasures(*(np.where(is_merged, *pair) for pair in zip(merged, measures, strict=True)))


def merged_ids(
    labels: _Labels, distance: _Map, measures: CellMeasures, *, merge_px: int | float, merge_depth: int | float
) -> Int32[np.ndarray, " n"]:
    """Return for every label the smallest label of its cell; several peaks need not be several cells.

    Two labels that share a border (4-connected) are one cell

    - if its saddle, the maximum over the border of the lower of both sides, times the smaller of their full radii is
      more than ``merge_px``. A long or curved cell has a peak in each place where it is wide. Between them the map
      falls to the width of the waist, but between two cells to their common border, that is to about one pixel.
    - if the lower of their peaks is less than ``merge_depth`` above the saddle, as peaks of noise are.

    Every border is judged as the flood left it, whatever else merges.
    """
    num_labels = len(measures.peak) - 1
    first, second, saddle = _highest_contacts(labels, distance, num_labels)
    full_radius = measures.full_radius_px
    # On a perfect map the saddle is (half-width of the waist) / radius.
    half_width_px = saddle * np.minimum(full_radius[first], full_radius[second])
    rise = np.minimum(measures.peak[first], measures.peak[second]) - saddle
    same = (half_width_px > merge_px) | (rise < merge_depth)
    # Cells are the connected components of the graph of merging pairs, named after their smallest label.
    size = num_labels + 1
    graph = coo_array((np.ones(same.sum(), np.int8), (first[same], second[same])), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    _, smallest = np.unique(group, return_index=True)
    return np.asarray(smallest[group], np.int32)


def _highest_contacts(labels: _Labels, distance: _Map, num_labels: int) -> tuple[_PerLabel, _PerLabel, _PerLabel]:
    """Return the pairs of neighbouring labels, the smaller first, with the saddle between them."""
    stride = num_labels + 1
    pairs, heights = [], []
    # Every two neighbouring pixels of different cells are a contact, as high as the lower of the two.
    for here, there in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        is_contact = (labels[here] != labels[there]) & (labels[here] != 0) & (labels[there] != 0)
        left, right = labels[here][is_contact], labels[there][is_contact]
        pairs.append(np.minimum(left, right).astype(np.int64) * stride + np.maximum(left, right))
        heights.append(np.minimum(distance[here][is_contact], distance[there][is_contact]))
    # Sort the contacts by pair; the saddle of a pair is the maximum over its run.
    pair, height = np.concatenate(pairs), np.concatenate(heights)
    order = np.argsort(pair, kind="stable")
    pair = pair[order]
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    saddle = np.maximum.reduceat(height[order], starts) if starts.size else height
    return *np.divmod(pair[starts], stride), saddle


def refine_boundaries(
    labels: _Labels, distance: _Map, measures: CellMeasures, *, cell_fill: int | float, blur_px: int | float | None
) -> _Labels:
    """Move each label's boundary from the contour of the map at ``cell_fill`` to where the cell ends.

    A distance map falls from 1 to 0 over a cell's radius R, so ``distance > cell_fill`` excludes a ring of
    cell_fill x R pixels. On a perfect map growing each label by that much undoes it. A network's map is smoother: it is
    not 0 at the cell's boundary, and a small cell's contour at ``cell_fill`` may be outside the cell. For a ramp of
    slope 1 / R that is smoothed by a Gaussian of sigma s, the value at e pixels inside the boundary is

        (s / R) ramp(e / s),    ramp(z) = z Phi(z) + phi(z)    (Phi, phi: the normal distribution and its density)

    and the peak of a round cell falls from 1 by sqrt(pi / 2) s / R, of a long one by sqrt(2 / pi) s / R (the mean
    distance from the centre, or from the midline). The second formula gives s, the first the position of the contour.

    Labels grow outwards only into free background, by Euclidean distance; a pixel in reach of two labels goes to the
    nearer one, of two equally near to the smaller id. Inwards, where blur has pushed the contour out of the cell, the
    map is cut higher, at most at half of the label's peak. ``blur_px`` is s; None estimates it from the peaks.
    """
    blur = estimate_blur_px(measures, cell_fill) if blur_px is None else blur_px
    radius = measures.radius_px.astype(np.float64) / (1 - cell_fill)
    # The full radius and the width of the ring depend on each other; on a perfect map the start is the solution.
    for _ in range(3):
        ring = _contour_px(cell_fill * radius, blur)
        radius = measures.radius_px + np.maximum(ring, 0)
    ring = _contour_px(cell_fill * radius, blur)
    # Cells whose contour is outside of them: cut the map higher, at its value on the boundary.
    inwards = (measures.radius_px > 0) & (ring < _BOUNDARY_PX) & (blur > 0)
    if inwards.any():
        level = np.zeros(len(ring), np.float32)
        boundary_value = blur * np.interp(_BOUNDARY_PX / blur, _STEEP, _RAMP)
        level[inwards] = np.minimum(boundary_value / radius[inwards], measures.peak[inwards] / 2)
        labels = np.where(distance > level[labels], labels, 0)
    # All others grow by the ring; rounding must not decide whether one of exactly two pixels is two pixels wide.
    growth = np.where(inwards, 0, np.maximum(ring, 0))
    return _grow(labels, np.floor(growth**2 + 1e-4).astype(np.int64))


def estimate_blur_px(measures: CellMeasures, cell_fill: int | float) -> float:
    """Return the sigma of the smoothing, in pixels, that explains the peak of the median cell."""
    wide = measures.radius_px > _SMALLEST_RADIUS_PX
    if not wide.any():
        return 0.0
    missing = np.maximum(1 - measures.middle[wide], 0)
    return float(np.median(missing * measures.radius_px[wide] / (1 - cell_fill)) / _PEAK_LOSS)


def _contour_px(height_px: _PerLabel, blur_px: int | float) -> _PerLabel:
    """Return the distance inside the boundary at which a smoothed ramp of slope 1 has this height."""
    if blur_px == 0:
        return height_px
    scaled = height_px / blur_px
    # Beyond the table smoothing has no effect.
    return blur_px * np.where(scaled < _RAMP[-1], np.interp(scaled, _RAMP, _STEEP), scaled)


@compiled
def _grow(labels: _Labels, squared_reach: _PerLabel) -> _Labels:
    """Give each free pixel to the nearest label within that label's reach."""
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
            # The label's pixel that is nearest to a free one has no neighbour of its label on that side. So only the
            # sides without one are searched: from a straight edge a line of pixels, not a disc.
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
