"""A segmenter as one file: tensors, and as plain data the sizes, the settings, ancestry and terms.

Read like every exported weight: as tensors only, nothing in a file is ever run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dinocell.configs.schema import MisfitError, fit, to_plain
from dinocell.errors import WeightsError
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.models.card import WeightsCard
from dinocell.models.files import METADATA_KEY, read_raw
from dinocell.models.sources import locate
from dinocell.models.vit import ViTConfig
from dinocell.runtime.atomic import replacing

KIND = "segmenter"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SegmenterFile:
    """What a file holds; ``tensors`` are named as in `dinocell.finetune.model.DINOCell`."""

    vit: ViTConfig
    blocks: tuple[int, ...]
    settings: SegmenterSettings
    card: WeightsCard
    tensors: dict[str, Tensor]


def is_segmenter(source: str | Path) -> bool:
    """Say whether a source is a segmenter of ours; whatever cannot be read is none."""
    try:
        path = locate(source)
        raw = read_raw(path / "model.safetensors" if (path / "model.safetensors").is_file() else path)
    except WeightsError:
        return False
    return isinstance(raw.metadata, dict) and raw.metadata.get("kind") == KIND


def write_segmenter(path: Path, file: SegmenterFile) -> None:
    """Write a file whole or not at all.

    Raises
    ------
    WeightsError
        If it cannot be written.
    """
    metadata = {
        "schema": _VERSION,
        "kind": KIND,
        "vit": to_plain(file.vit),
        "blocks": list(file.blocks),
        "settings": to_plain(file.settings),
        "card": to_plain(file.card),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in file.tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            if path.suffix == ".safetensors":
                header = {"format": "pt", METADATA_KEY: json.dumps(metadata)}
                part.write_bytes(safetensors.torch.save(tensors, metadata=header))  # save_file would make it 0600
            else:
                torch.save({"model": tensors, METADATA_KEY: metadata}, part)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise WeightsError(f"{path}: cannot be written ({reason or error})") from error


def read_segmenter(source: str | Path) -> SegmenterFile:
    """Find and read a segmenter.

    Raises
    ------
    WeightsError
        If there is none, it is damaged, or it is a backbone or something else.
    """
    path = locate(source)
    if path.is_dir():
        path = path / "model.safetensors"
    raw = read_raw(path)
    if not isinstance(raw.metadata, dict) or raw.metadata.get("kind") != KIND:
        what = "a backbone" if raw.metadata is not None or raw.container else "not one of ours"
        raise WeightsError(
            f"{source}: expected a segmenter, this file is {what}; 'dinocell finetune' makes a segmenter of a backbone"
        )
    version = raw.metadata.get("schema")
    if version != _VERSION:
        raise WeightsError(f"{source}: version {version}, this DINOCell reads {_VERSION}; update dinocell")
    try:
        return SegmenterFile(
            vit=fit(ViTConfig, raw.metadata["vit"], "vit"),
            blocks=tuple(fit(list[int], raw.metadata["blocks"], "blocks")),
            settings=fit(SegmenterSettings, raw.metadata["settings"], "settings"),
            card=fit(WeightsCard, raw.metadata["card"], "card"),
            tensors=raw.tensors,
        )
    except (MisfitError, KeyError, ValueError) as error:
        raise WeightsError(f"{source}: its description is damaged or of a newer version ({error})") from error
