"""From an image to labelled cells in one call.

The name is reserved here so that code can be written against it; the pipeline itself is not in this version.
"""

from typing import Any


class DINOCellPipeline:
    """Segment images with a `dinocell.DINOCell`. Reserved: constructing it says that this version does not have it."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise NotImplementedError(
            "DINOCellPipeline is not in this version of dinocell: it comes with the segment command, after fine-tuning"
        )
