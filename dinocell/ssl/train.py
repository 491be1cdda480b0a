"""The pretraining run: from shards to teacher checkpoints, in one process or several."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dinocell.configs.load import to_yaml
from dinocell.data_shards.read import loader
from dinocell.errors import DinocellError
from dinocell.models.vit import VisionTransformer
from dinocell.models.weights import Weights, save_weights
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.device import Throughput, peak_bytes
from dinocell.runtime.distributed import World, from_main, together
from dinocell.runtime.preemption import RunStopped, StopRequest
from dinocell.runtime.run import Run
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.data import PlannedBatch, open_shards
from dinocell.ssl.heads import ReconstructionHead
from dinocell.ssl.masking import PatchMasks
from dinocell.ssl.prepare import (
    backbone_of,
    build_model,
    check_memory,
    describe_run,
    flop_per_image,
    initial_backbone,
    what_would_fit,
)
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.trainer import PlateauMonitor, Trainer, eval_folder, help_text
from dinocell.ssl.views import Views, make_views
from dinocell.ssl.visualise import draw_features, draw_reconstruction, draw_views

OnlineEval = Callable[[VisionTransformer], Mapping[str, float]]
"""Evaluates a teacher during training and returns metrics; the command provides one."""

Module = TypeVar("Module", bound=torch.nn.Module)

_TEACHER = "teacher_checkpoint.pth"

# What may change when a run is resumed: how it is computed, where shards are cached, and the evaluation.
_MAY_DIFFER = ("compute", "data.cache", "data.cache_gb", "online_eval")


def dry_run(config: PretrainConfig) -> str:
    """Open the shards, build the model, take two steps, and return a summary of the run; nothing is written.

    Raises
    ------
    DinocellError
        As ``pretrain``, before its first step.
    """
    with together(config.compute.device, timeout_s=config.compute.timeout_s) as world:
        stream = open_shards(config, world)
        check_memory(config, world)
        model = build_model(config, world)
        trainer = Trainer(config, model, world)
        seconds, batches = 0.0, iter(stream)
        for step in range(min(2, config.steps)):
            start = time.perf_counter()
            trainer.step(step, _Feed(config, batches, world).parts(), measure=False)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start  # of the last step, after the warm-up
        return "\n".join(
            [
                *describe_run(config, stream.samples, model, world),
                f"measured memory: {peak_bytes(world.device) / 1e9:.1f} GB at the peak",
                f"measured time: {seconds:.2f} s per step on {world.device}, including reading",
                f"the run would take {timedelta(seconds=round(seconds * config.steps))}; nothing was written",
            ]
        )


def pretrain(
    config: PretrainConfig,
    *,
    on_export: Callable[[Path], None] = lambda _: None,
    online_eval: OnlineEval | None = None,
) -> Path:
    """Train a teacher and return the path of its last checkpoint.

    An interrupted run resumes from its latest checkpoint with the same results as an uninterrupted one; a finished run
    is not touched. Several processes (torchrun, ``dinocell launch``) share the work.

    Parameters
    ----------
    on_export
        Called with the path of each teacher checkpoint, by the main process.
    online_eval
        Called with the teacher every ``online_eval.every`` steps, by the main process; its metrics are logged.

    Raises
    ------
    DinocellError
        If shards, weights and settings do not fit together, or the training diverges.
    RunStopped
        If it was interrupted; it has saved a checkpoint and can be resumed.
    """
    with together(config.compute.device, timeout_s=config.compute.timeout_s) as world:
        Run.check(config.output, config, ignore=_MAY_DIFFER)
        last = eval_folder(config.output, config.steps) / _TEACHER
        if from_main(last.exists()):
            return last
        stream = open_shards(config, world)
        check_memory(config, world)
        model = build_model(config, world)
        trainer = Trainer(config, model, world)
        checkpointer = Checkpointer(
            config.output / "checkpoints",
            keep_last=config.keep_checkpoints,
            keep_every=config.keep_checkpoint_every,
            timeout_s=config.compute.timeout_s,
        )
        first = trainer.restore(checkpointer)
        if first:
            # The samples of a step depend on its position in the stream alone.
            stream = open_shards(config, world, position=first * config.batch_size)
        with (
            closing(checkpointer),
            StopRequest() as stop,
            Run.start(
                config.output,
                config,
                total_steps=config.steps,
                resume_step=first,
                log_every=config.log_every,
                batch_size=config.batch_size,
                is_main=world.is_main,
                ignore=_MAY_DIFFER,
            ) as run,
        ):
            run.text(0, "config", f"```yaml\n{to_yaml(config)}\n```")
            run.text(0, "help", help_text(config))
            for line in describe_run(config, stream.samples, model, world):
                run.note(line)
            if first:
                run.note(f"resuming after step {first}")
            plateau = PlateauMonitor(config)
            flop = flop_per_image(config, model) * config.batch_size / world.size
            throughput = Throughput(world.device, flop)
            batches = throughput.waiting(
                loader(stream, workers=config.compute.workers, pin_memory=world.device.type == "cuda")
            )
            if first == config.steps:  # finished, but its teacher was deleted
                _export(run, config, model, first, on_export)
            for step in range(first + 1, config.steps + 1):
                feed = _Feed(config, batches, world)
                is_log_step = run.is_log_step(step)
                try:
                    metrics = trainer.step(step - 1, feed.parts(), measure=is_log_step)
                except torch.OutOfMemoryError as error:
                    reason = str(error).splitlines()[0][:120]
                    raise DinocellError(
                        f"not enough memory on {world.device} ({reason}): {what_would_fit(config)}"
                    ) from error
                throughput.step()
                for line in feed.damaged:
                    run.note(f"replaced a damaged sample: {line}")
                run.log(step, metrics | throughput.metrics() if is_log_step else {})
                if run.is_main and is_log_step and (advice := plateau.advice(step, metrics)):
                    run.note(f"warning: {advice}")
                _evaluate(run, step, config, model, feed, online_eval)
                if step % config.export_every == 0 or step == config.steps:
                    _export(run, config, model, step, on_export)
                stops = step < config.steps and stop.agreed()
                if stops or step == config.steps or step % config.checkpoint_every == 0:
                    trainer.save(checkpointer, step)
                if stops:
                    checkpointer.wait()
                    stop.finish()
                    raise RunStopped(f"stopped after step {step} ({stop.reason}); run the same command to resume")
        return last


class _Feed:
    """Views and masks of this rank's share of a step, made part by part."""

    def __init__(self, config: PretrainConfig, batches: Iterator[PlannedBatch], world: World) -> None:
        self._config, self._batches, self._device = config, batches, world.device
        self.damaged: list[str] = []
        self.last: tuple[Views, PatchMasks] | None = None

    def parts(self) -> Iterator[tuple[Views, PatchMasks]]:
        for _ in range(self._config.optim.accumulate):
            batch = next(self._batches)
            self.damaged += batch.tiles.damaged
            views = make_views(batch.tiles, batch.plans, self._config.views, device=self._device)
            self.last = views, batch.masks.to(self._device)
            yield self.last


