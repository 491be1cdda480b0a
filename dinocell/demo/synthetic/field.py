"""Synthetic Cell Painting fields: the same cells in several stains, with masks and classes.

For the demo and the tests, where no data set can be downloaded. A field is generated in the order of an experiment:
positions of cells (`settle`), growth until they touch (`grow`), staining (`STAINS`, one function per stain), and image
formation (`_acquire`). The proportions were adjusted by eye to real fields:
JUMP Cell Painting, BBBC039, CellProfiler's HT29 example, T98G cells in phase contrast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, UInt8, UInt16

from dinocell.demo.synthetic.cells import Canvas, blurred, grow, settle
from dinocell.demo.synthetic.config import CELL_LINES, CELL_SHAPES, CELL_TYPES, SyntheticConfig

__all__ = ["CELL_LINES", "CELL_SHAPES", "CELL_TYPES", "STAINS", "SyntheticConfig", "SyntheticField", "make_field"]


@dataclass(frozen=True, kw_only=True)
class SyntheticField:
    """One field of view with its labels.

    Cell ``i`` (ids are 1 to n without gaps) is ``labels == i``, its nucleus is ``nuclei == i``, and its class is
    ``classes[i - 1]``, an index into ``class_names``. Every cell is 4-connected and has a nucleus in the image.
    """

    pixels: UInt8[np.ndarray, "c h w"] | UInt16[np.ndarray, "c h w"]
    labels: Int32[np.ndarray, "h w"]
    nuclei: Int32[np.ndarray, "h w"]
    classes: Int[np.ndarray, " n"]
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]


def make_field(seed: int | np.random.SeedSequence, config: SyntheticConfig | None = None) -> SyntheticField:
    """Draw one field of view; the same seed and configuration give the same field, in any process and order.

    Parameters
    ----------
    seed
        A number of at least 0, or a seed sequence (``SeedSequence((run, index))`` for the field ``index`` of a run).
    config
        Appearance of the field; None is ``SyntheticConfig()``.
    """
    config = config or SyntheticConfig()
    # Each part has its own random stream, so that more channels or less noise do not change the rest of the field.
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    streams = [
        np.random.default_rng(np.random.SeedSequence(root.entropy, spawn_key=(*root.spawn_key, part)))
        for part in range(1 + len(STAINS))
    ]
    cells = settle(streams[0], config)
    canvas = grow(cells, config, streams[0])
    pixels = [
        _acquire(STAINS[name](canvas, stream), stream, config, light=name == "Phase")
        for name in config.channels
        for stream in [streams[1 + list(STAINS).index(name)]]
    ]
    return SyntheticField(
        pixels=np.stack(pixels),
        labels=canvas.labels,
        nuclei=np.where(canvas.nucleus_radius < 1, canvas.labels, 0).astype(np.int32),
        classes=canvas.cells.kind.copy(),
        channel_names=config.channels,
        class_names=tuple(kind.name for kind in config.cell_types[: config.num_classes]),
    )


def _acquire(scene: np.ndarray, generator: np.random.Generator, config: SyntheticConfig, *, light: bool) -> np.ndarray:
    """Simulate the acquisition: blur, vignetting, shot noise, camera. ``light``: transmitted light."""
    height, width = config.size
    scene = blurred(scene.astype(np.float32), generator.uniform(*config.blur_px))
    exposure = np.exp(generator.normal(0, 0.12))
    photons_per_unit = config.photons * (10 if light else 1)  # transmitted light is brighter
    if not light:
        glow = blurred(scene, config.cell_radius_px * 0.6)
        scene = (1 - config.haze) * scene + config.haze * glow + 0.02
    centre_row, centre_column = generator.uniform(0.3, 0.7, 2)
    rows = (np.arange(height, dtype=np.float32)[:, None] / height - np.float32(centre_row)) ** 2
    columns = (np.arange(width, dtype=np.float32)[None, :] / width - np.float32(centre_column)) ** 2
    # A condenser is adjusted for even illumination, so transmitted light falls off less.
    falloff = np.float32(config.illumination * (0.4 if light else 1)) * (rows + columns)
    photons = scene * (1 - falloff) * np.float32(photons_per_unit * exposure)
    # A normal distribution with the variance of the Poisson distribution, at a tenth of the cost.
    noise = generator.standard_normal(scene.shape, np.float32)
    photons += noise * np.sqrt(np.maximum(photons, 0) + np.float32(config.read_noise**2))
    top = 2**config.bit_depth - 1
    unit = (0.5 if light else 0.3) * top / photons_per_unit
    counts = np.clip(np.rint(photons * np.float32(unit) + 0.01 * top), 0, top)
    return np.asarray(counts.astype(np.uint8 if config.bit_depth == 8 else np.uint16))


# --- stains ---------------------------------------------------------------------------------------------------------
#
# One function per stain renders the structures that it labels.


def _varied(generator: np.random.Generator, canvas: Canvas, name: str, spread: float = 0.15) -> np.ndarray:
    """Return a property of the cells for every pixel, with variation around the value of the class."""
    of_class = canvas.cells.of_class(name)
    return canvas.per_pixel(of_class * np.exp(generator.normal(0, spread, len(of_class))))


def _brightness(generator: np.random.Generator, canvas: Canvas) -> np.ndarray:
    kind = canvas.cells.kind
    return canvas.per_pixel(canvas.cells.brightness * np.exp(generator.normal(0, 0.15, len(kind))))


def _dna(canvas: Canvas, generator: np.random.Generator) -> np.ndarray:
    """Paint nuclei with chromatin, and chromosomes of dividing cells."""
    grain = canvas.texture("grain", _varied(generator, canvas, "chromatin_grain"))
    contrast = _varied(generator, canvas, "chromatin")
    dome = 0.72 + 0.28 * np.sqrt(np.clip(1 - canvas.nucleus_radius**2, 0, 1))
    condensed = 1 + 1.1 * canvas.per_pixel(canvas.cells.mitotic)
    chromatin = np.maximum(1 + contrast * grain, 0.25)
    light = _brightness(generator, canvas) * condensed
    return np.asarray(0.9 * light * canvas.nucleus * dome * chromatin + 0.012 * canvas.inside)


def _rna(canvas: Canvas, generator: np.random.Generator) -> np.ndarray:
    """Paint nucleoli and the cytoplasm, fullest about the nucleus."""
    n = len(canvas.cells.kind)
    count = generator.poisson(canvas.cells.of_class("nucleoli")) * ~canvas.cells.mitotic
    count = np.maximum(count, ~canvas.cells.mitotic)
    pixels = np.flatnonzero(canvas.nucleus)
    owner = canvas.labels.ravel()[pixels] - 1
    along, across = canvas.along.ravel()[pixels], canvas.across.ravel()[pixels]
    radius = np.sqrt(canvas.cells.nucleus_length * canvas.cells.nucleus_width)
    painted = np.zeros(pixels.size, np.float32)
    for j in range(min(int(count.max(initial=0)), 8)):
        turn, out = generator.uniform(0, 2 * np.pi, n), radius * generator.uniform(0.1, 0.62, n)
        size = radius * generator.uniform(0.13, 0.24, n) * (1.6 / np.sqrt(np.maximum(count, 1)))
        distance = ((along - (out * np.cos(turn))[owner]) ** 2 + (across - (out * np.sin(turn))[owner]) ** 2).astype(
            np.float32
        )
        spot = np.exp(-((distance / (size**2).astype(np.float32)[owner]) ** 2)) * (j < count)[owner]
        painted = np.maximum(painted, spot)
    spots = np.zeros_like(canvas.edge)
    spots.ravel()[pixels] = painted
    near = np.exp(-canvas.outside_nucleus / np.maximum(_varied(generator, canvas, "reach"), 0.05))
    body = canvas.thickness * (0.25 + 0.6 * near) * (1 + 0.1 * canvas.texture("grain", 0.8))
    return np.asarray(_brightness(generator, canvas) * (body + (0.15 + 0.5 * spots) * canvas.nucleus))


def _er(canvas: Canvas, generator: np.random.Generator) -> np.ndarray:
    """Paint a net that is dense about the nucleus, with the nuclear envelope as a rim."""
    near = np.exp(-canvas.outside_nucleus / np.maximum(0.85 * _varied(generator, canvas, "reach"), 0.05))
    rim = np.exp(-(((canvas.nucleus_radius - 1.06) / 0.16) ** 2))
    net = 0.55 + 0.75 * canvas.texture("net") + 0.08 * canvas.texture("grain", 1.3)
    body = canvas.thickness * (0.16 + 0.85 * near) * net * (1 - 0.45 * canvas.nucleus)
    return np.asarray(_brightness(generator, canvas) * (body + 0.15 * rim * canvas.inside))


def _agp(canvas: Canvas, generator: np.random.Generator) -> np.ndarray:
    """Paint actin at the edge and in fibres, the plasma membrane, and the Golgi beside the nucleus."""
    cells = canvas.cells
    n = len(cells.kind)
    patchy = 0.6 + 0.5 * np.clip(canvas.texture("grain", 0.3), -1, 2)
    edge = _varied(generator, canvas, "edge_actin") * np.exp(-(((canvas.edge - 1) / 1.4) ** 2)) * patchy
    fibres = _varied(generator, canvas, "fibre_actin") * canvas.texture("fibres", 0.8, stretch=5.0)
    turn = generator.uniform(0, 2 * np.pi, n)
    beside = np.sqrt(cells.nucleus_length * cells.nucleus_width) * 1.25
    along = canvas.along - canvas.per_pixel(beside * np.cos(turn))
    across = canvas.across - canvas.per_pixel(beside * np.sin(turn))
    cloud = np.maximum(_varied(generator, canvas, "golgi") * canvas.per_pixel(cells.radius), 1)
    golgi = np.exp(-((along**2 + across**2) / cloud**2)) * (0.25 + 1.6 * canvas.texture("specks", 0.9))
    body = canvas.thickness * (0.3 + 0.05 * canvas.texture("grain", 0.9) + 0.55 * fibres * (1 - 0.4 * canvas.nucleus))
    return np.asarray(_brightness(generator, canvas) * (body + 0.5 * edge + 0.75 * golgi) * canvas.inside)


def _mito(canvas: Canvas, generator: np.random.Generator) -> np.ndarray:
    """Paint threads and grains about the nucleus, none in it."""
    near = np.exp(-((canvas.outside_nucleus / np.maximum(_varied(generator, canvas, "reach"), 0.05)) ** 2))
    grain = _varied(generator, canvas, "mito_grain")
    threads = canvas.texture("filaments", grain, stretch=1.6) + 0.5 * canvas.texture("specks", grain)
    body = 0.12 + near * (0.28 + 0.95 * threads)
    return np.asarray(_brightness(generator, canvas) * canvas.thickness * body * (1 - 0.75 * canvas.nucleus))


def _phase(canvas: Canvas, generator: np.random.Generator) -> np.ndarray:
    """Paint the phase-contrast look: grey ground, dark cells, bright halos, dark granules."""
    granules = canvas.texture("specks", 0.7)
    near = np.exp(-canvas.outside_nucleus / np.maximum(_varied(generator, canvas, "reach"), 0.05))
    envelope = np.exp(-(((canvas.nucleus_radius - 1) / 0.1) ** 2))
    contrast = np.sqrt(np.maximum(_brightness(generator, canvas), 0.3))
    rim = np.exp(-(((canvas.edge - 2) / 1.6) ** 2)) * (0.5 + 0.4 * np.clip(canvas.texture("grain", 0.3), -1, 2))
    path = (
        contrast * canvas.thickness * (0.75 + 0.13 * canvas.texture("grain") + 0.15 * canvas.nucleus + 0.3 * envelope)
    )
    path += (
        contrast * canvas.inside * (1.3 * granules * near + 0.75 * rim * _varied(generator, canvas, "edge_actin", 0.3))
    )
    # The phase plate dims what is thicker than its surroundings, and what is thinner looks brighter for it.
    halo = path - 0.6 * blurred(path, 3.5) - 0.36 * blurred(path, 10.0)
    return np.asarray(np.maximum(1 - 0.55 * halo, 0.12))


STAINS: dict[str, Callable[[Canvas, np.random.Generator], np.ndarray]] = {
    "DNA": _dna,
    "RNA": _rna,
    "ER": _er,
    "AGP": _agp,
    "Mito": _mito,
    "Phase": _phase,
}
