"""A backbone as plain data, and the layouts in which it is written.

Every layout includes provenance and licence (the card): in the file if the format allows it, else in a small JSON file
next to it.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dinocell.configs.schema import to_plain
from dinocell.errors import WeightsError, one_line
from dinocell.models.checkpoint_files import METADATA_KEY, sidecar_path
from dinocell.models.config import WeightsCard
from dinocell.models.locate import require
from dinocell.models.positions import rotary_periods
from dinocell.models.vit import VisionTransformer, ViTConfig
from dinocell.runtime.files import replacing

SCHEMA_VERSION = 1

Layout = Literal["dinocell", "meta", "meta-flat", "huggingface"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A backbone as plain data: configuration, tensors under the names of `VisionTransformer`, card, heads.

    ``heads`` maps ``dino_head`` and ``ibot_head`` to their tensors, if a file has them. ``source_format`` is a
    description.
    """

    config: ViTConfig
    tensors: Mapping[str, Tensor]
    card: WeightsCard = field(default_factory=WeightsCard)
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    source_format: str = "DINOCell"

    @classmethod
    def of(cls, vit: VisionTransformer, heads: Mapping[str, Mapping[str, Tensor]] | None = None) -> "Weights":
        """Return the weights of a model (detached, not copied)."""
        tensors = {name: tensor.detach() for name, tensor in vit.state_dict().items()}
        return cls(config=vit.config, tensors=tensors, card=vit.card, heads=heads or {})

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the backbone, without heads."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def save_weights(path: str | Path, weights: Weights, *, layout: Layout = "dinocell") -> None:
    """Write a model to one file (``huggingface``: one folder), atomically.

    Parameters
    ----------
    path
        ``.pth`` or ``.pt`` for a PyTorch file, ``.safetensors`` for safetensors; a folder for ``huggingface``.
    layout
        ``dinocell`` and ``meta``: Meta's layout of a teacher checkpoint, ``{"teacher": {"backbone.*", "dino_head.*",
        "ibot_head.*"}}``, plus our configuration and card, which Meta's evaluators ignore. ``meta-flat``: the bare
        state dict, as Meta's released files, and ``<file>.card.json`` next to it. ``huggingface``: ``config.json``,
        ``model.safetensors`` and ``README.md``.

    It is a :class:`WeightsError` if the layout cannot express the model, or the files cannot be written.
    """
    path = Path(path)
    if layout == "huggingface":
        _save_hugging_face(path, weights)
        return
    is_known = path.suffix in (".pth", ".pt", ".safetensors")
    require(is_known, f"{path}: expected a name that ends in .pth, .pt or .safetensors")
    tensors = _packed(to_meta(weights.config, weights.tensors))
    if layout == "meta-flat":
        _save_tensors(path, tensors, None)
        _save_text(sidecar_path(path), json.dumps(_metadata(weights), indent=2) + "\n")
        return
    teacher = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    for head, own in weights.heads.items():
        teacher |= _packed({f"{head}.{name}": tensor for name, tensor in own.items()})
    if path.suffix == ".safetensors":
        _save_tensors(path, {f"teacher.{name}": tensor for name, tensor in teacher.items()}, weights)
    else:
        content = {"teacher": teacher, METADATA_KEY: _metadata(weights)}
        _write(path, lambda part: _torch_save(content, part))


def _save_tensors(path: Path, tensors: Mapping[str, Tensor], described_by: Weights | None) -> None:
    if path.suffix != ".safetensors":
        _write(path, lambda part: _torch_save(dict(tensors), part))
        return
    header = {"format": "pt"}
    if described_by is not None:
        header[METADATA_KEY] = json.dumps(_metadata(described_by))
    # Not save_file, whose files only their owner can read (mode 0600).
    _write(path, lambda part: part.write_bytes(safetensors.torch.save(dict(tensors), metadata=header)))


def _save_hugging_face(folder: Path, weights: Weights) -> None:
    tensors, hub_config = to_hugging_face(weights.config, weights.tensors)
    is_folder = folder.is_dir() or not folder.exists()
    require(is_folder, f"{folder}: expected a folder for the huggingface layout, got a file")
    # transformers has no local_cls_norm, and always has LayerScale; the metadata describes the exported tensors.
    exported = dataclasses.replace(weights.config, local_cls_norm=False, layer_scale=True)
    _save_tensors(folder / "model.safetensors", _packed(tensors), dataclasses.replace(weights, config=exported))
    _save_text(folder / "config.json", json.dumps(hub_config, indent=2, sort_keys=True) + "\n")
    _save_text(folder / "README.md", _model_card(weights))


