"""Synthetic cells before they are stained: where they settle, how they grow, where their nuclei lie."""

from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage

from dinocell.demo.synthetic.config import CellType, SyntheticConfig
from dinocell.demo.synthetic.textures import SHEET_PX, sheets, smooth_noise
from dinocell.labelled.distance import distance_to_boundary

_Array = np.ndarray


class Cells(NamedTuple):
    """The cells of a field, one row a cell; lengths in pixels, angles in radians."""

    types: tuple[CellType, ...]  # the classes
    kind: _Array  # number of the class
    row: _Array  # centre
    column: _Array
    angle: _Array  # of the long axis
    radius: _Array  # of the disc of the same area, arms aside
    outline: _Array  # (n, _NUM_ANGLES): radius of the outline in each direction
    nucleus_row: _Array
    nucleus_column: _Array
    nucleus_length: _Array  # half axes
    nucleus_width: _Array
    nucleus_angle: _Array
    brightness: _Array
    mitotic: _Array  # rounded up, chromosomes condensed

    def keep(self, which: _Array) -> "Cells":
        """Return some of the cells."""
        return Cells(self.types, *(column[which] for column in self[1:]))

    def of_class(self, name: str) -> _Array:
        """Return a property of each cell's class."""
        return _of_class(self.types, self.kind, name)


_NUM_ANGLES = 512
_TRIES = 24  # places that a cell looks at
_MITOTIC_SHARE = 0.03


def _of_class(types: tuple[CellType, ...], kind: _Array, name: str) -> _Array:
    return np.asarray(np.array([getattr(cell_type, name) for cell_type in types], np.float32)[kind])


def settle(generator: np.random.Generator, config: SyntheticConfig) -> Cells:
    """Draw the cells: classes, places, outlines, nuclei."""
    n = int(generator.integers(config.num_cells[0], config.num_cells[1] + 1))
    weights = np.ones(config.num_classes) if config.class_weights is None else np.array(config.class_weights, float)
    kind = generator.choice(config.num_classes, n, p=weights / weights.sum())

    def vary(name: str, spread: float) -> _Array:
        drawn: _Array = _of_class(config.cell_types, kind, name) * np.exp(generator.normal(0, spread, n))
        return drawn

    mitotic = generator.random(n) < _MITOTIC_SHARE
    radius = config.cell_radius_px * vary("radius", 0.16) * np.where(mitotic, 0.7, 1)
    aspect = np.where(mitotic, 1, np.maximum(vary("aspect", 0.15), 1))
    angle = generator.uniform(0, 2 * np.pi, n)
    row, column = _places(generator, config, radius)

    nucleus = radius * np.minimum(vary("nucleus", 0.1), 0.68) * np.where(mitotic, 0.75, 1)
    nucleus_aspect = np.maximum(vary("nucleus_aspect", 0.12), 1) * np.where(mitotic, 1.5, 1)
    # A nucleus is rarely in the very middle; an elongated cell leaves it more room along its axis.
    along, across = generator.normal(0, 0.09, (2, n)) * radius * [[1], [0.6]]
    cells = Cells(
        types=config.cell_types,
        kind=kind,
        row=row,
        column=column,
        angle=angle,
        radius=radius,
        outline=_outlines(generator, config.cell_types, kind, radius, aspect, angle, mitotic),
        nucleus_row=row + along * np.sin(angle) + across * np.cos(angle),
        nucleus_column=column + along * np.cos(angle) - across * np.sin(angle),
        nucleus_length=nucleus * np.sqrt(nucleus_aspect),
        nucleus_width=nucleus / np.sqrt(nucleus_aspect),
        nucleus_angle=angle + generator.normal(0, 0.25, n),
        brightness=vary("brightness", 0.22) * np.where(mitotic, 1.5, 1),
        mitotic=mitotic,
    )
    return cells.keep(~np.isnan(row))


def _places(generator: np.random.Generator, config: SyntheticConfig, radius: _Array) -> tuple[_Array, _Array]:
    """Draw a centre for each cell: beside another cell, or away from all as long as there is room.

    A cell that finds no room anywhere is left out: its centre is NaN.
    """
    size = np.array(config.size)
    centres = np.full((len(radius), 2), np.nan)
    for i in range(len(radius)):
        there = np.flatnonzero(~np.isnan(centres[:i, 0]))
        alone = generator.uniform(-0.02, 1.02, (_TRIES, 2)) * size
        turn = generator.uniform(0, 2 * np.pi, _TRIES)
        reach = generator.uniform(0.8, 1.0, _TRIES)
        wants_company = generator.random() < config.touching
        if not there.size:
            centres[i] = alone[0]
            continue
        hosts = there[generator.integers(0, there.size, _TRIES)]
        reach *= radius[hosts] + radius[i]
        beside = centres[hosts] + reach[:, None] * np.stack([np.sin(turn), np.cos(turn)], 1)
        beside[((beside < -0.02 * size) | (beside > 1.02 * size)).any(1)] = np.inf
        candidates = beside if wants_company else alone
        room = _room(candidates, centres[there], radius[i] + radius[there])
        fits = np.flatnonzero(room >= (0.78 if wants_company else 1.2))
        if fits.size:
            centres[i] = candidates[fits[0]]
            continue
        room = _room(alone, centres[there], radius[i] + radius[there])
        if room.max() >= 0.7:
            centres[i] = alone[room.argmax()]
    return centres[:, 0], centres[:, 1]


