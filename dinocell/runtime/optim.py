"""Parameter groups, learning-rate rule, gradient clipping, exponential moving average, and non-finite steps."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dinocell.errors import DinocellError
from dinocell.runtime.distributed import max_over_ranks


def parameter_groups(
    modules: Mapping[str, nn.Module],
    *,
    depth: int,
    layer_decay: float = 1.0,
    patch_embedding_factor: float = 0.2,
    head_weight_decay_factor: float = 1.0,
    decay_tokens: bool = True,
) -> list[dict[str, Any]]:
    """Sort parameters into groups of equal learning rate and weight decay (the rules of DINOv2 and DINOv3).

    The learning rate decreases towards the input: ``layer_decay ** (depth + 1 - layer)``, with layer 0 for patch
    embedding, tokens and positions, ``i + 1`` for block i, ``depth + 1`` for final norms and heads; that of the patch
    embedding is also multiplied by ``patch_embedding_factor``. Biases, norms and LayerScale have no weight decay; CLS,
    mask and register tokens and positions have it, unless ``decay_tokens`` is off.

    Of the sub-modules, ``backbone`` is a vision transformer of ``depth`` blocks, the others are heads; parameters
    without gradient are skipped. A group has ``params`` and plain values for the optimizer's state dict: ``module``;
    ``learning_rate_factor`` and ``weight_decay_factor`` on the scheduled values, which `set_rates` sets; ``last_layer``
    for prototypes.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            backbone = module_name == "backbone"
            layer = _layer(name, depth) if backbone else depth + 1
            rate = layer_decay ** (depth + 1 - layer)
            if backbone and name.startswith("patch_embed."):
                rate *= patch_embedding_factor
            decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
            decays = decays and (decay_tokens or not (backbone and name in _TOKENS))
            decay = (1.0 if backbone else head_weight_decay_factor) if decays else 0.0
            group = {
                "module": module_name,
                "learning_rate_factor": rate,
                "weight_decay_factor": decay,
                "last_layer": not backbone and name.startswith("last_layer."),
            }
            groups.setdefault(tuple(group.values()), {"params": [], **group})["params"].append(parameter)
    return list(groups.values())


_TOKENS = ("cls_token", "mask_token", "register_tokens", "pos_embed")


def _layer(name: str, depth: int) -> int:
    if block := re.match(r"blocks\.(\d+)\.", name):
        assert int(block[1]) < depth, f"{name} in a backbone of depth {depth}"
        return int(block[1]) + 1
    return 0 if name in _TOKENS or name.startswith("patch_embed.") else depth + 1


def adamw(groups: Sequence[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """Return AdamW over the groups with learning rate 0: call `set_rates` before every step."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def set_rates(
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float,
    weight_decay: float,
    backbone_factor: float = 1.0,
    last_layer_factor: float = 1.0,
) -> None:
    """Write this step's learning rate and weight decay into the groups.

    ``backbone_factor`` and ``last_layer_factor`` multiply the learning rate of the backbone and of the prototypes: 0
    freezes them exactly (AdamW multiplies the decay by the learning rate); the moments still follow the gradient.
    """
    for group in optimizer.param_groups:
        factor = backbone_factor if group["module"] == "backbone" else last_layer_factor if group["last_layer"] else 1.0
        group["lr"] = learning_rate * group["learning_rate_factor"] * factor
        group["weight_decay"] = weight_decay * group["weight_decay_factor"]


def scaled_learning_rate(
    base: float, batch: int, *, reference: int = 1024, rule: Literal["sqrt", "linear", "constant"] = "sqrt"
) -> float:
    """Return the learning rate for a batch, over all ranks and accumulated steps: ``base * sqrt(batch / 1024)``."""
    exponent = {"sqrt": 0.5, "linear": 1.0, "constant": 0.0}[rule]
    return float(base * (batch / reference) ** exponent)


@torch.no_grad()
def clip_gradients(
    modules: Mapping[str, nn.Module | Sequence[Tensor]], max_norm: float
) -> dict[str, Float[Tensor, ""]]:
    """Scale the gradients of each sub-module down to ``max_norm``, separately, and return their norms before.

    Nothing is read back from the device. A norm that is not finite means that the step must be skipped. Sub-modules are
    given by name, as modules or as lists of their parameters.
    """
    norms = {}
    for name, part in modules.items():
        parameters = list(part.parameters()) if isinstance(part, nn.Module) else list(part)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shards
        clip_grads_with_norm_(parameters, max_norm, norms[name])
    return norms


@torch.no_grad()
def update_ema(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """Move each teacher parameter towards the student's: ``momentum * teacher + (1 - momentum) * student``.

    In place, on this rank's shards. Momentum 1 leaves the teacher bit-equal, 0 copies the student.
    """
    averages, values = [_local(parameter) for parameter in teacher], [_local(parameter) for parameter in student]
    if [average.shape for average in averages] != [value.shape for value in values]:
        raise ValueError("teacher and student: expected parameters of the same shapes in the same order")
    if momentum < 1 and averages:
        torch._foreach_lerp_(averages, values, 1 - momentum)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class NonfiniteSteps:
    """Skips and counts steps with a loss or gradient that is not finite, without reading from the device until `check`.

    ``most`` such steps in a row are an error; ``advice`` tells the user what to do then, in sentences.
    """

    def __init__(self, device: torch.device, *, most: int, advice: str) -> None:
        self._most, self._advice = most, advice
        self._counts = torch.zeros(2, device=device)  # in the run, and in a row until now

    def step(self, optimizer: torch.optim.Optimizer, values: Iterable[Tensor]) -> None:
        """Take the optimizer's step, unless one of the values (losses, gradient norms) is not finite on any rank.

        The optimizer must be fused: its kernel leaves weights and moments unchanged where ``found_inf`` is 1.
        """
        finite = torch.stack(list(values)).isfinite().all()
        nonfinite = max_over_ranks((~finite).float())
        optimizer.found_inf = nonfinite  # type: ignore[attr-defined]
        optimizer.step()
        total, in_a_row = self._counts
        self._counts = torch.stack((total + nonfinite, (in_a_row + nonfinite) * nonfinite))

    @property
    def total(self) -> Tensor:
        """Number of skipped steps of the run, on the device."""
        return self._counts[0]

    def check(self) -> None:
        """Read the counts from the device; raise :class:`DinocellError` if there were too many in a row."""
        in_a_row = int(self._counts[1])
        if in_a_row >= self._most:
            problem = f"{in_a_row} steps in a row had a loss or gradient that is not finite; they changed no weight"
            raise DinocellError(f"{problem}. {self._advice}")

    def state(self) -> Tensor:
        """Return the counts for a checkpoint."""
        return self._counts

    def restore(self, state: Tensor) -> None:
        """Continue from the counts of a checkpoint."""
        self._counts = state.to(self._counts.device)
