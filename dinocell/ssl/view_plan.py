"""What each view of a tile will be: crop, channels, turns and photometry, drawn before a pixel is touched.

Everything is drawn from (seed, epoch, data set, sample), so a sample has the same views whichever rank or worker meets
it, and a run that is repeated or resumed sees them again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64

from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.read import Origin
from dinocell.data_shards.sample import SampleInfo
from dinocell.errors import ConfigError

Policy = Literal["consistency", "average", "bag", "stack"]

# Tries for a crop of the wanted area and aspect that fits; then the first one is cut to the tile.
_TRIES = 10
# Cell-DINO's law: a factor from a normal distribution about 1, and at least this.
_LEAST_FACTOR = 0.5


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How tiles become views (Cell-DINO's crops and photometry; the channel policies are ours).

    Attributes
    ----------
    policy
        ``consistency``: some views are the mean of all channels, the others one random channel, so that features stop
        depending on the stain. ``average``: the mean everywhere. ``bag``: one random channel for all views of a sample
        (channel-adaptive DINO). ``stack``: all channels, as Cell-DINO.
    global_mean_probability, local_mean_probability
        For ``consistency``: the chance of a view to be the mean; one number a global view, one for all local views.
    channels
        For ``stack``: the names of the input channels, in order; a tile's other channels are not used, missing ones 0.
    global_size, global_area, local_size, local_area
        Side of a crop in pixels, and the least and largest share of the tile's area that it shows.
    aspect
        Least and largest ratio of a crop's sides on the tile.
    right_angles
        Turn by a random multiple of 90 degrees.
    brightness, contrast
        Deviation of the factors, one a channel and view; always applied, before channels are averaged.
    drop_channel, protein_contrast, protein_channel
        For ``stack``: the chance to blank one channel (never the protein), and to change the protein's contrast by
        0 to 2 over its maximum.
    blur, blur_sigma_px, noise, noise_sigma
        Chances of a Gaussian blur and of Gaussian noise, and the ranges of their deviations (noise: of a unit range).
    black, white
        Percentiles of a channel's values in the data set (manifest) that become 0 and 1.
    """

    policy: Policy = "consistency"
    global_mean_probability: tuple[float, ...] = (1.0, 0.0)
    local_mean_probability: float = 0.3
    channels: tuple[str, ...] = ()
    num_local: int = 8
    global_size: int = 224
    local_size: int = 96
    global_area: tuple[float, float] = (0.4, 1.0)
    local_area: tuple[float, float] = (0.05, 0.4)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flips: bool = True
    right_angles: bool = True
    brightness: float = 0.2
    contrast: float = 0.2
    drop_channel: float = 0.2
    protein_contrast: float = 0.2
    protein_channel: str = "protein"
    blur: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    noise: float = 0.0
    noise_sigma: tuple[float, float] = (0.01, 0.05)
    black: str = "0.1"
    white: str = "99.9"

    def __post_init__(self) -> None:
        shares = {"local_mean_probability": self.local_mean_probability, "drop_channel": self.drop_channel}
        shares |= {"protein_contrast": self.protein_contrast, "blur": self.blur, "noise": self.noise}
        shares |= {f"global_mean_probability[{k}]": value for k, value in enumerate(self.global_mean_probability)}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a chance from 0 to 1, got {share}")
        for name in ("global_area", "local_area"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}: expected 0 < least <= largest <= 1, got {low} and {high}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect: expected 0 < least <= largest, got {self.aspect}")
        if self.num_global < 2:
            raise ValueError("global_mean_probability: expected a number for each of at least 2 global views")
        for name, least in (
            ("num_local", 0),
            ("global_size", 1),
            ("local_size", 1),
            ("brightness", 0),
            ("contrast", 0),
        ):
            value = getattr(self, name)
            if not (value >= least and np.isfinite(value)):
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("blur_sigma_px", "noise_sigma"):
            low, high = getattr(self, name)
            if not (0 <= low <= high and np.isfinite(high)):
                raise ValueError(f"{name}: expected 0 <= least <= largest, got {low} and {high}")
        if self.policy == "stack" and not self.channels:
            raise ValueError("channels: the policy stack needs the names of the input channels, in order")
        if len(set(self.channels)) < len(self.channels):
            raise ValueError(f"channels: expected each name once, got {', '.join(self.channels)}")
        try:
            ascending = float(self.black) < float(self.white)
        except ValueError:
            ascending = False
        if not ascending:
            raise ValueError(f"black, white: expected two percentiles, ascending, got {self.black} and {self.white}")

    @property
    def num_global(self) -> int:
        """Global views of a tile."""
        return len(self.global_mean_probability)

    @property
    def num_views(self) -> int:
        """All views of a tile, the global ones first."""
        return self.num_global + self.num_local

    @property
    def kinds(self) -> tuple[tuple[range, int], tuple[range, int]]:
        """The numbers of the global views and their side in pixels, then those of the local ones."""
        return (
            (range(self.num_global), self.global_size),
            (range(self.num_global, self.num_views), self.local_size),
        )

    @property
    def in_channels(self) -> int:
        """Input channels of the model."""
        return len(self.channels) if self.policy == "stack" else 1


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewPlan:
    """The views of one tile; ``n`` views, the global ones first, ``k`` output channels, ``c`` channels of the tile.

    Attributes
    ----------
    boxes
        First row, first column, height and width of each crop on the tile.
    mixing
        The output channels as weighted sums of the tile's channels, after photometry.
    gain, contrast
        Photometry of the tile's channels, on values of 0 to 1: times ``gain``, clamped to 0 to 1, then moved away from
        the crop's mean by ``contrast`` and clamped again.
    protein
        For ``stack``: what the protein's largest value becomes, values above 1 then clamped; negative: left alone.
    mirrored, turned
        Whether rows are reversed, and the number of right angles.
    blur_sigma_px, noise_sigma, noise_seed
        Deviations of the Gaussian blur and noise, 0: none; where the noise comes from, with the view's number.
    """

    boxes: Int64[np.ndarray, "n 4"]
    mixing: Float32[np.ndarray, "n k c"]
    gain: Float32[np.ndarray, "n c"]
    contrast: Float32[np.ndarray, "n c"]
    protein: Float32[np.ndarray, " n"]
    mirrored: Bool[np.ndarray, " n"]
    turned: Int64[np.ndarray, " n"]
    blur_sigma_px: Float32[np.ndarray, " n"]
    noise_sigma: Float32[np.ndarray, " n"]
    noise_seed: int

    def channels(self) -> tuple[int, ...]:
        """Return the channels of the tile that any view needs."""
        return tuple(int(channel) for channel in np.flatnonzero((self.mixing != 0).any(axis=(0, 1))))


