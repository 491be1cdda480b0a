"""The fine-tuning run: labelled sets and a backbone in, a segmenter out."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.filesize import decimal
from torch import Tensor
from torch.utils.data import DataLoader

from dinocell.configs.load import to_yaml
from dinocell.errors import ConfigError, WeightsError
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Batch, CropDataset, loader, open_sets, skipped_pairs, split
from dinocell.finetune.learner import Learner
from dinocell.finetune.model import DINOCell, replace_settings
from dinocell.finetune.targets import TARGETS
from dinocell.labelled.dataset import LabelledImage
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.device import peak_bytes
from dinocell.runtime.distributed import World, barrier, together
from dinocell.runtime.preemption import RunStopped, StopRequest
from dinocell.runtime.run import Run
from dinocell.runtime.schedules import Schedule, value_at

# Example images: number of crops, and space between their maps.
_SHOWN = 4
_GAP_PX = 2


class Scored(NamedTuple):
    """Metrics for the log, and the settings that scored better than the segmenter's own."""

    metrics: dict[str, float]
    settings: dict[str, Any]


Scorer = Callable[[DINOCell, Sequence[LabelledImage], bool], Scored]
"""Segments images and scores them; with True it also searches thresholds.

`dinocell.eval.threshold_search.score_segmenter` is one; it is passed in because evaluation is a layer above training.
"""


def finetune(config: FinetuneConfig, *, score: Scorer | None = None) -> Path:
    """Train a segmenter and return its file, ``best.pt`` in the run folder (the last weights are in ``last.pt``).

    An interrupted run resumes from its last checkpoint; a finished one is left as it is.

    Parameters
    ----------
    score
        `dinocell.eval.threshold_search.score_segmenter`: called on the main rank every ``score_every`` epochs, and at
        the end to choose the thresholds that are stored in the file. None: no scores, default thresholds.

    Raises
    ------
    DinocellError
        If data, backbone and settings do not fit together, the training diverges, or the file of a finished run was
        removed.
    RunStopped
        If the run was interrupted; a checkpoint is saved.
    """
    Run.check(config.output, config)
    best = config.output / "best.pt"
    with together(config.compute.device, timeout_s=config.compute.timeout_s) as world, StopRequest() as stop:
        training = Training(config, world, score)
        training.restore()
        if training.progress.finished:
            if not best.exists():
                raise WeightsError(f"{best}: removed, and the run has finished; use last.pt, or another output")
            return best
        with Run.start(
            config.output,
            config,
            total_steps=training.total_steps,
            resume_step=training.progress.step,
            log_every=config.log_every,
            batch_size=config.crops_per_step,
            is_main=world.is_main,
        ) as run:
            run.text(0, "config", f"```yaml\n{to_yaml(config)}\n```")
            run.text(0, "help", help_text(config))
            for line in training.describe():
                run.note(line)
            training.train(run, stop)
            training.finish(run)
    return best


def dry_run(config: FinetuneConfig) -> str:
    """Open the data, build the model, take two steps, and describe the run; the run folder is not touched."""
    with tempfile.TemporaryDirectory() as scratch, together(config.compute.device) as world:
        config = replace(config, output=Path(scratch))  # a set that is built from images and masks is written there
        training = Training(config, world, is_dry=True)
        seconds = 0.0
        for step, batch in zip(range(2), training.batches(0), strict=False):
            begin = perf_counter()
            training.step(step, batch)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = perf_counter() - begin
        total = timedelta(seconds=round(seconds * training.total_steps))
        lines = (
            *training.describe(),
            f"a step takes {seconds:.2f} s on {world.device}; peak memory {decimal(peak_bytes(world.device))}",
            f"the run takes at most {total}, without validation; nothing was written",
        )
        return "\n".join(lines)


