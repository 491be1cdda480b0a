"""Measurements of all cells in a few sweeps over the label image.

The definitions are those of `skimage.measure.regionprops`, to rounding, which the tests compare with. It is not used
here because it measures one cell at a time: 1.5 s for 2,000 cells in 2048 x 2048 pixels and two channels, against 0.1 s
(benchmarks/results/cell_table.md); on a GPU that would be most of the time of such an image. It counts no neighbours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64, Integer, Shaped
from skimage.segmentation import relabel_sequential

from dinocell.runtime.jit import compiled

_Cells = Int32[np.ndarray, "h w"]  # labels without gaps
_Ints = Int64[np.ndarray, "..."]
_Floats = Float64[np.ndarray, "..."]
_SQRT2 = math.sqrt(2)


class Intensities(NamedTuple):
    """Intensities of one channel, in the units of the image, one entry per cell; ``std`` is that of its pixels."""

    mean: Float64[np.ndarray, "_"]
    minimum: Float64[np.ndarray, "_"]
    maximum: Float64[np.ndarray, "_"]
    std: Float64[np.ndarray, "_"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CellTable:
    """One entry per cell, in the order of the ids; lengths and areas in pixels."""

    ids: Int64[np.ndarray, "n"]
    area: Int64[np.ndarray, "n"]
    # Of the line through the centres of the border pixels (4 neighbours), as by Benkrid and Crookes.
    perimeter: Float64[np.ndarray, "n"]
    centroid: Float64[np.ndarray, "n 2"]  # row and column
    box: Int64[np.ndarray, "n 4"]  # top, left, bottom and right; the last two are exclusive
    major_axis: Float64[np.ndarray, "n"]  # of the ellipse with the cell's second moments
    minor_axis: Float64[np.ndarray, "n"]
    eccentricity: Float64[np.ndarray, "n"]
    orientation: Float64[np.ndarray, "n"]  # of the major axis to the rows' axis, -pi/2 to pi/2 counter-clockwise
    solidity: Float64[np.ndarray, "n"]  # area / area of the convex hull of the pixels' diamonds
    num_neighbours: Int64[np.ndarray, "n"]  # other cells that touch this one, also by a corner
    intensities: tuple[Intensities, ...]  # one entry per channel


def measure_table(labels: Integer[np.ndarray, "h w"], channels: Sequence[Shaped[np.ndarray, "h w"]] = ()) -> CellTable:
    """Measure every cell, and its intensities in each channel (bool, any integer or any float type)."""
    relabelled, _, ids_of = relabel_sequential(labels)  # type: ignore[no-untyped-call]
    cells = np.ascontiguousarray(relabelled, np.int32)
    ids = np.asarray(ids_of, np.int64)  # ids[0] is 0, the background
    area, box, sums = _sweep(cells, len(ids))
    # The rows of all cells in one array: those of cell k are rows[k] to rows[k + 1].
    rows = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(box[:, 2] - box[:, 0], out=rows[1:])
    perimeter, ends, pairs = _border_sweep(np.pad(cells, 1), box, rows)
    pairs = np.unique(pairs)
    neighbours = np.bincount(pairs // len(ids), minlength=len(ids)) + np.bincount(pairs % len(ids), minlength=len(ids))
    axes = _axes(area[1:], sums[1:])
    return CellTable(
        ids=ids[1:],
        area=area[1:],
        perimeter=perimeter[1:],
        centroid=box[1:, :2] + sums[1:, :2] / area[1:, None],
        box=box[1:],
        major_axis=axes[0],
        minor_axis=axes[1],
        eccentricity=axes[2],
        orientation=axes[3],
        solidity=area[1:] / hull_areas(ends, rows)[1:],
        num_neighbours=neighbours[1:],
        intensities=tuple(_intensities_of(cells, area, channel) for channel in channels),
    )


def _axes(area: _Ints, sums: _Ints) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Return major and minor axis, eccentricity and orientation, from the sums of r, c, rr, cc and rc."""
    row, column, rows, columns, product = sums.T.astype(np.float64)
    # Second central moments, arranged as the inertia tensor (a b; b c); its eigenvalues give the axes.
    a = columns / area - (column / area) ** 2
    c = rows / area - (row / area) ** 2
    b = -(product / area - row / area * (column / area))
    middle, half = (a + c) / 2, np.hypot((a - c) / 2, b)
    large, small = middle + half, np.clip(middle - half, 0, None)
    with np.errstate(invalid="ignore"):
        eccentricity = np.where(large > 0, np.sqrt(1 - small / np.where(large > 0, large, 1)), 0.0)
    diagonal = np.where(b < 0, math.pi / 4, -math.pi / 4)
    orientation = np.where(a == c, diagonal, 0.5 * np.arctan2(-2 * b, c - a))
    return 4 * np.sqrt(np.clip(large, 0, None)), 4 * np.sqrt(small), eccentricity, orientation