def _room(candidates: _Array, centres: _Array, reach: _Array) -> _Array:
    """Return how far each candidate is from the nearest of the centres; 1 is where the two outlines meet."""
    gaps: _Array = (np.hypot(*(candidates[:, None] - centres[None]).transpose(2, 0, 1)) / reach).min(1)
    return np.where(np.isfinite(gaps), gaps, -1)


def _outlines(
    generator: np.random.Generator,
    types: tuple[CellType, ...],
    kind: _Array,
    radius: _Array,
    aspect: _Array,
    angle: _Array,
    mitotic: _Array,
) -> _Array:
    """Draw each cell's radius in every direction: an ellipse, lobes, and the arms that its class has."""
    n = len(kind)
    turn = np.arange(_NUM_ANGLES) * (2 * np.pi / _NUM_ANGLES)
    own = turn - angle[:, None]
    shape = 1 / np.sqrt(np.cos(own) ** 2 / aspect[:, None] + np.sin(own) ** 2 * aspect[:, None])
    calm = np.where(mitotic, 0.2, 1)[:, None]
    for order, size in ((2, 0.06), (3, 0.08), (4, 0.05), (5, 0.03), (7, 0.015)):
        lobe = generator.normal(0, size, (n, 1)) * calm
        shape *= 1 + lobe * np.cos(order * turn + generator.uniform(0, 2 * np.pi, (n, 1)))
    num_arms, arm = _of_class(types, kind, "protrusions"), _of_class(types, kind, "arm")
    for j in range(max(cell_type.protrusions for cell_type in types)):
        # Arms are spread about the cell, the first two along its axis.
        towards = angle + 2 * np.pi * j / np.maximum(num_arms, 1) + generator.normal(0, 0.35, n)
        length = arm * generator.uniform(0.3, 1.4, n) * (j < num_arms) * ~mitotic
        width = generator.uniform(8, 30, (n, 1))
        shape += length[:, None] * np.exp(width * (np.cos(turn - towards[:, None]) - 1))
    outlines: _Array = (np.maximum(shape, 0.3) * radius[:, None]).astype(np.float32)
    return outlines


