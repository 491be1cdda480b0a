"""DINOCell: from unlabelled multi-channel microscopy to a cell segmentation model.

Importing this package is cheap: nothing below it, torch included, is imported until a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dinocell._renamed import install
from dinocell._version import __version__

__all__ = ["DINOCell", "DINOCellPipeline", "__version__", "create_dinocell_model"]

if TYPE_CHECKING:
    from dinocell.eval.segmentation.pipeline import DINOCellPipeline
    from dinocell.finetune.model import DINOCell, create_dinocell_model

install()

_HOMES = {
    "DINOCell": "dinocell.finetune.model",
    "create_dinocell_model": "dinocell.finetune.model",
    "DINOCellPipeline": "dinocell.eval.segmentation.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dinocell' has no attribute {name!r}; its public names are {sorted(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
