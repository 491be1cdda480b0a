"""The views of a batch of tiles: crops of their channels with photometry, resized, standardised.

There are two implementations of the crops: `crop_by_crop` here is faster on a CPU, `dinocell.ssl.views_gpu` on a GPU.
The tests compare them with each other.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dinocell.data_shards.read import Batch
from dinocell.ssl.config import ViewsConfig
from dinocell.ssl.view_plan import MIN_DIFFERENCE, ViewPlan, planned_kinds
from dinocell.ssl.views_gpu import all_tiles_at_once


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
