"""The model in the box: a small segmenter that the package carries, for a first look without any download."""

from importlib.resources import as_file, files
from pathlib import Path

from dinocell.errors import WeightsError
from dinocell.finetune.model import DINOCell

_FILE = "default.safetensors"


def default_model() -> DINOCell:
    """Load it; `DINOCell.card` says what it was trained on.

    Raises
    ------
    WeightsError
        If this installation does not carry it.
    """
    resource = files("dinocell") / "weights" / _FILE
    if not resource.is_file():
        raise WeightsError(f"this installation has no model in the box (weights/{_FILE}); give one with --model")
    with as_file(resource) as path:
        return DINOCell.from_pretrained(Path(path))


def notice(model: DINOCell) -> str:
    """Say in a line what the model in the box is and is not."""
    return f"no --model given: the model in the box is used. {' '.join(model.card.derived_from[-1:])}"
