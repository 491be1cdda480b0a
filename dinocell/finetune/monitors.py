"""What a fine-tuning run is, in words: for its log, for a dry run, and beside its numbers in TensorBoard."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Crops, Examples
from dinocell.finetune.feature_cache import in_bytes
from dinocell.finetune.learner import Learner
from dinocell.finetune.sets import Split, left_out


def describe_run(
    config: FinetuneConfig, learner: Learner, divided: Split, crops: Crops, *, total_steps: int, feature_bytes: int
) -> list[str]:
    """Return lines: the model, the data, how long it is, what is kept on disk, and which images were left out.

    ``feature_bytes`` are those of kept features on this rank, 0 for none.
    """
    model = learner.model
    count = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (("backbone", model.backbone), ("decoder", model.decoder))
    }
    frozen = " (frozen)" if model.freeze_backbone else ""
    lines = [
        f"backbone {count['backbone']:.1f} M{frozen}, decoder {count['decoder']:.1f} M parameters; "
        f"{' | '.join(model.card.derived_from) or 'random weights'}",
        f"{_images(len(divided.training))} to learn from, {len(divided.validation)} to validate on; "
        f"{crops.epoch_length} crops an epoch, {config.epochs} epochs at most: "
        f"{total_steps} steps of {config.crops_a_step}",
    ]
    if feature_bytes:
        lines.append(
            f"{crops.num_drawn} fixed crops, {config.data.fixed_crops} an image: features of up to "
            f"{in_bytes(feature_bytes)} are kept in the run folder while it runs"
        )
    return [*lines, *(f"left out, {line}" for line in left_out(divided.sets))]


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"


def guide(config: FinetuneConfig) -> str:
    """Return what the numbers and pictures of a run mean, as Markdown (``/*``: all of a group)."""
    error = "mean squared error of distance maps" if config.target == "distance" else "error of flows and chances"
    rows = (
        ("`loss/train`, `loss/validation`", f"{error}; training falls while validation rises: too few images"),
        ("`score/seg`, `score/det`, `score/op_csb`", "of the validation images, segmented; 0 to 1, 1 is perfect"),
        ("`score/f1_at_0.5`", "cells that overlap a reference cell by half of their union or more; 0 to 1"),
        ("`epoch`", "how many are done"),
        ("`gradient_norm/*`", f"before clipping at {config.optim.clip:g}"),
        ("`schedule/*`", "learning rates of this step"),
        ("`health/skipped_steps`", "steps left out because something was not finite; should stay 0"),
        ("`speed/images_per_s`, `speed/steps_per_s`", "crops and steps a second over all processes"),
        ("`examples ...`", "a crop a row; images -2.5 to 2.5 deviations, maps and errors black 0 to white 1"),
    )
    lines = (f"| {names} | {meaning} |" for names, meaning in rows)
    return "\n".join(["| number or picture | unit, and what to look for |\n|---|---|", *lines])


# --- pictures ------------------------------------------------------------------------------------------------------
#
# Pictures of what fine-tuning sees and says.

_SHOWN = 4
_GAP_PX = 2


def draw_examples(batch: Examples, maps: Float[Tensor, "b k h w"]) -> UInt8[np.ndarray, "rows columns"]:
    """Draw the first crops, a row each: image, then for each map the target, what was predicted, and the error.

    Images go from -2.5 to 2.5 deviations (or over their own range), maps from 0 to 1 (flows from -1), errors from 0 to
    1.
    """
    rows = []
    for image, target, predicted in list(zip(batch.images, batch.targets, maps, strict=True))[:_SHOWN]:
        planes = [image[0] / 5 + 0.5]
        for wanted, got in zip(target, predicted, strict=True):
            signed = bool(wanted.min() < 0)
            planes += [wanted / 2 + 0.5, got / 2 + 0.5] if signed else [wanted, got]
            planes.append((wanted - got).abs())
        padded = [torch.nn.functional.pad(plane, (0, _GAP_PX, 0, _GAP_PX)) for plane in planes]
        rows.append(torch.cat(padded, dim=1))
    sheet = torch.cat(rows).clamp(0, 1) * 255
    return np.asarray(sheet.byte().numpy())
