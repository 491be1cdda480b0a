"""What a fine-tuning run is, in words: for its log and for a dry run."""

from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Crops
from dinocell.finetune.kept_features import in_bytes
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
