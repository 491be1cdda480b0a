"""What the benchmarks of short pretraining runs share: the product's training loop, CPU time, and stored results."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dinocell.models.config import VARIANTS, ViTConfig
from dinocell.models.vit import VisionTransformer
from dinocell.runtime.distributed import World
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.data import open_shards
from dinocell.ssl.masking import PatchMasks
from dinocell.ssl.prepare import backbone_of, build_model
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.trainer import Trainer
from dinocell.ssl.views import Views, make_views

# Smaller than every variant of the product: what 90 seconds of one core can train.
WIDTH_64 = "width_64"
VARIANTS.setdefault(WIDTH_64, ViTConfig(width=64, depth=3, heads=2, mlp_hidden=256))

Numbers = dict[str, float]


@dataclass(frozen=True)
class Trained:
    """Backbones after a run, in eval mode, and the CPU time of the run in seconds."""

    teacher: VisionTransformer
    student: VisionTransformer
    cpu_seconds: float


def use_one_thread() -> None:
    """Compute on one core, so that the CPU time of the process is the time of the arithmetic."""
    torch.set_num_threads(1)


class Batches:
    """Iterate over the (views, masks) of a run; reads and decodes in this process, so that its CPU time counts."""

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self._stream = open_shards(config, World())

    def __iter__(self) -> Iterator[tuple[Views, PatchMasks]]:
        config = self._config
        batches = iter(self._stream)
        for _ in range(config.steps):
            batch = next(batches)
            views = make_views(batch.tiles, batch.plans, config.views, device=torch.device("cpu"))
            yield views, batch.masks


def train(
    config: PretrainConfig,
    *,
    marks: Sequence[float] = (),
    at_mark: Callable[[float, int, StudentTeacher], None] = lambda _seconds, _steps, _model: None,
) -> Trained:
    """Train with the product's trainer, without run folder, images and checkpoints.

    Parameters
    ----------
    marks
        Seconds of CPU time after which ``at_mark`` is called, with the steps so far; its own time does not count.
    """
    model = build_model(config, World())
    trainer = Trainer(config, model, World())
    start, waiting = time.process_time(), list(marks)
    for number, part in enumerate(Batches(config)):
        trainer.step(number, [part], measure=False)
        used = time.process_time() - start
        if waiting and used >= waiting[0]:
            at_mark(waiting.pop(0), number + 1, model)
            start += time.process_time() - start - used
    used = time.process_time() - start
    return Trained(backbone_of(model.teacher).eval(), backbone_of(model.student).eval(), used)


def random_backbone(config: PretrainConfig) -> VisionTransformer:
    """Return the backbone with which `train` starts."""
    return backbone_of(build_model(config, World()).student).eval()


def stored(path: Path, measure: Callable[[], Mapping[str, float]]) -> Numbers:
    """Return the numbers in a file, or measure and store them: the file is complete or absent."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(dict(measure()), indent=1))
        temporary.replace(path)
    numbers: Numbers = json.loads(path.read_text())
    return numbers


def stored_by_seed(folder: Path, arm: str) -> list[Numbers]:
    """Return the numbers of an arm that exist, by ascending seed."""
    paths = sorted(folder.glob(f"{arm}-seed*.json"), key=lambda path: int(path.stem.rpartition("seed")[2]))
    return [json.loads(path.read_text()) for path in paths]


def mean_and_range(values: Sequence[float], digits: int = 3) -> str:
    """Return ``.512 (.501 to .530)``; the mean alone of a single value, nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else mean
