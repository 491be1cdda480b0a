"""Measurements of every cell, all cells in a few sweeps over the label image instead of one picture a cell.

The definitions are those of `skimage.measure.regionprops`, to rounding; neighbours are counted as said below.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Integer, Shaped

from dinocell.runtime.jit import compiled

_Array = np.ndarray
_SQRT2 = math.sqrt(2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Intensities:
    """Grey levels of one channel, in the units of the image, one entry a cell; the deviation is that of all pixels."""

    mean: Float64[np.ndarray, "_"]
    lowest: Float64[np.ndarray, "_"]
    highest: Float64[np.ndarray, "_"]
    deviation: Float64[np.ndarray, "_"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CellTable:
    """One entry a cell, in the order of the ids; lengths and areas in pixels.

    Attributes
    ----------
    perimeter
        Of the line through the centres of the border pixels (4 neighbours), as Benkrid and Crookes estimate it.
    centroid
        Row and column.
    box
        Top, left, and bottom and right, which are the first row and column after it.
    major_axis, minor_axis
        Of the ellipse with the cell's second moments.
    orientation
        Of the major axis against the rows' axis, from -pi/2 to pi/2 counter-clockwise.
    solidity
        Area / area of the convex hull of the pixels' diamonds.
    num_neighbours
        Other cells of which a pixel lies beside one of this cell's, or touches it by a corner.
    intensities
        One entry a channel.
    """

    ids: Int64[np.ndarray, "n"]
    area: Int64[np.ndarray, "n"]
    perimeter: Float64[np.ndarray, "n"]
    centroid: Float64[np.ndarray, "n 2"]
    box: Int64[np.ndarray, "n 4"]
    major_axis: Float64[np.ndarray, "n"]
    minor_axis: Float64[np.ndarray, "n"]
    eccentricity: Float64[np.ndarray, "n"]
    orientation: Float64[np.ndarray, "n"]
    solidity: Float64[np.ndarray, "n"]
    num_neighbours: Int64[np.ndarray, "n"]
    intensities: tuple[Intensities, ...]


def measure_table(labels: Integer[np.ndarray, "h w"], channels: Sequence[Shaped[np.ndarray, "h w"]] = ()) -> CellTable:
    """Measure every cell, and its intensities in each channel, of bool, any integer or any float."""
    numbers, ids = _numbered(labels)
    area, box, sums = _sweep(numbers, len(ids))
    rows = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(box[:, 2] - box[:, 0], out=rows[1:])
    perimeter, ends, pairs = _border_sweep(numbers, box, rows)
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
        intensities=tuple(_intensities_of(numbers, area, channel) for channel in channels),
    )


def _numbered(labels: _Array) -> tuple[_Array, _Array]:
    """Return the cells numbered from 1 without gaps, int32, and the id of each number; that of 0 is 0."""
    present = np.zeros(1, np.bool_)
    if labels.size and int(labels.max()) <= max(4 * labels.size, 2**16):
        present = np.zeros(int(labels.max()) + 1, np.bool_)
        present[labels.ravel()] = True
        present[0] = False
        ids = np.flatnonzero(present)
        lookup = np.zeros(len(present), np.int32)
        lookup[ids] = np.arange(1, len(ids) + 1)
        numbers = lookup[labels]
    else:  # ids that are far larger than the image
        ids = np.unique(labels[labels > 0]).astype(np.int64)
        numbers = np.where(labels > 0, np.searchsorted(ids, labels) + 1, 0).astype(np.int32)
    return np.ascontiguousarray(numbers), np.concatenate([np.zeros(1, np.int64), ids.astype(np.int64)])


def _axes(area: _Array, sums: _Array) -> tuple[_Array, _Array, _Array, _Array]:
    """Return major and minor axis, eccentricity and orientation, from the sums of r, c, rr, cc and rc."""
    row, column, rows, columns, product = sums.T.astype(np.float64)
    # The inertia tensor: across the axis that it names.
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


def _intensities_of(numbers: _Array, area: _Array, channel: _Array) -> Intensities:
    if channel.dtype == np.bool_:
        channel = channel.view(np.uint8)
    elif channel.dtype not in (np.uint8, np.uint16, np.float32):
        channel = channel.astype(np.float64)
    mean, lowest, highest, deviation = _intensities(numbers, area, np.ascontiguousarray(channel))
    return Intensities(mean=mean[1:], lowest=lowest[1:], highest=highest[1:], deviation=deviation[1:])


@compiled
def _sweep(numbers: _Array, num: int) -> tuple[_Array, _Array, _Array]:
    """Return areas, boxes, and the sums of r, c, rr, cc, rc from each box's corner."""
    height, width = numbers.shape
    area = np.zeros(num, np.int64)
    box = np.zeros((num, 4), np.int64)
    for row in range(height):
        for column in range(width):
            number = numbers[row, column]
            if number == 0:
                continue
            if area[number] == 0:
                box[number, 0], box[number, 1] = row, column
            area[number] += 1
            box[number, 1] = min(box[number, 1], column)
            box[number, 2] = row + 1
            box[number, 3] = max(box[number, 3], column + 1)
    sums = np.zeros((num, 5), np.int64)
    for row in range(height):
        for column in range(width):
            number = numbers[row, column]
            if number > 0:
                r, c = row - box[number, 0], column - box[number, 1]
                sums[number, 0] += r
                sums[number, 1] += c
                sums[number, 2] += r * r
                sums[number, 3] += c * c
                sums[number, 4] += r * c
    return area, box, sums


