"""The fine-tuning run: labelled sets and a backbone in, a segmenter out."""

import math
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader

from dinocell.configs.load import to_yaml
from dinocell.errors import ConfigError
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Crops, Examples, crops_of_step, loader
from dinocell.finetune.feature_cache import bytes_of_crop, in_bytes
from dinocell.finetune.learner import Learner
from dinocell.finetune.monitors import describe_run, draw_examples, guide
from dinocell.finetune.sets import Split, open_sets, split
from dinocell.finetune.validation import Scorer, choose_thresholds, validation_error
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.device import peak_bytes
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
            run.text(0, "config", f"```yaml\n{to_yaml(config)}\n```")
            run.text(0, "guide", guide(config))
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
            seconds = _timed_step(training, number, batch)
        # Steps whose crops are all new; the others find their features kept, as this one does if it is taken again.
        new, again = training.total_steps, 0.0
        if training.learner.kept:
            new = min(new, math.ceil(training.crops.num_drawn / config.crops_a_step))
            again = _timed_step(training, number, batch)
        total = timedelta(seconds=round(seconds * new + again * (training.total_steps - new)))
        used = peak_bytes(world.device)
        kept = f", {again:.2f} s when its crops come again" if training.learner.kept else ""
        return "\n".join(
            [
                *training.facts(),
                f"a step takes {seconds:.2f} s on {world.device}{kept}; {in_bytes(used)} at the peak",
                f"the run takes {total} at most, without validation; nothing was written",
            ]
        )


def _timed_step(training: "Training", number: int, batch: Examples) -> float:
    begin = perf_counter()
    training.step(number, batch)
    if training.world.device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - begin


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
        self.checkpointer = Checkpointer(config.output / "checkpoints", timeout_s=config.compute.timeout_s)
        has_begun = bool(self.checkpointer.steps())
        if world.is_main:
            # What has begun goes on with the images that it began with; before that, images may still be mended.
            open_sets(config.data, config.output, anew=not has_begun)
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
            fixed=config.data.fixed_crops,
        )
        self.steps_per_epoch = math.ceil(self.crops.epoch_length / config.crops_a_step)
        self.total_steps = config.epochs * self.steps_per_epoch
        if self.crops.num_drawn:
            self._keep_features(check_room=not is_dry)
        warmup = min(config.optim.warmup_steps, self.total_steps // 10)
        self._schedule = Schedule(peak=1.0, end=0.0, warmup=warmup)
        self.progress = Progress()

    def _pixel_size(self) -> float | None:
        sizes = {self.split.sets[c.data_set][c.image].pixel_size_um for c in self.split.training}
        return sizes.pop() if len(sizes) == 1 else None

    def _keep_features(self, *, check_room: bool) -> None:
        output = self.config.output
        output.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(output).free, self._feature_bytes * self.world.local_size
        if check_room and needed > free:
            raise ConfigError(
                f"data.fixed_crops: the features of its crops take {in_bytes(needed)}, and {output} has "
                f"{in_bytes(free)} left; set it lower, take another output, or leave it out"
            )
        self.learner.keep_features(output)

    @property
    def _feature_bytes(self) -> int:
        """Of a rank's kept features, at most."""
        vit, crop = self.learner.model.backbone.config, self.config.augment.crop
        drawn = min(self.crops.num_drawn, self.total_steps * self.config.crops_a_step)
        shapes: list[tuple[int, ...]] = [each.labels.shape for each in self.split.validation_images()]
        validated = sum(-(-height // crop) * -(-width // crop) for height, width in shapes)
        each = bytes_of_crop(crop=crop, patch_size=vit.patch_size, width=vit.width, dtype=self.learner.dtype)
        return (drawn + validated) * each

    def facts(self) -> list[str]:
        """Say what the run is, in lines."""
        return describe_run(
            self.config,
            self.learner,
            self.split,
            self.crops,
            total_steps=self.total_steps,
            feature_bytes=self._feature_bytes if self.learner.kept else 0,
        )

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
                self.learner.nonfinite_steps.check()
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
        size, world = self.config.crops_a_step, self.world
        crops = crops_of_step(number, batch_size=size, rank=world.rank, ranks=world.size)
        drawn = [self.crops.drawn(each) for each in crops] if self.crops.num_drawn else None
        return self.learner.step(batch, value_at(self._schedule, number, self.total_steps), drawn)

    def _end_of_epoch(self, run: Run, step: int, epoch: int, score: Scorer | None, batch: Examples) -> dict[str, Any]:
        config, progress = self.config, self.progress
        metrics: dict[str, Any] = {"epoch": float(epoch)}
        if epoch % config.validate_every == 0 or step == self.total_steps:
            error = validation_error(
                self.learner,
                self.split.validation_images(),
                crop=config.augment.crop,
                batch_size=config.crops_a_step,
                world=self.world,
                first_number=self.crops.num_drawn,
            )
            metrics["loss/validation"] = error
            is_best = progress.take(error, epoch, after=config.validate_every, min_delta=config.stopping.min_delta)
            for name in ("best.pt", "last.pt") if is_best else ("last.pt",):
                self.write(name, step)
        if score is not None and self.world.is_main and epoch % config.score_every == 0:
            metrics |= score(self.learner.average.eval(), self.split.validation_images(), False).metrics
        if epoch % config.picture_every == 0 and self.world.is_main:
            run.image(
                step,
                "examples (image, target, prediction, error)",
                draw_examples(batch, self.learner.predict(batch.images).cpu()),
            )
        return metrics

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
        if self.world.is_main and score is not None:
            images = self.split.validation_images()
            run.note(f"choosing thresholds on {len(images)} validation image{'s' * (len(images) > 1)}")
            scored = choose_thresholds(best, images, score, self.world.device)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in scored.metrics.items())
            chosen = ", ".join(f"{name} {value}" for name, value in scored.settings.items()) or "as they were"
            run.note(f"best epoch {self.progress.best_epoch}: {shown}; thresholds: {chosen}")
            if not any(scored.metrics.values()):
                run.note("no cell was found: train longer (epochs, data.crops_per_image), or see docs/training.md")
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