@dataclass(frozen=True)
class PlanViews:
    """Plans the views of each sample in the reader, which then decodes the channels that they need and no other."""

    config: ViewsConfig
    seed: int

    def __call__(self, info: SampleInfo, origin: Origin) -> ViewPlan:
        """Return the plan of a sample."""
        return plan_views(info, origin, self.config, seed=self.seed)


def plan_views(info: SampleInfo, origin: Origin, config: ViewsConfig, *, seed: int) -> ViewPlan:
    """Draw the views of a sample.

    Parameters
    ----------
    info, origin
        From the reader; only the tile's size and channel names count, and where the sample comes from.
    """
    rng = np.random.default_rng([seed, origin.epoch, origin.data_set, origin.sample])
    n, c = config.num_views, len(info.channels)
    mixing = _draw_mixing(rng, info.channels, config)
    gain = np.maximum(rng.normal(1, config.brightness, (n, c)), _LEAST_FACTOR)
    contrast = np.maximum(rng.normal(1, config.contrast, (n, c)), _LEAST_FACTOR)
    blurred, noisy = rng.random(n) < config.blur, rng.random(n) < config.noise
    protein = np.where(rng.random(n) < config.protein_contrast, rng.uniform(0, 2, n), -1.0)
    return ViewPlan(
        boxes=_draw_boxes(rng, info.height, info.width, config),
        mixing=mixing,
        gain=gain.astype(np.float32),
        contrast=contrast.astype(np.float32),
        protein=protein.astype(np.float32),
        mirrored=(rng.random(n) < 0.5) & config.flips,
        turned=rng.integers(0, 4, n) * config.right_angles,
        blur_sigma_px=(blurred * rng.uniform(*config.blur_sigma_px, n)).astype(np.float32),
        noise_sigma=(noisy * rng.uniform(*config.noise_sigma, n)).astype(np.float32),
        noise_seed=int(rng.integers(2**62)),
    )


