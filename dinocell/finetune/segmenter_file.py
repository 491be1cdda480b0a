"""A segmenter as one file: tensors, and as plain data its architecture, settings, provenance and licence.

Files are read as tensors only; no code in them is ever executed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dinocell.configs.schema import MisfitError, fit, to_plain
from dinocell.errors import WeightsError, one_line
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.models.checkpoint_files import METADATA_KEY, RawWeights, read_raw
from dinocell.models.config import WeightsCard
from dinocell.models.locate import locate, require
from dinocell.models.vit import ViTConfig
from dinocell.runtime.files import replacing

KIND = "segmenter"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SegmenterFile:
    """Content of a file; ``tensors`` are named as in `dinocell.finetune.model.DINOCell`."""

    vit: ViTConfig
    blocks: tuple[int, ...]
    settings: SegmenterSettings
    card: WeightsCard
    tensors: dict[str, Tensor]


def is_segmenter(source: str | Path) -> bool:
    """Return whether a source is a DINOCell segmenter; False if it cannot be read."""
    try:
        return _read(source)[1].get("kind") == KIND
    except WeightsError:
        return False


def _read(source: str | Path) -> tuple[RawWeights, Mapping[str, Any]]:
    """Find and read a file, or the segmenter in a folder; return its content and our description, if it has one."""
    path = locate(source)
    inner = path / "model.safetensors"
    raw = read_raw(inner if inner.is_file() else path)
    return raw, raw.metadata or {}


def write_segmenter(path: Path, file: SegmenterFile) -> None:
    """Write a file atomically; WeightsError if it cannot be written."""
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
                part.write_bytes(safetensors.torch.save(tensors, metadata=header))  # save_file would set mode 0600
            else:
                torch.save({"model": tensors, METADATA_KEY: metadata}, part)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{path}: cannot be written ({one_line(error)})") from error


def read_segmenter(source: str | Path) -> SegmenterFile:
    """Find and read a segmenter; WeightsError if there is none, it is damaged, or it is another kind of file."""
    raw, metadata = _read(source)
    kind = "a backbone" if raw.metadata is not None or raw.container else "no DINOCell file"
    require(
        metadata.get("kind") == KIND,
        f"{source}: expected a segmenter, this file is {kind}; train one with 'dinocell finetune'",
    )
    version = metadata.get("schema")
    require(version == _VERSION, f"{source}: file version {version}, this DINOCell reads {_VERSION}; update dinocell")
    try:
        return SegmenterFile(
            vit=fit(ViTConfig, metadata["vit"], "vit"),
            blocks=tuple(fit(list[int], metadata["blocks"], "blocks")),
            settings=fit(SegmenterSettings, metadata["settings"], "settings"),
            card=fit(WeightsCard, metadata["card"], "card"),
            tensors=raw.tensors,
        )
    except (MisfitError, KeyError, ValueError) as error:
        raise WeightsError(f"{source}: its metadata is damaged or of a newer version ({error})") from error


def describe_segmenter(file: SegmenterFile) -> dict[str, str]:
    """Return the facts about a segmenter by name, in reading order."""
    vit, settings = file.vit, file.settings
    backbone, decoder = (
        sum(tensor.numel() for name, tensor in file.tensors.items() if name.startswith(part))
        for part in ("backbone.", "decoder.")
    )
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()})
    tiles = f" in tiles of {settings.clahe_tile_px} px"
    clahe = f"CLAHE {settings.clahe_clip:g}{tiles}" if settings.clahe_clip else "no CLAHE"
    low, high = settings.percentiles
    return {
        "format": "DINOCell segmenter",
        "architecture": f"ViT of width {vit.width}, {vit.depth} blocks, patch {vit.patch_size} px; decoder at blocks "
        f"{', '.join(map(str, file.blocks))}",
        "parameters": f"{backbone:,} backbone, {decoder:,} decoder ({', '.join(dtypes)})",
        "target": settings.target,
        "input": f"{settings.convention}, percentiles {low:g} and {high:g}, {clahe}",
        "windows": f"{settings.window_px} px",
        "pixel size": "not stated" if settings.pixel_size_um is None else f"{settings.pixel_size_um:g} um",
        "cells": str(settings.postprocessing),
        "trained on": ", ".join(settings.trained_on) or "not stated",
        "derived from": " | ".join(file.card.derived_from) or "trained from random weights",
        "licence": file.card.licence or "not stated",
    }


# Shipped with the package, for `dinocell segment` without ``--model``; its model card is README.md in the same folder.
DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "default_model" / "segmenter.safetensors"
DEFAULT_MODEL_NOTICE = (
    "no --model: using the default model, trained on 751 public images of nuclei and of one cell type in phase "
    "contrast. Check its overlays (--save-viz) before you rely on it, and fine-tune it on your own images"
)