def _evaluate(
    run: Run, step: int, config: PretrainConfig, model: StudentTeacher, feed: "_Feed", online_eval: OnlineEval | None
) -> None:
    """Draw images and evaluate the teacher, if due; all ranks gather the networks, the main one evaluates."""
    draws = step == 1 or step % config.image_every == 0
    every = config.online_eval.every if online_eval is not None else 0
    evaluates = every > 0 and (step % every == 0 or step == config.steps)
    if not (draws or evaluates):
        return
    teacher = _whole_backbone(model.teacher, keep=run.is_main)
    student = head = None
    if draws and config.uses_reconstruction:
        student, head = _whole_backbone(model.student, keep=run.is_main), _whole_head(model, keep=run.is_main)
    if teacher is None or feed.last is None:
        return
    views, masks = feed.last
    if draws:
        run.image(step, "views", draw_views(views))
        images = draw_features(teacher, views, initial_backbone(config).to(views.global_views.device))
        if student is not None and head is not None:
            normalised = config.losses.reconstruction.patch_normalised
            images |= draw_reconstruction(student, head, views, masks, patch_normalised=normalised)
        for name, image in images.items():
            run.image(step, name, image)
    if evaluates and online_eval is not None:
        run.log(step, online_eval(teacher), always=True)


def _whole_backbone(side: torch.nn.ModuleDict, *, keep: bool) -> VisionTransformer | None:
    """Return `_whole` of a backbone: nothing is compiled, and its attention kernel accepts float32."""
    backbone = backbone_of(side)
    return _whole(backbone, lambda: VisionTransformer(backbone.config), keep=keep)


def _whole_head(model: StudentTeacher, *, keep: bool) -> ReconstructionHead | None:
    head = cast("ReconstructionHead", model.student["reconstruction_head"])
    sizes = head.fc1.in_features, head.fc2.out_features
    return _whole(head, lambda: ReconstructionHead(*sizes, hidden_dim=head.fc1.out_features), keep=keep)


def _whole(module: torch.nn.Module, make: Callable[[], Module], *, keep: bool) -> Module | None:
    """Return what ``make`` returns, with a module's parameters (shared, or gathered); called by all ranks."""
    is_sharded = any(hasattr(parameter, "device_mesh") for parameter in module.parameters())
    tensors = _gathered(module) if is_sharded else module.state_dict()
    if not keep:
        return None
    with torch.device("meta"):
        whole = make()
    whole.load_state_dict(tensors, assign=True)
    return whole.to(next(module.parameters()).device).eval().requires_grad_(False)


def _gathered(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return full tensors in main memory on the main rank, nothing on the others; called by all ranks."""
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _export(
    run: Run, config: PretrainConfig, model: StudentTeacher, step: int, on_export: Callable[[Path], None]
) -> None:
    """Write the teacher of a step; called by all ranks."""
    path = eval_folder(config.output, step) / _TEACHER
    whole = _whole_backbone(model.teacher, keep=run.is_main)
    heads = {name: _gathered(module) for name, module in model.teacher.items() if name != "backbone"}
    if whole is None or not run.is_main:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinocellError(f"{path}: cannot be written ({error.strerror or error})") from error
    whole.card = backbone_of(model.teacher).card
    weights = Weights.of(whole, heads)
    line = f"DINOCell pretraining, {config.views.policy}, {step} steps of {config.batch_size}"
    card = replace(weights.card, derived_from=(*weights.card.derived_from, line))
    save_weights(path, replace(weights, card=card))
    run.note(f"teacher: {path}")
    on_export(path)