def _model_card(weights: Weights) -> str:
    config, card = weights.config, weights.card
    provenance = "\n".join(f"- {ancestor}" for ancestor in card.derived_from) or "- trained from random weights"
    return (
        "# Vision transformer written by DINOCell\n\n"
        f"Width {config.width}, {config.depth} blocks, patch {config.patch_size} px, {config.in_channels} channel(s); "
        f"input convention: {card.input.convention}.\n\n"
        f"## Licence\n\n{card.licence or 'not stated'}\n\n## Derived from\n\n{provenance}\n"
    )


def _metadata(weights: Weights) -> dict[str, Any]:
    described = {"vit": to_plain(weights.config), "card": to_plain(weights.card)}
    return {"schema": SCHEMA_VERSION, "kind": "backbone", **described}


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detach, and copy tensors that are views of larger memory, so that files hold nothing else."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in whole.items()
    }


def _torch_save(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)


def _save_text(path: Path, text: str) -> None:
    _write(path, lambda part: part.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically, and create its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            write(part)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be written ({one_line(error)})") from error


# The names and shapes of other packages follow: the inverse of `dinocell.models.formats`, bit-exact as a round trip.


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
    has_one_norm = not (config.cls_norm or config.local_cls_norm)
    require(has_one_norm, "dinov2's model has one final norm; this one has an untied norm and cannot be exported to it")
    if config.mlp == "swiglu":
        for block in range(config.depth):
            for part in ("weight", "bias"):
                gate, value = (named.pop(f"blocks.{block}.mlp.{w}.{part}") for w in ("w1", "w2"))
                named[f"blocks.{block}.mlp.w12.{part}"] = torch.cat((gate, value))
    return named


def to_hugging_face(config: ViTConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the ``config.json`` of a DINOv3ViT, Dinov2 or Dinov2WithRegisters folder.

    Transformers' classes cannot express an untied CLS norm, rotary periods without a base, a table of positions that is
    not square, or an MLP whose width is not a multiple of the model's: these are errors.
    """
    require(not config.cls_norm, "transformers' models have one final norm; this one has an untied CLS norm")
    is_v3 = config.positions == "rope"
    dtype = tensors["patch_embed.proj.weight"].dtype
    hub = (_hub_v3(config) if is_v3 else _hub_v2(config)) | {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": 1.0,
        "dtype": str(dtype).removeprefix("torch."),
    }
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("local_cls_norm."):
            continue  # only used in training, and not in transformers
        if ".attn.qkv." in name:
            named |= _split_qkv(config, name, tensor)
            continue
        shaped = tensor[None] if is_v3 and name == "mask_token" else tensor
        for pattern, replacement in _V3_NAMES if is_v3 else _V2_NAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = shaped
    if is_v3 and not config.registers:
        named["embeddings.register_tokens"] = torch.empty(1, 0, config.width, dtype=dtype)
    if not config.layer_scale:
        prefix = "layer" if is_v3 else "encoder.layer"
        for block in range(config.depth):
            for branch in (1, 2):
                named[f"{prefix}.{block}.layer_scale{branch}.lambda1"] = torch.ones(config.width, dtype=dtype)
    if not is_v3 and config.mlp == "swiglu":
        for part in [name for name in named if ".mlp.w1." in name]:
            gate, value = named.pop(part), named.pop(part.replace(".w1.", ".w2."))
            named[part.replace(".w1.", ".weights_in.")] = torch.cat((gate, value))
    return named, hub


def _hub_v3(config: ViTConfig) -> dict[str, Any]:
    has_base = config.rope.min_period is None and config.rope.coordinates == "separate"
    require(has_base, "transformers' DINOv3 derives its rotary periods from a base, each axis by its own length")
    return {
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
    require(grid[0] == grid[1], f"transformers' Dinov2 needs a square table of positions, this one is {grid}")
    ratio = 4 if config.mlp == "swiglu" else config.mlp_hidden // config.width
    gated = (int(int(config.width * ratio) * 2 / 3) + 7) // 8 * 8
    is_ratio = config.mlp_hidden == (gated if config.mlp == "swiglu" else config.width * ratio)
    require(is_ratio, f"transformers' Dinov2 derives its MLP width from a ratio; {config.mlp_hidden} matches none")
    registers = {"num_register_tokens": config.registers} if config.registers else {}
    return registers | {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "mlp_ratio": ratio,
        "use_swiglu_ffn": config.mlp == "swiglu",
        "hidden_act": "gelu",
        "qkv_bias": config.qkv_bias,
        "image_size": grid[0] * config.patch_size,
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


_V3_NAMES = [
    (r"^blocks\.", "layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
    (r"\.mlp\.(w2|fc1)\.", ".mlp.up_proj."),
    (r"\.mlp\.(w3|fc2)\.", ".mlp.down_proj."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^(\w+_tokens?)$", r"embeddings.\1"),
]
_V2_NAMES = [
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^norm\.", "layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(\w+_tokens?)$", r"embeddings.\1"),
]
