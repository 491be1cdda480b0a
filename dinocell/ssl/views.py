"""The views of a batch of tiles: crops of their channels with photometry, resized, standardised.

There are two implementations of the crops: `crop_by_crop` is faster on a CPU, `all_tiles_at_once`, a few large
operations on all the planes that the views need, on a GPU. The tests compare them with each other.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from dinocell.data_shards.read import Batch
from dinocell.ssl.config import ViewsConfig
from dinocell.ssl.view_plan import MIN_DIFFERENCE, ViewPlan, planned_kinds


class Views(NamedTuple):
    """Views of ``b`` tiles with the model's input channels; zero mean and unit variance per crop and channel.

    ``target_views`` are the global crops in other channels, if the plans have targets of a reconstruction.
    """

    global_views: Float[Tensor, "v b c s s"]
    local_views: Float[Tensor, "w b c t t"]
    target_views: Float[Tensor, "v b c s s"] | None = None


def make_views(batch: Batch, plans: Sequence[ViewPlan], config: ViewsConfig, *, device: torch.device) -> Views:
    """Turn decoded tiles into standardised views on ``device``.

    Parameters
    ----------
    batch
        Tiles with at least the channels that their views need.
    plans
        Of each tile.
    """
    make = all_tiles_at_once if device.type == "cuda" else crop_by_crop
    crops = make(batch.to(device, non_blocking=True), plans, config)
    kinds = planned_kinds(plans, config)
    return Views(*(_finish(some, plans, views) for some, (views, _) in zip(crops, kinds, strict=True)))


def _finish(crops: Float[Tensor, "v b k s s"], plans: Sequence[ViewPlan], views: range) -> Float[Tensor, "v b k s s"]:
    """Add blur and noise where planned, then standardise each crop and channel."""
    for tile, plan in enumerate(plans):
        for index, view in enumerate(views):
            if plan.blur_sigma_px[view] > 0:
                crops[index, tile] = _blurred(crops[index, tile], float(plan.blur_sigma_px[view]))
            if plan.noise_sigma[view] > 0:
                # Drawn on the CPU, so that the noise is the same on every device.
                generator = torch.Generator().manual_seed(plan.noise_seed + view)
                noise = torch.randn(crops.shape[2:], generator=generator).to(crops.device, non_blocking=True)
                crops[index, tile] += float(plan.noise_sigma[view]) * noise
    centred = crops - crops.mean((3, 4), keepdim=True)
    std = centred.square().mean((3, 4), keepdim=True).sqrt()
    return centred / (std + MIN_DIFFERENCE)


def _blurred(crop: Float[Tensor, "k s s"], sigma: float) -> Float[Tensor, "k s s"]:
    """Blur by a separable Gaussian, truncated at three standard deviations, with mirrored borders."""
    radius = min(max(1, math.ceil(3 * sigma)), crop.shape[-1] - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=crop.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(crop.dtype)
    padded = F.pad(crop[:, None], (radius,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return blurred[:, 0]


def crop_by_crop(batch: Batch, plans: Sequence[ViewPlan], config: ViewsConfig) -> list[Float[Tensor, "v b k s s"]]:
    """Return the crops of all tiles, of the kinds of `planned_kinds`, not standardised; one crop at a time."""
    shape = (len(batch), config.in_channels)
    kinds = [torch.empty(len(views), *shape, size, size) for views, size in planned_kinds(plans, config)]
    views = [view for kind in kinds for view in kind]
    for index, plan in enumerate(plans):
        tile = batch.tile(index)
        # The decoded tile may lack channels; this is the row of each channel that it has.
        row_of_channel = {channel: row for row, channel in enumerate(batch.channels[index])}
        for view, out in enumerate(views):
            # Cut the region out of the channels that this view needs, before anything is computed on it.
            top, left, height, width = plan.boxes[view].tolist()
            needed = np.flatnonzero((plan.mixing[view] != 0).any(axis=0))
            rows = [row_of_channel[channel] for channel in needed.tolist()]
            region = tile[rows, top : top + height, left : left + width].float()
            factor, offset, contrast = (
                torch.from_numpy(values[view, needed])[:, None, None]
                for values in (plan.factor, plan.offset, plan.contrast)
            )
            # Brightness, then contrast about the region's mean; intensities stay within 0 to 1.
            region.mul_(factor).add_(offset).clamp_(0, 1)
            mean = region.mean((1, 2), keepdim=True)
            region.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
            # Mix channels, then resize and rotate.
            mixing = torch.from_numpy(plan.mixing[view][:, needed])
            mixed = region if mixing.shape == (1, 1) else torch.einsum("kc,chw->khw", mixing, region)
            mixed = _protein_contrast(mixed, float(plan.protein[view]), config)
            size = (out.shape[-1],) * 2
            crop = F.interpolate(mixed[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
            crop = crop.flip(-2) if plan.mirrored[view] else crop
            out[index] = torch.rot90(crop, int(plan.turned[view]), (-2, -1))
    return kinds


def _protein_contrast(mixed: Tensor, factor: float, config: ViewsConfig) -> Tensor:
    """Scale the protein channel so that its maximum is ``factor``, and clip at 1."""
    if config.policy != "stack" or factor < 0 or config.protein_channel not in config.channels:
        return mixed
    protein = mixed[config.channels.index(config.protein_channel)]
    protein.mul_(factor / protein.max().clamp_min(MIN_DIFFERENCE)).clamp_(0, 1)
    return mixed


def all_tiles_at_once(batch: Batch, plans: Sequence[ViewPlan], config: ViewsConfig) -> list[Float[Tensor, "v b k s s"]]:
    """Return the crops of all tiles, of the kinds of `planned_kinds`, rotated but not standardised."""
    device = batch.storage.device
    # Tiles of one size, type and number of channels are stacked; most batches are a single such group.
    groups = _groups_of_equal_tiles(batch)
    stacks = [_stacked_tiles(batch, members) for members in groups]
    order = np.argsort([index for members in groups for index in members])
    kinds = []
    for views, size in planned_kinds(plans, config):
        parts = []
        for members, tiles in zip(groups, stacks, strict=True):
            channels = [list(batch.channels[index]) for index in members]
            planes = _needed_planes([plans[index] for index in members], channels, views, config)
            parts.append(_resampled(tiles, planes, size, device).unflatten(0, (len(views), len(members))))
        kinds.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)[:, _on(device, order)])
    return kinds


def _groups_of_equal_tiles(batch: Batch) -> list[list[int]]:
    """Return the indices of the tiles of each size, type and number of channels."""
    groups: dict[tuple[int, int, str, int], list[int]] = {}
    for index, info in enumerate(batch.infos):
        groups.setdefault((info.height, info.width, info.dtype, len(batch.channels[index])), []).append(index)
    return list(groups.values())


def _stacked_tiles(batch: Batch, members: Sequence[int]) -> Float[Tensor, "b c h w"]:
    """Return tiles of one size and type in float32; stacked as bytes, as not every type can be stacked on a GPU."""
    first = batch.tile(members[0])
    length = first.numel() * first.element_size()
    rows = torch.stack([batch.storage[batch.starts[index] : batch.starts[index] + length] for index in members])
    return rows.view(first.dtype).view(len(members), *first.shape).float()


class _Planes(NamedTuple):
    """The ``p`` planes (one channel of one crop) that ``v`` views of ``b`` tiles need; crops are ordered ``v b``."""

    crop: Int64[np.ndarray, " p"]  # ascending
    channel: Int64[np.ndarray, " p"]  # row in the stacked tile
    boxes: Int64[np.ndarray, "p 4"]
    factor: Float32[np.ndarray, " p"]
    offset: Float32[np.ndarray, " p"]
    contrast: Float32[np.ndarray, " p"]
    protein: Float32[np.ndarray, " p"]  # negative: no protein, or unchanged
    weight: Float32[np.ndarray, "p k"]
    mirrored: Bool[np.ndarray, " vb"]
    turned: Int64[np.ndarray, " vb"]


def _needed_planes(
    plans: Sequence[ViewPlan], channels: Sequence[list[int]], views: range, config: ViewsConfig
) -> _Planes:
    """Return the planes with a non-zero weight in any output channel, of tiles that have ``channels``."""

    def by_crop(arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Return the rows of ``views`` of every plan, flattened to one row per crop, (v b ...)."""
        selected = np.stack([array[views.start : views.stop] for array in arrays], axis=1)
        return selected.reshape(-1, *selected.shape[2:])

    def by_plane(name: str) -> np.ndarray:
        """Return a per-channel attribute of the plans at the planes."""
        arrays = (getattr(plan, name)[:, own] for plan, own in zip(plans, channels, strict=True))
        return by_crop(arrays)[crop, channel]

    mixing = by_crop(plan.mixing[:, :, own] for plan, own in zip(plans, channels, strict=True))
    crop, channel = np.nonzero((mixing != 0).any(axis=1))
    protein = np.full(len(crop), -1, np.float32)
    if config.policy == "stack" and config.protein_channel in config.channels:
        is_protein = mixing[crop, config.channels.index(config.protein_channel), channel] != 0
        protein = np.where(is_protein, by_crop(plan.protein for plan in plans)[crop], protein)
    return _Planes(
        crop=crop,
        channel=channel,
        boxes=by_crop(plan.boxes for plan in plans)[crop],
        factor=by_plane("factor"),
        offset=by_plane("offset"),
        contrast=by_plane("contrast"),
        protein=protein,
        weight=mixing[crop, :, channel],
        mirrored=by_crop(plan.mirrored for plan in plans),
        turned=by_crop(plan.turned for plan in plans),
    )


