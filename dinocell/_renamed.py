"""Documented module names of version 0.1.0: they still import, with a DeprecationWarning."""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "dinocell.data_shards.distance": "dinocell.labelled.distance",
    "dinocell.data_shards.flows": "dinocell.finetune.targets",
    "dinocell.data_shards.images": "dinocell.images.read",
    "dinocell.data_shards.sources_images": "dinocell.data_shards.sources.files",
    "dinocell.data_shards.sources_names": "dinocell.data_shards.sources.files",
    "dinocell.data_shards.synthetic": "dinocell.demo.synthetic.field",
    "dinocell.data_shards.write": "dinocell.data_shards.build",
    "dinocell.eval.baseline": "dinocell.demo.otsu",
    "dinocell.eval.consistency": "dinocell.eval.probes.consistency",
    "dinocell.eval.ctc": "dinocell.eval.metrics.ctc",
    "dinocell.eval.features": "dinocell.eval.probes.features",
    "dinocell.eval.flows": "dinocell.eval.segmentation.flows",
    "dinocell.eval.image_sets": "dinocell.eval.probes.image_sets",
    "dinocell.eval.knn": "dinocell.eval.probes.knn",
    "dinocell.eval.linear": "dinocell.eval.probes.linear",
    "dinocell.eval.matching": "dinocell.eval.metrics.matching",
    "dinocell.eval.outputs": "dinocell.eval.export.writers",
    "dinocell.eval.pipeline": "dinocell.eval.segmentation.pipeline",
    "dinocell.eval.scoring": "dinocell.eval.threshold_search",
    "dinocell.eval.thresholds": "dinocell.eval.threshold_search",
    "dinocell.eval.watershed": "dinocell.eval.segmentation.watershed",
    "dinocell.eval.windows": "dinocell.eval.segmentation.tiling",
    "dinocell.ssl.pictures": "dinocell.ssl.visualise",
    "dinocell.ssl.preview": "dinocell.ssl.visualise",
}
# Functions that a former module offered and that are now in a third one.
MOVED_ON = {
    "dinocell.data_shards.images": dict.fromkeys(("write_png", "write_tiff", "write_labels"), "dinocell.images.write"),
}


class _RenamedFinder(MetaPathFinder, Loader):
    """Import a module under its former name: the module itself, not a copy."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in RENAMED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = RENAMED[spec.name]
        warnings.warn(f"{spec.name} is now {new}; the old name will be removed", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        for name, home in MOVED_ON.get(spec.name, {}).items():
            setattr(module, name, getattr(importlib.import_module(home), name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own specification; its code has run under the new name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the former names importable; safe to call twice."""
    if not any(isinstance(finder, _RenamedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_RenamedFinder())