@dataclass(kw_only=True)
class Progress:
    """Completed steps, the lowest validation loss and its epoch, and the epochs without an improvement since."""

    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0
    finished: bool = False

    def update(self, loss: float, epoch: int, *, after: int, min_delta: float) -> bool:
        """Record a validation loss, ``after`` epochs since the last, and return whether it is the lowest so far."""
        best = math.inf if self.best is None else self.best
        self.stale = 0 if loss < best - min_delta else self.stale + after
        if not loss < best:
            return False
        self.best, self.best_epoch = loss, epoch
        return True


class Training:
    """The parts of a run, and its progress."""

    def __init__(
        self, config: FinetuneConfig, world: World, score: Scorer | None = None, *, is_dry: bool = False
    ) -> None:
        if config.crops_per_step % world.size:
            raise ConfigError(f"batch_size: {config.crops_per_step} crops cannot be divided among {world.size} ranks")
        self.config, self.world, self._score = config, world, score
        self.checkpointer = Checkpointer(config.output / "checkpoints", timeout_s=config.compute.timeout_s)
        has_begun = bool(self.checkpointer.steps())  # of all ranks together
        if world.is_main:
            # A run that resumes uses the images that it started with; before its first checkpoint they may be fixed.
            open_sets(config.data, config.output, rebuild=not has_begun)
        barrier()
        record = config.output / "split.json" if world.is_main and not is_dry else None
        self.split = split(open_sets(config.data, config.output), config.data, seed=config.seed, record=record)
        names = tuple(Path(data_set.folder).name for data_set in self.split.sets)
        sizes = {self.split.sets[index.data_set][index.image].pixel_size_um for index in self.split.training}
        pixel_size_um = sizes.pop() if len(sizes) == 1 else None
        self.learner = Learner(config, world, trained_on=names, pixel_size_um=pixel_size_um)
        self.crops = CropDataset(
            self.split,
            self.learner.model.settings,
            config.augment,
            seed=config.seed,
            weights=config.data.weights,
            crops_per_image=config.data.crops_per_image,
        )
        self.steps_per_epoch = math.ceil(self.crops.epoch_length / config.crops_per_step)
        self.total_steps = config.epochs * self.steps_per_epoch
        self._schedule = Schedule(peak=1.0, end=0.0, warmup=min(config.optim.warmup_steps, self.total_steps // 10))
        self.progress = Progress()

    def describe(self) -> list[str]:
        """Return lines about the run: the model, the data, its length, and the pairs that were skipped."""
        config, model, images = self.config, self.learner.model, self.split.training
        backbone, decoder = (
            sum(parameter.numel() for parameter in part.parameters()) / 1e6 for part in (model.backbone, model.decoder)
        )
        frozen = " (frozen)" if model.freeze_backbone else ""
        return [
            f"backbone {backbone:.1f} M{frozen}, decoder {decoder:.1f} M parameters; "
            f"{' | '.join(model.card.derived_from) or 'random weights'}",
            f"{len(images)} image{'s' * (len(images) != 1)} for training, {len(self.split.validation)} for validation; "
            f"{self.crops.epoch_length} crops per epoch, at most {config.epochs} epochs: {self.total_steps} steps of "
            f"{config.crops_per_step}",
            *(f"skipped, {line}" for line in skipped_pairs(self.split.sets)),
        ]

    def batches(self, first_step: int) -> "DataLoader[Batch]":
        """Return the batches of this rank, from a step on."""
        return loader(
            self.crops,
            self.world,
            steps=range(first_step, self.total_steps),
            batch_size=self.config.crops_per_step,
            workers=self.config.compute.workers,
        )

    def train(self, run: Run, stop: StopRequest) -> None:
        """Train to the end, or until the validation loss no longer improves."""
        first = self.progress.step
        for step, batch in enumerate(self.batches(first), start=first + 1):
            metrics = self.step(step - 1, batch)
            self.progress.step = step
            if run.is_log_step(step):
                self.learner.nonfinite_steps.check()
            epoch, rest = divmod(step, self.steps_per_epoch)
            if rest == 0:
                metrics |= self._end_of_epoch(run, step, epoch, batch)
            run.log(step, metrics, always=rest == 0)
            if rest == 0 and epoch % self.config.checkpoint_every == 0:
                self.save()
            patience = self.config.stopping.patience
            is_done = step == self.total_steps or (patience and self.progress.stale >= patience)
            if stop.agreed() and not is_done:
                self.save()
                self.checkpointer.wait()
                stop.finish()
                raise RunStopped(f"stopped after step {step} ({stop.reason}); run the same command again to resume")
            if is_done and step < self.total_steps:
                run.note(f"early stopping: no improvement of the validation loss for {self.progress.stale} epochs")
                break

    def step(self, step: int, batch: Batch) -> dict[str, Any]:
        """Train on a batch; ``step`` counts from 0."""
        return self.learner.step(batch, value_at(self._schedule, step, self.total_steps))

    def _end_of_epoch(self, run: Run, step: int, epoch: int, batch: Batch) -> dict[str, Any]:
        config, progress = self.config, self.progress
        metrics: dict[str, Any] = {"epoch": float(epoch)}
        if epoch % config.validate_every == 0 or step == self.total_steps:
            loss = self.learner.validation_loss(
                self.split.validation_images(), crop=config.augment.crop, batch_size=config.crops_per_step
            )
            metrics["loss/validation"] = loss
            is_best = progress.update(loss, epoch, after=config.validate_every, min_delta=config.stopping.min_delta)
            for name in ("best.pt", "last.pt") if is_best else ("last.pt",):
                self.write(name, step)
        if self._score is not None and self.world.is_main and epoch % config.score_every == 0:
            metrics |= self._score(self.learner.average.eval(), self.split.validation_images(), False).metrics
        if epoch % config.image_every == 0 and self.world.is_main:
            drawn = draw_examples(batch, self.learner.predict(batch.images).cpu())
            run.image(step, "examples (image, target, prediction, error)", drawn)
        return metrics

    def write(self, name: str, step: int) -> None:
        """Export the averaged weights on the main rank; their card has a line and the data's licences in addition."""
        if not self.world.is_main:
            return
        model = self.learner.average
        own, trained_on = model.card, ", ".join(model.settings.trained_on)
        line = f"DINOCell fine-tuning, {model.target}, {step} steps of {self.config.crops_per_step} on {trained_on}"
        licences = [own.licence, *(str(data_set.description.get("licence") or "") for data_set in self.split.sets)]
        licence = "; ".join(dict.fromkeys(filter(None, licences)))
        model.card = replace(own, derived_from=(*own.derived_from, line), licence=licence)
        model.save_pretrained(self.config.output / name)
        model.card = own

    def finish(self, run: Run) -> None:
        """Choose the thresholds that score best on the validation images, store them, and mark the run as finished."""
        best = self.config.output / "best.pt"
        if self.world.is_main and self._score is not None:
            images = self.split.validation_images()
            run.note(f"choosing thresholds on {len(images)} validation image{'s' * (len(images) > 1)}")
            model = DINOCell.from_pretrained(best).to(self.world.device)
            scored = self._score(model, images, True)
            replace_settings(model, **scored.settings)
            model.save_pretrained(best)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in scored.metrics.items())
            chosen = ", ".join(f"{name} {value}" for name, value in scored.settings.items()) or "unchanged"
            run.note(f"best epoch {self.progress.best_epoch}: {shown}; thresholds: {chosen}")
            if not any(scored.metrics.values()):
                advice = "train longer (epochs, data.crops_per_image), or see docs/training.md"
                run.note(f"no cells were segmented: {advice}")
        barrier()
        self.progress.finished = True
        self.save()
        self.checkpointer.close()

    def save(self) -> None:
        """Save a checkpoint."""
        self.checkpointer.save(self.progress.step, self.learner.state(), asdict(self.progress))

    def restore(self) -> None:
        """Restore the latest checkpoint, if there is one."""
        if not self.checkpointer.steps():
            return
        state = self.learner.state()
        restored = self.checkpointer.restore(state)
        assert restored is not None
        self.learner.restore(state)
        self.progress = Progress(**restored.values)


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
