"""Recognise a checkpoint by its names and shapes, and rename its tensors to ours.

Our names are Meta's (``blocks.3.attn.qkv.weight``) with ``register_tokens`` for DINOv3's ``storage_tokens``, without
tensors that can be computed (rotary periods, the mask of the key bias). Formats: `docs/checkpoints.md`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dinocell.errors import WeightsError
from dinocell.models.config import ViTConfig
from dinocell.models.locate import require
from dinocell.models.positions import LearnedPositionConfig, RopeConfig

Family = Literal["dinov3", "dinov2", "cell_dino"]

HEADS = ("dino_head", "ibot_head")

# Limits of what a damaged file can cost.
MAX_PATCH = 64  # resampling takes patch ** 4 numbers; the largest release has 16
_MAX_BLOCKS = 512  # the largest release has 40

# Added to names by training wrappers (DDP, FSDP, torch.compile, activation checkpointing).
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = re.compile(r"^(?:(?:module|backbone|model|teacher)\.)+")
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+\.)")

_HUGGING_FACE_NAMES = [
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attn\.q\.", ".attn.query."),
    (r"\.attn\.k\.", ".attn.key."),
    (r"\.attn\.v\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
]


class Recognised(NamedTuple):
    """A checkpoint under our names; ``source_format`` is its description."""

    config: ViTConfig
    tensors: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    family: Family
    source_format: str


def recognise(
    tensors: Mapping[str, Tensor],
    hub_config: Mapping[str, Any] | None = None,
    config: ViTConfig | None = None,
) -> Recognised:
    """Rename the tensors of a file, and infer the configuration from their shapes unless a file of ours states it.

    ``hub_config`` is the ``config.json`` of a Hugging Face folder. It is a :class:`WeightsError` if the names match no
    known format, or two names mean the same tensor.
    """
    hub = hub_config or {}
    # 1. Names: strip wrappers and translate those of Hugging Face.
    named, heads = plain_names(tensors)
    if any(name.startswith("embeddings.") for name in named):
        named = _from_hugging_face(named, hub)
    periods = named.pop("rope_embed.periods", None)
    if "register_tokens" in named and named["register_tokens"].shape[1:2] == (0,):
        del named["register_tokens"]  # transformers' form of no registers
    for name, ndim in (("storage_tokens", 3), ("register_tokens", 3), ("mask_token", None)):
        if name in named:
            _check_ndim(name, named[name], ndim)
    # 2. Positions: DINOv3's files have rotary ones.
    rotary = "storage_tokens" in named or periods is not None or hub.get("model_type") == "dinov3_vit"
    if "storage_tokens" in named:
        is_one = "register_tokens" not in named
        require(is_one, "holds both 'storage_tokens' and 'register_tokens'; expected one of them")
        named["register_tokens"] = named.pop("storage_tokens")
    # 3. Tensors: one layout of gated MLPs, of the key bias and of the mask token.
    _split_gated_mlp(named)
    masked = _apply_bias_masks(named)
    _check_patch_embedding(named)
    if "mask_token" not in named:  # missing in some exports; zero when a training starts
        named["mask_token"] = torch.zeros(1, len(named["patch_embed.proj.weight"]))
    named["mask_token"] = named["mask_token"].reshape(1, -1)
    # 4. Configuration, from the shapes unless the file states it.
    if config is None:
        config = _infer_config(named, periods, hub, rotary=rotary, masked=masked)
    else:
        _check_sizes(config, named)
    family: Family = "dinov3" if config.positions == "rope" else "dinov2" if config.in_channels == 3 else "cell_dino"
    meta = {"dinov3": "Meta DINOv3", "dinov2": "Meta DINOv2", "cell_dino": "Meta Cell-DINO"}[family]
    return Recognised(config, named, heads, family, f"Hugging Face {hub['model_type']}" if hub else meta)


def plain_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Strip wrappers, prefixes and block chunks from names; return the backbone, and the DINO and iBOT heads."""
    backbone: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        plain = _PREFIXES.sub("", _WRAPPERS.sub("", name))
        head = plain.split(".", 1)[0]
        if head in HEADS and "." in plain:
            heads.setdefault(head, {})[plain.split(".", 1)[1]] = tensor
            continue
        plain = _CHUNK.sub(r"blocks.\1", plain)
        is_new = plain not in backbone
        require(is_new, f"two tensors are called {plain!r} without prefixes; expected one model per file")
        backbone[plain] = tensor
    return backbone, heads


