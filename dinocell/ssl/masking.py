"""Which patches of the global crops are masked for the student: block masks (BEiT) with fixed counts (DINOv3).

The numbers of masked patches are distributed over groups of samples, seeded by the group's samples, and each mask is
drawn from (seed, sample, view). So masks do not depend on the number of ranks or workers, and every group has the same
total: if no group is split between ranks, all shapes of a step are static.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, Integer
from torch import Tensor

from dinocell.ssl.config import MaskingConfig


class PatchMasks(NamedTuple):
    """Masked patches of the global crops, ordered by view, then sample.

    ``indices`` are those of ``masks.flatten()``, ascending: the ``select`` of the vision transformer. ``weights`` are
    one over the number of masked patches of the same crop, for `dinocell.ssl.losses.ibot_loss`.
    """

    masks: Bool[Tensor, "b h w"]
    indices: Int[Tensor, " m"]
    weights: Float[Tensor, " m"]

    def pin_memory(self) -> "PatchMasks":
        """Return the same in page-locked memory."""
        return PatchMasks(*(tensor.pin_memory() for tensor in self))

    def to(self, device: torch.device) -> "PatchMasks":
        """Return the same on a device, without waiting for the device."""
        return PatchMasks(*(tensor.to(device, non_blocking=True) for tensor in self))


def draw_masks(
    samples: Sequence[int] | Integer[np.ndarray, " s"],
    grid: tuple[int, int],
    config: MaskingConfig,
    *,
    seed: int,
    views: int = 2,
    own: slice = slice(None),
) -> PatchMasks:
    """Draw the masks of a step.

    Parameters
    ----------
    samples
        Positions in the stream of the samples of the whole batch, over all ranks.
    grid
        Rows and columns of patches of a global crop.
    seed
        Of the run; together with the position it determines a mask.
    views
        Global crops per sample.
    own
        The samples of this rank; only their masks are drawn.
    """
    positions = np.asarray(samples, dtype=np.int64)
    size = config.samples_per_group or max(len(positions), 1)
    groups = [positions[start : start + size] for start in range(0, len(positions), size)]
    counts = [_distribute(group, views, grid[0] * grid[1], config, seed) for group in groups]
    # (samples, views) to the order of the crops in a batch: view by view.
    own_counts = (np.concatenate(counts)[own] if counts else np.zeros((0, views), np.int64)).T.ravel()
    # The 0 held an epoch, which positions in the stream do not need; it keeps the masks of earlier runs.
    keys = [(seed, 0, int(position), view) for view in range(views) for position in positions[own]]
    masks = np.zeros((len(keys), *grid), bool)
    masked = np.flatnonzero(own_counts)
    masks[masked] = draw_blocks(own_counts[masked], grid, config, [np.random.SeedSequence(keys[i]) for i in masked])
    indices = torch.from_numpy(np.flatnonzero(masks))
    weights = np.repeat(1 / np.maximum(own_counts, 1), own_counts).astype(np.float32)
    return PatchMasks(torch.from_numpy(masks), indices, torch.from_numpy(weights))


def mask_counts(num_crops: int, num_patches: int, config: MaskingConfig) -> Int[np.ndarray, " n"]:
    """Return the numbers of masked patches of the crops that get a mask, ascending; the others have none.

    ``floor(image_share * num_crops)`` crops get one. The range of shares is divided into as many equal bins, and each
    crop takes the upper edge of a bin (DINOv3).
    """
    num_masked = math.floor(config.image_share * num_crops + _ROUNDING)
    edges = np.linspace(config.min_patch_share, config.max_patch_share, num_masked + 1)[1:]
    return np.floor(edges * num_patches + _ROUNDING).astype(np.int64)


# 0.29 * 100 is 28.999999999999996: a share that stands for a whole number must give it.
_ROUNDING = 1e-9

# Blocks that are tried before the rest of a mask is filled patch by patch, and consecutive failures that end the tries
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

    A block's area is uniform between ``min_block`` and the number of patches still to mask (or the largest block), its
    aspect log-uniform, its position uniform. It is accepted if it masks any new patch and not too many.
    """
    height, width = grid
    num_masks, num_patches = len(counts), height * width
    # All random numbers in advance, each row from the mask's own generator: four per try, one per patch, two shifts.
    uniform = np.empty((num_masks, _MAX_TRIES * 4 + num_patches + 2), np.float32)
    for row, seed in zip(uniform, seeds, strict=True):
        np.random.default_rng(seed).random(out=row, dtype=np.float32)
    tries = uniform[:, : _MAX_TRIES * 4].reshape(num_masks, _MAX_TRIES, 4)
    masks = np.zeros((num_masks, height, width), bool)
    left, failures = np.array(counts, np.int64), np.zeros(num_masks, np.int64)
    largest = max(1, int(config.max_block_share * num_patches))
    # All masks advance together, one try per iteration; finished ones drop out of `active`.
    for attempt in range(_MAX_TRIES):
        active = np.flatnonzero((left > 0) & (failures < _MAX_FAILURES))
        if not active.size:
            break
        limit = np.minimum(left[active], largest)
        blocks, fits = _blocks(tries[active, attempt], limit, grid, config)
        new = blocks & ~masks[active]
        gained = new.sum((1, 2))
        accepted = fits & (gained > 0) & (gained <= limit)
        masks[active[accepted]] |= new[accepted]
        left[active] -= np.where(accepted, gained, 0)
        failures[active] = np.where(accepted, 0, failures[active] + 1)
    _fill(masks, left, uniform[:, _MAX_TRIES * 4 : -2])
    if config.shift:
        shifts = (uniform[:, -2:] * grid).astype(np.int64)
        rows = (np.arange(height) - shifts[:, :1]) % height
        columns = (np.arange(width) - shifts[:, 1:]) % width
        masks = masks[np.arange(num_masks)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return masks


def _distribute(
    group: Int64[np.ndarray, " s"], views: int, num_patches: int, config: MaskingConfig, seed: int
) -> Int64[np.ndarray, "s v"]:
    """Return the number of masked patches of every crop of a group of samples, in random order."""
    counts = np.zeros(len(group) * views, np.int64)
    nonzero = mask_counts(len(counts), num_patches, config)
    counts[: len(nonzero)] = nonzero
    # One element more than the seed of a mask, so that no group shares its random numbers with one of its masks.
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0, len(group), 0, *group.tolist()]))
    return generator.permutation(counts).reshape(len(group), views)


def _blocks(
    uniform: Float32[np.ndarray, "n 4"], limit: Int64[np.ndarray, " n"], grid: tuple[int, int], config: MaskingConfig
) -> tuple[Bool[np.ndarray, "n h w"], Bool[np.ndarray, " n"]]:
    """Return one block per row of random numbers (area, aspect, row, column), and whether it fits into the grid."""
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


def _fill(masks: Bool[np.ndarray, "n h w"], left: Int64[np.ndarray, " n"], uniform: Float32[np.ndarray, "n p"]) -> None:
    """Mask ``left`` further patches of each mask, at random."""
    short = np.flatnonzero(left)
    if not short.size:
        return
    flat = masks[short].reshape(len(short), -1)
    # Sort free patches by their random number, masked ones (2) last; the first `left` of this order are masked.
    order = np.argsort(np.where(flat, 2, uniform[short]), axis=1)
    is_chosen = np.arange(flat.shape[1]) < left[short, None]
    filled = flat.copy()
    np.put_along_axis(filled, order, np.take_along_axis(flat, order, axis=1) | is_chosen, axis=1)
    masks[short] = filled.reshape(len(short), *masks.shape[1:])
