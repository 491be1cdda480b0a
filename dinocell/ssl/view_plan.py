"""Plans of views: crop, channels, rotation and photometry of each view of a tile, drawn before any pixel is read.

All random numbers derive from (seed, epoch, data set, sample). A sample has the same views on any rank and in any
loader worker, and again when a run is repeated or resumed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int64

from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.read import Origin
from dinocell.data_shards.sample import SampleInfo
from dinocell.ssl.config import TargetChannels, ViewsConfig

# Intensities of 0 to 1 that differ by less count as equal: the standard deviation of a real crop is 1,000 times larger.
MIN_DIFFERENCE = 1e-5

# Percentiles of a channel's intensities in a data set that become 0 and 1.
PERCENTILES = ("0.1", "99.9")

IntensityRanges = Sequence[Mapping[str, tuple[float, float]]]
"""By data set and channel name: the raw intensities that become 0 and 1."""

# Attempts to draw a crop that fits into the tile; if all fail, the first one is clipped to the tile.
_MAX_TRIES = 10
# Photometry factors are normal with mean 1, clipped at this minimum (Cell-DINO).
_MIN_FACTOR = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewPlan:
    """The ``n`` views of one tile, global ones first; ``k`` output channels, ``c`` channels of the tile.

    After the local views there may be targets, one per global view: the same crop in other channels.

    Attributes
    ----------
    boxes
        First row, first column, height and width of each crop on the tile.
    mixing
        The output channels as weighted sums of the tile's channels, after photometry.
    factor, offset, contrast
        Photometry of the tile's channels. A raw intensity times ``factor`` plus ``offset`` (which combine intensity
        range and brightness) is clipped to 0 to 1, then moved away from the crop's mean by ``contrast``, and clipped
        again.
    protein
        For ``stack``: the value that the protein's maximum is scaled to, before clipping at 1; negative: unchanged.
    mirrored, turned
        Whether rows are reversed, and the number of right angles.
    blur_sigma_px, noise_sigma, noise_seed
        Standard deviations of Gaussian blur and noise, 0: none. Noise of a view is seeded by the seed plus its index.
    """

    boxes: Int64[np.ndarray, "n 4"]
    mixing: Float32[np.ndarray, "n k c"]
    factor: Float32[np.ndarray, "n c"]
    offset: Float32[np.ndarray, "n c"]
    contrast: Float32[np.ndarray, "n c"]
    protein: Float32[np.ndarray, " n"]
    mirrored: Bool[np.ndarray, " n"]
    turned: Int64[np.ndarray, " n"]
    blur_sigma_px: Float32[np.ndarray, " n"]
    noise_sigma: Float32[np.ndarray, " n"]
    noise_seed: int

    def channels(self) -> tuple[int, ...]:
        """Return the indices of the tile's channels that at least one view needs."""
        return tuple(np.flatnonzero((self.mixing != 0).any(axis=(0, 1))).tolist())


def plan_views(
    info: SampleInfo,
    origin: Origin,
    config: ViewsConfig,
    ranges: IntensityRanges,
    *,
    seed: int,
    targets: TargetChannels = "same",
) -> ViewPlan:
    """Draw the views of a sample.

    Parameters
    ----------
    info, origin
        Size and channel names of the tile, and the position of the sample in the data.
    ranges
        From `intensity_ranges`.
    seed
        Of the run.
    targets
        Channels of the targets of a reconstruction, which are planned in addition; ``same``: none, the global views are
        the targets. The views themselves do not depend on it.
    """
    rng = np.random.default_rng([seed, origin.epoch, origin.data_set, origin.sample])
    n, c = config.num_views, len(info.channels)
    # The order of the draws is part of the format: another order gives another run.
    mixing = _draw_mixing(rng, info.channels, config)
    brightness = np.maximum(rng.normal(1, config.brightness, (n, c)), _MIN_FACTOR)
    contrast = np.maximum(rng.normal(1, config.contrast, (n, c)), _MIN_FACTOR)
    blurred, noisy = rng.random(n) < config.blur, rng.random(n) < config.noise
    protein = np.where(rng.random(n) < config.protein_contrast, rng.uniform(0, 2, n), -1.0)
    # Intensity range and brightness in one linear map: (raw - low) / (high - low) * brightness.
    low, high = np.array([ranges[origin.data_set][name] for name in info.channels], np.float32).T
    factor = brightness.astype(np.float32) / (high - low)
    plan = ViewPlan(
        boxes=_draw_boxes(rng, info.height, info.width, config),
        mixing=mixing,
        factor=factor,
        offset=-low * factor,
        contrast=contrast.astype(np.float32),
        protein=protein.astype(np.float32),
        mirrored=(rng.random(n) < 0.5) & config.flips,
        turned=rng.integers(0, 4, n) * config.right_angles,
        blur_sigma_px=(blurred * rng.uniform(*config.blur_sigma_px, n)).astype(np.float32),
        noise_sigma=(noisy * rng.uniform(*config.noise_sigma, n)).astype(np.float32),
        noise_seed=int(rng.integers(2**62)),
    )
    return plan if targets == "same" else _with_targets(plan, rng, config, targets, factor=1 / (high - low), low=low)


