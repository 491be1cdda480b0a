"""The pretraining run: shards in, teacher checkpoints out."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dinocell.configs.load import to_yaml
from dinocell.data_shards.read import Batch, Origin, SampleStream, loader, stream
from dinocell.data_shards.sample import SampleInfo
from dinocell.errors import ConfigError, DinocellError
from dinocell.models.positions import TrainingNoise
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import Weights, load_backbone, save_weights
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.optim import (
    adamw,
    clip_gradients,
    parameter_groups,
    scaled_learning_rate,
    set_rates,
    update_teacher,
)
from dinocell.runtime.preemption import RunStopped, StopRequest
from dinocell.runtime.run import Run
from dinocell.runtime.schedules import value_at
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.masking import PatchMasks, draw_masks
from dinocell.ssl.monitors import feature_spread, target_use
from dinocell.ssl.pictures import draw_views
from dinocell.ssl.student_teacher import StepOutput, StudentTeacher
from dinocell.ssl.view_plan import ViewsConfig, plan_views
from dinocell.ssl.views import Views, channel_levels, make_views


def dry_run(config: PretrainConfig) -> str:
    """Open the shards, build the model, take two steps, and say what a run would be; nothing is written.

    Raises
    ------
    DinocellError
        As ``pretrain``, before its first step.
    """
    device = _device(config)
    samples, model, trainer = _prepare(config, device)
    levels = channel_levels([each.manifest for each in samples.sets], config.views)
    seconds = 0.0
    for number, batch in zip(range(min(2, config.steps)), samples, strict=False):
        start = time.perf_counter()
        views = make_views(batch, config.views, levels, seed=config.seed, device=device)
        trainer.step(number, batch, views, watch=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start  # of the last, which is warm
    used = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    return "\n".join(
        [
            *_facts(config, samples, model),
            f"a step takes {seconds:.2f} s on {device}, without waiting for data; {used / 1e9:.1f} GB at the peak",
            f"the run would take {timedelta(seconds=round(seconds * config.steps))}; nothing was written",
        ]
    )


def pretrain(config: PretrainConfig, *, on_export: Callable[[Path], None] = lambda _: None) -> Path:
    """Train a teacher and return its last checkpoint.

    A run that was interrupted goes on from its last training state, and computes what it would have computed; one that
    has finished is not touched.

    Parameters
    ----------
    on_export
        Called with the path of each teacher checkpoint.

    Raises
    ------
    DinocellError
        If shards, weights and settings do not fit together, or the training diverges.
    RunStopped
        If it was told to stop; it has saved and can be continued.
    """
    Run.check(config.output, config)
    device = _device(config)
    samples, model, trainer = _prepare(config, device)
    levels = channel_levels([each.manifest for each in samples.sets], config.views)
    checkpointer = Checkpointer(
        config.output / "checkpoints", keep_last=config.keep_checkpoints, keep_every=config.keep_checkpoint_every
    )
    first = trainer.restore(checkpointer)
    last_export = _folder(config, config.steps) / _TEACHER
    if first >= config.steps and last_export.exists():
        return last_export
    # A step takes its samples from its place in the stream, so the position is no more than this.
    samples = _open_shards(config, position=first * config.batch_size)
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
        ) as run,
    ):
        run.text(0, "config", f"```yaml\n{to_yaml(config)}\n```")
        for line in [*_facts(config, samples, model), *([f"goes on after step {first}"] if first else [])]:
            run.note(line)
        checkpoint = Path()
        batches = loader(samples, workers=config.compute.workers, pin_memory=device.type == "cuda")
        for step, batch in enumerate(batches, start=first + 1):
            for line in batch.damaged:
                run.note(f"replaced a damaged sample: {line}")
            views = make_views(batch, config.views, levels, seed=config.seed, device=device)
            is_log_step = run.is_log_step(step)
            metrics = trainer.step(step - 1, batch, views, watch=is_log_step)
            run.log(step, metrics)
            if step == 1 or step % config.picture_every == 0:
                run.image(step, "views", draw_views(views))
            if step % config.export_every == 0 or step == config.steps:
                checkpoint = _export(config, model, step)
                run.note(f"teacher: {checkpoint}")
                on_export(checkpoint)
            if step == config.steps or step % config.checkpoint_every == 0:
                trainer.save(checkpointer, step)
            if step == config.steps:
                break
            if stop.agreed():
                trainer.save(checkpointer, step)
                checkpointer.wait()
                stop.finish()
                raise RunStopped(f"stopped after step {step} ({stop.reason}); the same command goes on from there")
    return checkpoint


class _Trainer:
    """Optimizer, schedules and randomness around the model."""

    def __init__(self, config: PretrainConfig, model: StudentTeacher, device: torch.device) -> None:
        self._config, self._model, self._device = config, model, device
        backbone = model.student["backbone"]
        assert isinstance(backbone, VisionTransformer)
        groups = parameter_groups(
            dict(model.student.items()),
            depth=backbone.config.depth,
            layer_decay=config.optim.layer_decay,
            patch_embedding_factor=config.optim.patch_embedding_factor,
        )
        self._optimizer = adamw(groups, betas=config.optim.betas)
        side = config.views.global_size // config.model.patch_size
        self._grid = (side, side)
        self._bad_in_a_row = torch.zeros((), device=device)
        self._bad = torch.zeros((), device=device)

    def step(self, number: int, batch: Batch, views: Views, *, watch: bool) -> dict[str, Any]:
        """Train on a batch; ``number`` counts from 0. Return the numbers to log, tensors among them."""
        config, model = self._config, self._model
        value = partial(value_at, step=number, num_steps=config.steps)
        schedules = config.schedules
        learning_rate = scaled_learning_rate(value(schedules.learning_rate), config.batch_size, rule=config.optim.rule)
        backbone_factor = value(schedules.backbone.factor())
        if config.model.weights is not None:
            backbone_factor *= value(config.model.start_freeze.factor())
        momentum, weight_decay = value(schedules.teacher_momentum), value(schedules.weight_decay)
        temperature = value(schedules.teacher_temperature)
        set_rates(
            self._optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            backbone_factor=backbone_factor,
            last_layer_factor=value(schedules.last_layer.factor()),
        )
        with torch.autocast(self._device.type, torch.bfloat16, enabled=_is_bfloat16(config, self._device)):
            output: StepOutput = model(
                views,
                self._masks(batch),
                teacher_temperature=temperature,
                local_weight=value(schedules.local_weight),
                generator=torch.Generator(self._device).manual_seed(config.seed * 1_000_003 + number),
            )
        self._optimizer.zero_grad(set_to_none=True)
        output.losses.total.backward()
        norms = clip_gradients(dict(model.student.items()), config.optim.clip)
        finite = self._update(output, norms, momentum)
        if not watch:
            return {}
        self._check()
        metrics: dict[str, Any] = {f"loss/{name}": loss.detach() for name, loss in output.losses._asdict().items()}
        metrics |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        if finite:
            use, spread = target_use(output.targets), feature_spread(output.student_cls.detach())
            metrics |= {f"targets/{name}": number for name, number in use._asdict().items()}
            metrics |= {f"cls/{name}": number for name, number in spread._asdict().items()}
        metrics |= {"schedule/learning_rate": learning_rate, "schedule/weight_decay": weight_decay}
        metrics |= {"schedule/teacher_momentum": momentum, "schedule/teacher_temperature": temperature}
        metrics |= {"schedule/backbone_factor": backbone_factor, "health/skipped_steps": self._bad.clone()}
        return metrics

    def save(self, checkpointer: Checkpointer, step: int) -> None:
        """Save everything that the next step depends on, besides the recipe and the data."""
        checkpointer.save(step, self._state(), {})

    def restore(self, checkpointer: Checkpointer) -> int:
        """Go back to the newest checkpoint, and return its step; 0 if there is none."""
        if not checkpointer.steps():
            return 0
        state = self._state()
        restored = checkpointer.restore(state)
        assert restored is not None
        set_state_dict(
            self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self._bad, self._bad_in_a_row = state["bad"].to(self._device)
        return restored.step

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer, "bad": torch.stack((self._bad, self._bad_in_a_row))}

    def _update(self, output: StepOutput, norms: dict[str, Tensor], momentum: float) -> Tensor:
        """Take the step, unless something is not finite, and return whether it was; nothing is read back for this."""
        finite = torch.stack([output.losses.total.detach(), *norms.values()]).isfinite().all()
        bad = (~finite).float()
        # What a gradient scaler sets: the fused kernel leaves weights and moments alone where it is 1.
        self._optimizer.found_inf = bad  # type: ignore[attr-defined]
        self._optimizer.step()
        self._bad += bad
        self._bad_in_a_row = (self._bad_in_a_row + bad) * bad
        update_teacher(self._model.teacher.parameters(), self._model.student.parameters(), momentum)
        return finite

    def _check(self) -> None:
        in_a_row = int(self._bad_in_a_row)
        if in_a_row >= self._config.optim.max_bad_steps:
            raise DinocellError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; no weight was changed by them. "
                "Lower schedules.learning_rate.peak or raise schedules.learning_rate.warmup, and start from the last "
                f"teacher in {self._config.output / 'eval'}"
            )

    def _masks(self, batch: Batch) -> PatchMasks:
        """Draw masks by the samples' positions in the stream, which no other sample of the run has."""
        positions = range(batch.next_position - len(batch), batch.next_position)
        masks = draw_masks(
            positions,
            self._grid,
            self._config.masking,
            seed=self._config.seed,
            epoch=0,
            views=self._config.views.num_global,
        )
        return PatchMasks(*(each.to(self._device, non_blocking=True) for each in masks))


