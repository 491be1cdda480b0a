"""Is the model collapsing? Numbers to look at every few steps, each cheap and without gradient.

They stay on the device: reading them back is the caller's decision.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dinocell.ssl.pieces import full_precision, with_scratch
from dinocell.ssl.targets import Targets


class TargetUse(NamedTuple):
    """How the teacher's targets use the prototypes.

    ``entropy`` is the mean entropy of a row, in nats: 0 is one prototype each, ln K is no opinion. ``mean_entropy`` is
    the entropy of the mean row: near ``entropy``, all rows say the same. ``used`` is the share of the prototypes that
    are the favourite of at least one row; it cannot exceed rows / K.
    """

    entropy: Float[Tensor, ""]
    mean_entropy: Float[Tensor, ""]
    used: Float[Tensor, ""]


class FeatureSpread(NamedTuple):
    """How features fill their space.

    ``std`` is the mean over channels of the standard deviation over the batch of unit-length features, times the root
    of the width: 1 if they are spread evenly over the sphere, 0 if all are the same. ``effective_rank`` is the
    exponential of the entropy of the normalised singular values (Roy and Vetterli 2007; RankMe, Garrido et al. 2023):
    from 1 to the smaller of batch and width; 1 too if all features are zero.
    """

    std: Float[Tensor, ""]
    effective_rank: Float[Tensor, ""]


@torch.no_grad()
def target_use(targets: Targets, *, piece_elements: int | None = None) -> TargetUse:
    """Measure the targets of this rank.

    Raises
    ------
    ValueError
        If there is no row.
    """
    if targets.num_rows == 0:
        raise ValueError("targets: expected at least one row, got none")
    mean = torch.zeros_like(targets.offsets)
    used = torch.zeros_like(targets.offsets, dtype=torch.bool)
    entropy = mean.new_zeros(())
    for which, scratch in with_scratch(2, targets.num_rows, mean, piece_elements):
        rows = targets.piece(which, scratch=scratch)
        mean += rows.sum(0)
        used[rows.argmax(1)] = True
        entropy += torch.special.entr(rows).sum()
    mean /= targets.num_rows
    return TargetUse(entropy / targets.num_rows, torch.special.entr(mean).sum(), used.to(mean.dtype).mean())


@torch.no_grad()
def feature_spread(features: Float[Tensor, "b d"]) -> FeatureSpread:
    """Measure CLS tokens, or any features, one a row.

    Raises
    ------
    ValueError
        If there is no row.
    """
    if len(features) == 0:
        raise ValueError("features: expected at least one row, got none")
    with full_precision(features):
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        unit = torch.nn.functional.normalize(rows, dim=1)
        std = unit.std(0, correction=0).mean() * features.shape[1] ** 0.5
        values = torch.linalg.svdvals(rows)
        share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return FeatureSpread(std, torch.special.entr(share).sum().exp())
