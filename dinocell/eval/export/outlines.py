"""Outlines of cells along the edges of their pixels: polygons that hold exactly the pixels of the label image.

Corners are (x, y) in whole numbers; the pixel in row r and column c is the square from (c, r) to (c + 1, r + 1), as
QuPath, ImageJ and COCO have it. Rings are simple (no corner twice), run clockwise on the screen round a piece and
counter-clockwise round a hole, have a corner only where the direction changes, and do not repeat their first corner.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Integer
from skimage.measure import label as label_pieces

from dinocell.runtime.jit import compiled

_Array = np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class CellOutline:
    """One cell: its pieces (pixels that hang together by their sides), each a ring and the rings of its holes."""

    label: int
    pieces: tuple[tuple[Int32[np.ndarray, "_ 2"], ...], ...]


def trace_cells(labels: Integer[np.ndarray, "h w"]) -> list[CellOutline]:
    """Return the outline of every cell, in the order of their ids.

    Pieces that touch only by a corner are pieces of their own, so that every polygon is valid by the rules of OGC.
    """
    pieces = np.asarray(label_pieces(labels, background=0, connectivity=1), np.int32)  # type: ignore[no-untyped-call]
    num_pieces = int(pieces.max(initial=0))
    corners, rings, first = _trace(pieces, num_pieces)
    of_pieces: list[list[_Array]] = [[] for _ in range(num_pieces)]
    start = 0
    for end, piece, is_hole in rings.tolist():
        found = of_pieces[piece - 1]
        found.insert(len(found) if is_hole else 0, corners[start:end])
        start = end
    cells: dict[int, list[tuple[_Array, ...]]] = {}
    for label, found in zip(labels.ravel()[first].tolist(), of_pieces, strict=True):
        cells.setdefault(label, []).append(tuple(found))
    return [CellOutline(label=label, pieces=tuple(cells[label])) for label in sorted(cells)]


def inner_edges(labels: Integer[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Return the pixels of cells that have a pixel of something else above, below, left or right, inside the image."""
    different = np.zeros(labels.shape, np.bool_)
    down, across = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    different[1:] |= down
    different[:-1] |= down
    different[:, 1:] |= across
    different[:, :-1] |= across
    edges: np.ndarray = different & (labels > 0)
    return edges


@compiled
def _grown(rows: _Array) -> _Array:
    """Return the rows in an array that has twice as many."""
    larger = np.empty((2 * rows.shape[0], rows.shape[1]), np.int32)
    larger[: rows.shape[0]] = rows
    return larger


@compiled
def _is_piece(pieces: _Array, row: int, column: int, piece: int) -> bool:
    height, width = pieces.shape
    return bool(0 <= row < height and 0 <= column < width and pieces[row, column] == piece)


@compiled
def _walk(pieces: _Array, seen: _Array, row: int, column: int, walk: _Array) -> tuple[_Array, int]:
    """Go round a boundary, the piece on the right hand, from a pixel's upper left corner until that is met again.

    Each corner becomes a row of ``walk``: x, y, and whether two pixels of the piece meet in this corner alone.
    """
    piece = pieces[row, column]
    heading, length = 0, 0  # clockwise on the screen: east, south, west, north
    while True:
        if heading == 0:
            if seen[row, column]:
                return walk, length
            seen[row, column] = True
            column += 1
            right, left = _is_piece(pieces, row, column, piece), _is_piece(pieces, row - 1, column, piece)
        elif heading == 1:
            row += 1
            right, left = _is_piece(pieces, row, column - 1, piece), _is_piece(pieces, row, column, piece)
        elif heading == 2:
            column -= 1
            right, left = _is_piece(pieces, row - 1, column - 1, piece), _is_piece(pieces, row, column - 1, piece)
        else:
            row -= 1
            right, left = _is_piece(pieces, row - 1, column, piece), _is_piece(pieces, row - 1, column - 1, piece)
        if right and not left:
            continue
        if length == walk.shape[0]:
            walk = _grown(walk)
        walk[length, 0], walk[length, 1], walk[length, 2] = column, row, left and not right
        length += 1
        heading = (heading + 3) % 4 if right else (heading + 1) % 4


@compiled
def _is_hole(corners: _Array, start: int, end: int) -> bool:
    """Say whether a ring runs counter-clockwise on the screen."""
    doubled_area = 0
    before = end - 1
    for index in range(start, end):
        doubled_area += np.int64(corners[before, 0]) * corners[index, 1]
        doubled_area -= np.int64(corners[index, 0]) * corners[before, 1]
        before = index
    return doubled_area < 0


@compiled
def _cut(walk: _Array, length: int, stack: _Array, corners: _Array, used: int, ends: _Array) -> tuple[_Array, int, int]:
    """Append a walk to ``corners`` as rings that do not touch themselves; return those, their number, and the rings'.

    Where the walk comes to a corner for the second time, what lies between is a ring.
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
def _trace(pieces: _Array, num_pieces: int) -> tuple[_Array, _Array, _Array]:
    """Return all corners; of each ring its end, its piece and whether it is a hole; of each piece its first pixel."""
    height, width = pieces.shape
    seen = np.zeros((height, width), np.bool_)  # the upper sides that a walk has passed
    first = np.full(num_pieces, -1, np.int64)
    walk, corners, rings = np.empty((256, 3), np.int32), np.empty((4096, 2), np.int32), np.empty((1024, 3), np.int32)
    stack, ends = np.empty((256, 1), np.int32), np.empty((256, 1), np.int32)
    used = num_rings = 0
    for row in range(height):
        for column in range(width):
            piece = pieces[row, column]
            if piece == 0 or seen[row, column] or (row > 0 and pieces[row - 1, column] == piece):
                continue
            if first[piece - 1] < 0:
                first[piece - 1] = row * width + column
            walk, length = _walk(pieces, seen, row, column, walk)
            while stack.shape[0] < length:
                stack, ends = _grown(stack), _grown(ends)
            start = used
            corners, used, num_new = _cut(walk, length, stack, corners, used, ends)
            while rings.shape[0] < num_rings + num_new:
                rings = _grown(rings)
            for number in range(num_new):
                rings[num_rings, 0], rings[num_rings, 1] = ends[number, 0], piece
                rings[num_rings, 2] = _is_hole(corners, start, ends[number, 0])
                start = ends[number, 0]
                num_rings += 1
    return corners[:used], rings[:num_rings], first
