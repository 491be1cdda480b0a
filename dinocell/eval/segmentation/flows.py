"""Flows to labelled cells: the inverse of `dinocell.labelled.flows` (Cellpose: Stringer et al. 2021, Nat. Methods).

Every pixel that is likely to be in a cell goes with the flow, step by step; pixels that come to the same sink are one
cell. Holes are filled. Then the cells found are asked what their flows should be, and those are dropped that contradict
the flows that they were found from.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Float64, Int32, Integer
from scipy import ndimage

from dinocell.errors import DinocellError
from dinocell.labelled.flows import labels_to_flows
from dinocell.runtime.jit import compiled

# The paper's: pixels of a chance of a half and more, and a mean squared error of the flows of at most 0.4.
PROBABILITY = 0.5
FLOW_ERROR = 0.4
# The paper's number of steps, each of the flow's length, at most about a pixel.
STEPS = 200
# The paper's rule for a sink: the pixel where most points end within 5 x 5, at least 10 of them; so a cell of fewer
# pixels is not found. Points that end up to this far from it, with no gap between, belong to it.
_SINK_POINTS, _SINK_WINDOW, _SINK_REACH_PX = 10, 5, 6

_Array = np.ndarray
_EIGHT_CONNECTED = np.ones((3, 3), bool)


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """Cells before any is dropped; ids run from 1 without gaps, in the raster order of the cells' first pixels.

    Attributes
    ----------
    errors
        By id, the first for cell 1: the mean over its pixels of the squared length of the difference between the flow
        that it was found from and the flow that a cell of its shape has. 0 is perfect, 4 the opposite direction.
    areas
        By id, in pixels.
    """

    labels: Int32[np.ndarray, "h w"]
    errors: Float64[np.ndarray, " n"]
    areas: Float64[np.ndarray, " n"]


def flows_to_labels(
    flows: Float[np.ndarray, "3 h w"],
    *,
    probability: int | float = PROBABILITY,
    flow_error: int | float = FLOW_ERROR,
    min_area_px: int = 0,
) -> Int32[np.ndarray, "h w"]:
    """Find the cells of flow maps; ids run from 1 without gaps, in the raster order of the cells' first pixels.

    Parameters
    ----------
    flows
        As `labels_to_flows` makes them: the flow along rows and along columns, in pixels a step and about 1 long in
        cells, and the chance of a cell, 0 to 1. Taken as float32.
    probability
        Pixels of a higher chance are in cells; in [0, 1).
    flow_error
        Cells whose flow error (see `Masks`) is higher become background. More than 0; 4 keeps nearly all.
    min_area_px
        Cells of fewer pixels become background.

    Raises
    ------
    DinocellError
        If the maps are not three of floating point numbers, have no pixels or a value that is not finite, or an option
        is out of its range.
    """
    check_flow_thresholds(probability, flow_error)
    return keep(_masks(_checked(flows), probability), flow_error=flow_error, min_area_px=min_area_px)


def find_masks(flows: Float[np.ndarray, "3 h w"], *, probability: int | float) -> Masks:
    """Follow the flows and cluster where they end, for `keep` to choose from.

    Raises
    ------
    DinocellError
        As `flows_to_labels`.
    """
    check_flow_thresholds(probability, FLOW_ERROR)
    return _masks(_checked(flows), probability)


def keep(masks: Masks, *, flow_error: int | float, min_area_px: int) -> Int32[np.ndarray, "h w"]:
    """Return the labels without the cells whose flow error is higher, or that are smaller, numbered anew."""
    if min_area_px < 0:
        raise DinocellError(f"min_area_px: expected at least 0, got {min_area_px}")
    kept = (masks.errors <= flow_error) & (masks.areas >= min_area_px)
    numbers = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)]).astype(np.int32)
    labels: _Array = numbers[masks.labels]
    return labels


def flow_errors(flows: Float[np.ndarray, "3 h w"], labels: Integer[np.ndarray, "h w"]) -> Float64[np.ndarray, " n"]:
    """Return by id, the first for cell 1, how much the flows contradict those that cells of these shapes have.

    See `Masks`; ids are to run from 1.
    """
    number = int(labels.max())
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    squared = ((flows[:2] - labels_to_flows(labels)[:2]).astype(np.float64) ** 2).sum(axis=0)
    sums = np.bincount(labels.ravel(), weights=squared.ravel(), minlength=number + 1)[1:]
    errors: _Array = sums / np.maximum(areas, 1)
    return errors


def check_flow_thresholds(probability: int | float, flow_error: int | float) -> None:
    """Say what is wrong with the two thresholds.

    Raises
    ------
    DinocellError
        If ``probability`` is not in [0, 1), or ``flow_error`` not above 0.
    """
    if not 0 <= probability < 1:
        raise DinocellError(f"probability: expected at least 0 and less than 1, got {probability}")
    if not flow_error > 0:
        raise DinocellError(f"flow_error: expected more than 0 (4 keeps nearly all cells), got {flow_error}")


def _checked(flows: _Array) -> _Array:
    if flows.ndim != 3 or len(flows) != 3:
        raise DinocellError(f"flows: expected three maps (3 h w), got an array of shape {flows.shape}")
    if not np.issubdtype(flows.dtype, np.floating):
        raise DinocellError(f"flows: expected floating point numbers, got values of type {flows.dtype}")
    if flows.size == 0:
        raise DinocellError(f"flows: expected at least one pixel, got maps of shape {flows.shape}")
    if not np.isfinite(flows).all():
        count = np.count_nonzero(~np.isfinite(flows))
        raise DinocellError(f"flows: expected finite numbers, got {count} of {flows.size} that are not")
    return np.ascontiguousarray(flows, np.float32)


def _masks(flows: _Array, probability: float) -> Masks:
    is_cell = flows[2] > np.float32(probability)
    ends = _ends(flows, is_cell)
    cells = np.zeros(is_cell.shape, np.int32)
    cells[is_cell] = _sinks(ends, is_cell.shape)[ends[:, 0], ends[:, 1]]
    labels = _renumbered(_without_holes(cells))
    areas = np.bincount(labels.ravel(), minlength=int(labels.max()) + 1)[1:].astype(np.float64)
    return Masks(labels=labels, errors=flow_errors(flows, labels), areas=areas)


def _ends(flows: _Array, is_cell: _Array) -> _Array:
    """Return the pixel where each pixel of ``is_cell`` ends, (n 2); outside of cells nothing flows."""
    directions = np.where(is_cell, flows[:2], 0).transpose(1, 2, 0).astype(np.float64)
    starts = np.argwhere(is_cell)
    ends = np.empty(starts.shape, np.float64)
    workers = os.cpu_count() or 1
    bounds = np.linspace(0, len(starts), 4 * workers + 1).astype(int)
    parts = [slice(first, last) for first, last in pairwise(bounds)]
    run: Callable[[slice], None] = lambda part: follow(directions, starts[part], ends[part], STEPS)  # noqa: E731
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, parts))
    return np.floor(ends + 0.5).astype(np.intp)


def _sinks(ends: _Array, shape: tuple[int, ...]) -> _Array:
    """Return an image of the pixels around each sink, numbered from 1; 0 elsewhere.

    Sinks whose 3 x 3 surroundings touch are one: equally many points may end in two pixels of a flat middle.
    """
    counts = np.zeros(shape, np.int32)
    np.add.at(counts, (ends[:, 0], ends[:, 1]), 1)
    highest = ndimage.maximum_filter(counts, _SINK_WINDOW, mode="constant")
    peaks = (counts >= _SINK_POINTS) & (counts == highest)
    around = np.empty(shape, np.int32)
    ndimage.label(ndimage.binary_dilation(peaks, _EIGHT_CONNECTED), _EIGHT_CONNECTED, output=around)
    width = shape[1] + 2
    sinks = np.pad(np.where(counts > 0, around, 0), 1).ravel()
    reached = np.flatnonzero(np.pad(counts, 1).ravel())
    neighbours = [down * width + right for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
    for _ in range(_SINK_REACH_PX - 1):  # the first pixel's distance is that of the surroundings
        largest = np.max([sinks[reached + step] for step in neighbours], axis=0, initial=0)
        sinks[reached] = np.where(sinks[reached] > 0, sinks[reached], largest)
    inner: _Array = sinks.reshape(shape[0] + 2, width)[1:-1, 1:-1]
    return inner


def _without_holes(labels: _Array) -> _Array:
    """Give background that one cell alone encloses to this cell."""
    pieces, number = ndimage.label(labels == 0)  # 4-connected
    lowest, highest = np.full(number + 1, np.iinfo(np.int32).max, np.int32), np.zeros(number + 1, np.int32)
    for one, other in (
        (np.s_[1:, :], np.s_[:-1, :]),
        (np.s_[:-1, :], np.s_[1:, :]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[:, :-1], np.s_[:, 1:]),
    ):
        beside = (pieces[one] > 0) & (labels[other] > 0)
        np.minimum.at(lowest, pieces[one][beside], labels[other][beside])
        np.maximum.at(highest, pieces[one][beside], labels[other][beside])
    is_hole = lowest == highest
    for edge in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        is_hole[edge] = False
    filled: _Array = np.where(is_hole[pieces] & (labels == 0), highest[pieces], labels)
    return filled


def _renumbered(labels: _Array) -> _Array:
    """Give cells numbers from 1, in the raster order of their first pixels."""
    first = np.full(int(labels.max()) + 1, -1)
    flat = labels.ravel()[::-1]
    first[flat] = np.arange(flat.size - 1, -1, -1)  # of equal indices the last one counts, which is the first pixel
    first[0] = -1
    found = np.flatnonzero(first >= 0)
    numbers = np.zeros(first.size, np.int32)
    numbers[found[np.argsort(first[found])]] = np.arange(1, len(found) + 1)
    renumbered: _Array = numbers[labels]
    return renumbered


# --- follow --------------------------------------------------------------------------------------------------------
#
# The kernel of `dinocell.eval.segmentation.flows`: where a point ends that goes with the flow.

__all__ = ["REST_EVERY", "REST_PX", "follow"]


# A point is at rest if it is this near to where it was so many steps before: around a sink it goes to and fro, and so
# many steps are an even number of these.
REST_EVERY, REST_PX = 8, 1 / 64


@compiled
def follow(flows: _Array, starts: _Array, ends: _Array, steps: int) -> None:
    """Write to ``ends`` (n 2) where points come to that start at pixels ``starts`` (n 2); ``flows`` is (h w 2)."""
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
