"""Labels to flows, the other training target (Cellpose: Stringer et al. 2021, Nature Methods 18).

Heat diffuses inside each cell from a source in its middle; a pixel's flow is the direction of the heat gradient.
Following the flows from any pixel of a cell leads to its middle, see `dinocell.eval.segmentation.flows`.
"""

import math

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, Integer

from dinocell.labelled.distance import check_not_negative
from dinocell.runtime.jit import compiled, inlined


def labels_to_flows(labels: Integer[np.ndarray, "h w"]) -> Float32[np.ndarray, "3 h w"]:
    """Return each pixel's flow as a unit vector along rows and columns, and whether it is in a cell (0 or 1).

    The source is the cell's pixel nearest to the median of its rows and columns. Each of ``2 * (rows + columns)``
    iterations, of its bounding box, adds 1 to the source and replaces every value by the mean of its 3 x 3 neighbours,
    with 0 outside the cell. Flows are the central differences of ``log(1 + heat)``, normalised to length 1; 0 where
    they vanish, and in pieces of a cell that are not connected to the source. They depend on the cell's own pixels
    only.

    Raises
    ------
    ValueError
        If an id is negative.
    """
    check_not_negative(labels)
    flows = np.zeros((3, *labels.shape), np.float32)
    if labels.any():
        if labels.max() > labels.size:  # consecutive ids: the kernel has one entry per id up to the maximum
            from skimage.segmentation import relabel_sequential

            labels = relabel_sequential(labels)[0]  # type: ignore[no-untyped-call]
        _write_flows(np.ascontiguousarray(labels, np.int32), int(labels.max()), flows)
    return flows


@compiled
def _write_flows(labels: Int32[np.ndarray, "h w"], num_cells: int, flows: Float32[np.ndarray, "3 h w"]) -> None:
    """Fill ``flows``, zeros at first, with the result of `labels_to_flows`; ids are at most ``num_cells``."""
    boxes = _boxes(labels, num_cells)
    largest = 0
    for cell in range(num_cells):
        largest = max(largest, (boxes[cell, 1] - boxes[cell, 0] + 3) * (boxes[cell, 3] - boxes[cell, 2] + 3))
    # Two buffers that all cells weight.
    weight_buffer, heat_buffer = np.empty(largest), np.empty(largest)
    for cell in range(num_cells):
        first_row, last_row, first_column, last_column = boxes[cell]
        if last_row < 0:  # no pixel has this id
            continue
        # The bounding box with a margin of one pixel, so that every pixel of the cell has all of its neighbours.
        rows, columns = last_row - first_row + 3, last_column - first_column + 3
        weight = weight_buffer[: rows * columns].reshape((rows, columns))
        heat = heat_buffer[: rows * columns].reshape((rows, columns))
        weight[:] = 0
        heat[:] = 0
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if labels[first_row + row - 1, first_column + column - 1] == cell + 1:
                    weight[row, column] = 1 / 9
        _diffuse(heat, weight)
        # The logarithm makes the differences visible far from the source, where heat is tiny.
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if weight[row, column] > 0:
                    heat[row, column] = math.log1p(heat[row, column])
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if weight[row, column] > 0:
                    down = heat[row + 1, column] - heat[row - 1, column]
                    right = heat[row, column + 1] - heat[row, column - 1]
                    length = math.hypot(down, right)
                    if length > 0:
                        flows[0, first_row + row - 1, first_column + column - 1] = down / length
                        flows[1, first_row + row - 1, first_column + column - 1] = right / length
                    flows[2, first_row + row - 1, first_column + column - 1] = 1


@inlined
def _boxes(labels: Int32[np.ndarray, "h w"], num_cells: int) -> Int64[np.ndarray, "cells 4"]:
    """Return the first and last row, and the first and last column, of each cell."""
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
def _diffuse(heat: Float64[np.ndarray, "h w"], weight: Float64[np.ndarray, "h w"]) -> None:
    """Iterate: add 1 to the source, then replace every value by the mean of its 3 x 3 neighbours.

    ``weight`` is 1 / 9 in the cell, 0 elsewhere. Opposite neighbours are added first, which makes the heat of a
    symmetrical cell symmetrical to the last bit.
    """
    source_row, source_column = _source(weight)
    top = bottom = source_row  # only the rows that heat has reached are computed
    # Sums of three neighbours in a row: in the row above, the current row, and the row below.
    above, here, below = np.empty(weight.shape[1]), np.empty(weight.shape[1]), np.empty(weight.shape[1])
    for _ in range(2 * (weight.shape[0] - 2 + weight.shape[1] - 2)):
        heat[source_row, source_column] += 1
        top, bottom = max(top - 1, 1), min(bottom + 1, weight.shape[0] - 2)
        above[:] = 0
        _add_three(heat[top], here)
        for row in range(top, bottom + 1):
            _add_three(heat[row + 1], below)
            for column in range(1, weight.shape[1] - 1):
                heat[row, column] = ((above[column] + below[column]) + here[column]) * weight[row, column]
            above, here, below = here, below, above
        if not heat[top].any():
            top += 1
        if not heat[bottom].any():
            bottom -= 1


@inlined
def _add_three(heat: Float64[np.ndarray, " w"], sums: Float64[np.ndarray, " w"]) -> None:
    for column in range(1, len(heat) - 1):
        sums[column] = (heat[column - 1] + heat[column + 1]) + heat[column]


@inlined
def _source(weight: Float64[np.ndarray, "h w"]) -> tuple[int, int]:
    """Return the cell's pixel nearest to the median of its rows and columns; the first of equally near ones."""
    pixels = np.argwhere(weight)
    middle_row, middle_column = np.median(pixels[:, 0]), np.median(pixels[:, 1])
    minimum, nearest = math.inf, 0
    for index in range(len(pixels)):
        distance = (pixels[index, 0] - middle_row) ** 2 + (pixels[index, 1] - middle_column) ** 2
        if distance < minimum:
            minimum, nearest = distance, index
    return pixels[nearest, 0], pixels[nearest, 1]
