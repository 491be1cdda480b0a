"""The fine-tuning run: labelled sets and a backbone in, a segmenter out."""

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from dinocell.data_shards.labelled import LabelledImage
from dinocell.errors import ConfigError
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Crops, Examples, Split, loader, open_sets, split, validation_batches
from dinocell.finetune.losses import map_loss
from dinocell.finetune.model import DINOCell, create_dinocell_model, replace_settings
from dinocell.finetune.pictures import draw_examples
from dinocell.runtime.bad_steps import BadSteps
from dinocell.runtime.checkpoint import Checkpointer, Restored
from dinocell.runtime.distributed import World, barrier, sum_over_ranks, together
from dinocell.runtime.optim import adamw, clip_gradients, parameter_groups, set_rates, update_teacher
from dinocell.runtime.precision import uses_bfloat16
from dinocell.runtime.preemption import RunStopped, StopRequest
from dinocell.runtime.run import Run
from dinocell.runtime.schedules import Schedule, value_at


class Scored(NamedTuple):
    """What a scorer says of a segmenter: numbers for the log, and settings that it would rather have."""

    metrics: dict[str, float]
    settings: dict[str, Any]


Scorer = Callable[[DINOCell, Sequence[LabelledImage], bool], Scored]
"""Segments validation images and scores them; the last argument asks for a search of thresholds."""


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
        training = _Training(config, world)
        training.restore()
        if training.progress["finished"]:
            return config.output / "best.pt"
        with Run.start(
            config.output,
            config,
            total_steps=training.total_steps,
            resume_step=training.progress["step"],
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
        training = _Training(config, world, is_dry=True)
        seconds = 0.0
        for number, batch in zip(range(2), training.batches(0), strict=False):
            begin = perf_counter()
            training.step(number, batch)
            seconds = perf_counter() - begin
        total = timedelta(seconds=round(seconds * training.total_steps))
        return "\n".join(
            [*training.facts(), f"a step takes {seconds:.2f} s on {world.device}; the run {total} at most"]
        )


class _Training:
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
        torch.manual_seed(config.seed)
        self.model = _model(config).to(world.device)
        names = tuple(Path(each.folder).name for each in self.split.sets)
        replace_settings(self.model, trained_on=names, pixel_size_um=self._pixel_size(), window_px=config.augment.crop)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.optim.ema else self.model
        self.parallel: nn.Module = self.model
        if world.size > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.crops = Crops(
            self.split,
            self.model.settings,
            config.augment,
            seed=config.seed,
            weights=config.data.weights,
            crops_per_image=config.data.crops_per_image,
        )
        self.steps_per_epoch = math.ceil(self.crops.epoch_length / config.crops_a_step)
        self.total_steps = config.epochs * self.steps_per_epoch
        warmup = min(config.optim.warmup_steps, self.total_steps // 10)
        self._schedule = Schedule(peak=1.0, end=0.0, warmup=warmup)
        parts = {"backbone": self.model.backbone, "decoder": self.model.decoder}
        groups = parameter_groups(
            parts,
            depth=self.model.backbone.config.depth,
            layer_decay=config.optim.layer_decay,
            patch_embedding_factor=1.0,
        )
        self._parts = {name: part for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}
        self.optimizer = adamw(groups, betas=config.optim.betas)
        self._bad_steps = BadSteps(
            world.device,
            most=config.optim.max_bad_steps,
            advice=f"Lower optim.learning_rate; {config.output / 'last.pt'} is the last good model",
        )
        self.checkpointer = Checkpointer(config.output / "checkpoints", timeout_s=config.compute.timeout_s)
        self.progress: dict[str, Any] = {"step": 0, "best": math.inf, "best_epoch": 0, "stale": 0, "finished": False}

    def _pixel_size(self) -> float | None:
        sizes = {self.split.sets[c.data_set][c.image].pixel_size_um for c in self.split.training}
        return sizes.pop() if len(sizes) == 1 else None

    def facts(self) -> list[str]:
        """Say what the run is, in lines."""
        count = {
            name: sum(p.numel() for p in part.parameters()) / 1e6
            for name, part in (("backbone", self.model.backbone), ("decoder", self.model.decoder))
        }
        skipped = [line for each in self.split.sets for line in each.description.get("skipped", [])]
        left_out = (
            [f"left out when the sets were made: {len(skipped)}, the first {skipped[0]['reason']}"] if skipped else []
        )
        frozen = " (frozen)" if self.model.freeze_backbone else ""
        return [
            f"backbone {count['backbone']:.1f} M{frozen}, decoder {count['decoder']:.1f} M parameters; "
            f"{' | '.join(self.model.card.derived_from) or 'random weights'}",
            f"{len(self.split.training)} images to learn from, {len(self.split.validation)} to validate on; "
            f"{self.crops.epoch_length} crops an epoch, {self.config.epochs} epochs at most: "
            f"{self.total_steps} steps of {self.config.crops_a_step}",
            *left_out,
        ]

    def batches(self, first_step: int) -> Any:
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
        first = self.progress["step"]
        for step, batch in enumerate(self.batches(first), start=first + 1):
            metrics = self.step(step - 1, batch)
            self.progress["step"] = step
            if run.is_log_step(step):
                self._bad_steps.check()
            epoch, rest = divmod(step, self.steps_per_epoch)
            if rest == 0:
                metrics |= self._end_of_epoch(run, step, epoch, score, batch)
            run.log(step, metrics, always=rest == 0)
            if rest == 0 and epoch % self.config.checkpoint_every == 0:
                self.save()
            patience = self.config.stopping.patience
            is_done = step == self.total_steps or (patience and self.progress["stale"] >= patience)
            if stop.agreed() and not is_done:
                self.save()
                self.checkpointer.wait()
                stop.finish()
                raise RunStopped(f"stopped after step {step} ({stop.reason}); the same command goes on from there")
            if is_done and step < self.total_steps:
                run.note(f"the validation error has not fallen for {self.progress['stale']} epochs: done")
                break

    def step(self, number: int, batch: Examples) -> dict[str, Any]:
        """Learn from a batch; ``number`` counts from 0."""
        config, optim = self.config, self.config.optim
        images, targets = (part.to(self.world.device, non_blocking=True) for part in batch)
        rate = value_at(self._schedule, number, self.total_steps)
        set_rates(
            self.optimizer,
            learning_rate=rate * optim.learning_rate,
            weight_decay=optim.weight_decay,
            backbone_factor=optim.backbone_learning_rate / optim.learning_rate,
        )
        self.model.train()
        maps = self._maps(self.parallel, images)
        loss = map_loss(maps, targets, self.model.target, **vars(config.loss))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = clip_gradients(self._parts, optim.clip)
        error = sum_over_ranks(loss.detach()) / self.world.size  # a rank sees its own crops: what is logged is of all
        self._bad_steps.step(self.optimizer, [error, *norms.values()])
        if optim.ema:
            update_teacher(self.average.parameters(), self.model.parameters(), optim.ema)
        metrics: dict[str, Any] = {"loss/train": error, "health/skipped_steps": self._bad_steps.total}
        metrics |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        metrics["schedule/learning_rate"] = rate * optim.learning_rate
        return metrics

    def _maps(self, model: nn.Module, images: Tensor) -> Tensor:
        device = self.world.device
        use_bfloat16 = uses_bfloat16(self.config.compute.dtype, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
            maps: Tensor = model(images)
        return maps.float()

    def _end_of_epoch(self, run: Run, step: int, epoch: int, score: Scorer | None, batch: Examples) -> dict[str, Any]:
        config = self.config
        metrics: dict[str, Any] = {"epoch": float(epoch)}
        is_last = step == self.total_steps
        if epoch % config.validate_every == 0 or is_last:
            error = self.validation_error()
            metrics["loss/validation"] = error
            improved = error < self.progress["best"] - config.stopping.min_delta
            self.progress["stale"] = 0 if improved else self.progress["stale"] + config.validate_every
            if error < self.progress["best"]:
                self.progress |= {"best": error, "best_epoch": epoch}
                self.write("best.pt", step)
            self.write("last.pt", step)
        if score is not None and self.world.is_main and epoch % config.score_every == 0:
            metrics |= score(self.average.eval(), self.split.validation_images(), False).metrics
        if epoch % config.picture_every == 0 and self.world.is_main:
            with torch.no_grad():
                maps = self._maps(self.average.eval(), batch.images.to(self.world.device))
            run.image(step, "examples", draw_examples(batch, maps.cpu()))
        return metrics

    @torch.no_grad()
    def validation_error(self) -> float:
        """Return the mean loss over all validation crops, whole images without augmentation, over all ranks."""
        model = self.average.eval()
        images = self.split.validation_images()[self.world.rank :: self.world.size]
        total = torch.zeros(2, dtype=torch.float64)
        batches = validation_batches(
            images, model.settings, crop=self.config.augment.crop, batch_size=self.config.crops_a_step
        )
        for batch in batches:
            part = batch.images.to(self.world.device), batch.targets.to(self.world.device)
            loss = map_loss(self._maps(model, part[0]), part[1], model.target)
            total += torch.tensor([float(loss) * len(batch.images), len(batch.images)], dtype=torch.float64)
        total = sum_over_ranks(total)
        return float(total[0] / total[1])

    def write(self, name: str, step: int) -> None:
        """Export the weights; on the main rank."""
        if not self.world.is_main:
            return
        line = (
            f"DINOCell fine-tuning, {self.model.target}, {step} steps of {self.config.crops_a_step} on "
            f"{', '.join(self.model.settings.trained_on)}"
        )
        card = self.model.card
        licences = [card.licence, *(str(each.description.get("licence") or "") for each in self.split.sets)]
        exported = self.average
        own = exported.card
        exported.card = replace(
            card, derived_from=(*card.derived_from, line), licence="; ".join(dict.fromkeys(filter(None, licences)))
        )
        exported.save_pretrained(self.config.output / name)
        exported.card = own

    def finish(self, run: Run, score: Scorer | None) -> None:
        """Choose thresholds on the validation images, store them, and mark the run as finished."""
        best = self.config.output / "best.pt"
        if self.world.is_main:
            model = DINOCell.from_pretrained(best).to(self.world.device)
            if score is not None:
                scored = score(model, self.split.validation_images(), True)
                replace_settings(model, **scored.settings)
                model.save_pretrained(best)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in scored.metrics.items())
                chosen = ", ".join(f"{name} {value}" for name, value in scored.settings.items())
                run.note(f"best epoch {self.progress['best_epoch']}: {shown}; thresholds: {chosen}")
            run.note(f"segmenter: {best}")
        barrier()
        self.progress["finished"] = True
        self.save()
        self.checkpointer.close()

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        state["bad"] = self._bad_steps.state()
        if self.config.optim.ema:
            state["average"] = self.average.state_dict()
        return state

    def save(self) -> None:
        """Save the training state."""
        values = {name: None if value == math.inf else value for name, value in self.progress.items()}
        self.checkpointer.save(self.progress["step"], self._state(), values)

    def restore(self) -> None:
        """Go back to the newest training state, if there is one."""
        if not self.checkpointer.steps():
            return
        state = self._state()
        restored: Restored | None = self.checkpointer.restore(state)
        assert restored is not None
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self._bad_steps.restore(state["bad"])
        if self.config.optim.ema:
            self.average.load_state_dict(state["average"])
        self.progress = {name: math.inf if value is None else value for name, value in restored.values.items()}


def _model(config: FinetuneConfig) -> DINOCell:
    chosen = config.model
    if chosen.segmenter is not None:
        model = DINOCell.from_pretrained(chosen.segmenter)
        if model.target != config.target:
            raise ConfigError(f"target: {chosen.segmenter} is a segmenter by {model.target}, not {config.target}")
        model.set_frozen(chosen.freeze_backbone)
        return model
    return create_dinocell_model(
        chosen.size,
        freeze_backbone=chosen.freeze_backbone,
        pretrained=chosen.pretrained,
        backbone_weights=chosen.weights,
        patch_size=chosen.patch_size,
        blocks=chosen.blocks,
        target=config.target,
    )


__all__ = ["Scored", "Scorer", "dry_run", "finetune"]
