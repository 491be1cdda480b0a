"""Views crop by crop: each region is cut out of its tile before it is worked on, which is fastest on a CPU."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dinocell.data_shards.read import Batch
from dinocell.ssl.view_levels import LEAST_DIFFERENCE, Scales
from dinocell.ssl.view_plan import ViewPlan, ViewsConfig


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
