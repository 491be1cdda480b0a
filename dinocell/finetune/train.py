"""The fine-tuning run: labelled sets and a backbone in, a segmenter out."""

import math
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

from torch.utils.data import DataLoader

from dinocell.errors import ConfigError
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Crops, Examples, Split, loader, open_sets, split
from dinocell.finetune.learner import Learner
from dinocell.finetune.pictures import draw_examples
from dinocell.finetune.validation import Scorer, choose_thresholds, validation_error
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.distributed import World, barrier, together
from dinocell.runtime.preemption import RunStopped, StopRequest
from dinocell.runtime.run import Run
from dinocell.runtime.schedules import Schedule, value_at


def finetune(config: FinetuneConfig, *, score: Scorer | None = None) -> Path:
    """Train a segmenter and return its file, ``best.pt`` in the run folder (``last.pt`` lies beside it).

    A run that was interrupted goes on from its last training state; one that has finished is not touched.

    Parameters
    ----------
    score
        Called on the main rank every ``score_every`` epochs, and at the end to choose thresholds, which are stored in
        the file.

    Raises
    ------
    DinocellError
        If data, backbone and settings do not fit together, or the training diverges.
    RunStopped
        If it was told to stop; it has saved and can be continued.
    """
    Run.check(config.output, config)
    with together(config.compute.device, timeout_s=config.compute.timeout_s) as world, StopRequest() as stop:
        training = Training(config, world)
        training.restore()
        if training.progress.finished:
            return config.output / "best.pt"
        with Run.start(
            config.output,
            config,
            total_steps=training.total_steps,
            resume_step=training.progress.step,
            log_every=config.log_every,
            batch_size=config.crops_a_step,
            is_main=world.is_main,
        ) as run:
            for line in training.facts():
                run.note(line)
            training.train(run, stop, score)
            training.finish(run, score)
    return config.output / "best.pt"


def dry_run(config: FinetuneConfig) -> str:
    """Open the data, build the model, take two steps, and say what a run would be; nothing stays in the run folder."""
    with tempfile.TemporaryDirectory() as scratch, together(config.compute.device) as world:
        config = replace(config, output=Path(scratch))  # a set made of images and masks goes there
        training = Training(config, world, is_dry=True)
        seconds = 0.0
        for number, batch in zip(range(2), training.batches(0), strict=False):
            begin = perf_counter()
            training.step(number, batch)
            seconds = perf_counter() - begin
        total = timedelta(seconds=round(seconds * training.total_steps))
        return "\n".join(
            [*training.facts(), f"a step takes {seconds:.2f} s on {world.device}; the run {total} at most"]
        )


