"""Outlines of cells along the edges of their pixels: polygons that hold exactly the pixels of the label image.

Corners are integers (x, y); the pixel in row r and column c is the square from (c, r) to (c + 1, r + 1), as in QuPath,
ImageJ and COCO. Rings are simple (no corner twice), run clockwise on the screen around a fragment and counter-clockwise
around a hole, have a corner only where the direction changes, and do not repeat their first corner.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer
from skimage.measure import label as label_image

from dinocell.runtime.jit import compiled

_Labels = Int32[np.ndarray, "h w"]
_Rows = Int32[np.ndarray, "n k"]

# By heading, clockwise on the screen (east, south, west, north): the step from a corner to the next, in rows and
# columns, and the pixel ahead on the right, relative to the corner. The one on the left is the right one of the heading
# before.
_STEPS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
_RIGHT = np.array([(0, 0), (0, -1), (-1, -1), (-1, 0)])


@dataclass(frozen=True, kw_only=True, eq=False)
class CellOutline:
    """One cell: its 4-connected fragments, each as the outer ring and the rings of its holes."""

    label: int
    fragments: tuple[tuple[Int32[np.ndarray, "_ 2"], ...], ...]


def trace_cells(labels: Integer[np.ndarray, "h w"]) -> list[CellOutline]:
    """Return the outline of every cell, in the order of their ids.

    Fragments that touch only by a corner are separate, so that every polygon is valid by the rules of OGC.
    """
    fragments = np.asarray(label_image(labels, background=0, connectivity=1), np.int32)  # type: ignore[no-untyped-call]
    num_fragments = int(fragments.max(initial=0))
    corners, rings, first = _trace(fragments, num_fragments)
    rings_of: list[list[Int32[np.ndarray, "_ 2"]]] = [[] for _ in range(num_fragments)]
    start = 0
    for end, fragment, is_hole in rings.tolist():
        own = rings_of[fragment - 1]
        own.insert(len(own) if is_hole else 0, corners[start:end])
        start = end
    cells: dict[int, list[tuple[Int32[np.ndarray, "_ 2"], ...]]] = {}
    for label, own in zip(labels.ravel()[first].tolist(), rings_of, strict=True):
        cells.setdefault(label, []).append(tuple(own))
    return [CellOutline(label=label, fragments=tuple(cells[label])) for label in sorted(cells)]


def inner_edges(labels: Integer[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Return the pixels of cells with a pixel of another cell or of background among their 4 neighbours."""
    different = np.zeros(labels.shape, np.bool_)
    down, across = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    different[1:] |= down
    different[:-1] |= down
    different[:, 1:] |= across
    different[:, :-1] |= across
    return different & (labels > 0)


@compiled
def _grown(rows: _Rows) -> _Rows:
    """Return the rows in an array twice as long."""
    larger = np.empty((2 * rows.shape[0], rows.shape[1]), np.int32)
    larger[: rows.shape[0]] = rows
    return larger


@compiled
def _is_fragment(fragments: _Labels, row: int, column: int, fragment: int) -> bool:
    height, width = fragments.shape
    return bool(0 <= row < height and 0 <= column < width and fragments[row, column] == fragment)


@compiled
def _walk(fragments: _Labels, seen: Bool[np.ndarray, "h w"], row: int, column: int, walk: _Rows) -> tuple[_Rows, int]:
    """Follow a boundary, the fragment on the right, from the upper left corner of a pixel until it is reached again.

    Each corner becomes a row of ``walk``: x, y, and whether two pixels of the fragment meet only in this corner.
    """
    fragment = fragments[row, column]
    heading, length = 0, 0
    # At each corner look at the two pixels ahead: go straight along an edge, else turn right, or left around a pixel.
    while True:
        if heading == 0:
            if seen[row, column]:
                return walk, length
            seen[row, column] = True
        row, column = row + _STEPS[heading, 0], column + _STEPS[heading, 1]
        before = (heading + 3) % 4
        right = _is_fragment(fragments, row + _RIGHT[heading, 0], column + _RIGHT[heading, 1], fragment)
        left = _is_fragment(fragments, row + _RIGHT[before, 0], column + _RIGHT[before, 1], fragment)
        if right and not left:
            continue
        if length == walk.shape[0]:
            walk = _grown(walk)
        walk[length, 0], walk[length, 1], walk[length, 2] = column, row, left and not right
        length += 1
        heading = before if right else (heading + 1) % 4


@compiled
def _is_hole(corners: _Rows, start: int, end: int) -> bool:
    """Return whether a ring runs counter-clockwise on the screen, by the sign of its area."""
    x, y = corners[start:end, 0].astype(np.int64), corners[start:end, 1].astype(np.int64)
    return bool(np.sum(np.roll(x, 1) * y - x * np.roll(y, 1)) < 0)


@compiled
def _cut(walk: _Rows, length: int, stack: _Rows, corners: _Rows, used: int, ends: _Rows) -> tuple[_Rows, int, int]:
    """Append a walk to ``corners`` as rings that do not touch themselves; return corners, their number, that of rings.

    When the walk reaches a corner for the second time, the corners in between are a ring of their own.
    """
    depth, num_rings = 0, 0
    while corners.shape[0] < used + length:
        corners = _grown(corners)
    for index in range(length):
        if walk[index, 2]:
            for met in range(depth - 1, -1, -1):
                other = stack[met, 0]
                if walk[other, 0] == walk[index, 0] and walk[other, 1] == walk[index, 1]:
                    for position in range(met, depth):
                        corners[used] = walk[stack[position, 0], :2]
                        used += 1
                    depth = met
                    ends[num_rings, 0] = used
                    num_rings += 1
                    break
        stack[depth, 0] = index
        depth += 1
    for position in range(depth):
        corners[used] = walk[stack[position, 0], :2]
        used += 1
    ends[num_rings, 0] = used
    return corners, used, num_rings + 1


@compiled
def _trace(fragments: _Labels, num_fragments: int) -> tuple[_Rows, _Rows, Int64[np.ndarray, " n"]]:
    """Return all corners; per ring its end, its fragment and whether it is a hole; per fragment its first pixel."""
    height, width = fragments.shape
    seen = np.zeros((height, width), np.bool_)  # upper sides that a walk has passed
    first = np.full(num_fragments, -1, np.int64)
    walk, corners, rings = np.empty((256, 3), np.int32), np.empty((4096, 2), np.int32), np.empty((1024, 3), np.int32)
    stack, ends = np.empty((256, 1), np.int32), np.empty((256, 1), np.int32)
    used = num_rings = 0
    for row in range(height):
        for column in range(width):
            fragment = fragments[row, column]
            # Every boundary, of an outside or a hole, has an upper side of a pixel to start from.
            if fragment == 0 or seen[row, column] or (row > 0 and fragments[row - 1, column] == fragment):
                continue
            if first[fragment - 1] < 0:
                first[fragment - 1] = row * width + column
            walk, length = _walk(fragments, seen, row, column, walk)
            while stack.shape[0] < length:
                stack, ends = _grown(stack), _grown(ends)
            start = used
            corners, used, num_new = _cut(walk, length, stack, corners, used, ends)
            while rings.shape[0] < num_rings + num_new:
                rings = _grown(rings)
            for index in range(num_new):
                rings[num_rings, 0], rings[num_rings, 1] = ends[index, 0], fragment
                rings[num_rings, 2] = _is_hole(corners, start, ends[index, 0])
                start = ends[index, 0]
                num_rings += 1
    return corners[:used], rings[:num_rings], first
