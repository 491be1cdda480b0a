"""Around the optimizer: parameter groups, learning-rate rule, clipping, the moving average of the teacher."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

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

    The learning rate falls towards the input: ``layer_decay ** (depth + 1 - layer)``, with layer 0 for patch embedding,
    tokens and positions, ``i + 1`` for block i, ``depth + 1`` for final norms and heads; the patch embedding's is
    multiplied by ``patch_embedding_factor`` besides. Biases, norms and LayerScale do not decay; CLS, mask and register
    tokens and positions do, unless ``decay_tokens`` is off.

    Parameters
    ----------
    modules
        Sub-modules by name; the one called ``backbone`` is a vision transformer, the others are heads. Parameters that
        need no gradient are left out.
    depth
        Blocks of the backbone.

    Returns
    -------
    list of dict
        Groups for an optimizer, with plain values that its state dict can hold: ``params``; ``module``;
        ``learning_rate_factor`` and ``weight_decay_factor`` on the scheduled values; ``last_layer`` for prototypes.
        `set_rates` gives them their rates.

    Raises
    ------
    ValueError
        If a parameter belongs to a block that ``depth`` does not have, or a factor is negative.
    """
    factors = {
        "layer_decay": layer_decay,
        "patch_embedding_factor": patch_embedding_factor,
        "head_weight_decay_factor": head_weight_decay_factor,
    }
    for name, factor in factors.items():
        if factor < 0:
            raise ValueError(f"{name}: expected at least 0, got {factor}")
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
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        index = int(block[1])
        if index >= depth:
            raise ValueError(f"depth: expected more than {index}, as there is {name}, got {depth}")
        return index + 1
    return 0 if name in _TOKENS or name.startswith("patch_embed.") else depth + 1


