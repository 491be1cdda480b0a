"""One step of pretraining around the model: schedules, masks, backward, clipping, AdamW, the moving average."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule

from dinocell.data_shards.read import Batch
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.device import uses_bfloat16
from dinocell.runtime.distributed import World, sum_over_ranks
from dinocell.runtime.optim import (
    NonfiniteSteps,
    adamw,
    clip_gradients,
    parameter_groups,
    scaled_learning_rate,
    set_rates,
    update_ema,
)
from dinocell.runtime.schedules import value_at
from dinocell.runtime.sharding import release, sharded_parts
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.masking import PatchMasks
from dinocell.ssl.monitors import feature_spread, target_use
from dinocell.ssl.prepare import backbone_of, masks_of
from dinocell.ssl.student_teacher import Losses, StepOutput, StudentTeacher
from dinocell.ssl.views import Views


class _Values(NamedTuple):
    """What the schedules say of a step."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    local_weight: float
    gram_weight: float
    backbone_factor: float
    last_layer_factor: float


class Trainer:
    """Optimizer, schedules and randomness around the model, on one rank of several or alone."""

    def __init__(self, config: PretrainConfig, model: StudentTeacher, world: World) -> None:
        self._config, self._model, self._world = config, model, world
        groups = parameter_groups(
            dict(model.student.items()),
            depth=backbone_of(model.student).config.depth,
            layer_decay=config.optim.layer_decay,
            patch_embedding_factor=config.optim.patch_embedding_factor,
            head_weight_decay_factor=config.optim.head_weight_decay_factor,
        )
        self._optimizer = adamw(groups, betas=config.optim.betas)
        # Found once: a walk through the modules of a deep model takes longer than most of what is done with them.
        self._parameters: dict[str, list[Tensor]] = {
            name: list(module.parameters()) for name, module in model.student.items()
        }
        self._teacher_parameters = list(model.teacher.parameters())
        self._sharded = sharded_parts([model.student, model.teacher, model.gram])
        self._draw_masks = masks_of(config)
        self._nonfinite_steps = NonfiniteSteps(
            world.device,
            most=config.optim.max_nonfinite_steps,
            advice="Lower schedules.learning_rate.peak or raise schedules.learning_rate.warmup, and start from the "
            f"last teacher in {config.output / 'eval'}",
        )
        self._gram_steps = _gram_steps(config)

    def step(self, number: int, parts: Iterable[tuple[Batch, Views]], *, watch: bool) -> dict[str, Any]:
        """Train on this rank's share of a step, and return the numbers to log, tensors among them; {} unless watched.

        Parameters
        ----------
        number
            Of the step, from 0.
        parts
            As many as the recipe accumulates.
        watch
            Measure; the same on every rank.

        Raises
        ------
        DinocellError
            If too many steps in a row were not finite; this is looked at when the step is watched.
        """
        config, model = self._config, self._model
        now = self._values(number)
        set_rates(
            self._optimizer,
            learning_rate=now.learning_rate,
            weight_decay=now.weight_decay,
            backbone_factor=now.backbone_factor,
            last_layer_factor=now.last_layer_factor,
        )
        if number in self._gram_steps:
            model.take_gram_teacher()
        self._optimizer.zero_grad(set_to_none=True)
        output, losses = self._backward(number, parts, now)
        for parameter in self._student_parameters():
            if parameter.grad is None:  # what a recipe leaves out still has its place in the optimizer's state
                parameter.grad = torch.zeros_like(parameter)
        # Before the update: the targets are made of the teacher's prototypes when they are looked at.
        measured = _measure(output) if watch else {}
        norms = clip_gradients(self._parameters, config.optim.clip)
        self._update(losses, norms, now.teacher_momentum)
        return measured | self._numbers(losses, norms, now) if watch else {}

    def _values(self, number: int) -> _Values:
        config, schedules = self._config, self._config.schedules
        value = partial(value_at, step=number, num_steps=config.steps)
        freeze = schedules.backbone_freeze(from_weights=config.model.weights is not None)
        peak = value(schedules.learning_rate)
        return _Values(
            learning_rate=scaled_learning_rate(peak, config.batch_size, rule=config.optim.rule),
            weight_decay=value(schedules.weight_decay),
            teacher_momentum=value(schedules.teacher_momentum),
            teacher_temperature=value(schedules.teacher_temperature),
            local_weight=value(schedules.local_weight),
            gram_weight=value(schedules.gram_weight),
            backbone_factor=value(freeze.factor()),
            last_layer_factor=value(schedules.last_layer.factor()),
        )

    def _backward(self, number: int, parts: Iterable[tuple[Batch, Views]], now: _Values) -> tuple[StepOutput, Losses]:
        """Accumulate the gradient of all parts; return the last part's output and the mean losses."""
        config, world = self._config, self._world
        count = config.optim.accumulate
        total: Tensor | None = None
        output: StepOutput | None = None
        for index, (batch, views) in enumerate(parts):
            seed = (config.seed * 1_000_003 + number) * 4099 + world.rank * count + index
            if world.size * count == 1:
                seed = config.seed * 1_000_003 + number
            self._exchange_gradients(index == count - 1)
            use_bfloat16 = uses_bfloat16(config.compute.dtype, world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=use_bfloat16):
                output = self._model(
                    views,
                    self._masks(batch),
                    teacher_temperature=now.teacher_temperature,
                    local_weight=now.local_weight,
                    gram_weight=now.gram_weight,
                    generator=torch.Generator(world.device).manual_seed(seed),
                )
            (output.losses.total / count).backward()
            values = torch.stack([loss.detach().float() for loss in output.losses])
            total = values if total is None else total + values
        assert output is not None
        assert total is not None
        return output, Losses(*(total / count).unbind())

    def _exchange_gradients(self, now: bool) -> None:
        """Average gradients over the ranks after this part, or keep them until the last one."""
        for module in self._model.student.values():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(now)

    def _update(self, losses: Losses, norms: dict[str, Tensor], momentum: float) -> None:
        """Take the step, unless it is a bad one, and let the teacher follow."""
        self._nonfinite_steps.step(self._optimizer, [losses.total, *norms.values()])
        release(self._sharded)
        update_ema(self._teacher_parameters, self._student_parameters(), momentum)

    def _student_parameters(self) -> list[Tensor]:
        return [parameter for part in self._parameters.values() for parameter in part]

    def _numbers(self, losses: Losses, norms: dict[str, Tensor], now: _Values) -> dict[str, Any]:
        """Losses are means over all ranks."""
        self._nonfinite_steps.check()
        mean = sum_over_ranks(torch.stack(losses)) / self._world.size
        metrics: dict[str, Any] = {f"loss/{name}": loss for name, loss in zip(Losses._fields, mean, strict=True)}
        if not self._config.uses_gram:
            del metrics["loss/gram"]
        metrics |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        metrics |= {f"schedule/{name}": number for name, number in now._asdict().items()}
        metrics["health/skipped_steps"] = self._nonfinite_steps.total
        return metrics

    def _masks(self, batch: Batch) -> PatchMasks:
        """Return the masks that the reader drew in its workers, or draw them here."""
        size, draw = len(batch), self._draw_masks
        if batch.drawn_by == draw and isinstance(batch.drawn, PatchMasks):
            masks = batch.drawn
        else:
            everyone = range(batch.next_position - size * self._world.size, batch.next_position)
            masks = draw(everyone, slice(self._world.rank * size, (self._world.rank + 1) * size))
        return masks.to(self._world.device, non_blocking=True)

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
        self._nonfinite_steps.restore(state["bad"])
        return restored.step

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer, "bad": self._nonfinite_steps.state()}


def _measure(output: StepOutput) -> dict[str, Any]:
    """Look for collapse, in this rank's targets and features; there is nothing to see where they are not finite."""
    if not output.losses.total.isfinite():
        return {}
    use, spread = target_use(output.targets), feature_spread(output.student_cls.detach())
    metrics: dict[str, Any] = {f"targets/{name}": number for name, number in use._asdict().items()}
    return metrics | {f"cls/{name}": number for name, number in spread._asdict().items()}


def _gram_steps(config: PretrainConfig) -> frozenset[int]:
    """Return the steps before which the Gram teacher is taken."""
    if not config.uses_gram:
        return frozenset()
    weights = (value_at(config.schedules.gram_weight, step, config.steps) for step in range(config.steps))
    first = next((step for step, weight in enumerate(weights) if weight > 0), None)
    if first is None:
        return frozenset()
    return frozenset(first + index * config.gram.refresh_every for index in range(config.gram.max_refreshes + 1))


def eval_folder(output: Path, step: int) -> Path:
    """Return where the teacher of a step goes: where Meta's evaluators look."""
    return output / "eval" / f"training_{step}"
