"""Which patches of the global crops the student does not see: block masks (BEiT) with fixed counts (DINOv3).

The counts are dealt over groups of samples, a group seeded by its samples, and every mask is drawn from (seed, epoch,
sample index, view). So masks depend neither on the number of ranks nor on workers, and each group hides the same number
of patches: with groups that no rank divides, every shape of a step is static.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Integer
from torch import Tensor

from dinocell.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How much is hidden, and in what shapes.

    Of every ``samples_per_group`` samples (each with as many global crops as there are; null: of the whole batch) the
    share ``image_share`` of the crops is masked; the masked shares of their patches are the upper edges of equal bins
    between ``min_patch_share`` and ``max_patch_share``, dealt at random. Blocks have at least ``min_block`` patches, at
    most the share ``max_block_share`` of the image, and a height over width between ``min_aspect`` and its inverse.
    """

    image_share: float = 0.5
    min_patch_share: float = 0.1
    max_patch_share: float = 0.5
    samples_per_group: int | None = None
    min_block: int = 4
    max_block_share: float = 0.5
    min_aspect: float = 0.3
    shift: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.image_share <= 1:
            raise ConfigError(f"image_share: expected a share in [0, 1], got {self.image_share}")
        if not 0 <= self.min_patch_share <= self.max_patch_share <= 1:
            raise ConfigError(
                "expected 0 <= min_patch_share <= max_patch_share <= 1, "
                f"got {self.min_patch_share} and {self.max_patch_share}"
            )
        if self.samples_per_group is not None and self.samples_per_group < 1:
            raise ConfigError(f"samples_per_group: expected at least 1, or null, got {self.samples_per_group}")
        if self.min_block < 1:
            raise ConfigError(f"min_block: expected at least 1 patch, got {self.min_block}")
        if not 0 < self.max_block_share <= 1:
            raise ConfigError(f"max_block_share: expected a share in (0, 1], got {self.max_block_share}")
        if not 0 < self.min_aspect <= 1:
            raise ConfigError(f"min_aspect: expected a ratio in (0, 1], got {self.min_aspect}")


class PatchMasks(NamedTuple):
    """Hidden patches of the global crops, crop after crop (all samples' first views, then all second ones).

    ``indices`` are those of ``masks.flatten()``, ascending: the ``select`` of the vision transformer. ``weights`` are
    one over the number of masked patches of the same crop, for `dinocell.ssl.losses.ibot_loss`.
    """

    masks: Bool[Tensor, "b h w"]
    indices: Int[Tensor, " m"]
    weights: Float[Tensor, " m"]

    def pin_memory(self) -> "PatchMasks":
        """Return the same in page-locked memory."""
        return PatchMasks(*(each.pin_memory() for each in self))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "PatchMasks":
        """Return the same on a device."""
        return PatchMasks(*(each.to(device, non_blocking=non_blocking) for each in self))


@dataclass(frozen=True)
class DrawMasks:
    """Draws the masks of each step in the reader, by the samples' positions in the stream: no other step has them."""

    config: MaskingConfig
    grid: tuple[int, int]
    views: int
    seed: int

    def __call__(self, everyone: range, own: slice) -> PatchMasks:
        """Return this rank's masks; they are dealt over the positions of all ranks."""
        return draw_masks(everyone, self.grid, self.config, seed=self.seed, epoch=0, views=self.views, own=own)


def draw_masks(
    samples: Sequence[int] | Integer[np.ndarray, " s"],
    grid: tuple[int, int],
    config: MaskingConfig,
    *,
    seed: int,
    epoch: int,
    views: int = 2,
    own: slice = slice(None),
) -> PatchMasks:
    """Draw the masks of a step.

    Parameters
    ----------
    samples
        Indices of the samples of the whole batch, over all ranks, in the data set.
    grid
        Rows and columns of patches of a global crop.
    seed, epoch
        Of the run; with the sample index they decide everything.
    views
        Global crops a sample.
    own
        The samples of this rank; only their masks are drawn.

    Raises
    ------
    ValueError
        If a seed, epoch or sample index is negative, or the grid is empty.
    """
    indices = np.asarray(samples, dtype=np.int64)
    if grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"grid: expected at least 1 x 1 patches, got {grid[0]} x {grid[1]}")
    if seed < 0 or epoch < 0 or (indices.size and indices.min() < 0):
        raise ValueError(f"expected seed, epoch and sample indices of at least 0, got seed {seed}, epoch {epoch}")
    size = config.samples_per_group or max(len(indices), 1)
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    dealt = [_deal(group, views, grid[0] * grid[1], config, (seed, epoch)) for group in groups]
    counts = np.concatenate(dealt)[own] if dealt else np.zeros((0, views), np.int64)
    # View after view, as the crops of a batch lie.
    counts = counts.T.ravel()
    keys = [(seed, epoch, int(sample), view) for view in range(views) for sample in indices[own]]
    masks = np.zeros((len(keys), *grid), bool)
    hidden = np.flatnonzero(counts)
    masks[hidden] = draw_blocks(counts[hidden], grid, config, [np.random.SeedSequence(keys[i]) for i in hidden])
    flat = torch.from_numpy(np.flatnonzero(masks))
    weights = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    return PatchMasks(torch.from_numpy(masks), flat, torch.from_numpy(weights))


