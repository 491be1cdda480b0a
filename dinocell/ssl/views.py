"""The views of a batch of tiles: crops of their channels with photometry, scaled to one size, standardised.

Two ways lead to the same crops, `dinocell.ssl.view_crops` on a CPU and `dinocell.ssl.view_planes` on a GPU: each tests
the other.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dinocell.data_shards.read import Batch
from dinocell.ssl.view_crops import crop_by_crop
from dinocell.ssl.view_levels import LEAST_DIFFERENCE, Levels, scales_of
from dinocell.ssl.view_plan import PlanViews, ViewPlan, ViewsConfig
from dinocell.ssl.view_planes import all_tiles_at_once


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
