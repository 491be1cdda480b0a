"""The views of a batch of tiles: crops of their channels with photometry, scaled to one size, standardised.

Two ways lead to the same crops, `dinocell.ssl.views` on a CPU and `dinocell.ssl.views_gpu` on a GPU: each tests
the other.
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
from dinocell.ssl.view_plan import LEAST_DIFFERENCE, Levels, PlanViews, Scales, ViewPlan, ViewsConfig, scales_of
from dinocell.ssl.views_gpu import all_tiles_at_once


class Views(NamedTuple):
    """Views of ``b`` tiles, one channel or those of the policy ``stack``; standardised by crop and channel."""

    global_views: Float[Tensor, "v b c s s"]
    local_views: Float[Tensor, "w b c t t"]


def make_views(batch: Batch, config: ViewsConfig, levels: Levels, *, seed: int, device: torch.device) -> Views:
    """Turn decoded tiles into standardised views on ``device``.

    Parameters
    ----------
    batch
        From the reader; it may lack channels that no view of a sample needs, and bring its plans (`PlanViews`).
    levels
        From ``channel_levels``.
    seed
        Of the whole run; the rest of the randomness follows from where each sample comes from.
    """
    plans = _plans(batch, PlanViews(config, seed))
    scales = [
        scales_of(info, levels[origin.data_set], plan)
        for info, origin, plan in zip(batch.infos, batch.origins, plans, strict=True)
    ]
    make = all_tiles_at_once if device.type == "cuda" else crop_by_crop
    crops = make(batch.to(device, non_blocking=True), plans, scales, config)
    return Views(*(_finish(some, plans, views) for some, (views, _) in zip(crops, config.kinds, strict=True)))


def _plans(batch: Batch, plan: PlanViews) -> list[ViewPlan]:
    """Return the plans that the reader made in its workers, or make them here."""
    if batch.chosen_by == plan:
        return [each for each in batch.chosen if isinstance(each, ViewPlan)]
    return [plan(info, origin) for info, origin in zip(batch.infos, batch.origins, strict=True)]


def _finish(crops: Float[Tensor, "v b k s s"], plans: Sequence[ViewPlan], views: range) -> Float[Tensor, "v b k s s"]:
    """Blur and add noise where it was drawn, then standardise each crop and channel."""
    for number, plan in enumerate(plans):
        for place, view in enumerate(views):
            if plan.blur_sigma_px[view] > 0:
                crops[place, number] = _blurred(crops[place, number], float(plan.blur_sigma_px[view]))
            if plan.noise_sigma[view] > 0:
                generator = torch.Generator().manual_seed(plan.noise_seed + view)
                noise = torch.randn(crops.shape[2:], generator=generator).to(crops.device, non_blocking=True)
                crops[place, number] += float(plan.noise_sigma[view]) * noise
    mean = crops.mean((3, 4), keepdim=True)
    centred = crops - mean
    deviation = centred.square().mean((3, 4), keepdim=True).sqrt()
    return centred / (deviation + LEAST_DIFFERENCE)


def _blurred(crop: Float[Tensor, "k s s"], sigma: float) -> Float[Tensor, "k s s"]:
    """Blur by a Gaussian cut off at three deviations, mirrored at the borders."""
    radius = min(max(1, math.ceil(3 * sigma)), crop.shape[-1] - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=crop.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(crop.dtype)
    padded = F.pad(crop[:, None], (radius,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return blurred[:, 0]


# --- view_crops ----------------------------------------------------------------------------------------------------
#
# Views crop by crop: each region is cut out of its tile before it is worked on, which is fastest on a CPU.


def crop_by_crop(
    batch: Batch, plans: Sequence[ViewPlan], scales: Sequence[Scales], config: ViewsConfig
) -> list[Float[Tensor, "v b k s s"]]:
    """Return the crops of all tiles, the global and the local views, turned but not yet standardised."""
    shape = (len(batch), config.in_channels)
    made = [torch.empty(len(views), *shape, size, size) for views, size in config.kinds]
    views = [view for kind in made for view in kind]
    for number, (plan, scale) in enumerate(zip(plans, scales, strict=True)):
        tile = batch.tile(number)
        # Where in the decoded tile a channel of the sample lies.
        place = {channel: index for index, channel in enumerate(batch.channels[number])}
        for view, out in enumerate(views):
            size = out.shape[-1]
            top, left, height, width = plan.boxes[view].tolist()
            needed = np.flatnonzero((plan.mixing[view] != 0).any(axis=0))
            region = tile[[place[c] for c in needed.tolist()], top : top + height, left : left + width]
            unit = _unit(region.float(), scale.factor[view, needed], scale.offset[view, needed])
            mean = unit.mean((1, 2), keepdim=True)
            unit = _contrasted(unit, mean, plan.contrast[view, needed])
            mixing = torch.from_numpy(plan.mixing[view][:, needed])
            mixed = unit if mixing.shape == (1, 1) else torch.einsum("kc,chw->khw", mixing, unit)
            mixed = _protein_contrast(mixed, float(plan.protein[view]), config)
            crop = F.interpolate(mixed[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
            out[number] = _turned(crop, bool(plan.mirrored[view]), int(plan.turned[view]))
    return made


def _unit(region: Tensor, factor: np.ndarray, offset: np.ndarray) -> Tensor:
    scale, shift = (torch.from_numpy(values)[:, None, None] for values in (factor, offset))
    return region.mul_(scale).add_(shift).clamp_(0, 1)


def _contrasted(unit: Tensor, mean: Tensor, contrast: np.ndarray) -> Tensor:
    factor = torch.from_numpy(contrast)[:, None, None]
    return unit.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _protein_contrast(mixed: Tensor, factor: float, config: ViewsConfig) -> Tensor:
    if config.policy != "stack" or factor < 0 or config.protein_channel not in config.channels:
        return mixed
    protein = mixed[config.channels.index(config.protein_channel)]
    protein.mul_(factor / protein.max().clamp_min(LEAST_DIFFERENCE)).clamp_(0, 1)
    return mixed


def _turned(crop: Float[Tensor, "k s s"], mirrored: bool, quarter_turns: int) -> Float[Tensor, "k s s"]:
    if mirrored:
        crop = crop.flip(-2)
    return torch.rot90(crop, quarter_turns, (-2, -1)) if quarter_turns else crop
