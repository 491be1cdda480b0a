"""The pretraining run: shards in, teacher checkpoints out, on one process or on many."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dinocell.configs.load import to_yaml
from dinocell.data_shards.read import Batch, loader
from dinocell.errors import DinocellError
from dinocell.models.vit import VisionTransformer
from dinocell.models.weights import Weights, save_weights
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.device import Throughput, peak_bytes
from dinocell.runtime.distributed import World, from_main, together
from dinocell.runtime.preemption import RunStopped, StopRequest
from dinocell.runtime.run import Run
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.memory import check_memory
from dinocell.ssl.monitors import guide
from dinocell.ssl.prepare import backbone_of, build_model, describe_run, flop_per_image, open_shards
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.trainer import Trainer, eval_folder
from dinocell.ssl.view_plan import Levels, channel_levels
from dinocell.ssl.views import Views, make_views
from dinocell.ssl.visualise import draw_features, draw_views

Watch = Callable[[VisionTransformer], Mapping[str, float]]
"""Measures a teacher while it is trained: channel consistency, neighbours. The command gives one."""

_TEACHER = "teacher_checkpoint.pth"

# What may be other when a run goes on: where and how it is computed, where copies of shards lie, what is looked at.
_MAY_DIFFER = ("compute", "data.cache", "data.cache_gb", "watch")


def dry_run(config: PretrainConfig) -> str:
    """Open the shards, build the model, take two steps, and say what a run would be; nothing is written.

    Raises
    ------
    DinocellError
        As ``pretrain``, before its first step.
    """
    with together(config.compute.device, timeout_s=config.compute.timeout_s) as world:
        samples = open_shards(config, world)
        check_memory(config, world)
        model = build_model(config, world)
        trainer = Trainer(config, model, world)
        levels = channel_levels([each.manifest for each in samples.sets], config.views)
        seconds, batches = 0.0, iter(samples)
        for number in range(min(2, config.steps)):
            start = time.perf_counter()
            feed = _Feed(config, batches, levels, world)
            trainer.step(number, feed.parts(), watch=False)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start  # of the last, which is warm
        used = peak_bytes(world.device) / 1e9
        return "\n".join(
            [
                *describe_run(config, samples, model, world),
                f"a step takes {seconds:.2f} s on {world.device}, reading included; {used:.1f} GB at the peak",
                f"the run would take {timedelta(seconds=round(seconds * config.steps))}; nothing was written",
            ]
        )


def pretrain(
    config: PretrainConfig,
    *,
    on_export: Callable[[Path], None] = lambda _: None,
    watch: Watch | None = None,
) -> Path:
    """Train a teacher and return its last checkpoint.

    A run that was interrupted goes on from its last training state, and computes what it would have computed; one that
    has finished is not touched. Started in several processes (torchrun, ``dinocell launch``) they share the work.

    Parameters
    ----------
    on_export
        Called with the path of each teacher checkpoint, by the main process.
    watch
        Called with the teacher every ``watch.every`` steps, by the main process; its numbers are logged.

    Raises
    ------
    DinocellError
        If shards, weights and settings do not fit together, or the training diverges.
    RunStopped
        If it was told to stop; it has saved and can be continued.
    """
    with together(config.compute.device, timeout_s=config.compute.timeout_s) as world:
        Run.check(config.output, config, ignore=_MAY_DIFFER)
        last = eval_folder(config.output, config.steps) / _TEACHER
        if from_main(last.exists()):
            return last
        samples = open_shards(config, world)
        check_memory(config, world)
        model = build_model(config, world)
        trainer = Trainer(config, model, world)
        levels = channel_levels([each.manifest for each in samples.sets], config.views)
        checkpointer = Checkpointer(
            config.output / "checkpoints",
            keep_last=config.keep_checkpoints,
            keep_every=config.keep_checkpoint_every,
            timeout_s=config.compute.timeout_s,
        )
        first = trainer.restore(checkpointer)
        if first:
            # A step takes its samples from its place in the stream, so the position is no more than this.
            samples = open_shards(config, world, position=first * config.batch_size)
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
            run.text(0, "guide", guide(config))
            facts = describe_run(config, samples, model, world)
            for line in [*facts, *([f"goes on after step {first}"] if first else [])]:
                run.note(line)
            flop = flop_per_image(config, model) * config.batch_size / world.size
            throughput = Throughput(world.device, flop)
            batches = throughput.waiting(
                loader(samples, workers=config.compute.workers, pin_memory=world.device.type == "cuda")
            )
            if first == config.steps:  # its teacher has been removed, its state has not
                _export(run, config, model, first, on_export)
            for step in range(first + 1, config.steps + 1):
                feed = _Feed(config, batches, levels, world)
                is_log_step = run.is_log_step(step)
                try:
                    metrics = trainer.step(step - 1, feed.parts(), watch=is_log_step)
                except torch.OutOfMemoryError as error:
                    raise DinocellError(_what_would_fit(config, world, error)) from error
                throughput.step()
                for line in feed.damaged:
                    run.note(f"replaced a damaged sample: {line}")
                run.log(step, metrics | throughput.metrics() if is_log_step else {})
                _look(run, step, config, model, feed.views, watch)
                if step % config.export_every == 0 or step == config.steps:
                    _export(run, config, model, step, on_export)
                stops = step < config.steps and stop.agreed()
                if stops or step == config.steps or step % config.checkpoint_every == 0:
                    trainer.save(checkpointer, step)
                if stops:
                    checkpointer.wait()
                    stop.finish()
                    raise RunStopped(f"stopped after step {step} ({stop.reason}); the same command goes on from there")
        return last


def _what_would_fit(config: PretrainConfig, world: World, error: Exception) -> str:
    part = config.batch_size // (world.size * config.optim.accumulate)
    return (
        f"the device's memory is too small for {part} tiles at a time ({str(error).splitlines()[0][:120]}): raise "
        f"optim.accumulate from {config.optim.accumulate}, set compute.recompute=activations (or =blocks), "
        f"or lower batch_size from {config.batch_size} or heads.num_prototypes from {config.heads.num_prototypes}"
    )


class _Feed:
    """What a rank trains on in a step: its parts, made when they are asked for."""

    def __init__(self, config: PretrainConfig, batches: Iterator[Batch], levels: Levels, world: World) -> None:
        self._config, self._batches, self._levels, self._world = config, batches, levels, world
        self.damaged: list[str] = []
        self.views: Views | None = None

    def parts(self) -> Iterator[tuple[Batch, Views]]:
        for _ in range(self._config.optim.accumulate):
            batch = next(self._batches)
            self.damaged += batch.damaged
            config, device = self._config, self._world.device
            self.views = make_views(batch, config.views, self._levels, seed=config.seed, device=device)
            yield batch, self.views


def _look(
    run: Run,
    step: int,
    config: PretrainConfig,
    model: StudentTeacher,
    views: Views | None,
    watch: Watch | None,
) -> None:
    """Draw pictures and measure the teacher, if it is time to; every rank comes along, the main one looks."""
    draws = step == 1 or step % config.picture_every == 0
    measures = watch is not None and config.watch.every and (step % config.watch.every == 0 or step == config.steps)
    if not (draws or measures):
        return
    teacher = _whole_teacher(model, keep=run.is_main)
    if teacher is None or views is None:
        return
    with _for_a_look(teacher):
        if draws:
            run.image(step, "views", draw_views(views))
            for name, picture in draw_features(teacher, views).items():
                run.image(step, name, picture)
        if measures and watch is not None:
            run.log(step, watch(teacher), always=True)


@contextmanager
def _for_a_look(teacher: VisionTransformer) -> Iterator[None]:
    """Compile nothing for the shapes of a look, and attend in a way that takes float32 as well."""
    kernel = teacher.kernel
    teacher.set_kernel("sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        teacher.set_kernel(kernel)


def _whole_teacher(model: StudentTeacher, *, keep: bool) -> VisionTransformer | None:
    """Return the teacher's backbone in one piece, where it is to be kept; all ranks together."""
    backbone = backbone_of(model.teacher)
    if not any(hasattr(parameter, "device_mesh") for parameter in backbone.parameters()):
        return backbone
    tensors = _gathered(backbone)
    if not keep:
        return None
    with torch.device("meta"):
        whole = VisionTransformer(backbone.config)
    whole.load_state_dict(tensors, assign=True)
    return whole.to(next(backbone.parameters()).device).eval().requires_grad_(False)


def _gathered(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return whole tensors in main memory, on the main rank; the others get nothing, but must ask."""
    found = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _export(
    run: Run, config: PretrainConfig, model: StudentTeacher, step: int, on_export: Callable[[Path], None]
) -> None:
    """Write the teacher of a step; all ranks together."""
    path = eval_folder(config.output, step) / _TEACHER
    whole = _whole_teacher(model, keep=run.is_main)
    heads = {name: _gathered(module) for name, module in model.teacher.items() if name != "backbone"}
    if whole is not None and run.is_main:
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