def planned_kinds(plans: Sequence[ViewPlan], config: ViewsConfig) -> tuple[tuple[range, int], ...]:
    """Return `ViewsConfig.kinds`, followed by the targets if the plans have any."""
    targets = range(config.num_views, len(plans[0].boxes) if plans else config.num_views)
    return (*config.kinds, (targets, config.global_size)) if targets else config.kinds


def _with_targets(
    plan: ViewPlan,
    rng: np.random.Generator,
    config: ViewsConfig,
    targets: TargetChannels,
    *,
    factor: Float32[np.ndarray, " c"],
    low: Float32[np.ndarray, " c"],
) -> ViewPlan:
    """Add a target per global view: the same crop with the same rotation, in other channels, without photometry."""
    count = config.num_global
    seen, drawn = plan.mixing[:count, 0], rng.random(count)
    mixing = np.full_like(seen, 1 / seen.shape[1])
    if targets == "other":
        for view, weights in enumerate(seen):
            others = np.flatnonzero(weights == 0)
            # A view of the mean shows every channel: any channel is the target, as for a tile with one channel.
            candidates = others if others.size else np.arange(len(weights))
            mixing[view] = np.eye(len(weights), dtype=np.float32)[candidates[int(drawn[view] * len(candidates))]]
    zeros, ones = np.zeros(count, np.float32), np.ones_like(plan.contrast[:count])
    added = {
        "boxes": plan.boxes[:count],
        "mixing": mixing[:, None],
        "factor": ones * factor,
        "offset": ones * (-low * factor),
        "contrast": ones,
        "protein": zeros - 1,
        "mirrored": plan.mirrored[:count],
        "turned": plan.turned[:count],
        "blur_sigma_px": zeros,
        "noise_sigma": zeros,
    }
    extended = {name: np.concatenate((getattr(plan, name), values)) for name, values in added.items()}
    return replace(plan, **extended)  # type: ignore[arg-type]


def intensity_ranges(manifests: Sequence[Manifest]) -> list[dict[str, tuple[float, float]]]:
    """Return by data set and channel the raw intensities that become 0 and 1: the 0.1 and 99.9 percentiles.

    Where both are equal (a nearly constant channel), its minimum and maximum are used instead.
    """
    ranges: list[dict[str, tuple[float, float]]] = []
    for manifest in manifests:
        ranges.append({})
        for name, channel in manifest.channels.items():
            low, high = (channel.percentiles[percentile] for percentile in PERCENTILES)
            if high <= low:
                low, high = channel.minimum, max(channel.maximum, channel.minimum + 1)
            ranges[-1][name] = (low, high)
    return ranges


def _draw_mixing(rng: np.random.Generator, names: Sequence[str], config: ViewsConfig) -> Float32[np.ndarray, "n k c"]:
    """Draw which channels of the tile each view shows, by the channel policy."""
    n, c = config.num_views, len(names)
    if config.policy == "stack":
        # One row of the mixing matrix per input channel: it selects the tile's channel of that name, if there is one.
        mixing = np.zeros((n, len(config.channels), c), np.float32)
        for index, name in enumerate(config.channels):
            if name in names:
                mixing[:, index, list(names).index(name)] = 1
        # In some views one channel other than the protein is blanked.
        droppable = [index for index, name in enumerate(config.channels) if name != config.protein_channel]
        is_dropped = rng.random(n) < config.drop_channel
        dropped = rng.integers(0, max(1, len(droppable)), n)
        if len(config.channels) > 1:
            for view in np.flatnonzero(is_dropped):
                mixing[view, droppable[dropped[view]]] = 0
        return mixing
    # One output channel: the mean of all channels (weights 1/c) or a single random one (a row of the unit matrix).
    single = rng.integers(0, c, n)
    averaged = rng.random(n) < [*config.global_mean_probability, *([config.local_mean_probability] * config.num_local)]
    if config.policy == "average":
        averaged[:] = True
    elif config.policy == "bag":
        averaged[:] = False
        single[:] = single[0]
    one_channel = np.eye(c, dtype=np.float32)[single]
    return np.where(averaged[:, None], np.float32(1 / c), one_channel)[:, None, :].astype(np.float32)


def _draw_boxes(rng: np.random.Generator, height: int, width: int, config: ViewsConfig) -> Int64[np.ndarray, "n 4"]:
    """Draw crops inside the tile with uniform area and log-uniform aspect, as torchvision's RandomResizedCrop."""
    n = config.num_views
    areas = np.array([config.global_area] * config.num_global + [config.local_area] * config.num_local)
    # All attempts of all views at once (n, tries); the first attempt that fits into the tile is taken.
    share = rng.uniform(size=(n, _MAX_TRIES)) * (areas[:, 1:] - areas[:, :1]) + areas[:, :1]
    aspect = np.exp(rng.uniform(np.log(config.aspect[0]), np.log(config.aspect[1]), (n, _MAX_TRIES)))
    heights = np.rint(np.sqrt(share * height * width / aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(share * height * width * aspect)).astype(np.int64)
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    # argmax is the first attempt that fits, and 0 if none does: that one is clipped, which changes no other.
    views, first = np.arange(n), fits.argmax(axis=1)
    box_height = np.clip(heights[views, first], 1, height)
    box_width = np.clip(widths[views, first], 1, width)
    top = np.floor(rng.random(n) * (height - box_height + 1)).astype(np.int64)
    left = np.floor(rng.random(n) * (width - box_width + 1)).astype(np.int64)
    return np.stack([top, left, box_height, box_width], axis=1)
