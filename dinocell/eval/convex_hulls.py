"""Areas of the convex hulls of cells, exact in whole numbers, from the first and last column of each of their rows."""

import numpy as np

from dinocell.runtime.compiled import compiled

_Array = np.ndarray


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