def _from_hugging_face(named: dict[str, Tensor], hub: Mapping[str, Any]) -> dict[str, Tensor]:
    require(bool(hub), "has Hugging Face names but no config.json: give the folder, not the file")
    kind, kinds = hub.get("model_type"), ("dinov3_vit", "dinov2", "dinov2_with_registers")
    require(kind in kinds, f"model_type {str(kind)!r} in config.json: expected one of {', '.join(kinds)}")
    is_gated = any(name.endswith(".mlp.gate_proj.weight") for name in named)
    up, down = ("w2", "w3") if is_gated else ("fc1", "fc2")
    mlp_names = [(r"\.mlp\.up_proj\.", f".mlp.{up}."), (r"\.mlp\.down_proj\.", f".mlp.{down}.")]
    ours: dict[str, Tensor] = {}
    for name, tensor in named.items():
        for pattern, replacement in [*_HUGGING_FACE_NAMES, *mlp_names]:
            name = re.sub(pattern, replacement, name)
        require(name not in ours, f"two tensors mean {name!r}; expected one model per file")
        ours[name] = tensor
    for name in [n for n in ours if n.endswith(".attn.query.weight")]:
        _fuse_qkv(ours, name.removesuffix("query.weight"))
    return ours


def _fuse_qkv(named: dict[str, Tensor], prefix: str) -> None:
    """Join the three projections; a missing bias is zero if another one exists."""
    parts = ("query", "key", "value")
    weights = [named.pop(f"{prefix}{part}.weight") for part in parts if f"{prefix}{part}.weight" in named]
    biases = [named.pop(f"{prefix}{part}.bias", None) for part in parts]
    query = weights[0]
    _check_ndim(f"{prefix}query.weight", query, 2)
    fits = len(weights) == 3 and all(weight.shape == query.shape for weight in weights)
    fits = fits and all(bias is None or bias.shape == query.shape[:1] for bias in biases)
    require(fits, f"{prefix}*: expected query, key and value projections of one shape")
    named[f"{prefix}qkv.weight"] = torch.cat(weights)
    if any(bias is not None for bias in biases):
        named[f"{prefix}qkv.bias"] = torch.cat([query.new_zeros(len(query)) if b is None else b for b in biases])


def _split_gated_mlp(named: dict[str, Tensor]) -> None:
    """Split DINOv2's fused ``w12`` (gate first, then value) into ``w1`` and ``w2``."""
    for name in [n for n in named if ".mlp.w12." in n]:
        shape = tuple(named[name].shape)
        is_even = shape != () and 0 not in shape and shape[0] % 2 == 0
        require(is_even, f"{name}: expected an even number of rows, got {shape}")
        gate, value = named.pop(name).chunk(2)
        named[name.replace(".w12.", ".w1.")], named[name.replace(".w12.", ".w2.")] = gate.clone(), value.clone()


def _apply_bias_masks(named: dict[str, Tensor]) -> bool:
    """Apply and remove DINOv3's masks of the qkv bias; return whether there were any (then the key bias is off).

    The small and large DINOv3 releases have masks (and biases) of zeros, new models masks of NaN. Both mean "query and
    value, but not key". Multiplying a zero bias changes nothing, so a rebuilt mask gives the released features and lets
    continued training change the biases.
    """
    masks = [name for name in named if name.endswith(".attn.qkv.bias_mask")]
    for name in masks:
        mask, bias = named.pop(name), name.removesuffix("_mask")
        shape = named[bias].shape if bias in named else mask.shape
        require(mask.shape == shape, f"{name}: expected shape {tuple(shape)}, got {tuple(mask.shape)}")
        if bias in named and not bool(mask.isnan().any()):
            named[bias] = named[bias] * mask.to(named[bias].dtype)  # an integer bias is refused later
    return bool(masks)


def _check_patch_embedding(named: Mapping[str, Tensor]) -> None:
    name = "patch_embed.proj.weight"
    require(name in named, f"not a DINO backbone: it has no patch embedding ({name!r})")
    shape = tuple(named[name].shape)
    is_square = len(shape) == 4 and shape[2] == shape[3] and 0 not in shape
    require(is_square, f"{name}: expected shape (width, channels, patch, patch), got {shape}")
    require(shape[2] <= MAX_PATCH, f"{name}: expected a patch of at most {MAX_PATCH}, got {shape[2:]}")


