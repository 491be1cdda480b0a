"""Is the model collapsing? Numbers to look at every few steps, each cheap and without gradient.

They stay on the device: reading them back is the caller's decision.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dinocell.ssl.chunks import full_precision, with_scratch
from dinocell.ssl.config import PretrainConfig
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
def target_use(targets: Targets, *, chunk_elements: int | None = None) -> TargetUse:
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
    for which, scratch in with_scratch(2, targets.num_rows, mean, chunk_elements):
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


# --- guide ---------------------------------------------------------------------------------------------------------
#
# What the numbers and pictures of a pretraining run mean: a text beside them in TensorBoard.


def guide(config: PretrainConfig) -> str:
    """Return it as Markdown; every name that a run logs is in it (``/*``: and all others of its group)."""
    prototypes = config.heads.num_prototypes
    undecided = f"ln {prototypes} = {math.log(prototypes):.2f}"
    rows = (
        ("`loss/dino_global`, `loss/dino_local`", f"nats; {undecided} is no opinion, a fall below it is learning"),
        (
            "`loss/ibot`",
            f"nats; no opinion is {math.log(prototypes):.2f} times the share of samples with hidden patches",
        ),
        ("`loss/koleo`", "spread of the features over the sphere; falls by itself, so a falling total proves nothing"),
        ("`loss/gram`", "distance to the Gram teacher's patch similarities"),
        ("`loss/total`", "the weighted sum, that which is minimised"),
        ("`targets/entropy`", f"nats, of one target; {undecided}: the teacher has no opinion; should fall"),
        ("`targets/mean_entropy`", "nats, of the mean target; near `targets/entropy`: all tiles get the same"),
        ("`targets/used`", "share of the prototypes that are some row's favourite, 0 to 1; a handful only: collapse"),
        ("`cls/std`", "1: features spread evenly; toward 0: all are the same"),
        ("`cls/effective_rank`", f"directions in use, 1 to {config.batch_size} at most; toward 1: collapse"),
        ("`gradient_norm/*`", f"before clipping at {config.optim.clip:g}; should be steady"),
        ("`schedule/*`", "what the recipe asks for at this step: rates, weights, momentum, temperature"),
        ("`health/skipped_steps`", "steps left out because something was not finite; should stay 0"),
        ("`speed/images_per_s`, `speed/steps_per_s`", "tiles and steps a second over all processes"),
        ("`speed/data_wait_share`", "share of the time in which the step waits for data, 0 to 1"),
        ("`speed/tflops`, `speed/mfu`", "10^12 operations a second of a device; their share of its peak, 0 to 1"),
        ("`memory/gb`, `memory/peak_gb`", "10^9 bytes; of the device, or of the process on a CPU"),
        (
            "`probe/*`",
            "of the teacher: margin of channel consistency, retrieval, neighbours; above random weights, rising",
        ),
    )
    pictures = (
        ("views", "a tile a row (of `stack`, a row a channel): global crops, then local ones; -2.5 to 2.5 deviations"),
        (
            "patch_pca",
            "a tile a column: a global view and below it its patches' three main components as red, green, blue, then "
            "the second view in the same way; one basis for all, so what is alike has one colour",
        ),
        ("cls_attention", "a tile a column: a global view, and where the CLS token looks, black (not) to white (most)"),
    )
    return "\n".join(
        [
            "| number | unit, and what to look for |\n|---|---|",
            *(f"| {names} | {meaning} |" for names, meaning in rows),
            "\n| picture | what it shows |\n|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in pictures),
            "\nMore: docs/training.md, what to watch.",
        ]
    )