@dataclass(kw_only=True)
class Progress:
    """How far a run is: its steps, the least validation error, its epoch, and for how many epochs it has not fallen."""

    step: int = 0
    best: float = math.inf
    best_epoch: int = 0
    stale: int = 0
    finished: bool = False

    def take(self, error: float, epoch: int, *, after: int, min_delta: float) -> bool:
        """Take in a validation error, ``after`` so many epochs, and say whether it is the least so far."""
        self.stale = 0 if error < self.best - min_delta else self.stale + after
        if not error < self.best:
            return False
        self.best, self.best_epoch = error, epoch
        return True

    def values(self) -> dict[str, Any]:
        """Return plain values for `Progress.of`, which JSON can hold."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}

    @staticmethod
    def of(values: dict[str, Any]) -> "Progress":
        """Return the progress that gave these values."""
        given: dict[str, Any] = {name: math.inf if value is None else value for name, value in values.items()}
        return Progress(**given)


class Training:
    """The parts of a run, and its progress."""

    def __init__(self, config: FinetuneConfig, world: World, *, is_dry: bool = False) -> None:
        if config.crops_a_step % world.size:
            raise ConfigError(f"batch_size: {config.crops_a_step} crops cannot be shared by {world.size} ranks")
        self.config, self.world = config, world
        if world.is_main:
            open_sets(config.data, config.output)
        barrier()
        record = config.output / "split.json" if world.is_main and not is_dry else None
        self.split: Split = split(open_sets(config.data, config.output), config.data, seed=config.seed, record=record)
        names = tuple(Path(each.folder).name for each in self.split.sets)
        self.learner = Learner(config, world, trained_on=names, pixel_size_um=self._pixel_size())
        self.crops = Crops(
            self.split,
            self.learner.model.settings,
            config.augment,
            seed=config.seed,
            weights=config.data.weights,
            crops_per_image=config.data.crops_per_image,
        )
        self.steps_per_epoch = math.ceil(self.crops.epoch_length / config.crops_a_step)
        self.total_steps = config.epochs * self.steps_per_epoch
        warmup = min(config.optim.warmup_steps, self.total_steps // 10)
        self._schedule = Schedule(peak=1.0, end=0.0, warmup=warmup)
        self.checkpointer = Checkpointer(config.output / "checkpoints", timeout_s=config.compute.timeout_s)
        self.progress = Progress()

    def _pixel_size(self) -> float | None:
        sizes = {self.split.sets[c.data_set][c.image].pixel_size_um for c in self.split.training}
        return sizes.pop() if len(sizes) == 1 else None

    def facts(self) -> list[str]:
        """Say what the run is, in lines."""
        model = self.learner.model
        count = {
            name: sum(p.numel() for p in part.parameters()) / 1e6
            for name, part in (("backbone", model.backbone), ("decoder", model.decoder))
        }
        skipped = [line for each in self.split.sets for line in each.description.get("skipped", [])]
        left_out = (
            [f"left out when the sets were made: {len(skipped)}, the first {skipped[0]['reason']}"] if skipped else []
        )
        frozen = " (frozen)" if model.freeze_backbone else ""
        return [
            f"backbone {count['backbone']:.1f} M{frozen}, decoder {count['decoder']:.1f} M parameters; "
            f"{' | '.join(model.card.derived_from) or 'random weights'}",
            f"{len(self.split.training)} images to learn from, {len(self.split.validation)} to validate on; "
            f"{self.crops.epoch_length} crops an epoch, {self.config.epochs} epochs at most: "
            f"{self.total_steps} steps of {self.config.crops_a_step}",
            *left_out,
        ]

    def batches(self, first_step: int) -> "DataLoader[Examples]":
        """Return the batches of this rank from a step on."""
        return loader(
            self.crops,
            first_step=first_step,
            last_step=self.total_steps,
            batch_size=self.config.crops_a_step,
            rank=self.world.rank,
            ranks=self.world.size,
            workers=self.config.compute.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def train(self, run: Run, stop: StopRequest, score: Scorer | None) -> None:
        """Go on to the end, or to where the validation error no longer falls."""
        first = self.progress.step
        for step, batch in enumerate(self.batches(first), start=first + 1):
            metrics = self.step(step - 1, batch)
            self.progress.step = step
            if run.is_log_step(step):
                self.learner.bad_steps.check()
            epoch, rest = divmod(step, self.steps_per_epoch)
            if rest == 0:
                metrics |= self._end_of_epoch(run, step, epoch, score, batch)
            run.log(step, metrics, always=rest == 0)
            if rest == 0 and epoch % self.config.checkpoint_every == 0:
                self.save()
            patience = self.config.stopping.patience
            is_done = step == self.total_steps or (patience and self.progress.stale >= patience)
            if stop.agreed() and not is_done:
                self.save()
                self.checkpointer.wait()
                stop.finish()
                raise RunStopped(f"stopped after step {step} ({stop.reason}); the same command goes on from there")
            if is_done and step < self.total_steps:
                run.note(f"the validation error has not fallen for {self.progress.stale} epochs: done")
                break

    def step(self, number: int, batch: Examples) -> dict[str, Any]:
        """Learn from a batch; ``number`` counts from 0."""
        return self.learner.step(batch, value_at(self._schedule, number, self.total_steps))

    def _end_of_epoch(self, run: Run, step: int, epoch: int, score: Scorer | None, batch: Examples) -> dict[str, Any]:
        config, progress = self.config, self.progress
        metrics: dict[str, Any] = {"epoch": float(epoch)}
        if epoch % config.validate_every == 0 or step == self.total_steps:
            error = self.validation_error()
            metrics["loss/validation"] = error
            is_best = progress.take(error, epoch, after=config.validate_every, min_delta=config.stopping.min_delta)
            for name in ("best.pt", "last.pt") if is_best else ("last.pt",):
                self.write(name, step)
        if score is not None and self.world.is_main and epoch % config.score_every == 0:
            metrics |= score(self.learner.average.eval(), self.split.validation_images(), False).metrics
        if epoch % config.picture_every == 0 and self.world.is_main:
            run.image(step, "examples", draw_examples(batch, self.learner.predict(batch.images).cpu()))
        return metrics

    def validation_error(self) -> float:
        """Return the mean loss over all validation images, over all ranks."""
        return validation_error(
            self.learner,
            self.split.validation_images(),
            crop=self.config.augment.crop,
            batch_size=self.config.crops_a_step,
            world=self.world,
        )

    def write(self, name: str, step: int) -> None:
        """Export the weights; on the main rank."""
        if not self.world.is_main:
            return
        model = self.learner.model
        self.learner.write(
            self.config.output / name,
            line=f"DINOCell fine-tuning, {model.target}, {step} steps of {self.config.crops_a_step} on "
            f"{', '.join(model.settings.trained_on)}",
            licences=[str(each.description.get("licence") or "") for each in self.split.sets],
        )

    def finish(self, run: Run, score: Scorer | None) -> None:
        """Choose thresholds on the validation images, store them, and mark the run as finished."""
        best = self.config.output / "best.pt"
        if self.world.is_main:
            if score is not None:
                scored = choose_thresholds(best, self.split.validation_images(), score, self.world.device)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in scored.metrics.items())
                chosen = ", ".join(f"{name} {value}" for name, value in scored.settings.items())
                run.note(f"best epoch {self.progress.best_epoch}: {shown}; thresholds: {chosen}")
            run.note(f"segmenter: {best}")
        barrier()
        self.progress.finished = True
        self.save()
        self.checkpointer.close()

    def save(self) -> None:
        """Save the training state."""
        self.checkpointer.save(self.progress.step, self.learner.state(), self.progress.values())

    def restore(self) -> None:
        """Go back to the newest training state, if there is one."""
        if not self.checkpointer.steps():
            return
        state = self.learner.state()
        restored = self.checkpointer.restore(state)
        assert restored is not None
        self.learner.restore(state)
        self.progress = Progress.of(restored.values)