def mask_counts(num_crops: int, num_patches: int, config: MaskingConfig) -> Int[np.ndarray, " n"]:
    """Return the numbers of masked patches of the crops that get a mask, ascending; the others have none.

    ``floor(image_share * num_crops)`` crops; a crop's share of masked patches is the upper edge of its bin (DINOv3).
    """
    num_masked = math.floor(config.image_share * num_crops + _ROUNDING)
    edges = np.linspace(config.min_patch_share, config.max_patch_share, num_masked + 1)[1:]
    counts: np.ndarray = np.floor(edges * num_patches + _ROUNDING).astype(np.int64)
    return counts


# 0.29 * 100 is 28.999999999999996: a share that means a whole number must give it.
_ROUNDING = 1e-9

# Blocks that a crop may try before the rest is filled patch by patch, and failures in a row after which it gives up
# (10 in BEiT). Of 4,000 masks of half of 28 x 28 patches none took more than 35 tries.
_MAX_TRIES = 100
_MAX_FAILURES = 10


def draw_blocks(
    counts: Integer[np.ndarray, " n"],
    grid: tuple[int, int],
    config: MaskingConfig,
    seeds: Sequence[np.random.SeedSequence],
) -> Bool[np.ndarray, "n h w"]:
    """Draw masks of exactly ``counts`` patches: overlapping blocks (Bao et al. 2022, BEiT), then single patches.

    All masks advance together, one try at a time, each from its own generator: a mask does not depend on its
    neighbours. A block's area is uniform between ``min_block`` and what is left to hide (or the largest block), its
    aspect log-uniform, its place uniform; it is taken if it hides anything new and not too much.
    """
    height, width = grid
    number, num_patches = len(counts), height * width
    uniform = np.empty((number, _MAX_TRIES * 4 + num_patches + 2), np.float32)
    for row, each in zip(uniform, seeds, strict=True):
        np.random.default_rng(each).random(out=row, dtype=np.float32)
    tries = uniform[:, : _MAX_TRIES * 4].reshape(number, _MAX_TRIES, 4)
    masks = np.zeros((number, height, width), bool)
    left, failures = np.array(counts, np.int64), np.zeros(number, np.int64)
    largest = max(1, int(config.max_block_share * num_patches))
    for attempt in range(_MAX_TRIES):
        active = np.flatnonzero((left > 0) & (failures < _MAX_FAILURES))
        if not active.size:
            break
        limit = np.minimum(left[active], largest)
        blocks, fits = _blocks(tries[active, attempt], limit, grid, config)
        new = blocks & ~masks[active]
        gained = new.sum((1, 2))
        taken = fits & (gained > 0) & (gained <= limit)
        masks[active[taken]] |= new[taken]
        left[active] -= np.where(taken, gained, 0)
        failures[active] = np.where(taken, 0, failures[active] + 1)
    _fill(masks, left, uniform[:, _MAX_TRIES * 4 : -2])
    if config.shift:
        shifts = (uniform[:, -2:] * grid).astype(np.int64)
        rows = (np.arange(height) - shifts[:, :1]) % height
        columns = (np.arange(width) - shifts[:, 1:]) % width
        masks = masks[np.arange(number)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return masks


def _deal(
    group: np.ndarray, views: int, num_patches: int, config: MaskingConfig, seed: tuple[int, int]
) -> Int[np.ndarray, "s v"]:
    """Return the number of masked patches of every crop of a group of samples, in random order."""
    counts = np.zeros(len(group) * views, np.int64)
    dealt = mask_counts(len(counts), num_patches, config)
    counts[: len(dealt)] = dealt
    # One number more than a mask's seed has, so that no group shares the numbers of one of its masks.
    generator = np.random.default_rng(np.random.SeedSequence([*seed, len(group), 0, *group.tolist()]))
    return generator.permutation(counts).reshape(len(group), views)


def _blocks(
    uniform: Float32[np.ndarray, "n 4"], limit: np.ndarray, grid: tuple[int, int], config: MaskingConfig
) -> tuple[Bool[np.ndarray, "n h w"], Bool[np.ndarray, " n"]]:
    """Return one block a row of random numbers, and whether it lies inside the image."""
    area = np.minimum(config.min_block, limit) + uniform[:, 0] * np.maximum(limit - config.min_block, 0)
    aspect = np.exp((2 * uniform[:, 1] - 1) * -math.log(config.min_aspect))
    height = np.maximum(np.rint(np.sqrt(area * aspect)), 1)
    width = np.maximum(np.rint(np.sqrt(area / aspect)), 1)
    top = np.floor(uniform[:, 2] * (grid[0] - height + 1))
    left = np.floor(uniform[:, 3] * (grid[1] - width + 1))
    row, column = np.arange(grid[0]), np.arange(grid[1])
    rows = (row >= top[:, None]) & (row < (top + height)[:, None])
    columns = (column >= left[:, None]) & (column < (left + width)[:, None])
    return rows[:, :, None] & columns[:, None, :], (height <= grid[0]) & (width <= grid[1])


def _fill(masks: Bool[np.ndarray, "n h w"], left: np.ndarray, uniform: Float32[np.ndarray, "n p"]) -> None:
    """Hide ``left`` further patches of each mask, at random."""
    short = np.flatnonzero(left)
    if not short.size:
        return
    flat = masks[short].reshape(len(short), -1)
    order = np.argsort(np.where(flat, 2, uniform[short]), axis=1)
    chosen = np.arange(flat.shape[1]) < left[short, None]
    filled = flat.copy()
    np.put_along_axis(filled, order, np.take_along_axis(flat, order, axis=1) | chosen, axis=1)
    masks[short] = filled.reshape(len(short), *masks.shape[1:])
