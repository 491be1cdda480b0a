"""What a fine-tuning run reports: lines about the run, the meaning of its metrics, and images of example crops."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Batch, CropDataset
from dinocell.finetune.learner import Learner
from dinocell.finetune.sets import Split, skipped_pairs
from dinocell.finetune.targets import TARGETS

_SHOWN = 4
_GAP_PX = 2


def describe_run(
    config: FinetuneConfig, learner: Learner, split: Split, crops: CropDataset, *, total_steps: int
) -> list[str]:
    """Return lines about a run: the model, the data, its length, and the pairs that were skipped."""
    model = learner.model
    millions = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (("backbone", model.backbone), ("decoder", model.decoder))
    }
    frozen = " (frozen)" if model.freeze_backbone else ""
    images = f"{len(split.training)} image{'s' * (len(split.training) != 1)}"
    return [
        f"backbone {millions['backbone']:.1f} M{frozen}, decoder {millions['decoder']:.1f} M parameters; "
        f"{' | '.join(model.card.derived_from) or 'random weights'}",
        f"{images} for training, {len(split.validation)} for validation; {crops.epoch_length} crops per epoch, at most "
        f"{config.epochs} epochs: {total_steps} steps of {config.crops_per_step}",
        *(f"skipped, {line}" for line in skipped_pairs(split.sets)),
    ]


def help_text(config: FinetuneConfig) -> str:
    """Return what the metrics and images of a run mean, as Markdown (``/*``: all of a group)."""
    error = TARGETS[config.target].error
    rows = (
        ("`loss/train`, `loss/validation`", f"{error}; overfitting if training falls while validation rises"),
        ("`score/seg`, `score/det`, `score/op_csb`", "of the segmented validation images; 0 to 1, 1 is perfect"),
        ("`score/f1_at_0.5`", "cells that match a reference cell at an intersection over union of 0.5; 0 to 1"),
        ("`epoch`", "completed epochs"),
        ("`gradient_norm/*`", f"before clipping at {config.optim.clip:g}"),
        ("`schedule/*`", "learning rates of this step"),
        ("`health/skipped_steps`", "steps skipped because of a non-finite loss or gradient; should stay 0"),
        ("`speed/images_per_s`, `speed/steps_per_s`", "crops and steps per second over all processes"),
        ("`examples ...`", "one crop per row; images from -2.5 to 2.5 std, maps and errors from 0 to 1"),
    )
    lines = (f"| {names} | {meaning} |" for names, meaning in rows)
    return "\n".join(["| metric or image | meaning |\n|---|---|", *lines])


def draw_examples(batch: Batch, maps: Float[Tensor, "b k h w"]) -> UInt8[np.ndarray, "rows columns"]:
    """Draw the first crops, one per row: the image, then for each map the target, the prediction and the error.

    Grey levels show -2.5 to 2.5 standard deviations of images, 0 to 1 of maps (flows: -1 to 1) and 0 to 1 of errors.
    """
    rows = []
    for image, target, predicted in list(zip(batch.images, batch.targets, maps, strict=True))[:_SHOWN]:
        planes = [image[0] / 5 + 0.5]
        for expected, got in zip(target, predicted, strict=True):
            is_signed = bool(expected.min() < 0)
            planes += [expected / 2 + 0.5, got / 2 + 0.5] if is_signed else [expected, got]
            planes.append((expected - got).abs())
        padded = [torch.nn.functional.pad(plane, (0, _GAP_PX, 0, _GAP_PX)) for plane in planes]
        rows.append(torch.cat(padded, dim=1))
    sheet = torch.cat(rows).clamp(0, 1) * 255
    return np.asarray(sheet.byte().numpy())
