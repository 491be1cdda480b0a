"""The losses of fine-tuning, functions of maps."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dinocell.finetune.preprocess import Target

# Cellpose (Stringer et al. 2021, Methods) learns flows times 5 and halves their mean squared error, so that they weigh
# about as much as the cross entropy of the chance of a cell. Our flows keep their length: 0.5 * 5^2.
_FLOW_WEIGHT = 12.5


def map_loss(
    maps: Float[Tensor, "b k h w"],
    targets: Float[Tensor, "b k h w"],
    target: Target,
    *,
    foreground_weight: float = 0.0,
    gradient_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the mean squared error of distance maps, or 12.5 times that of flows plus a cross entropy.

    The cross entropy is that of the chance of a cell, the third map, with whether there is one.

    Parameters
    ----------
    foreground_weight
        Extra weight of pixels inside cells; the weights are divided by their mean. Distance maps only.
    gradient_weight
        Of the mean squared error of the differences between neighbouring pixels; distance maps only.
    """
    if target == "flows":
        flows = _FLOW_WEIGHT * F.mse_loss(maps[:, :2], targets[:, :2])
        return flows + F.binary_cross_entropy(maps[:, 2], targets[:, 2])
    squared = (maps - targets).square()
    if foreground_weight:
        weight = 1 + foreground_weight * (targets > 0)
        squared = squared * (weight / weight.mean())
    loss = squared.mean()
    if gradient_weight:
        differences = [torch.diff(maps - targets, dim=axis).square().mean() for axis in (-1, -2)]
        loss = loss + gradient_weight * torch.stack(differences).sum()
    return loss
