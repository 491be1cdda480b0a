"""Our tensors under the names and shapes that other people's code expects.

The inverse of `dinocell.models.formats`; together they are bit-exact round trips.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinocell.errors import WeightsError
from dinocell.models.positions import rotary_periods
from dinocell.models.vit import ViTConfig


def to_meta(config: ViTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a flat state dict for dinov3's ``DinoVisionTransformer`` (rotary positions) or dinov2's (learned ones)."""
    named = dict(tensors)
    if config.positions == "rope":
        if config.registers:
            named["storage_tokens"] = named.pop("register_tokens")
        named["rope_embed.periods"] = rotary_periods(config.rope, config.width // config.heads)
        if config.qkv_bias and not config.key_bias:
            mask = torch.ones(3, config.width, dtype=tensors["blocks.0.attn.qkv.bias"].dtype)
            mask[1] = 0
            named |= {f"blocks.{i}.attn.qkv.bias_mask": mask.flatten().clone() for i in range(config.depth)}
        return named
    if config.cls_norm or config.local_cls_norm:
        raise WeightsError(
            "dinov2's model has one final norm; this one has an untied norm and cannot be exported to it"
        )
    if config.mlp == "swiglu":
        for block in range(config.depth):
            for part in ("weight", "bias"):
                gate, value = (named.pop(f"blocks.{block}.mlp.{w}.{part}") for w in ("w1", "w2"))
                named[f"blocks.{block}.mlp.w12.{part}"] = torch.cat((gate, value))
    return named


def to_hugging_face(config: ViTConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the ``config.json`` of a DINOv3ViT, Dinov2 or Dinov2WithRegisters folder.

    Raises
    ------
    WeightsError
        For what transformers' classes cannot express: an untied CLS norm, other rotary periods than a base's, a table
        of positions that is not square, an MLP whose width is no multiple of the model's.
    """
    if config.cls_norm:
        raise WeightsError("transformers' models have one final norm; this one has an untied CLS norm")
    hub = _hub_v3(config) if config.positions == "rope" else _hub_v2(config)
    dtype = tensors["patch_embed.proj.weight"].dtype
    hub["dtype"] = str(dtype).removeprefix("torch.")
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("local_cls_norm."):
            continue  # only training uses it, and transformers has no place for it
        if ".attn.qkv." in name:
            named |= _split_qkv(config, name, tensor)
        elif config.positions == "rope":
            named[_v3_name(name, config.mlp == "swiglu")] = tensor[None] if name == "mask_token" else tensor
        else:
            named[_v2_name(name)] = tensor
    if config.positions == "rope" and not config.registers:
        named["embeddings.register_tokens"] = torch.empty(1, 0, config.width, dtype=dtype)
    if not config.layer_scale:
        prefix = "layer" if config.positions == "rope" else "encoder.layer"
        for block in range(config.depth):
            for branch in (1, 2):
                named[f"{prefix}.{block}.layer_scale{branch}.lambda1"] = torch.ones(config.width, dtype=dtype)
    if config.positions == "learned" and config.mlp == "swiglu":
        for part in [name for name in named if ".mlp.w1." in name]:
            gate, value = named.pop(part), named.pop(part.replace(".w1.", ".w2."))
            named[part.replace(".w1.", ".weights_in.")] = torch.cat((gate, value))
    return named, hub


def _hub_v3(config: ViTConfig) -> dict[str, Any]:
    if config.rope.min_period is not None or config.rope.coordinates != "separate":
        raise WeightsError("transformers' DINOv3 derives its rotary periods from a base, each axis by its own length")
    return _hub_sizes(config) | {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "intermediate_size": config.mlp_hidden,
        "use_gated_mlp": config.mlp == "swiglu",
        "hidden_act": "silu" if config.mlp == "swiglu" else "gelu",
        "rope_theta": config.rope.base,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and config.key_bias,
        "value_bias": config.qkv_bias,
        "num_register_tokens": config.registers,
        "image_size": 224,
    }


def _hub_v2(config: ViTConfig) -> dict[str, Any]:
    grid = (config.learned.grid_rows, config.learned.grid_columns)
    if grid[0] != grid[1]:
        raise WeightsError(f"transformers' Dinov2 needs a square table of positions, this one is {grid[0]} x {grid[1]}")
    ratio = 4 if config.mlp == "swiglu" else config.mlp_hidden // config.width
    gated = (int(int(config.width * ratio) * 2 / 3) + 7) // 8 * 8
    if config.mlp_hidden != (gated if config.mlp == "swiglu" else config.width * ratio):
        raise WeightsError(f"transformers' Dinov2 derives its MLP width from a ratio; {config.mlp_hidden} fits none")
    hub = _hub_sizes(config) | {
        "architectures": ["Dinov2WithRegistersModel" if config.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if config.registers else "dinov2",
        "mlp_ratio": ratio,
        "use_swiglu_ffn": config.mlp == "swiglu",
        "hidden_act": "gelu",
        "qkv_bias": config.qkv_bias,
        "image_size": grid[0] * config.patch_size,
    }
    return hub | ({"num_register_tokens": config.registers} if config.registers else {})


def _hub_sizes(config: ViTConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": 1.0,
    }


def _split_qkv(config: ViTConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    block, part = name.split(".")[1], name.rsplit(".", 1)[1]
    query, key, value = tensor.chunk(3)
    if config.positions == "rope":
        parts = {"q_proj": query, "k_proj": key, "v_proj": value}
        if part == "bias" and not config.key_bias:
            del parts["k_proj"]
        return {f"layer.{block}.attention.{n}.{part}": t.clone() for n, t in parts.items()}
    parts = {"query": query, "key": key, "value": value}
    return {f"encoder.layer.{block}.attention.attention.{n}.{part}": t.clone() for n, t in parts.items()}


def _v3_name(name: str, gated: bool) -> str:
    mlp = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"} if gated else {"fc1": "up_proj", "fc2": "down_proj"}
    if name.startswith("blocks."):
        name = name.replace("blocks.", "layer.", 1).replace(".attn.proj.", ".attention.o_proj.")
        name = name.replace(".ls1.gamma", ".layer_scale1.lambda1").replace(".ls2.gamma", ".layer_scale2.lambda1")
        for ours, theirs in mlp.items():
            name = name.replace(f".mlp.{ours}.", f".mlp.{theirs}.")
        return name
    if name.startswith("patch_embed.proj."):
        return name.replace("patch_embed.proj.", "embeddings.patch_embeddings.")
    return f"embeddings.{name}" if name.endswith(("_token", "_tokens")) else name


def _v2_name(name: str) -> str:
    if name.startswith("blocks."):
        name = name.replace("blocks.", "encoder.layer.", 1).replace(".attn.proj.", ".attention.output.dense.")
        name = name.replace(".ls1.gamma", ".layer_scale1.lambda1").replace(".ls2.gamma", ".layer_scale2.lambda1")
        return name.replace(".mlp.w3.", ".mlp.weights_out.")
    if name.startswith("norm."):
        return name.replace("norm.", "layernorm.", 1)
    if name.startswith("patch_embed.proj."):
        return name.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
    return "embeddings.position_embeddings" if name == "pos_embed" else f"embeddings.{name}"
