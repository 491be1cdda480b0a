"""Flows to labelled cells: the inverse of `labels_to_flows` (Cellpose: Stringer et al. 2021, Nat. Methods).

Every pixel with a sufficient cell probability follows the flow, step by step; pixels that end in the same sink are one
cell. Holes are filled. Then the flows of the resulting cells are computed, and cells are dropped whose flows contradict
the predicted ones.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Integer
from scipy import ndimage

from dinocell.errors import require
from dinocell.eval.segmentation.refine import relabel
from dinocell.finetune.targets import labels_to_flows
from dinocell.runtime.jit import compiled

# As in the paper: cell probability above one half, and a mean squared error of the flows of at most 0.4.
PROBABILITY = 0.5
FLOW_ERROR = 0.4
# As in the paper: the number of steps, each as long as the flow, at most about a pixel.
STEPS = 200
# As in the paper: a sink is the pixel within 5 x 5 where most points end, at least 10 of them, so smaller cells are not
# found. Points that end up to this far from it, without a gap between, belong to it.
_SINK_POINTS, _SINK_WINDOW, _SINK_REACH_PX = 10, 5, 6
# A point has converged if it is this close to its position so many steps before. The number is even, because points
# oscillate around a sink.
REST_EVERY, REST_PX = 8, 1 / 64

_EIGHT_CONNECTED = np.ones((3, 3), bool)


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """All cells, before any is dropped; ids run from 1 without gaps, in the raster order of the cells' first pixels."""

    labels: Int32[np.ndarray, "h w"]
    errors: Float64[np.ndarray, " n"]  # per cell, from cell 1: see `flow_errors`
    areas: Float64[np.ndarray, " n"]  # per cell, in pixels


def flows_to_labels(
    flows: Float[np.ndarray, "3 h w"],
    *,
    probability: int | float = PROBABILITY,
    flow_error: int | float = FLOW_ERROR,
    min_area_px: int = 0,
) -> Int32[np.ndarray, "h w"]:
    """Return the cells of flow maps; ids run from 1 without gaps, in the raster order of the cells' first pixels.

    Parameters
    ----------
    flows
        As from `labels_to_flows`: the flow along rows and along columns, in pixels per step and of length about 1 in
        cells, and the cell probability, 0 to 1. Converted to float32.
    probability
        Minimum cell probability, exclusive; in [0, 1).
    flow_error
        Cells with a higher flow error (see `flow_errors`) become background. More than 0; 4 keeps nearly all.
    min_area_px
        Smaller cells become background.

    Raises
    ------
    DinocellError
        If the maps are not three of floating point numbers, have no pixels or a value that is not finite, or an option
        is out of range.
    """
    _check(flows, probability, flow_error, min_area_px)
    return keep(find_masks(flows, probability=probability), flow_error=flow_error, min_area_px=min_area_px)


def find_masks(flows: Float[np.ndarray, "3 h w"], *, probability: int | float) -> Masks:
    """Follow the flows and cluster the points where they end, for `keep`; errors as in `flows_to_labels`."""
    _check(flows, probability)
    flows = np.ascontiguousarray(flows, np.float32)
    is_cell = flows[2] > np.float32(probability)
    ends = _ends(flows, is_cell)
    # A cell is all pixels whose points end around one sink.
    cells = np.zeros(is_cell.shape, np.int32)
    cells[is_cell] = _sinks(ends, is_cell.shape)[ends[:, 0], ends[:, 1]]
    labels = _in_raster_order(_without_holes(cells))
    areas = np.bincount(labels.ravel(), minlength=int(labels.max()) + 1)[1:].astype(np.float64)
    return Masks(labels=labels, errors=flow_errors(flows, labels), areas=areas)


def keep(masks: Masks, *, flow_error: int | float, min_area_px: int) -> Int32[np.ndarray, "h w"]:
    """Return the labels without cells that have a higher flow error or are smaller; ids run from 1 in their order."""
    is_kept = (masks.errors <= flow_error) & (masks.areas >= min_area_px)
    return relabel(masks.labels, np.concatenate([[False], is_kept]))


def flow_errors(flows: Float[np.ndarray, "3 h w"], labels: Integer[np.ndarray, "h w"]) -> Float64[np.ndarray, " n"]:
    """Return for each cell, from cell 1, how much the flows contradict those of cells of these shapes.

    It is the mean over the cell's pixels of the squared length of the difference: 0 is perfect, 4 opposite.
    """
    num_cells = int(labels.max())
    areas = np.bincount(labels.ravel(), minlength=num_cells + 1)[1:]
    squared = ((flows[:2] - labels_to_flows(labels)[:2]).astype(np.float64) ** 2).sum(axis=0)
    sums = np.bincount(labels.ravel(), weights=squared.ravel(), minlength=num_cells + 1)[1:]
    return sums / np.maximum(areas, 1)


def _check(
    flows: np.ndarray, probability: int | float, flow_error: int | float = FLOW_ERROR, min_area_px: int = 0
) -> None:
    num_bad = np.count_nonzero(~np.isfinite(flows)) if flows.dtype.kind == "f" else 0
    checks = (
        ("probability", 0 <= probability < 1, f"at least 0 and less than 1, got {probability}"),
        ("flow_error", flow_error > 0, f"more than 0 (4 keeps nearly all cells), got {flow_error}"),
        ("min_area_px", min_area_px >= 0, f"at least 0, got {min_area_px}"),
        (
            "flows",
            flows.ndim == 3 and len(flows) == 3 and flows.size > 0 and flows.dtype.kind == "f",
            f"three maps (3 h w) of floating point numbers, got {flows.dtype}, {flows.shape}",
        ),
        ("flows", num_bad == 0, f"finite numbers, got {num_bad} of {flows.size} that are not"),
    )
    for name, is_valid, expected in checks:
        require(is_valid, f"{name}: expected {expected}")