def _resampled(
    tiles: Float[Tensor, "b c h w"], planes: _Planes, size: int, device: torch.device
) -> Float[Tensor, "vb k s s"]:
    """Return the crops, rotated but not standardised."""
    num_tiles, _, height, width = tiles.shape
    num_crops, num_outputs = len(planes.turned), planes.weight.shape[1]
    if not len(planes.crop):
        return tiles.new_zeros(num_crops, num_outputs, size, size)
    indices = [planes.crop % num_tiles, planes.channel, *planes.boxes.T]
    tile, channel, top, left, rows, columns = _on(device, np.stack(indices).astype(np.int64))
    factor, offset, contrast = _on(device, np.stack([planes.factor, planes.offset, planes.contrast]))[..., None, None]

    # Gather the regions of all planes (p h w), each as large as the largest box. Outside of its box a region repeats
    # the tile's last row or column: values that are finite and get no weight below.
    row, column = (torch.arange(int(longest), device=device) for longest in planes.boxes[:, 2:].max(axis=0))
    from_row, from_column = (top[:, None] + row).clamp_(max=height - 1), (left[:, None] + column).clamp_(max=width - 1)
    unit = tiles[tile[:, None, None], channel[:, None, None], from_row[:, :, None], from_column[:, None, :]]
    in_row, in_column = (row < rows[:, None]).float(), (column < columns[:, None]).float()

    # Brightness, then contrast about the mean of the crop; intensities stay within 0 to 1.
    torch.addcmul(offset, unit, factor, out=unit).clamp_(0, 1)
    sums = torch.bmm(unit, in_column[:, :, None])[:, :, 0]
    mean = ((sums * in_row).sum(1) / (rows * columns))[:, None, None]
    torch.addcmul(mean * (1 - contrast), unit, contrast, out=unit).clamp_(0, 1)
    scaled = np.flatnonzero(planes.protein >= 0)
    if len(scaled):
        index, maximum = _on(device, scaled), _on(device, planes.protein[scaled])
        protein = unit[index]
        largest = (protein * in_row[index][:, :, None] * in_column[index][:, None, :]).amax((1, 2))
        unit[index] = (protein * (maximum / largest.clamp_min(MIN_DIFFERENCE))[:, None, None]).clamp_(0, 1)

    # Resize by two matrix products per plane; the matrices also reverse rows and columns. A rotation by 90 degrees is
    # to reverse the columns and then transpose (below); by 180 to reverse both; by 270 to reverse the rows, transpose.
    mirrored, turned = planes.mirrored[planes.crop], planes.turned[planes.crop]
    lengths = planes.boxes[:, 2], planes.boxes[:, 3]
    reversals = mirrored ^ (turned >= 2), (turned == 1) | (turned == 2)
    by_row, by_column = (
        resampling_matrix(length, len(index), size, device, backwards=backwards)
        for length, index, backwards in zip(lengths, (row, column), reversals, strict=True)
    )
    crops = torch.bmm(torch.bmm(by_row, unit), by_column.transpose(1, 2))

    # Mix the planes of each crop last, as mixing and resizing are both linear. The planes of a crop are consecutive, at
    # most m of them: gathered to (crops m), not scattered, because sums of a scatter on a GPU have no fixed order.
    counts = np.bincount(planes.crop, minlength=num_crops)
    place = np.arange(len(planes.crop)) - (np.cumsum(counts) - counts)[planes.crop]
    index_of_plane = np.zeros((num_crops, counts.max()), np.int64)
    weight = np.zeros((num_crops, num_outputs, counts.max()), np.float32)
    index_of_plane[planes.crop, place] = np.arange(len(planes.crop))
    weight[planes.crop, :, place] = planes.weight
    mixed = torch.einsum("nkm,nmst->nkst", _on(device, weight), crops[_on(device, index_of_plane)])
    is_transposed = _on(device, planes.turned % 2 == 1)[:, None, None, None]
    return torch.where(is_transposed, mixed.transpose(2, 3), mixed)


def resampling_matrix(
    lengths: Shaped[np.ndarray, " b"],
    side: int,
    size: int,
    device: torch.device,
    *,
    backwards: Bool[np.ndarray, " b"],
) -> Float[Tensor, "b s h"]:
    """Return the weights that resize the first ``lengths`` of ``side`` pixels to ``size`` pixels.

    Antialiased bilinear, as in ``torch.nn.functional.interpolate``: a triangle two output pixels wide (at least two
    input pixels), cut off at the ends of the crop, normalised to a sum of 1. ``backwards`` reverses the output.
    """
    length = _on(device, lengths.astype(np.float32))[:, None, None]
    scale = length / size
    place = torch.arange(size, device=device, dtype=torch.float32)[:, None]
    place = torch.where(_on(device, backwards)[:, None, None], size - 1 - place, place)
    centre = (place + 0.5) * scale
    position = torch.arange(side, device=device, dtype=torch.float32)
    weights: Tensor = (1 - (position + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weights = weights * (position < length)
    return weights / weights.sum(-1, keepdim=True)


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    """Return an array on the device, without waiting for the device."""
    return torch.from_numpy(values).to(device, non_blocking=True)