def adamw(
    groups: Sequence[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """Return AdamW over the groups with learning rate 0: `set_rates` comes before every step."""
    return _AdamW(list(groups), lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


class _AdamW(torch.optim.AdamW):
    """Torch's fused AdamW, its state and results, with less of the host's time.

    Layer-wise decay makes dozens of groups, and torch sorts the tensors of each in every step. Here groups of equal
    rates share a launch, the counts of steps are raised at once, and each rank works on the shards it has.
    """

    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None or not self._has_state():
            return super().step(closure)
        merged: dict[tuple[float, ...], tuple[list[Tensor], ...]] = {}
        for group in self.param_groups:
            rates = (group["lr"], group["weight_decay"], *group["betas"], group["eps"])
            lists = merged.setdefault(rates, ([], [], [], [], []))
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
                for each, tensor in zip(lists, tensors, strict=True):
                    each.append(_local(tensor) if isinstance(parameter, DTensor) else tensor)
        found_inf = getattr(self, "found_inf", None)
        counts = [count for lists in merged.values() for count in lists[4]]
        if counts:
            # A step that is not taken does not count; the kernel leaves its tensors alone. A single tensor instead of
            # the list would be read back from the device.
            torch._foreach_add_(counts, 1 if found_inf is None else [1 - found_inf] * len(counts))
        for (rate, decay, beta1, beta2, eps), (parameters, gradients, means, squares, steps) in merged.items():
            if not parameters:
                continue
            torch._fused_adamw_(
                parameters,
                gradients,
                means,
                squares,
                [],
                steps,
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=found_inf,
            )
        return None

    def _has_state(self) -> bool:
        """Say whether every parameter with a gradient has its moments: torch makes them in its own first step."""
        return all(p in self.state for group in self.param_groups for p in group["params"] if p.grad is not None)


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
    freezes them exactly (AdamW's decay is multiplied by the learning rate), its moments still follow the gradient.
    """
    for group in optimizer.param_groups:
        factor = backbone_factor if group["module"] == "backbone" else last_layer_factor if group["last_layer"] else 1.0
        group["lr"] = learning_rate * group["learning_rate_factor"] * factor
        group["weight_decay"] = weight_decay * group["weight_decay_factor"]


def scaled_learning_rate(
    base: float, batch: int, *, reference: int = 1024, rule: Literal["sqrt", "linear", "constant"] = "sqrt"
) -> float:
    """Return the learning rate of a batch of all ranks and accumulated steps: ``base * sqrt(batch / 1024)``.

    Raises
    ------
    ValueError
        If a batch size is below 1.
    """
    if batch < 1 or reference < 1:
        raise ValueError(f"expected batch sizes of at least 1, got {batch} and reference {reference}")
    exponent = {"sqrt": 0.5, "linear": 1.0, "constant": 0.0}[rule]
    return float(base * (batch / reference) ** exponent)


@torch.no_grad()
def clip_gradients(
    modules: Mapping[str, nn.Module | Sequence[Tensor]], max_norm: float
) -> dict[str, Float[Tensor, ""]]:
    """Scale the gradients of each sub-module down to ``max_norm``, each by itself, and return their norms before.

    Nothing is read back from the device. A norm that is not finite says that the step must not be taken; the gradients
    are spoilt then. Ranks that share a module in shards exchange one number a sub-module, all of them at once.

    Parameters
    ----------
    modules
        Sub-modules by name, or lists of their parameters: those of a deep one take longer to find than to clip.
    max_norm
        Of each.

    Raises
    ------
    ValueError
        If ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number, got {max_norm}")
    parts = {
        name: [p for p in (part.parameters() if isinstance(part, nn.Module) else part) if p.grad is not None]
        for name, part in modules.items()
    }
    gradients = {name: [_local(_gradient(p)) for p in part] for name, part in parts.items()}
    everything = [each for part in gradients.values() for each in part]
    if not everything:
        return dict.fromkeys(parts, torch.zeros(()))
    of_each = iter(torch._foreach_norm(everything))
    zero = everything[0].new_zeros(())
    norms = {
        name: torch.linalg.vector_norm(torch.stack([next(of_each) for _ in part])) if part else zero
        for name, part in gradients.items()
    }
    norms = _over_shards(norms, {name: part[0] for name, part in parts.items() if part})
    factors = (max_norm / (torch.stack(list(norms.values())) + 1e-6)).clamp(max=1)
    for part, factor in zip(gradients.values(), factors.unbind(), strict=True):
        if part:
            torch._foreach_mul_(part, factor)
    return norms


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _over_shards(norms: dict[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the norms of whole gradients from those of this rank's shards; ``first`` is one parameter of each."""
    sharded = {name: parameter for name, parameter in first.items() if isinstance(parameter, DTensor)}
    groups = {name: _shard_groups(parameter) for name, parameter in sharded.items()}
    if not any(groups.values()):
        return norms
    names = [name for name, found in groups.items() if found]
    assert all(groups[name] == groups[names[0]] for name in names), "all sub-modules lie on one mesh"
    squares = torch.stack([norms[name] for name in names]).square()
    for group in groups[names[0]]:
        dist.all_reduce(squares, group=group)
    return norms | dict(zip(names, squares.sqrt().unbind(), strict=True))


def _shard_groups(parameter: DTensor) -> list[dist.ProcessGroup]:
    mesh = parameter.device_mesh
    return [
        mesh.get_group(dimension)
        for dimension, placement in enumerate(parameter.placements)
        if isinstance(placement, Shard) and mesh.size(dimension) > 1
    ]


@torch.no_grad()
def update_ema(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """Move each teacher parameter towards the student's: ``momentum * teacher + (1 - momentum) * student``.

    In place, each rank on the shard it has. Momentum 1 leaves the teacher bit-equal, 0 copies the student.

    Raises
    ------
    ValueError
        If the momentum is outside [0, 1], or teacher and student differ in number or shape of parameters.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected 0 to 1, got {momentum}")
    theirs, ours = [_local(each) for each in teacher], [_local(each) for each in student]
    if [each.shape for each in theirs] != [each.shape for each in ours]:
        raise ValueError("teacher and student: expected parameters of the same shapes in the same order")
    if momentum == 1 or not theirs:
        return
    torch._foreach_lerp_(theirs, ours, 1 - momentum)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# --- bad_steps -----------------------------------------------------------------------------------------------------
#
# Training steps with a loss or gradient that is not finite: they change no weight, and too many end the run.


class NonfiniteSteps:
    """Skips such steps and counts them, on the device: nothing is read back from it until `check`.

    Parameters
    ----------
    most
        So many bad steps in a row are too many.
    advice
        What the user is told to do then, in sentences.
    """

    def __init__(self, device: torch.device, *, most: int, advice: str) -> None:
        self._most, self._advice = most, advice
        self._counts = torch.zeros(2, device=device)  # of the run, and in a row until now

    def step(self, optimizer: torch.optim.Optimizer, values: Iterable[Tensor]) -> None:
        """Take the optimizer's step, unless one of the values (losses, gradient norms) is not finite on any rank.

        The optimizer must be fused: its kernel leaves weights and moments alone where ``found_inf`` is 1.
        """
        finite = torch.stack(list(values)).isfinite().all()
        bad = max_over_ranks((~finite).float())
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        total, in_a_row = self._counts
        self._counts = torch.stack((total + bad, (in_a_row + bad) * bad))

    @property
    def total(self) -> Tensor:
        """Bad steps of the run, a number on the device."""
        return self._counts[0]

    def check(self) -> None:
        """Read the count from the device.

        Raises
        ------
        DinocellError
            If there were too many in a row.
        """
        in_a_row = int(self._counts[1])
        if in_a_row >= self._most:
            raise DinocellError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; no weight was changed by them. "
                f"{self._advice}"
            )

    def state(self) -> Tensor:
        """Return what a training state keeps, for `restore`."""
        return self._counts

    def restore(self, state: Tensor) -> None:
        """Go on counting from a state."""
        self._counts = state.to(self._counts.device)