def _intensities_of(cells: _Cells, area: _Ints, channel: Shaped[np.ndarray, "h w"]) -> Intensities:
    if channel.dtype == np.bool_:
        channel = channel.view(np.uint8)
    elif channel.dtype not in (np.uint8, np.uint16, np.float32):
        channel = channel.astype(np.float64)
    return Intensities(*(values[1:] for values in _intensities(cells, area, np.ascontiguousarray(channel))))


@compiled
def _sweep(cells: _Cells, num_cells: int) -> tuple[_Ints, _Ints, _Ints]:
    """Return areas, boxes, and the sums of r, c, rr, cc and rc, relative to the corner of each box."""
    height, width = cells.shape
    area = np.zeros(num_cells, np.int64)
    box = np.zeros((num_cells, 4), np.int64)
    for row in range(height):
        for column in range(width):
            cell = cells[row, column]
            if cell == 0:
                continue
            if area[cell] == 0:
                box[cell, 0], box[cell, 1] = row, column
            area[cell] += 1
            box[cell, 1] = min(box[cell, 1], column)
            box[cell, 2] = row + 1
            box[cell, 3] = max(box[cell, 3], column + 1)
    sums = np.zeros((num_cells, 5), np.int64)
    for row in range(height):
        for column in range(width):
            cell = cells[row, column]
            if cell > 0:
                r, c = row - box[cell, 0], column - box[cell, 1]
                sums[cell, 0] += r
                sums[cell, 1] += c
                sums[cell, 2] += r * r
                sums[cell, 3] += c * c
                sums[cell, 4] += r * c
    return area, box, sums


@compiled
def _is_border(framed: _Cells, row: int, column: int, cell: int) -> bool:
    """Return whether a pixel belongs to the cell, and one of its 4 neighbours does not."""
    return bool(
        framed[row, column] == cell
        and (
            framed[row - 1, column] != cell
            or framed[row + 1, column] != cell
            or framed[row, column - 1] != cell
            or framed[row, column + 1] != cell
        )
    )


@compiled
def _border_sweep(framed: _Cells, box: _Ints, rows: _Ints) -> tuple[_Floats, _Ints, _Ints]:
    """Return perimeters, the first and last column of each row of each cell, and pairs of cells that touch.

    ``framed`` has a frame of one pixel of background, ``box`` and the result are those of the image without it. A
    border pixel has weight 1, sqrt(2) or (1 + sqrt(2)) / 2, depending on the number of border pixels among its 4
    neighbours and at its corners (Benkrid and Crookes, "Design and FPGA implementation of a perimeter estimator",
    2000).
    """
    num_cells = len(box)
    perimeter = np.zeros(num_cells, np.float64)
    ends = np.full((rows[-1], 2), -1, np.int64)
    pairs = np.empty(1024, np.int64)
    num_pairs = 0
    last = np.zeros(num_cells, np.int64)
    for row in range(1, framed.shape[0] - 1):
        for column in range(1, framed.shape[1] - 1):
            cell = framed[row, column]
            if cell == 0:
                continue
            place = rows[cell] + row - 1 - box[cell, 0]
            if ends[place, 0] < 0:
                ends[place, 0] = column - 1
            ends[place, 1] = column - 1
            if not _is_border(framed, row, column, cell):
                continue  # another cell that touches it by a corner also touches one of its neighbours by a side
            sides = corners = 0
            for step in (-1, 1):
                sides += _is_border(framed, row + step, column, cell)
                sides += _is_border(framed, row, column + step, cell)
                corners += _is_border(framed, row + step, column - 1, cell)
                corners += _is_border(framed, row + step, column + 1, cell)
            if 2 <= sides <= 3 and corners <= 2:
                perimeter[cell] += 1
            elif (sides == 0 and corners == 2) or (sides == 1 and corners == 3):
                perimeter[cell] += _SQRT2
            elif sides == 1 and 1 <= corners <= 2:
                perimeter[cell] += (1 + _SQRT2) / 2
            # Every pair of cells once, from the smaller id; repeats of the last partner are skipped at once.
            for down in range(-1, 2):
                for right in range(-1, 2):
                    other = framed[row + down, column + right]
                    if other <= cell or last[cell] == other:
                        continue
                    last[cell] = other
                    if num_pairs == len(pairs):
                        pairs = np.append(pairs, np.empty_like(pairs))
                    pairs[num_pairs] = cell * np.int64(num_cells) + other
                    num_pairs += 1
    return perimeter, ends, pairs[:num_pairs]