class NeededChannels:
    """The channels of a tile that its views need: what the reader has to decode."""

    def __init__(self, config: ViewsConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def __call__(self, info: SampleInfo, origin: Origin) -> tuple[int, ...]:
        """Return their numbers."""
        return plan_views(info, origin, self._config, seed=self._seed).channels()


def _prepare(config: PretrainConfig, device: torch.device) -> tuple[SampleStream, StudentTeacher, _Trainer]:
    samples = _open_shards(config)
    torch.manual_seed(config.seed)
    model = StudentTeacher(_backbone(config), config.heads, config.losses).to(device).train()
    return samples, model, _Trainer(config, model, device)


def _open_shards(config: PretrainConfig, *, position: int = 0) -> SampleStream:
    data = config.data
    samples = stream(
        data.shards,
        batch_size=config.batch_size,
        position=position,
        weights=data.weights,
        seed=config.seed,
        stop=config.steps * config.batch_size,
        block_shards=data.block_shards,
        choose=NeededChannels(config.views, config.seed),
        cache=data.cache,
        cache_gb=data.cache_gb,
    )
    for each in samples.sets:
        _check_channels(config.views, each.location, tuple(each.manifest.channels))
    return samples


def _check_channels(views: ViewsConfig, location: str, names: tuple[str, ...]) -> None:
    if views.policy == "stack" and not set(views.channels) & set(names):
        raise ConfigError(
            f"views.channels: {location} has none of {', '.join(views.channels)}; it has {', '.join(names)}"
        )
    if views.policy in ("consistency", "bag") and len(names) < 2:
        raise ConfigError(
            f"views.policy: {views.policy} needs at least two channels, {location} has {', '.join(names)}; "
            "use views.policy=average"
        )


def _backbone(config: PretrainConfig) -> VisionTransformer:
    model, channels = config.model, config.views.in_channels
    noise = TrainingNoise(drop_path=model.drop_path)
    if model.weights is not None:
        vit = load_backbone(
            model.weights,
            patch_size=model.patch_size,
            in_channels=channels,
            input="standardised",
            variant=model.variant,
            noise=noise,
        )
    else:
        vit = VisionTransformer(
            variant_config(model.variant, patch_size=model.patch_size, in_channels=channels), noise=noise
        )
        vit.init_weights(layer_scale=model.layer_scale)
    settings = replace(
        vit.card.input,
        convention="standardised",
        channel_policy=config.views.policy,
        channel_names=config.views.channels,
        percentiles=(float(config.views.black), float(config.views.white)),
    )
    vit.card = replace(vit.card, input=settings)
    return vit


def _export(config: PretrainConfig, model: StudentTeacher, step: int) -> Path:
    folder = _folder(config, step)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = model.teacher["backbone"]
    assert isinstance(backbone, VisionTransformer)
    heads = {name: module.state_dict() for name, module in model.teacher.items() if name != "backbone"}
    weights = Weights.of(backbone, heads)
    line = f"DINOCell pretraining, {config.views.policy}, {step} steps of {config.batch_size}"
    card = replace(weights.card, derived_from=(*weights.card.derived_from, line))
    path = folder / _TEACHER
    save_weights(path, replace(weights, card=card))
    return path


# Where Meta's evaluators look.
_TEACHER = "teacher_checkpoint.pth"


def _folder(config: PretrainConfig, step: int) -> Path:
    return config.output / "eval" / f"training_{step}"


def _facts(config: PretrainConfig, samples: SampleStream, model: StudentTeacher) -> list[str]:
    rate = scaled_learning_rate(config.schedules.learning_rate.peak, config.batch_size, rule=config.optim.rule)
    parameters = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in model.student.items()}
    sizes = ", ".join(f"{name} {size:.1f} M" for name, size in parameters.items())
    epochs = config.steps * config.batch_size / samples.num_samples
    return [
        f"student: {sizes}; from {config.model.weights or 'random weights'}",
        f"{samples.num_samples:,} tiles, {config.steps:,} steps of {config.batch_size}: {epochs:.1f} epochs; "
        f"policy {config.views.policy}; learning rate {rate:.3g} at the peak",
    ]


def _device(config: PretrainConfig) -> torch.device:
    name = config.compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("compute.device: cuda was asked for, and there is none")
    return torch.device(name)


def _is_bfloat16(config: PretrainConfig, device: torch.device) -> bool:
    wanted = config.compute.dtype
    return device.type == "cuda" if wanted == "auto" else wanted == "bfloat16"