def _infer_config(
    named: Mapping[str, Tensor], periods: Tensor | None, hub: Mapping[str, Any], *, rotary: bool, masked: bool
) -> ViTConfig:
    """Return the configuration implied by the tensors, the stored rotary periods and a hub's ``config.json``.

    Values that shapes do not determine come from the hub's file, or else from the family: heads are 64 wide, the norm's
    epsilon is 1e-5 with rotary and 1e-6 with learned positions.
    """
    require(not (rotary and "pos_embed" in named), "holds both rotary and learned positions; expected one of them")
    expected = "expected 'rope_embed.periods', 'pos_embed' or a DINOv3 config.json"
    got = ", ".join(sorted(named)[:3])
    require(rotary or "pos_embed" in named, f"not a DINO backbone: {expected}, got names such as {got}")
    width, in_channels, patch_size, _ = named["patch_embed.proj.weight"].shape
    blocks = _blocks(named)
    require(len(blocks) <= _MAX_BLOCKS, f"expected at most {_MAX_BLOCKS} blocks, got {len(blocks)}")
    is_complete = bool(blocks) and blocks == set(range(len(blocks)))
    require(is_complete, f"expected blocks numbered from 0 without a gap, got {sorted(blocks)[:50]}")
    gated = "blocks.0.mlp.w1.weight" in named
    first = "blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"
    require(first in named, "block 0 has no MLP: expected 'mlp.fc1.weight' or 'mlp.w1.weight'")
    _check_ndim(first, named[first], 2)
    if periods is not None:
        _check_ndim("rope_embed.periods", periods, 1)
    head_width = 64 if periods is None else 4 * len(periods)
    heads = int(_number(hub, "num_attention_heads", max(1, width // head_width)))
    registers = named["register_tokens"].shape[1] if "register_tokens" in named else 0
    qkv_bias = "blocks.0.attn.qkv.bias" in named
    has_key_bias = bool(hub.get("key_bias", hub["model_type"] != "dinov3_vit")) if hub else not masked
    try:
        return ViTConfig(
            width=width,
            depth=len(blocks),
            heads=heads,
            mlp="swiglu" if gated else "gelu",
            mlp_hidden=len(named[first]),
            patch_size=patch_size,
            in_channels=in_channels,
            registers=registers,
            positions="rope" if rotary else "learned",
            rope=_infer_rope(periods, hub),
            learned=LearnedPositionConfig() if rotary else _infer_learned(named["pos_embed"], registers, hub),
            qkv_bias=qkv_bias,
            key_bias=qkv_bias and has_key_bias,
            layer_scale="blocks.0.ls1.gamma" in named,
            norm_eps=_number(hub, "layer_norm_eps", 1e-5 if rotary else 1e-6),
            cls_norm="cls_norm.weight" in named,
            local_cls_norm="local_cls_norm.weight" in named,
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"does not describe a vision transformer: {error}") from error


def _blocks(named: Mapping[str, Tensor]) -> set[int]:
    return {int(match[1]) for name in named if (match := re.match(r"blocks\.(\d+)\.", name))}


def _check_sizes(config: ViTConfig, named: Mapping[str, Tensor]) -> None:
    """Compare a stated configuration with the tensors, before a model of that size is made."""
    width, in_channels, patch_size, _ = named["patch_embed.proj.weight"].shape
    sizes = {"width": width, "in_channels": in_channels, "patch_size": patch_size, "depth": len(_blocks(named))}
    for name, size in sizes.items():
        stated = getattr(config, name)
        require(stated == size, f"its configuration has {name} {stated}, its tensors {size}")


def _check_ndim(name: str, tensor: Tensor, ndim: int | None) -> None:
    """Require a tensor with numbers and, unless None, this number of dimensions."""
    fits = tensor.numel() > 0 and ndim in (None, tensor.ndim)
    require(fits, f"{name}: expected {ndim or 'any'} dimension(s), not empty, got shape {tuple(tensor.shape)}")


def _number(hub: Mapping[str, Any], name: str, default: int | float) -> float:
    value = hub.get(name, default)
    is_valid = type(value) in (int, float) and 0 < value < 1e9
    require(is_valid, f"{name} in config.json: expected a positive number, got {str(value)[:40]!r}")
    return float(value)


def _infer_rope(periods: Tensor | None, hub: Mapping[str, Any]) -> RopeConfig:
    """Infer the base, or minimum and maximum period; the stored table may have been rounded to bfloat16."""
    if periods is None:
        return RopeConfig(base=_number(hub, "rope_theta", 100.0))
    values = periods.double()
    count = len(values)
    first, last = float(values[0]), float(values[-1])
    require(count >= 2 and 0 < first < last < 1e9, "rope_embed.periods: expected at least two increasing periods")
    geometric = first * (last / first) ** (torch.arange(count, dtype=torch.float64) / (count - 1))
    require(torch.allclose(values, geometric, rtol=2e-2), "rope_embed.periods: expected a geometric series")
    base = last ** (count / (count - 1))
    if abs(first - 1) < 1e-3:
        return RopeConfig(base=float(round(base)) if abs(base / round(base) - 1) < 1e-2 else base)
    return RopeConfig(min_period=first, max_period=last)


def _infer_learned(table: Tensor, registers: int, hub: Mapping[str, Any]) -> LearnedPositionConfig:
    side = math.isqrt(max(0, table.shape[1] - 1)) if table.ndim == 3 and table.numel() else 0
    is_square = side > 0 and side * side == table.shape[1] - 1
    require(is_square, f"pos_embed: expected shape (1, 1 + side * side, width), got {tuple(table.shape)}")
    antialias = hub["model_type"] == "dinov2_with_registers" if hub else registers > 0
    offset = 0.0 if hub or registers else 0.1
    return LearnedPositionConfig(grid_rows=side, grid_columns=side, offset=offset, antialias=antialias)
