"""Synthetic cells before staining: positions, outlines and nuclei, and the textures with which stains are painted."""

import functools
from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage

from dinocell.demo.synthetic.config import CellType, SyntheticConfig
from dinocell.labelled.distance import distance_to_boundary

SHEET_PX = 512


@functools.cache
def sheets() -> dict[str, np.ndarray]:
    """Return the textures from which every cell is rendered: "grain" has mean 0 and std 1, others are in [0, 1]."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SHEET_PX)[:, None], np.fft.rfftfreq(SHEET_PX)[None, :])

    def band(size: float) -> np.ndarray:
        spectrum = np.fft.rfft2(generator.normal(size=(SHEET_PX, SHEET_PX)))
        wave = np.fft.irfft2(spectrum * np.exp(-2 * (np.pi * size * frequency) ** 2) * (frequency > 1 / (size * 14)))
        return np.asarray((wave / wave.std()).astype(np.float32))

    def ridges(size: float, width: float) -> np.ndarray:
        return np.asarray(np.clip(1 - np.abs(band(size)) / width, 0, 1))

    return {
        "grain": 0.75 * band(1.3) + 0.65 * band(2.6),
        "filaments": np.maximum(ridges(2.6, 0.45), 0.8 * ridges(2.0, 0.35)),
        "fibres": ridges(2.2, 0.5) * np.clip(0.5 + 0.6 * band(9.0), 0, 1.5),
        "net": 0.5 * ridges(1.6, 0.6) + 0.5 * ridges(2.4, 0.8),
        "specks": np.clip((band(1.2) - 1.6) / 1.2, 0, 1.5),
    }


def smooth_noise(generator: np.random.Generator, size: tuple[int, int], scale: float) -> np.ndarray:
    """Draw noise with mean about 0 and std about 1 that varies over ``scale`` pixels."""
    coarse = generator.standard_normal((max(2, round(size[0] / scale) + 1), max(2, round(size[1] / scale) + 1)))
    smooth: np.ndarray = cv2.resize(coarse.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
    return smooth * np.float32(1.4)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Apply a Gaussian blur; wide ones on a downscaled image, without a visible difference."""
    shrink = int(max(1, min(sigma // 2.5, min(image.shape) // 8)))
    if shrink == 1:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT))
    small = cv2.resize(image, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / shrink, borderType=cv2.BORDER_REFLECT)
    return np.asarray(cv2.resize(small, image.shape[::-1], interpolation=cv2.INTER_LINEAR))


class Cells(NamedTuple):
    """The cells of a field, one entry per cell; lengths in pixels, angles in radians."""

    types: tuple[CellType, ...]  # the classes
    kind: np.ndarray  # index of the class
    row: np.ndarray  # centre
    column: np.ndarray
    angle: np.ndarray  # of the long axis
    radius: np.ndarray  # of the disc of the same area, without arms
    outline: np.ndarray  # (n, _NUM_ANGLES): radius of the outline in each direction
    nucleus_row: np.ndarray
    nucleus_column: np.ndarray
    nucleus_length: np.ndarray  # half axes
    nucleus_width: np.ndarray
    nucleus_angle: np.ndarray
    brightness: np.ndarray
    mitotic: np.ndarray  # rounded up, chromosomes condensed

    def keep(self, which: np.ndarray) -> "Cells":
        """Return some of the cells."""
        return Cells(self.types, *(column[which] for column in self[1:]))

    def of_class(self, name: str) -> np.ndarray:
        """Return a property of each cell's class."""
        return _of_class(self.types, self.kind, name)


_NUM_ANGLES = 512
_TRIES = 24  # places that a cell looks at
_MITOTIC_SHARE = 0.03


def _of_class(types: tuple[CellType, ...], kind: np.ndarray, name: str) -> np.ndarray:
    return np.asarray(np.array([getattr(cell_type, name) for cell_type in types], np.float32)[kind])


def settle(generator: np.random.Generator, config: SyntheticConfig) -> Cells:
    """Draw the cells: classes, places, outlines, nuclei."""
    n = int(generator.integers(config.num_cells[0], config.num_cells[1] + 1))
    weights = np.ones(config.num_classes) if config.class_weights is None else np.array(config.class_weights, float)
    kind = generator.choice(config.num_classes, n, p=weights / weights.sum())

    def vary(name: str, spread: float) -> np.ndarray:
        drawn: np.ndarray = _of_class(config.cell_types, kind, name) * np.exp(generator.normal(0, spread, n))
        return drawn

    mitotic = generator.random(n) < _MITOTIC_SHARE
    radius = config.cell_radius_px * vary("radius", 0.16) * np.where(mitotic, 0.7, 1)
    aspect = np.where(mitotic, 1, np.maximum(vary("aspect", 0.15), 1))
    angle = generator.uniform(0, 2 * np.pi, n)
    row, column = _draw_centres(generator, config, radius)

    nucleus = radius * np.minimum(vary("nucleus", 0.1), 0.68) * np.where(mitotic, 0.75, 1)
    nucleus_aspect = np.maximum(vary("nucleus_aspect", 0.12), 1) * np.where(mitotic, 1.5, 1)
    # A nucleus is rarely at the exact centre; in an elongated cell it is displaced more along the long axis.
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


def _draw_centres(
    generator: np.random.Generator, config: SyntheticConfig, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a centre for each cell: touching another cell, or apart from all others while there is space.

    The centre of a cell that does not fit anywhere is NaN.
    """
    size = np.array(config.size)
    centres = np.full((len(radius), 2), np.nan)
    for i in range(len(radius)):
        placed = np.flatnonzero(~np.isnan(centres[:i, 0]))
        isolated = generator.uniform(-0.02, 1.02, (_TRIES, 2)) * size
        turn = generator.uniform(0, 2 * np.pi, _TRIES)
        reach = generator.uniform(0.8, 1.0, _TRIES)
        touches = generator.random() < config.touching
        if not placed.size:
            centres[i] = isolated[0]
            continue
        neighbours = placed[generator.integers(0, placed.size, _TRIES)]
        reach *= radius[neighbours] + radius[i]
        adjacent = centres[neighbours] + reach[:, None] * np.stack([np.sin(turn), np.cos(turn)], 1)
        adjacent[((adjacent < -0.02 * size) | (adjacent > 1.02 * size)).any(1)] = np.inf
        candidates = adjacent if touches else isolated
        gap = _relative_gap(candidates, centres[placed], radius[i] + radius[placed])
        fits = np.flatnonzero(gap >= (0.78 if touches else 1.2))
        if fits.size:
            centres[i] = candidates[fits[0]]
            continue
        gap = _relative_gap(isolated, centres[placed], radius[i] + radius[placed])
        if gap.max() >= 0.7:
            centres[i] = isolated[gap.argmax()]
    return centres[:, 0], centres[:, 1]


def _relative_gap(candidates: np.ndarray, centres: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return the distance of each candidate to the nearest centre, relative to the sum of radii: 1 is touching."""
    gaps: np.ndarray = (np.hypot(*(candidates[:, None] - centres[None]).transpose(2, 0, 1)) / reach).min(1)
    return np.where(np.isfinite(gaps), gaps, -1)


def _outlines(
    generator: np.random.Generator,
    types: tuple[CellType, ...],
    kind: np.ndarray,
    radius: np.ndarray,
    aspect: np.ndarray,
    angle: np.ndarray,
    mitotic: np.ndarray,
) -> np.ndarray:
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
    outlines: np.ndarray = (np.maximum(shape, 0.3) * radius[:, None]).astype(np.float32)
    return outlines


class Canvas(NamedTuple):
    """What the stains are painted from: the grown cells, and for every pixel where in its cell it lies."""

    cells: Cells
    labels: np.ndarray
    inside: np.ndarray  # 1 in cells, 0 on the background
    edge: np.ndarray  # pixels to the cell's boundary
    along: np.ndarray  # pixels from the nucleus along and across the cell's axis
    across: np.ndarray
    nucleus_radius: np.ndarray  # distance from the nucleus' centre, its outline is 1
    outside_nucleus: np.ndarray  # pixels from the nucleus' outline outwards, as a share of the cell's radius
    nucleus: np.ndarray  # share of the pixel that is nucleus
    thickness: np.ndarray  # of the cell, about 1 in its middle
    sheet_row: np.ndarray  # where each cell begins on the texture sheets
    sheet_column: np.ndarray

    def per_pixel(self, per_cell: np.ndarray, background: float = 0) -> np.ndarray:
        """Give every pixel the value of its cell."""
        return np.asarray(np.concatenate([[background], per_cell]).astype(np.float32)[self.labels])

    def texture(self, name: str, grain: np.ndarray | float = 1.0, stretch: float = 1.0) -> np.ndarray:
        """Lay a texture sheet into every cell, along its axis, ``grain`` sheet pixels a pixel, stretched lengthwise."""
        columns = self.along * (grain / stretch) + self.sheet_column
        rows = self.across * grain + self.sheet_row
        laid: np.ndarray = cv2.remap(sheets()[name], columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
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

    exists = np.zeros(len(cells.kind), bool)
    for i, window in enumerate(windows):
        exists[i] = _keep_largest_component(labels[window], i + 1)
    canvas = _locate(cells, labels, generator)
    seen = np.bincount(labels.ravel(), canvas.nucleus.ravel(), minlength=len(exists) + 1)[1:]
    # The image border may cut a nucleus, a neighbouring cell may not.
    gap = [
        np.minimum(at, end - 1 - at) for at, end in zip((cells.nucleus_row, cells.nucleus_column), size, strict=True)
    ]
    share = np.where(np.minimum(*gap) > cells.nucleus_length, 0.88, 0.25)
    exists &= seen >= np.maximum(share * np.pi * cells.nucleus_length * cells.nucleus_width, 6)
    if exists.all():
        return canvas
    renumber = np.concatenate([[0], np.where(exists, np.cumsum(exists), 0)]).astype(np.int32)
    return _locate(cells.keep(exists), renumber[labels], generator)


def _keep_largest_component(window: np.ndarray, label: int) -> bool:
    """Clear all 4-connected components of a label but the largest; return whether the label exists."""
    # Not OpenCV's connected components, which crash on an empty window (a cell outside the image).
    components, count = ndimage.label(window == label)
    if count > 1:
        largest = 1 + int(np.bincount(components.ravel())[1:].argmax())
        window[(components > 0) & (components != largest)] = 0
    return bool(count)


def _locate(cells: Cells, labels: np.ndarray, generator: np.random.Generator) -> Canvas:
    """Compute the coordinates of every pixel within its cell."""
    n = len(cells.kind)

    def per_pixel(per_cell: np.ndarray, background: float = 1) -> np.ndarray:
        return np.asarray(np.concatenate([[background], per_cell]).astype(np.float32)[labels])

    inside = (labels > 0).astype(np.float32)
    rows = (np.arange(labels.shape[0], dtype=np.float32)[:, None] - per_pixel(cells.nucleus_row)) * inside
    columns = (np.arange(labels.shape[1], dtype=np.float32)[None, :] - per_pixel(cells.nucleus_column)) * inside

    def turned(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