@compiled
def _is_border(numbers: _Array, row: int, column: int, number: int) -> bool:
    """Say whether a pixel is the cell's and has one of 4 neighbours that is not."""
    height, width = numbers.shape
    if row < 0 or column < 0 or row >= height or column >= width or numbers[row, column] != number:
        return False
    return bool(
        row == 0
        or column == 0
        or row == height - 1
        or column == width - 1
        or numbers[row - 1, column] != number
        or numbers[row + 1, column] != number
        or numbers[row, column - 1] != number
        or numbers[row, column + 1] != number
    )


@compiled
def _border_sweep(numbers: _Array, box: _Array, rows: _Array) -> tuple[_Array, _Array, _Array]:
    """Return perimeters, the first and last column of each row of each cell, and pairs of cells that touch.

    A border pixel weighs 1, sqrt(2) or (1 + sqrt(2)) / 2 by the number of border pixels beside it and across its
    corners (Benkrid and Crookes, "Design and FPGA implementation of a perimeter estimator", 2000).
    """
    height, width = numbers.shape
    num = len(box)
    perimeter = np.zeros(num, np.float64)
    ends = np.full((rows[-1], 2), -1, np.int64)
    pairs = np.empty(1024, np.int64)
    num_pairs = 0
    last = np.zeros(num, np.int64)
    for row in range(height):
        for column in range(width):
            number = numbers[row, column]
            if number == 0:
                continue
            place = rows[number] + row - box[number, 0]
            if ends[place, 0] < 0:
                ends[place, 0] = column
            ends[place, 1] = column
            if not _is_border(numbers, row, column, number):
                continue  # if a corner of another cell touches it, a neighbour of it has that cell beside it
            sides = corners = 0
            for step in (-1, 1):
                sides += _is_border(numbers, row + step, column, number)
                sides += _is_border(numbers, row, column + step, number)
                corners += _is_border(numbers, row + step, column - 1, number)
                corners += _is_border(numbers, row + step, column + 1, number)
            if 2 <= sides <= 3 and corners <= 2:
                perimeter[number] += 1
            elif (sides == 0 and corners == 2) or (sides == 1 and corners == 3):
                perimeter[number] += _SQRT2
            elif sides == 1 and 1 <= corners <= 2:
                perimeter[number] += (1 + _SQRT2) / 2
            for down in range(-1, 2):
                for right in range(-1, 2):
                    other_row, other_column = row + down, column + right
                    if other_row < 0 or other_column < 0 or other_row >= height or other_column >= width:
                        continue
                    other = numbers[other_row, other_column]
                    if other <= number or last[number] == other:
                        continue
                    last[number] = other
                    if num_pairs == len(pairs):
                        larger = np.empty(2 * num_pairs, np.int64)
                        larger[:num_pairs] = pairs
                        pairs = larger
                    pairs[num_pairs] = number * np.int64(num) + other
                    num_pairs += 1
    return perimeter, ends, pairs[:num_pairs]


@compiled
def _intensities(numbers: _Array, area: _Array, channel: _Array) -> tuple[_Array, _Array, _Array, _Array]:
    """Return mean, lowest, highest and standard deviation; 0 where there is no cell."""
    height, width = numbers.shape
    num = len(area)
    mean, deviation = np.zeros(num, np.float64), np.zeros(num, np.float64)
    lowest, highest = np.zeros(num, np.float64), np.zeros(num, np.float64)
    is_seen = np.zeros(num, np.bool_)
    for row in range(height):
        for column in range(width):
            number = numbers[row, column]
            if number > 0:
                value = np.float64(channel[row, column])
                if not is_seen[number]:
                    is_seen[number] = True
                    lowest[number] = highest[number] = value
                mean[number] += value
                lowest[number] = min(lowest[number], value)
                highest[number] = max(highest[number], value)
    for number in range(1, num):
        mean[number] /= area[number]
    for row in range(height):
        for column in range(width):
            number = numbers[row, column]
            if number > 0:
                deviation[number] += (np.float64(channel[row, column]) - mean[number]) ** 2
    for number in range(1, num):
        deviation[number] = np.sqrt(deviation[number] / area[number])
    return mean, lowest, highest, deviation


# --- convex_hulls --------------------------------------------------------------------------------------------------
#
# Areas of the convex hulls of cells, exact in whole numbers, from the first and last column of each of their rows.


@compiled
def hull_areas(ends: _Array, rows: _Array) -> _Array:
    """Return for each cell the pixels whose centres lie in the convex hull of its pixels' diamonds, or on its border.

    In half pixels, so that all is whole numbers: row i is at y = 2 i, and each of its pixels reaches one to every side.
    """
    num = len(rows) - 1
    areas = np.zeros(num, np.int64)
    for number in range(num):
        first = rows[number]
        height = rows[number + 1] - first
        if height == 0:
            continue
        left, left_size = _chain(ends[first : first + height], 0)
        right, right_size = _chain(ends[first : first + height], 1)
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
            areas[number] += x // (2 * span) - begin + 1
    return areas


@compiled
def _crossing(chain: _Array, at: int, y: int) -> tuple[int, int]:
    """Return where a chain's segment is at y, as numerator and denominator."""
    span = chain[at + 1, 0] - chain[at, 0]
    return chain[at, 1] * span + (chain[at + 1, 1] - chain[at, 1]) * (y - chain[at, 0]), span


@compiled
def _chain(ends: _Array, side: int) -> tuple[_Array, int]:
    """Return the corners (y, x) of a hull's left (0) or right (1) side from top to bottom, and how many they are."""
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
