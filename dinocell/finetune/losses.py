"""The losses of fine-tuning, functions of maps."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dinocell.finetune.preprocess import Target

# Cellpose multiplies flows by 5 before the squared error, and halves that: so they weigh as much as the chance of a
# cell.
_FLOW_WEIGHT = 12.5


def map_loss(
    maps: Float[Tensor, "b k h w"],
    targets: Float[Tensor, "b k h w"],
    target: Target,
    *,
    foreground_weight: float = 0.0,
    gradient_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the mean squared error of distance maps, or of flows with the cross entropy of the chance of a cell.

    Parameters
    ----------
    foreground_weight
        Extra weight of pixels inside cells; the weights are divided by their mean.
    gradient_weight
        Of the mean squared error of the differences between neighbouring pixels; distance maps only.
    """
    if target == "flows":
        flows = _FLOW_WEIGHT * F.mse_loss(maps[:, :2], targets[:, :2])
        return flows + F.binary_cross_entropy(maps[:, 2].clamp(1e-6, 1 - 1e-6), targets[:, 2])
    squared = (maps - targets).square()
    if foreground_weight:
        weight = 1 + foreground_weight * (targets > 0)
        squared = squared * (weight / weight.mean())
    loss = squared.mean()
    if gradient_weight:
        differences = [torch.diff(maps - targets, dim=axis).square().mean() for axis in (-1, -2)]
        loss = loss + gradient_weight * torch.stack(differences).sum()
    return loss