@compiled
def _intensities(
    cells: _Cells, area: _Ints, channel: Shaped[np.ndarray, "h w"]
) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Return mean, minimum, maximum and standard deviation; 0 for missing cells."""
    height, width = cells.shape
    num_cells = len(area)
    mean, std = np.zeros(num_cells, np.float64), np.zeros(num_cells, np.float64)
    minimum, maximum = np.zeros(num_cells, np.float64), np.zeros(num_cells, np.float64)
    is_seen = np.zeros(num_cells, np.bool_)
    for row in range(height):
        for column in range(width):
            cell = cells[row, column]
            if cell > 0:
                value = np.float64(channel[row, column])
                if not is_seen[cell]:
                    is_seen[cell] = True
                    minimum[cell] = maximum[cell] = value
                mean[cell] += value
                minimum[cell] = min(minimum[cell], value)
                maximum[cell] = max(maximum[cell], value)
    # A second sweep for the squares: exact where the mean is large relative to the std.
    for cell in range(1, num_cells):
        mean[cell] /= area[cell]
    for row in range(height):
        for column in range(width):
            cell = cells[row, column]
            if cell > 0:
                std[cell] += (np.float64(channel[row, column]) - mean[cell]) ** 2
    for cell in range(1, num_cells):
        std[cell] = np.sqrt(std[cell] / area[cell])
    return mean, minimum, maximum, std


@compiled
def hull_areas(ends: _Ints, rows: _Ints) -> _Ints:
    """Return for each cell the number of pixel centres inside or on the convex hull of its pixels' diamonds.

    ``ends`` are the first and last column of each row of a cell. Coordinates are half pixels, hence integers: row i is
    at y = 2 i, and a pixel extends by one to every side.
    """
    num_cells = len(rows) - 1
    areas = np.zeros(num_cells, np.int64)
    for cell in range(num_cells):
        first = rows[cell]
        height = rows[cell + 1] - first
        if height == 0:
            continue
        left, left_size = _chain(ends[first : first + height], 0)
        right, right_size = _chain(ends[first : first + height], 1)
        # Walk down both sides of the hull; each row counts the centres between them.
        at_left = at_right = 0
        for row in range(height):
            y = 2 * row
            while at_left < left_size - 2 and left[at_left + 1, 0] < y:
                at_left += 1
            while at_right < right_size - 2 and right[at_right + 1, 0] < y:
                at_right += 1
            x, span = _crossing(left, at_left, y)
            begin = -((-x) // (2 * span))
            x, span = _crossing(right, at_right, y)
            areas[cell] += x // (2 * span) - begin + 1
    return areas


@compiled
def _crossing(chain: _Ints, at: int, y: int) -> tuple[int, int]:
    """Return the x of a chain's segment at y, as numerator and denominator."""
    span = chain[at + 1, 0] - chain[at, 0]
    return chain[at, 1] * span + (chain[at + 1, 1] - chain[at, 1]) * (y - chain[at, 0]), span


@compiled
def _chain(ends: _Ints, side: int) -> tuple[_Ints, int]:
    """Return the corners (y, x) of a hull's left (0) or right (1) side from top to bottom, and their number."""
    sign = 1 if side == 0 else -1  # the right side is the left one of the mirrored cell
    height = len(ends)
    chain = np.empty((2 * height + 1, 2), np.int64)
    size = 0
    for y in range(-1, 2 * height):
        # At odd y the tips of the diamonds above and below, at even y their outer corners.
        reach = np.int64(2**62)
        if y % 2 == 0:
            if ends[y // 2, side] >= 0:
                reach = 2 * sign * ends[y // 2, side] - 1
        else:
            for row in (y // 2, y // 2 + 1):
                if 0 <= row < height and ends[row, side] >= 0:
                    reach = min(reach, 2 * sign * ends[row, side])
        if reach == np.int64(2**62):
            continue
        # Drop corners that the new one makes concave (Andrew's monotone chain).
        while size >= 2:
            step_y, step_x = chain[size - 1, 0] - chain[size - 2, 0], chain[size - 1, 1] - chain[size - 2, 1]
            if step_y * (reach - chain[size - 2, 1]) - step_x * (y - chain[size - 2, 0]) > 0:
                break
            size -= 1
        chain[size, 0], chain[size, 1] = y, reach
        size += 1
    for index in range(size):
        chain[index, 1] *= sign
    return chain, size
