"""What validation images say of a segmenter: its error, and with the evaluation's help scores and thresholds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinocell.finetune.data import validation_batches
from dinocell.finetune.learner import Learner, map_loss
from dinocell.finetune.model import DINOCell, replace_settings
from dinocell.labelled.dataset import LabelledImage
from dinocell.runtime.distributed import World, sum_over_ranks


class Scored(NamedTuple):
    """What a scorer says of a segmenter: numbers for the log, and settings that it would rather have."""

    metrics: dict[str, float]
    settings: dict[str, Any]


Scorer = Callable[[DINOCell, Sequence[LabelledImage], bool], Scored]
"""Segments validation images and scores them; the last argument asks for a search of thresholds."""


@torch.no_grad()
def validation_error(
    learner: Learner, images: Sequence[LabelledImage], *, crop: int, batch_size: int, world: World, first_number: int
) -> float:
    """Return the mean loss over all crops of the images, whole ones without augmentation, over all ranks.

    ``first_number`` is that of the first crop, where features are kept.
    """
    total = torch.zeros(2, dtype=torch.float64)
    own = images[world.rank :: world.size]
    for batch in validation_batches(own, learner.average.settings, crop=crop, batch_size=batch_size):
        numbers = range(first_number, first_number := first_number + len(batch.images))
        maps = learner.predict(batch.images, numbers)
        loss = map_loss(maps, batch.targets.to(world.device), learner.average.target)
        total += torch.tensor([float(loss) * len(batch.images), len(batch.images)], dtype=torch.float64)
    total = sum_over_ranks(total)
    return float(total[0] / total[1])


def choose_thresholds(path: Path, images: Sequence[LabelledImage], score: Scorer, device: torch.device) -> Scored:
    """Let the images choose the thresholds of the segmenter in a file, and store them there."""
    model = DINOCell.from_pretrained(path).to(device)
    scored = score(model, images, True)
    replace_settings(model, **scored.settings)
    model.save_pretrained(path)
    return scored
