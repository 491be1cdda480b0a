"""The kernel of `dinocell.eval.flows`: where a point ends that goes with the flow."""

import numpy as np

from dinocell.runtime.compiled import compiled

__all__ = ["REST_EVERY", "REST_PX", "follow"]

_Array = np.ndarray

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