def _draw_mixing(rng: np.random.Generator, names: Sequence[str], config: ViewsConfig) -> Float32[np.ndarray, "n k c"]:
    n, c = config.num_views, len(names)
    if config.policy == "stack":
        mixing = np.zeros((n, len(config.channels), c), np.float32)
        for number, name in enumerate(config.channels):
            if name in names:
                mixing[:, number, list(names).index(name)] = 1
        droppable = [number for number, name in enumerate(config.channels) if name != config.protein_channel]
        dropped = rng.random(n) < config.drop_channel
        which = rng.integers(0, max(1, len(droppable)), n)
        if len(config.channels) > 1:
            for view in np.flatnonzero(dropped):
                mixing[view, droppable[which[view]]] = 0
        return mixing
    single = rng.integers(0, c, n)
    averaged = rng.random(n) < [
        *config.global_mean_probability,
        *([config.local_mean_probability] * config.num_local),
    ]
    if config.policy == "average":
        averaged[:] = True
    elif config.policy == "bag":
        averaged[:] = False
        single[:] = single[0]
    one_channel = np.eye(c, dtype=np.float32)[single]
    return np.where(averaged[:, None], np.float32(1 / c), one_channel)[:, None, :].astype(np.float32)


def _draw_boxes(rng: np.random.Generator, height: int, width: int, config: ViewsConfig) -> Int64[np.ndarray, "n 4"]:
    """Draw crops of a random share of the area and a random aspect that lie inside the tile."""
    n = config.num_views
    areas = np.array([config.global_area] * config.num_global + [config.local_area] * config.num_local)
    share = rng.uniform(size=(n, _TRIES)) * (areas[:, 1:] - areas[:, :1]) + areas[:, :1]
    aspect = np.exp(rng.uniform(np.log(config.aspect[0]), np.log(config.aspect[1]), (n, _TRIES)))
    heights = np.rint(np.sqrt(share * height * width / aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(share * height * width * aspect)).astype(np.int64)
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = fits.argmax(axis=1)
    rows = np.arange(n)
    chosen_height = np.where(fits.any(axis=1), heights[rows, first], np.clip(heights[:, 0], 1, height))
    chosen_width = np.where(fits.any(axis=1), widths[rows, first], np.clip(widths[:, 0], 1, width))
    top = np.floor(rng.random(n) * (height - chosen_height + 1)).astype(np.int64)
    left = np.floor(rng.random(n) * (width - chosen_width + 1)).astype(np.int64)
    return np.stack([top, left, chosen_height, chosen_width], axis=1)


# --- view_levels ---------------------------------------------------------------------------------------------------
#
# What raw values are 0 and 1, by data set and channel, and what a view makes of that.

# Values of 0 to 1 that differ by less are the same: a real crop's deviation is a thousand times larger.
LEAST_DIFFERENCE = 1e-5
# By data set and channel name: the raw values that are 0 and 1.
Levels = Sequence[Mapping[str, tuple[float, float]]]


def channel_levels(manifests: Sequence[Manifest], config: ViewsConfig) -> list[dict[str, tuple[float, float]]]:
    """Take the values that become 0 and 1 from the statistics of each data set.

    Where both percentiles are one value, the least and the largest stand in for them.

    Raises
    ------
    ConfigError
        If a manifest does not hold these percentiles.
    """
    levels: list[dict[str, tuple[float, float]]] = []
    for manifest in manifests:
        found = {}
        for name, known in manifest.channels.items():
            if not {config.black, config.white} <= known.percentiles.keys():
                raise ConfigError(
                    f"views.black, views.white: expected two of the percentiles {', '.join(known.percentiles)}, "
                    f"got {config.black} and {config.white}"
                )
            low, high = known.percentiles[config.black], known.percentiles[config.white]
            found[name] = (low, high) if high > low else (known.minimum, max(known.maximum, known.minimum + 1))
        levels.append(found)
    return levels


class Scales(NamedTuple):
    """What raw values are multiplied by and what is then added, by view and channel: levels and gain in one."""

    factor: np.ndarray  # (n c)
    offset: np.ndarray  # (n c)


def scales_of(info: SampleInfo, levels: Mapping[str, tuple[float, float]], plan: ViewPlan) -> Scales:
    """Return the scales of a tile's views."""
    low, high = np.array([levels[name] for name in info.channels], np.float32).T
    factor = plan.gain / (high - low)
    return Scales(factor, -low * factor)
