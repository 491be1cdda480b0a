"""Synthetic Cell Painting fields: the same cells in several stains, with masks and classes.

For the demo and the tests, where no data set can be downloaded. A field is generated in the order of an experiment:
positions of cells (`settle`), growth until they touch (`grow`), staining (`STAINS`, one function per stain), and image
formation (`_acquire`). The proportions were adjusted by eye to real fields:
JUMP Cell Painting, BBBC039, CellProfiler's HT29 example, T98G cells in phase contrast.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, UInt8, UInt16

from dinocell.demo.synthetic.cells import grow, settle
from dinocell.demo.synthetic.config import CELL_SHAPES, CELL_TYPES, SyntheticConfig
from dinocell.demo.synthetic.stains import STAINS
from dinocell.demo.synthetic.textures import blurred

__all__ = ["CELL_SHAPES", "CELL_TYPES", "STAINS", "SyntheticConfig", "SyntheticField", "make_field"]


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
