"""Validation of a segmenter: its loss, and with an injected scorer its scores and postprocessing parameters."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinocell.finetune.data import validation_batches
from dinocell.finetune.learner import Learner
from dinocell.finetune.model import DINOCell, replace_settings
from dinocell.labelled.dataset import LabelledImage
from dinocell.runtime.distributed import World, sum_over_ranks


class Scored(NamedTuple):
    """Metrics for the log, and the settings that scored better than the segmenter's own."""

    metrics: dict[str, float]
    settings: dict[str, Any]


Scorer = Callable[[DINOCell, Sequence[LabelledImage], bool], Scored]
"""Segments images and scores them; with True it also searches thresholds.

`dinocell.eval.threshold_search.score_segmenter` is one; it is passed in because evaluation is a layer above training.
"""


@torch.no_grad()
def validation_loss(
    learner: Learner, images: Sequence[LabelledImage], *, crop: int, batch_size: int, world: World
) -> float:
    """Return the mean loss over all crops of the images, without augmentation, over all ranks."""
    total = torch.zeros(2, dtype=torch.float64)
    own = images[world.rank :: world.size]
    for batch in validation_batches(own, learner.average.settings, crop=crop, batch_size=batch_size):
        loss = learner.loss(learner.predict(batch.images), batch.targets.to(world.device))
        total += torch.tensor([float(loss) * len(batch.images), len(batch.images)], dtype=torch.float64)
    total = sum_over_ranks(total)
    return float(total[0] / total[1])


def choose_thresholds(path: Path, images: Sequence[LabelledImage], score: Scorer, device: torch.device) -> Scored:
    """Find the thresholds that score best on the images, and store them in the segmenter's file."""
    model = DINOCell.from_pretrained(path).to(device)
    scored = score(model, images, True)
    replace_settings(model, **scored.settings)
    model.save_pretrained(path)
    return scored
