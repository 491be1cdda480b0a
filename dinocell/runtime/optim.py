"""Around the optimizer: parameter groups, learning-rate rule, clipping, the moving average of the teacher."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
    return torch.optim.AdamW(list(groups), lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


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


def clip_gradients(modules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Float[Tensor, ""]]:
    """Scale the gradients of each sub-module down to ``max_norm``, each by itself, and return their norms before.

    Nothing is read back from the device. A norm that is not finite says that the step must not be taken; the gradients
    are spoilt then.

    Raises
    ------
    ValueError
        If ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number, got {max_norm}")
    norms = {}
    for name, module in modules.items():
        norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


@torch.no_grad()
def update_teacher(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
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
