"""One training step around the model: schedules, backward pass, clipping, AdamW, the moving average, monitors.

The monitors are indicators of collapse, computed every few steps, cheap and without gradient. Their values stay on the
device: reading them back is the caller's decision.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule

from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.device import uses_bfloat16
from dinocell.runtime.distributed import World, release, sharded_parts, sum_over_ranks
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
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.heads import chunks_with_scratch, full_precision
from dinocell.ssl.masking import PatchMasks, mask_counts
from dinocell.ssl.prepare import backbone_of
from dinocell.ssl.student_teacher import Losses, StepOutput, StudentTeacher
from dinocell.ssl.targets import Targets
from dinocell.ssl.views import Views


class _Values(NamedTuple):
    """Values of the schedules at a step."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    local_weight: float
    gram_weight: float
    backbone_factor: float
    last_layer_factor: float


class Trainer:
    """Optimizer, schedules and random seeds around the model, on one rank."""

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
        # Listed once: iterating over the modules of a deep model in every step takes the host too long.
        self._parameters: dict[str, list[Tensor]] = {
            name: list(module.parameters()) for name, module in model.student.items()
        }
        self._student_parameters = [parameter for part in self._parameters.values() for parameter in part]
        # The head of reconstruction is the student's only.
        self._averaged_parameters = [parameter for name in model.teacher for parameter in self._parameters[name]]
        self._teacher_parameters = list(model.teacher.parameters())
        self._sharded = sharded_parts([model.student, model.teacher, model.gram])
        self._nonfinite_steps = NonfiniteSteps(
            world.device,
            most=config.optim.max_nonfinite_steps,
            advice="Lower schedules.learning_rate.peak or raise schedules.learning_rate.warmup, and start from the "
            f"last teacher in {config.output / 'eval'}",
        )
        self._gram_steps = _gram_steps(config)

    def step(self, step: int, parts: Iterable[tuple[Views, PatchMasks]], *, measure: bool) -> dict[str, Any]:
        """Train on this rank's share of a step, and return the metrics to log, partly tensors; {} unless measured.

        Parameters
        ----------
        step
            From 0.
        parts
            Views and masks, as many as the recipe accumulates.
        measure
            Compute metrics; the same on every rank.

        Raises
        ------
        DinocellError
            If too many consecutive steps were not finite; this is checked in measured steps only.
        """
        config, model = self._config, self._model
        now = self._values(step)
        set_rates(
            self._optimizer,
            learning_rate=now.learning_rate,
            weight_decay=now.weight_decay,
            backbone_factor=now.backbone_factor,
            last_layer_factor=now.last_layer_factor,
        )
        if step in self._gram_steps:
            model.update_gram_teacher()
        self._optimizer.zero_grad(set_to_none=True)
        output, losses = self._backward(step, parts, now)
        for parameter in self._student_parameters:
            if parameter.grad is None:  # parameters that a recipe does not use still have optimizer states
                parameter.grad = torch.zeros_like(parameter)
        # Before the update, because the targets refer to the teacher's prototypes.
        measured = _measure(output) if measure else {}
        norms = clip_gradients(self._parameters, config.optim.clip)
        # AdamW, unless the loss or a gradient is not finite; then the teacher follows the student.
        self._nonfinite_steps.step(self._optimizer, [losses.total, *norms.values()])
        release(self._sharded)
        update_ema(self._teacher_parameters, self._averaged_parameters, now.teacher_momentum)
        return measured | self._metrics(losses, norms, now) if measure else {}

    def _values(self, step: int) -> _Values:
        config, schedules = self._config, self._config.schedules
        value = partial(value_at, step=step, num_steps=config.steps)
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

    def _backward(
        self, step: int, parts: Iterable[tuple[Views, PatchMasks]], now: _Values
    ) -> tuple[StepOutput, Losses]:
        """Accumulate the gradient of all parts; return the last part's output and the mean losses."""
        config, world = self._config, self._world
        count = config.optim.accumulate
        total: Tensor | None = None
        output: StepOutput | None = None
        for index, (views, masks) in enumerate(parts):
            # Training noise (drop path) differs between steps, ranks and parts.
            seed = (config.seed * 1_000_003 + step) * 4099 + world.rank * count + index
            if world.size * count == 1:
                seed = config.seed * 1_000_003 + step
            for module in self._model.student.values():
                if isinstance(module, FSDPModule):  # gradients are averaged over the ranks after the last part only
                    module.set_requires_gradient_sync(index == count - 1)
            use_bfloat16 = uses_bfloat16(config.compute.dtype, world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=use_bfloat16):
                output = self._model(
                    views,
                    masks,
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

    def _metrics(self, losses: Losses, norms: dict[str, Tensor], now: _Values) -> dict[str, Any]:
        """Return losses (means over all ranks), gradient norms, schedules and the count of skipped steps."""
        self._nonfinite_steps.check()
        mean = sum_over_ranks(torch.stack(losses)) / self._world.size
        metrics: dict[str, Any] = {f"loss/{name}": loss for name, loss in zip(Losses._fields, mean, strict=True)}
        if not self._config.uses_gram:
            del metrics["loss/gram"]
        if not self._config.uses_reconstruction:
            del metrics["loss/reconstruction"]
        metrics |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        metrics |= {f"schedule/{name}": value for name, value in now._asdict().items()}
        metrics["health/skipped_steps"] = self._nonfinite_steps.total
        return metrics

    def save(self, checkpointer: Checkpointer, step: int) -> None:
        """Save everything that the next step depends on, except recipe and data."""
        checkpointer.save(step, self._state(), {})

    def restore(self, checkpointer: Checkpointer) -> int:
        """Restore the latest checkpoint, and return its step; 0 if there is none."""
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


def _gram_steps(config: PretrainConfig) -> frozenset[int]:
    """Return the steps that start with a copy of the teacher into the Gram teacher."""
    if not config.uses_gram:
        return frozenset()
    weights = (value_at(config.schedules.gram_weight, step, config.steps) for step in range(config.steps))
    first = next((step for step, weight in enumerate(weights) if weight > 0), config.steps)
    return frozenset(first + index * config.gram.refresh_every for index in range(config.gram.max_refreshes + 1))


def eval_folder(output: Path, step: int) -> Path:
    """Return the folder for the teacher of a step, as Meta's evaluators expect it."""
    return output / "eval" / f"training_{step}"


def _measure(output: StepOutput) -> dict[str, Any]:
    """Return the indicators of collapse for this rank's targets and features; {} if the loss is not finite."""
    if not output.losses.total.isfinite():
        return {}
    use, spread = target_use(output.targets), feature_spread(output.student_cls.detach())
    metrics: dict[str, Any] = {f"targets/{name}": value for name, value in use._asdict().items()}
    return metrics | {f"cls/{name}": value for name, value in spread._asdict().items()}


class PlateauMonitor:
    """Notices a DINO or iBOT loss that stays near that of uniform targets and predictions.

    Near is within 1 % of ln K of K prototypes, for iBOT times the share of masked crops; it is noticed after a fifth of
    the run, at least 50 steps, once. Without a DINO loss nothing is.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self._config, self._patience = config, max(50.0, config.steps / 5)
        group = (config.masking.samples_per_group or config.batch_size) * config.views.num_global
        masked_share = len(mask_counts(group, math.prod(config.mask_grid), config.masking)) / group
        shares = {"dino_global": 1.0, "ibot": masked_share if config.losses.ibot_weight > 0 else 0.0}
        uniform = math.log(config.heads.num_prototypes)
        self._plateaus = {f"loss/{name}": share * uniform for name, share in shares.items() if share > 0}
        if not config.losses.dino_weight:
            self._plateaus = {}
        self._since: dict[str, int] = {}

    def advice(self, step: int, metrics: Mapping[str, SupportsFloat]) -> str | None:
        """Return what to change, if it is noticed at this logging step."""
        for name, plateau in self._plateaus.items():
            if not abs(float(metrics[name]) - plateau) <= 0.01 * plateau:  # nor is NaN near it
                self._since.pop(name, None)
            elif step - self._since.setdefault(name, step) >= self._patience:
                since, self._plateaus = self._since[name], {}
                return (
                    f"{name} has been within 1 % of {plateau:.2f} since step {since}: the targets are still uniform. "
                    "In runs of up to some thousand steps, change first schedules.teacher_momentum (lower: a half-life "
                    "of 20 to 200 steps), losses.centring=sinkhorn, heads.num_prototypes="
                    f"{2 * self._config.batch_size} (about twice the batch), smaller batches with more steps, "
                    "optim.layer_decay=1; see docs/training.md"
                )
        return None


class TargetUse(NamedTuple):
    """How the teacher's targets use the prototypes.

    ``entropy`` is the mean entropy of a row, in nats: 0 for one prototype per row, ln K for uniform rows.
    ``mean_entropy`` is the entropy of the mean row; if it is close to ``entropy``, all rows are alike. ``used`` is the
    share of the prototypes that have the highest probability in at least one row; it cannot exceed rows / K.
    """

    entropy: Float[Tensor, ""]
    mean_entropy: Float[Tensor, ""]
    used: Float[Tensor, ""]


class FeatureSpread(NamedTuple):
    """How features fill their space.

    ``std`` is the mean over channels of the standard deviation over the batch of unit-length features, times the root
    of the width: 1 if they are spread evenly over the sphere, 0 if all are the same. ``effective_rank`` is the
    exponential of the entropy of the normalised singular values (Roy and Vetterli 2007; RankMe, Garrido et al. 2023):
    from 1 to the smaller of batch and width; 1 too if all features are zero.
    """

    std: Float[Tensor, ""]
    effective_rank: Float[Tensor, ""]


@torch.no_grad()
def target_use(targets: Targets, *, chunk_elements: int | None = None) -> TargetUse:
    """Measure the targets of this rank, at least one row."""
    mean = torch.zeros_like(targets.offsets)
    used = torch.zeros_like(targets.offsets, dtype=torch.bool)
    entropy = mean.new_zeros(())
    for chunk, scratch in chunks_with_scratch(2, targets.num_rows, mean, chunk_elements):
        rows = targets.chunk(chunk, scratch=scratch)
        mean += rows.sum(0)
        used[rows.argmax(1)] = True
        entropy += torch.special.entr(rows).sum()
    mean /= targets.num_rows
    return TargetUse(entropy / targets.num_rows, torch.special.entr(mean).sum(), used.to(mean.dtype).mean())


@torch.no_grad()
def feature_spread(features: Float[Tensor, "b d"]) -> FeatureSpread:
    """Measure CLS tokens, or any features, at least one row."""
    with full_precision(features):
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        unit = torch.nn.functional.normalize(rows, dim=1)
        std = unit.std(0, correction=0).mean() * features.shape[1] ** 0.5
        values = torch.linalg.svdvals(rows)
        share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return FeatureSpread(std, torch.special.entr(share).sum().exp())


def help_text(config: PretrainConfig) -> str:
    """Return Markdown that explains every metric and image that a run logs (``/*``: all others of a group)."""
    prototypes = config.heads.num_prototypes
    uniform = f"ln {prototypes} = {math.log(prototypes):.2f}"
    rows = (
        ("`loss/dino_global`, `loss/dino_local`", f"nats; {uniform} for uniform predictions, learning starts below it"),
        ("`loss/ibot`", f"nats; {math.log(prototypes):.2f} times the share of masked crops for uniform predictions"),
        ("`loss/koleo`", "spread of the features over the sphere; it falls by itself: a falling total proves nothing"),
        ("`loss/gram`", "difference to the Gram teacher's patch similarities"),
        (
            "`loss/reconstruction`",
            "squared error of the pixels of masked patches; the share of masked crops if the mean is predicted",
        ),
        ("`loss/total`", "the weighted sum, which is minimised"),
        ("`targets/entropy`", f"nats, mean over the targets; {uniform} for uniform targets; should fall"),
        ("`targets/mean_entropy`", "nats, of the mean target; near `targets/entropy`: all tiles get the same target"),
        ("`targets/used`", "share of the prototypes that are the most likely of a row, 0 to 1; few only: collapse"),
        ("`cls/std`", "1: features spread evenly; toward 0: all are the same"),
        ("`cls/effective_rank`", f"directions in use, 1 to {config.batch_size} at most; toward 1: collapse"),
        ("`gradient_norm/*`", f"before clipping at {config.optim.clip:g}; should be steady"),
        ("`schedule/*`", "values of the recipe's schedules at this step: rates, weights, momentum, temperature"),
        ("`health/skipped_steps`", "steps skipped because a loss or gradient was not finite; should stay 0"),
        ("`speed/images_per_s`, `speed/steps_per_s`", "tiles and steps per second over all processes"),
        ("`speed/data_wait_share`", "share of the time in which the step waits for data, 0 to 1"),
        ("`speed/tflops`, `speed/mfu`", "10^12 operations per second and device; their share of its peak, 0 to 1"),
        ("`memory/gb`, `memory/peak_gb`", "10^9 bytes; of the device, or of the process on a CPU"),
        ("`probe/*`", "of the teacher: channel consistency margin, retrieval, kNN accuracy; should rise above random"),
        ("`probe/patch_r2`", "R2 of distance maps read from the teacher's patch tokens, 1 at most; should rise"),
    )
    images = (
        ("views", "one row per tile (of `stack`, per channel): global crops, then local ones; -2.5 to 2.5 std"),
        (
            "patch_pca",
            "one column per tile: a global view, below it the first three principal components of the teacher's patch "
            "features as red, green, blue, and those of the network with which the run started; then the same for the "
            "second view; one basis per network, so equal colours in its rows mean similar features",
        ),
        (
            "reconstruction",
            "one column per masked crop: the crop, what the student sees of it, the target with its predictions in "
            "the masked patches, the target; -2.5 to 2.5 std",
        ),
        ("cls_attention", "one column per tile: a global view, and the attention of the CLS token, black 0, white max"),
    )
    return "\n".join(
        [
            "| metric | unit and interpretation |\n|---|---|",
            *(f"| {names} | {meaning} |" for names, meaning in rows),
            "\n| image | content |\n|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in images),
            "\nMore in docs/training.md.",
        ]
    )