class Canvas(NamedTuple):
    """What the stains are painted from: the grown cells, and for every pixel where in its cell it lies."""

    cells: Cells
    labels: _Array
    inside: _Array  # 1 in cells, 0 on the background
    edge: _Array  # pixels to the cell's boundary
    along: _Array  # pixels from the nucleus along and across the cell's axis
    across: _Array
    nucleus_radius: _Array  # distance from the nucleus' centre, its outline is 1
    outside_nucleus: _Array  # pixels from the nucleus' outline outwards, as a share of the cell's radius
    nucleus: _Array  # share of the pixel that is nucleus
    thickness: _Array  # of the cell, about 1 in its middle
    sheet_row: _Array  # where each cell begins on the texture sheets
    sheet_column: _Array

    def per_pixel(self, per_cell: _Array, background: float = 0) -> _Array:
        """Give every pixel the value of its cell."""
        return np.asarray(np.concatenate([[background], per_cell]).astype(np.float32)[self.labels])

    def texture(self, name: str, grain: _Array | float = 1.0, stretch: float = 1.0) -> _Array:
        """Lay a texture sheet into every cell, along its axis, ``grain`` sheet pixels a pixel, stretched lengthwise."""
        columns = self.along * (grain / stretch) + self.sheet_column
        rows = self.across * grain + self.sheet_row
        laid: _Array = cv2.remap(sheets()[name], columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        return laid


def grow(cells: Cells, config: SyntheticConfig, generator: np.random.Generator) -> Canvas:
    """Let the cells fill their outlines; where outlines cross, the cell that is relatively nearer has the pixel."""
    size = config.size
    warp_row, warp_column = (
        smooth_noise(generator, size, config.cell_radius_px * 0.45) * (0.055 * config.cell_radius_px) for _ in range(2)
    )
    rows = np.arange(size[0], dtype=np.float32)[:, None] + warp_row
    columns = np.arange(size[1], dtype=np.float32)[None, :] + warp_column
    nearest = np.ones(size, np.float32)
    labels = np.zeros(size, np.int32)
    windows = []
    for i in range(len(cells.kind)):
        reach = float(cells.outline[i].max()) + 0.35 * config.cell_radius_px
        window = tuple(
            slice(max(0, int(at - reach)), max(0, min(end, int(at + reach) + 2)))
            for at, end in zip((cells.row[i], cells.column[i]), size, strict=True)
        )
        windows.append(window)
        dy, dx = rows[window] - np.float32(cells.row[i]), columns[window] - np.float32(cells.column[i])
        turn = (np.arctan2(dy, dx) * (_NUM_ANGLES / (2 * np.pi)) + _NUM_ANGLES + 0.5).astype(np.int32) % _NUM_ANGLES
        share = np.sqrt(dy * dy + dx * dx) / cells.outline[i][turn]
        taken = share < nearest[window]
        nearest[window][taken] = share[taken]
        labels[window][taken] = i + 1

    whole = np.zeros(len(cells.kind), bool)
    for i, window in enumerate(windows):
        whole[i] = _keep_largest_piece(labels[window], i + 1)
    canvas = _locate(cells, labels, generator)
    seen = np.bincount(labels.ravel(), canvas.nucleus.ravel(), minlength=len(whole) + 1)[1:]
    # The edge of the picture may cut a nucleus, a neighbour may not.
    gap = [
        np.minimum(at, end - 1 - at) for at, end in zip((cells.nucleus_row, cells.nucleus_column), size, strict=True)
    ]
    share = np.where(np.minimum(*gap) > cells.nucleus_length, 0.88, 0.25)
    whole &= seen >= np.maximum(share * np.pi * cells.nucleus_length * cells.nucleus_width, 6)
    if whole.all():
        return canvas
    renumber = np.concatenate([[0], np.where(whole, np.cumsum(whole), 0)]).astype(np.int32)
    return _locate(cells.keep(whole), renumber[labels], generator)


def _keep_largest_piece(window: _Array, label: int) -> bool:
    """Clear all 4-connected pieces of a label but the largest; say whether anything is there."""
    # Not OpenCV's components: they crash on a window without a pixel, that of a cell beyond the picture's edge.
    pieces, count = ndimage.label(window == label)
    if count > 1:
        largest = 1 + int(np.bincount(pieces.ravel())[1:].argmax())
        window[(pieces > 0) & (pieces != largest)] = 0
    return bool(count)


def _locate(cells: Cells, labels: _Array, generator: np.random.Generator) -> Canvas:
    """Give every pixel its place in its cell."""
    n = len(cells.kind)

    def per_pixel(per_cell: _Array, background: float = 1) -> _Array:
        return np.asarray(np.concatenate([[background], per_cell]).astype(np.float32)[labels])

    inside = (labels > 0).astype(np.float32)
    rows = (np.arange(labels.shape[0], dtype=np.float32)[:, None] - per_pixel(cells.nucleus_row)) * inside
    columns = (np.arange(labels.shape[1], dtype=np.float32)[None, :] - per_pixel(cells.nucleus_column)) * inside

    def turned(angle: _Array) -> tuple[_Array, _Array]:
        cosine, sine = per_pixel(np.cos(angle)), per_pixel(np.sin(angle))
        return columns * cosine + rows * sine, rows * cosine - columns * sine

    along, across = turned(cells.nucleus_angle)
    # Two soft lobes make the nuclei unequal: beans and eggs rather than ellipses.
    bend = per_pixel(generator.normal(0, 0.12, n)) * across / per_pixel(cells.nucleus_width)
    length = along / per_pixel(cells.nucleus_length) + bend * across / per_pixel(cells.nucleus_width)
    width = across / per_pixel(cells.nucleus_width) * (1 + per_pixel(generator.normal(0, 0.13, n)) * np.tanh(length))
    nucleus_radius = np.where(labels > 0, np.sqrt(length * length + width * width), np.float32(9))
    nucleus_px = per_pixel(np.sqrt(cells.nucleus_length * cells.nucleus_width))
    edge = np.where(labels > 0, np.minimum(distance_to_boundary(labels), np.float32(1e4)), 0)
    along, across = turned(cells.angle)
    radius = per_pixel(cells.radius)
    return Canvas(
        cells=cells,
        labels=labels,
        inside=inside,
        edge=edge,
        along=along,
        across=across,
        nucleus_radius=nucleus_radius,
        outside_nucleus=np.maximum(nucleus_radius - 1, 0) * nucleus_px / radius,
        nucleus=np.clip((1 - nucleus_radius) * nucleus_px + 0.5, 0, 1) * inside,
        thickness=(1 - 0.7 * np.exp(-edge / (0.22 * radius))) * inside,
        sheet_row=per_pixel(generator.uniform(0, SHEET_PX, n)),
        sheet_column=per_pixel(generator.uniform(0, SHEET_PX, n)),
    )
