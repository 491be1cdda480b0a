"""A backbone as plain data, and every layout in which it leaves the house.

Whatever the layout, the file carries ancestry and terms (the card): beside the tensors where there is room, else in
a small JSON file next to it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dinocell.configs.schema import to_plain
from dinocell.errors import WeightsError
from dinocell.models.card import WeightsCard
from dinocell.models.files import METADATA_KEY, sidecar_path
from dinocell.models.layouts import to_hugging_face, to_meta
from dinocell.models.vit import VisionTransformer, ViTConfig
from dinocell.runtime.atomic import replacing

SCHEMA_VERSION = 1

Layout = Literal["dinocell", "meta", "meta-flat", "huggingface"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A backbone as plain data: configuration, tensors under the names of `VisionTransformer`, card, heads.

    ``heads`` maps ``dino_head`` and ``ibot_head`` to their tensors, where a file has them. ``source_format`` is for
    people to read.
    """

    config: ViTConfig
    tensors: Mapping[str, Tensor]
    card: WeightsCard = field(default_factory=WeightsCard)
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    source_format: str = "DINOCell"

    @classmethod
    def of(cls, vit: VisionTransformer, heads: Mapping[str, Mapping[str, Tensor]] | None = None) -> "Weights":
        """Take the weights out of a model (detached, not copied)."""
        tensors = {name: tensor.detach() for name, tensor in vit.state_dict().items()}
        return cls(config=vit.config, tensors=tensors, card=vit.card, heads=heads or {})

    @property
    def num_parameters(self) -> int:
        """Parameters of the backbone, heads not counted."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def save_weights(path: str | Path, weights: Weights, *, layout: Layout = "dinocell") -> None:
    """Write a model to one file (or, for ``huggingface``, one folder); nothing half-written is ever seen.

    Parameters
    ----------
    path
        ``.pth`` or ``.pt`` for a PyTorch file, ``.safetensors`` for safetensors; a folder for ``huggingface``.
    layout
        ``dinocell`` and ``meta``: Meta's layout of a teacher checkpoint, ``{"teacher": {"backbone.*", "dino_head.*",
        "ibot_head.*"}}``, plus our configuration and card, which Meta's evaluators ignore. ``meta-flat``: the bare
        state dict, as Meta's released files, and ``<file>.card.json`` beside it. ``huggingface``: ``config.json``,
        ``model.safetensors`` and ``README.md``.

    Raises
    ------
    WeightsError
        If the layout cannot express the model, or the files cannot be written.
    """
    path = Path(path)
    if layout == "huggingface":
        _save_hugging_face(path, weights)
        return
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise WeightsError(f"{path}: expected a name that ends in .pth, .pt or .safetensors")
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
    # Not save_file, which would let nobody else read it (mode 0600).
    _write(path, lambda part: part.write_bytes(safetensors.torch.save(dict(tensors), metadata=header)))


def _save_hugging_face(folder: Path, weights: Weights) -> None:
    tensors, hub_config = to_hugging_face(weights.config, weights.tensors)
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{folder}: expected a folder for the huggingface layout, found a file")
    # What transformers cannot hold is dropped or made explicit on the way out, so it is not in what comes back either.
    exported = dataclasses.replace(weights.config, local_cls_norm=False, layer_scale=True)
    _save_tensors(folder / "model.safetensors", _packed(tensors), dataclasses.replace(weights, config=exported))
    _save_text(folder / "config.json", json.dumps(hub_config, indent=2, sort_keys=True) + "\n")
    _save_text(folder / "README.md", _model_card(weights))


def _model_card(weights: Weights) -> str:
    config, card = weights.config, weights.card
    ancestry = "\n".join(f"- {ancestor}" for ancestor in card.derived_from) or "- trained from random weights"
    return (
        "# Vision transformer written by DINOCell\n\n"
        f"Width {config.width}, {config.depth} blocks, patch {config.patch_size} px, {config.in_channels} channel(s); "
        f"input convention: {card.input.convention}.\n\n"
        f"## Licence\n\n{card.licence or 'not stated'}\n\n## Derived from\n\n{ancestry}\n"
    )


def _metadata(weights: Weights) -> dict[str, Any]:
    return {
        "schema": SCHEMA_VERSION,
        "kind": "backbone",
        "vit": to_plain(weights.config),
        "card": to_plain(weights.card),
    }


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detach, and copy what is a part of larger memory: files hold each tensor once and nothing around it."""
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
    """Write the whole file or nothing, making its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            write(part)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise WeightsError(f"{path}: cannot be written ({reason or error})") from error
