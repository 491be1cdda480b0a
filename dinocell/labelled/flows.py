"""Labels to flows: the other target that fine-tuning can learn (Cellpose: Stringer et al. 2021, Nature Methods 18).

Heat starts at the middle of each cell and spreads inside it; a pixel's flow is the direction in which it is warmer.
Following the flows from every pixel of a cell leads to its middle, see `dinocell.eval.segmentation.flows`.
"""

import math

import numpy as np
from jaxtyping import Float32, Integer

from dinocell.runtime.jit import compiled, inlined


def labels_to_flows(labels: Integer[np.ndarray, "h w"]) -> Float32[np.ndarray, "3 h w"]:
    """Return for each pixel of a cell a unit vector along rows and columns, and whether there is a cell (0 or 1).

    The source is the cell's pixel nearest to the median of its rows and columns; each of ``2 * (rows + columns)`` of
    its box iterations adds 1 to the source and replaces every value by the mean of its 3 x 3 neighbours in the cell,
    with 0 outside. Flows are the central differences of ``log(1 + heat)``, brought to length 1; 0 where they vanish,
    and in pieces of a cell that do not touch the source's. Each cell's flows follow from its own pixels alone.

    Raises
    ------
    ValueError
        If an id is negative.
    """
    if labels.size and labels.dtype.kind == "i" and labels.min() < 0:
        raise ValueError(f"labels: expected ids of at least 0 (0 is background), got {labels.min()}")
    flows = np.zeros((3, *labels.shape), np.float32)
    if labels.any():
        numbers = labels.astype(np.int32) if labels.max() <= labels.size else _renumbered(labels)
        write_flows(np.ascontiguousarray(numbers), int(numbers.max()), flows)
    return flows


def _renumbered(labels: np.ndarray) -> np.ndarray:
    """Give cells numbers from 1 without gaps: the kernel makes an entry for every id up to the largest."""
    ids, numbers = np.unique(labels, return_inverse=True)
    return (numbers.reshape(labels.shape) + int(ids[0] != 0)).astype(np.int32)


# --- heat ----------------------------------------------------------------------------------------------------------
#
# The kernel of `dinocell.labelled.flows`: heat that spreads inside each cell, and where it is warmer.

__all__ = ["write_flows"]

_Array = np.ndarray


@compiled
def write_flows(labels: _Array, num_cells: int, flows: _Array) -> None:
    """Write to zeros (3 h w) what `labels_to_flows` returns; the ids of ``labels`` (h w) go up to ``num_cells``."""
    boxes = _boxes(labels, num_cells)
    longest = 0
    for number in range(num_cells):
        longest = max(longest, (boxes[number, 1] - boxes[number, 0] + 3) * (boxes[number, 3] - boxes[number, 2] + 3))
    room, other_room = np.empty(longest), np.empty(longest)
    for number in range(num_cells):
        first_row, last_row, first_column, last_column = boxes[number]
        if last_row < 0:  # an id that no pixel has
            continue
        # A pixel of margin on each side, so that every pixel of the cell has all of its neighbours.
        rows, columns = last_row - first_row + 3, last_column - first_column + 3
        share = room[: rows * columns].reshape((rows, columns))
        heat = other_room[: rows * columns].reshape((rows, columns))
        share[:] = 0
        heat[:] = 0
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if labels[first_row + row - 1, first_column + column - 1] == number + 1:
                    share[row, column] = 1 / 9
        _spread(heat, share)
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if share[row, column] > 0:
                    heat[row, column] = math.log1p(heat[row, column])
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if share[row, column] > 0:
                    down = heat[row + 1, column] - heat[row - 1, column]
                    right = heat[row, column + 1] - heat[row, column - 1]
                    length = math.hypot(down, right)
                    if length > 0:
                        flows[0, first_row + row - 1, first_column + column - 1] = down / length
                        flows[1, first_row + row - 1, first_column + column - 1] = right / length
                    flows[2, first_row + row - 1, first_column + column - 1] = 1


@inlined
def _boxes(labels: _Array, num_cells: int) -> _Array:
    """Return each cell's first and last row, and its first and last column (n 4)."""
    boxes = np.empty((num_cells, 4), np.int64)
    boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3] = labels.shape[0], -1, labels.shape[1], -1
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            if labels[row, column] > 0:
                box = boxes[labels[row, column] - 1]
                box[0], box[1] = min(box[0], row), row
                box[2], box[3] = min(box[2], column), max(box[3], column)
    return boxes


@inlined
def _spread(heat: _Array, share: _Array) -> None:
    """Add 1 to the source and replace all heat by the mean of its 3 x 3 neighbours, as often as is to be.

    ``share`` is 1 / 9 in the cell, 0 elsewhere. Opposite neighbours are added first: so a symmetrical cell's heat is
    symmetrical to the last bit. Rows that no heat has come to yet are left out.
    """
    source_row, source_column = _source(share)
    top = bottom = source_row
    # Sums of three neighbours in a row: of the row above, the row that is written, and the row below.
    above, here, below = np.empty(share.shape[1]), np.empty(share.shape[1]), np.empty(share.shape[1])
    for _ in range(2 * (share.shape[0] - 2 + share.shape[1] - 2)):
        heat[source_row, source_column] += 1
        top, bottom = max(top - 1, 1), min(bottom + 1, share.shape[0] - 2)
        above[:] = 0
        _add_three(heat[top], here)
        for row in range(top, bottom + 1):
            _add_three(heat[row + 1], below)
            for column in range(1, share.shape[1] - 1):
                heat[row, column] = ((above[column] + below[column]) + here[column]) * share[row, column]
            above, here, below = here, below, above
        if not heat[top].any():
            top += 1
        if not heat[bottom].any():
            bottom -= 1


@inlined
def _add_three(heat: _Array, sums: _Array) -> None:
    for column in range(1, len(heat) - 1):
        sums[column] = (heat[column - 1] + heat[column + 1]) + heat[column]


@inlined
def _source(share: _Array) -> tuple[int, int]:
    """Return the cell's pixel nearest to the median of its rows and columns; of equally near ones the first."""
    places = np.argwhere(share)
    middle_row, middle_column = np.median(places[:, 0]), np.median(places[:, 1])
    nearest, first = math.inf, 0
    for place in range(len(places)):
        distance = (places[place, 0] - middle_row) ** 2 + (places[place, 1] - middle_column) ** 2
        if distance < nearest:
            nearest, first = distance, place
    return places[first, 0], places[first, 1]
