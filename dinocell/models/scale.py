"""LayerScale, taken as part of the linear layer before it.

A factor a channel behind a linear layer is a factor on its weights: ``(W x + b) * g = (W * g) x + b * g``. Scaling the
weights costs a few hundred thousand products a block; scaling the rows is a pass over the largest activations forwards,
three backwards, and keeps them for the gradient of the factor.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LayerScale(nn.Module):
    """A learned factor a channel on the output of a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Scale every channel."""
        return rows * self.gamma


def scaled_linear(linear: nn.Linear, rows: Float[Tensor, "n i"], scale: LayerScale | None) -> Float[Tensor, "n o"]:
    """Return ``scale(linear(rows))``; without a scale just the linear layer."""
    if scale is None:
        return linear(rows)  # type: ignore[no-any-return]
    bias = None if linear.bias is None else linear.bias * scale.gamma
    return F.linear(rows, linear.weight * scale.gamma[:, None], bias)
