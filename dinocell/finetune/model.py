"""The segmenter: a vision transformer and a decoder that regresses per-cell distance maps.

The names are reserved here so that code can be written against them; the model itself is not in this version.
"""

from typing import Any, NoReturn

_NOT_YET = "{} is not in this version of dinocell, which has backbones (dinocell.models) but no fine-tuning yet"


class DINOCell:
    """The segmentation model. Reserved: constructing it says that this version does not have it."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise NotImplementedError(_NOT_YET.format("DINOCell"))

    @classmethod
    def from_pretrained(cls, *_args: Any, **_kwargs: Any) -> "DINOCell":
        """Load a segmenter. Reserved, like the class."""
        raise NotImplementedError(_NOT_YET.format("DINOCell.from_pretrained"))


def create_dinocell_model(*_args: Any, **_kwargs: Any) -> NoReturn:
    """Build a `DINOCell` from a size and backbone weights. Reserved, like the class."""
    raise NotImplementedError(_NOT_YET.format("create_dinocell_model"))