def _ends(flows: Float32[np.ndarray, "3 h w"], is_cell: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "n 2"]:
    """Return the pixel where the point of each pixel of ``is_cell`` ends; outside of cells the flow is 0."""
    directions = np.where(is_cell, flows[:2], 0).transpose(1, 2, 0).astype(np.float64)
    starts = np.argwhere(is_cell)
    ends = np.empty(starts.shape, np.float64)
    # The kernel runs without the interpreter's lock; several parts per core even out their lengths.
    workers = os.cpu_count() or 1
    bounds = np.linspace(0, len(starts), 4 * workers + 1).astype(int)
    parts = [slice(first, last) for first, last in pairwise(bounds)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda part: follow(directions, starts[part], ends[part], STEPS), parts))
    return np.floor(ends + 0.5).astype(np.intp)


def _sinks(ends: Int[np.ndarray, "n 2"], shape: tuple[int, ...]) -> Int32[np.ndarray, "h w"]:
    """Return an image of the pixels around each sink, labelled from 1; 0 elsewhere.

    Sinks whose 3 x 3 neighbourhoods touch are one: equally many points may end in two pixels of a flat middle.
    """
    # Count the points that end in each pixel; sinks are the local maxima.
    counts = np.zeros(shape, np.int32)
    np.add.at(counts, (ends[:, 0], ends[:, 1]), 1)
    highest = ndimage.maximum_filter(counts, _SINK_WINDOW, mode="constant")
    peaks = (counts >= _SINK_POINTS) & (counts == highest)
    around = np.empty(shape, np.int32)
    ndimage.label(ndimage.binary_dilation(peaks, _EIGHT_CONNECTED), _EIGHT_CONNECTED, output=around)
    # Grow each sink by one pixel at a time over pixels where points end; a frame of one pixel saves border checks.
    width = shape[1] + 2
    sinks = np.pad(np.where(counts > 0, around, 0), 1).ravel()
    reached = np.flatnonzero(np.pad(counts, 1).ravel())
    neighbours = [down * width + right for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
    for _ in range(_SINK_REACH_PX - 1):  # the neighbourhood of the sink is the first pixel
        largest = np.max([sinks[reached + step] for step in neighbours], axis=0, initial=0)
        sinks[reached] = np.where(sinks[reached] > 0, sinks[reached], largest)
    return np.asarray(sinks.reshape(shape[0] + 2, width)[1:-1, 1:-1])


def _without_holes(labels: Int32[np.ndarray, "h w"]) -> Int32[np.ndarray, "h w"]:
    """Give background that is enclosed by a single cell to this cell."""
    # Per background component (4-connected), the smallest and the largest label next to it.
    components, num_components = ndimage.label(labels == 0)
    lowest = np.full(num_components + 1, np.iinfo(np.int32).max, np.int32)
    highest = np.zeros(num_components + 1, np.int32)
    for here, there in (
        (np.s_[1:, :], np.s_[:-1, :]),
        (np.s_[:-1, :], np.s_[1:, :]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[:, :-1], np.s_[:, 1:]),
    ):
        touch = (components[here] > 0) & (labels[there] > 0)
        np.minimum.at(lowest, components[here][touch], labels[there][touch])
        np.maximum.at(highest, components[here][touch], labels[there][touch])
    # A hole has one neighbour, and does not reach the image's border.
    is_hole = lowest == highest
    for edge in (components[0], components[-1], components[:, 0], components[:, -1]):
        is_hole[edge] = False
    return np.where(is_hole[components] & (labels == 0), highest[components], labels)


def _in_raster_order(labels: Int32[np.ndarray, "h w"]) -> Int32[np.ndarray, "h w"]:
    """Relabel cells from 1, in the raster order of their first pixels."""
    first = np.full(int(labels.max()) + 1, labels.size)
    first[labels.ravel()[::-1]] = np.arange(labels.size - 1, -1, -1)  # the last write of an id is its first pixel
    first[0] = labels.size
    ids = np.argsort(first)[: np.count_nonzero(first < labels.size)]
    lookup = np.zeros(first.size, np.int32)
    lookup[ids] = np.arange(1, len(ids) + 1)
    return np.take(lookup, labels)


@compiled
def follow(
    flows: Float64[np.ndarray, "h w 2"], starts: Int[np.ndarray, "n 2"], ends: Float64[np.ndarray, "n 2"], steps: int
) -> None:
    """Write to ``ends`` where Euler steps through the bilinearly interpolated flow lead from the pixels ``starts``."""
    height, width = flows.shape[0], flows.shape[1]
    for point in range(starts.shape[0]):
        row, column = float(starts[point, 0]), float(starts[point, 1])
        row_before, column_before = row, column
        for step in range(1, steps + 1):
            top, left = int(row), int(column)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, across = row - top, column - left
            upper = flows[top, left, 0] * (1 - across) + flows[top, right, 0] * across
            lower = flows[bottom, left, 0] * (1 - across) + flows[bottom, right, 0] * across
            rows = upper * (1 - down) + lower * down
            upper = flows[top, left, 1] * (1 - across) + flows[top, right, 1] * across
            lower = flows[bottom, left, 1] * (1 - across) + flows[bottom, right, 1] * across
            columns = upper * (1 - down) + lower * down
            row = min(max(row + rows, 0.0), height - 1.0)
            column = min(max(column + columns, 0.0), width - 1.0)
            if step % REST_EVERY == 0:
                if abs(row - row_before) <= REST_PX and abs(column - column_before) <= REST_PX:
                    break
                row_before, column_before = row, column
        ends[point, 0], ends[point, 1] = row, column
