"""Indicators of collapse, computed every few steps, cheap and without gradient; and the help text of all metrics.

The values stay on the device: reading them back is the caller's decision.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dinocell.ssl.chunks import chunks_with_scratch, full_precision
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.targets import Targets


class TargetUse(NamedTuple):
    """How the teacher's targets use the prototypes.

    ``entropy`` is the mean entropy of a row, in nats: 0 for one prototype per row, ln K for uniform rows.
    ``mean_entropy`` is the entropy of the mean row; if it is close to ``entropy``, all rows are alike. ``used`` is the
    share of the prototypes that have the highest probability in at least one row; it cannot exceed rows / K.
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
    """Measure the targets of this rank, at least one row."""
    mean = torch.zeros_like(targets.offsets)
    used = torch.zeros_like(targets.offsets, dtype=torch.bool)
    entropy = mean.new_zeros(())
    for chunk, scratch in chunks_with_scratch(2, targets.num_rows, mean, chunk_elements):
        rows = targets.chunk(chunk, scratch=scratch)
        mean += rows.sum(0)
        used[rows.argmax(1)] = True
        entropy += torch.special.entr(rows).sum()
    mean /= targets.num_rows
    return TargetUse(entropy / targets.num_rows, torch.special.entr(mean).sum(), used.to(mean.dtype).mean())


@torch.no_grad()
def feature_spread(features: Float[Tensor, "b d"]) -> FeatureSpread:
    """Measure CLS tokens, or any features, at least one row."""
    with full_precision(features):
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        unit = torch.nn.functional.normalize(rows, dim=1)
        std = unit.std(0, correction=0).mean() * features.shape[1] ** 0.5
        values = torch.linalg.svdvals(rows)
        share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return FeatureSpread(std, torch.special.entr(share).sum().exp())


def help_text(config: PretrainConfig) -> str:
    """Return Markdown that explains every metric and image that a run logs (``/*``: all others of a group)."""
    prototypes = config.heads.num_prototypes
    uniform = f"ln {prototypes} = {math.log(prototypes):.2f}"
    rows = (
        ("`loss/dino_global`, `loss/dino_local`", f"nats; {uniform} for uniform predictions, learning starts below it"),
        ("`loss/ibot`", f"nats; {math.log(prototypes):.2f} times the share of masked crops for uniform predictions"),
        ("`loss/koleo`", "spread of the features over the sphere; it falls by itself: a falling total proves nothing"),
        ("`loss/gram`", "difference to the Gram teacher's patch similarities"),
        (
            "`loss/reconstruction`",
            "squared error of the pixels of masked patches; the share of masked crops if the mean is predicted",
        ),
        ("`loss/total`", "the weighted sum, which is minimised"),
        ("`targets/entropy`", f"nats, mean over the targets; {uniform} for uniform targets; should fall"),
        ("`targets/mean_entropy`", "nats, of the mean target; near `targets/entropy`: all tiles get the same target"),
        ("`targets/used`", "share of the prototypes that are the most likely of a row, 0 to 1; few only: collapse"),
        ("`cls/std`", "1: features spread evenly; toward 0: all are the same"),
        ("`cls/effective_rank`", f"directions in use, 1 to {config.batch_size} at most; toward 1: collapse"),
        ("`gradient_norm/*`", f"before clipping at {config.optim.clip:g}; should be steady"),
        ("`schedule/*`", "values of the recipe's schedules at this step: rates, weights, momentum, temperature"),
        ("`health/skipped_steps`", "steps skipped because a loss or gradient was not finite; should stay 0"),
        ("`speed/images_per_s`, `speed/steps_per_s`", "tiles and steps per second over all processes"),
        ("`speed/data_wait_share`", "share of the time in which the step waits for data, 0 to 1"),
        ("`speed/tflops`, `speed/mfu`", "10^12 operations per second and device; their share of its peak, 0 to 1"),
        ("`memory/gb`, `memory/peak_gb`", "10^9 bytes; of the device, or of the process on a CPU"),
        ("`probe/*`", "of the teacher: channel consistency margin, retrieval, kNN accuracy; should rise above random"),
    )
    images = (
        ("views", "one row per tile (of `stack`, per channel): global crops, then local ones; -2.5 to 2.5 std"),
        (
            "patch_pca",
            "one column per tile: a global view and below it its patch features' first three principal components as "
            "red, green, blue, then the same for the second view; one basis for all, so equal colours mean similar "
            "features",
        ),
        ("cls_attention", "one column per tile: a global view, and the attention of the CLS token, black 0, white max"),
    )
    return "\n".join(
        [
            "| metric | unit and interpretation |\n|---|---|",
            *(f"| {names} | {meaning} |" for names, meaning in rows),
            "\n| image | content |\n|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in images),
            "\nMore in docs/training.md.",
        ]
    )
