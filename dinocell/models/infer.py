"""Read a transformer's configuration off the shapes of its tensors (under our names)."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinocell.errors import WeightsError
from dinocell.models.config import ViTConfig
from dinocell.models.positions import LearnedPositionConfig, RopeConfig

_MAX_BLOCKS = 512  # bounds what a damaged file can cost; the largest release has 40


def infer_config(
    named: Mapping[str, Tensor],
    periods: Tensor | None,
    hub_config: Mapping[str, Any] | None,
    *,
    rotary: bool,
    key_bias: bool,
) -> ViTConfig:
    """Return the configuration that the tensors, the stored rotary periods and a hub's ``config.json`` imply.

    What shapes cannot tell is taken from the hub's file or else is the family's: heads are 64 wide, the norm's
    epsilon is 1e-5 with rotary and 1e-6 with learned positions.
    """
    hub = hub_config or {}
    width, in_channels, patch_size, _ = named["patch_embed.proj.weight"].shape
    blocks = _blocks(named)
    if len(blocks) > _MAX_BLOCKS:
        raise WeightsError(f"expected at most {_MAX_BLOCKS} blocks, got {len(blocks)}")
    if blocks != set(range(len(blocks))) or not blocks:
        raise WeightsError(f"expected blocks numbered from 0 without a gap, got {sorted(blocks)[:50]}")
    gated = "blocks.0.mlp.w1.weight" in named
    hidden = named.get("blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight")
    if hidden is None:
        raise WeightsError("block 0 has no MLP: expected 'mlp.fc1.weight' or 'mlp.w1.weight'")
    check_ndim("MLP of block 0", hidden, 2)
    if periods is not None:
        check_ndim("rope_embed.periods", periods, 1)
    head_width = 64 if periods is None else 4 * len(periods)
    heads = int(_number(hub, "num_attention_heads", max(1, width // head_width)))
    registers = named["register_tokens"].shape[1] if "register_tokens" in named else 0
    try:
        return ViTConfig(
            width=width,
            depth=len(blocks),
            heads=heads,
            mlp="swiglu" if gated else "gelu",
            mlp_hidden=hidden.shape[0],
            patch_size=patch_size,
            in_channels=in_channels,
            registers=registers,
            positions="rope" if rotary else "learned",
            rope=_infer_rope(periods, hub),
            learned=LearnedPositionConfig() if rotary else _infer_learned(named["pos_embed"], registers, hub_config),
            qkv_bias="blocks.0.attn.qkv.bias" in named,
            key_bias=key_bias,
            layer_scale="blocks.0.ls1.gamma" in named,
            norm_eps=_number(hub, "layer_norm_eps", 1e-5 if rotary else 1e-6),
            cls_norm="cls_norm.weight" in named,
            local_cls_norm="local_cls_norm.weight" in named,
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"does not describe a vision transformer: {error}") from error


def _blocks(named: Mapping[str, Tensor]) -> set[int]:
    return {int(match[1]) for name in named if (match := re.match(r"blocks\.(\d+)\.", name))}


def check_sizes(config: ViTConfig, named: Mapping[str, Tensor]) -> None:
    """Compare a stated configuration with the tensors before a model of that size is made."""
    width, in_channels, patch_size, _ = named["patch_embed.proj.weight"].shape
    found = {"width": width, "in_channels": in_channels, "patch_size": patch_size, "depth": len(_blocks(named))}
    for name, size in found.items():
        if getattr(config, name) != size:
            raise WeightsError(f"its configuration says {name} {getattr(config, name)}, its tensors {size}")


def check_ndim(name: str, tensor: Tensor, ndim: int | None) -> None:
    """Refuse a tensor without numbers, or of another number of dimensions."""
    if tensor.numel() == 0 or tensor.ndim != (tensor.ndim if ndim is None else ndim):
        expected = "numbers" if ndim is None else f"{ndim} dimension(s)"
        raise WeightsError(f"{name}: expected {expected}, got shape {tuple(tensor.shape)}")


def _number(hub: Mapping[str, Any], name: str, default: int | float) -> float:
    value = hub.get(name, default)
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise WeightsError(f"{name} in config.json: expected a positive number, got {str(value)[:40]!r}")
    return float(value)


def _infer_rope(periods: Tensor | None, hub: Mapping[str, Any]) -> RopeConfig:
    """Tell base from minimum and maximum period; the stored table may have been rounded to bfloat16."""
    if periods is None:
        return RopeConfig(base=_number(hub, "rope_theta", 100.0))
    values = periods.double()
    count = len(values)
    first, last = float(values[0]), float(values[-1])
    if count < 2 or not 0 < first < last < 1e9:
        raise WeightsError("rope_embed.periods: expected at least two growing, positive periods")
    geometric = first * (last / first) ** (torch.arange(count, dtype=torch.float64) / (count - 1))
    if not torch.allclose(values, geometric, rtol=2e-2):
        raise WeightsError("rope_embed.periods: expected a geometric series")
    base = last ** (count / (count - 1))
    if abs(first - 1) < 1e-3:
        return RopeConfig(base=float(round(base)) if abs(base / round(base) - 1) < 1e-2 else base)
    return RopeConfig(min_period=first, max_period=last)


def _infer_learned(table: Tensor, registers: int, hub_config: Mapping[str, Any] | None) -> LearnedPositionConfig:
    side = math.isqrt(max(0, table.shape[1] - 1)) if table.ndim == 3 and table.numel() else 0
    if side == 0 or side * side != table.shape[1] - 1:
        raise WeightsError(f"pos_embed: expected shape (1, 1 + side * side, width), got {tuple(table.shape)}")
    if hub_config is not None:
        antialias = model_type(hub_config) == "dinov2_with_registers"
        return LearnedPositionConfig(grid_rows=side, grid_columns=side, offset=0.0, antialias=antialias)
    return LearnedPositionConfig(
        grid_rows=side, grid_columns=side, offset=0.0 if registers else 0.1, antialias=registers > 0
    )


def model_type(hub_config: Mapping[str, Any] | None) -> str | None:
    """Return which of transformers' models a ``config.json`` describes."""
    return None if hub_config is None else str(hub_config.get("model_type"))
