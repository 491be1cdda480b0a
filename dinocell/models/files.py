"""Bytes on disk -> named tensors, without ever running what a file says.

PyTorch files are read with ``weights_only=True``, everything else as safetensors; the first bytes decide, not the
suffix.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dinocell.errors import WeightsError

METADATA_KEY = "dinocell"
"""Where our own files keep their card and configuration."""

_CONTAINERS = ("teacher", "model_ema", "ema", "student", "model", "state_dict", "module")


class RawWeights(NamedTuple):
    """The tensors of a checkpoint under the names that the file uses, and what came with them.

    ``container`` says which entry of a training checkpoint was taken (``teacher``, ...), if any; ``metadata`` is our
    own block, ``hub_config`` the ``config.json`` of a Hugging Face folder.
    """

    tensors: dict[str, Tensor]
    container: str | None
    metadata: Mapping[str, Any] | None
    hub_config: Mapping[str, Any] | None


def read_raw(path: Path) -> RawWeights:
    """Read a file or a Hugging Face folder.

    Raises
    ------
    WeightsError
        If it cannot be read completely and safely; one line that names the file.
    """
    if path.is_dir():
        return _read_folder(path)
    tensors, container, metadata = _read_file(path)
    return RawWeights(tensors, container, metadata, None)


def _read_folder(folder: Path) -> RawWeights:
    config = _read_json(folder / "config.json")
    if "model_type" not in config:
        raise WeightsError(f"{folder / 'config.json'}: no 'model_type'; expected a Hugging Face model configuration")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            shards = _read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise WeightsError(f"{folder / index}: no 'weight_map' of tensor names to files")
            names = sorted(set(shards.values()))
            break
    else:
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()][:1]
    if not names:
        raise WeightsError(f"{folder}: holds a config.json but no model.safetensors or pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"{folder}: the index names {name!r}, which is outside the folder")
        if not (folder / name).exists():
            raise WeightsError(f"{folder / name}: missing, but the index of the folder names it; download it again")
        tensors.update(_read_file(folder / name)[0])
    return RawWeights(tensors, None, None, config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_file(path: Path) -> tuple[dict[str, Tensor], str | None, Mapping[str, Any] | None]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not start:
        raise WeightsError(f"{path}: the file is empty")
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _unwrap(path, _read_torch(path, zipped=start[:2] == b"PK"))
    if start[8:9] == b"{":
        tensors, metadata = _read_safetensors(path)
        return *_own_part(tensors, None), metadata
    raise WeightsError(f"{path}: neither a PyTorch nor a safetensors file (it starts with {start[:4]!r})")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    # Whatever a parser of damaged bytes raises means the same here: the file cannot be trusted.
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            return tensors, None if metadata is None else json.loads(metadata)
    except Exception as error:
        raise WeightsError(f"{path}: damaged safetensors file ({_one_line(error)})") from error


def _read_torch(path: Path, *, zipped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # see _read_safetensors
        text = str(error)
        if match := re.search(r"(?:Unsupported (?:global|class|operand)[^:]*: |GLOBAL )(?:GLOBAL )?([\w.]+)", text):
            raise WeightsError(
                f"{path}: refused, because it holds more than tensors ({match[1]}) and loading that could run code; "
                "ask its author for a file of tensors only"
            ) from error
        raise WeightsError(f"{path}: damaged or incomplete PyTorch file ({_one_line(error)})") from error


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Tensor], str | None, Mapping[str, Any] | None]:
    """Take the model out of a training checkpoint: the teacher where there is one."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    metadata = content.get(METADATA_KEY)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise WeightsError(f"{path}: its {METADATA_KEY!r} entry should be a dictionary, got {type(metadata).__name__}")
    container = None
    while inner := next((n for n in _CONTAINERS if isinstance(content.get(n), Mapping)), None):
        content, container = content[inner], container or inner
    tensors = dict(_flatten(path, {k: v for k, v in content.items() if k != METADATA_KEY}))
    return *_own_part(tensors, container), metadata


def _own_part(tensors: dict[str, Tensor], container: str | None) -> tuple[dict[str, Tensor], str | None]:
    """Take the teacher (else the student) out of a flat dictionary that holds both."""
    for name in ("teacher", "student"):
        own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
        if own:
            return own, container or name
    return tensors, container


def _flatten(path: Path, tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    flat: list[tuple[str, Tensor]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            flat.append((name, value))
        elif isinstance(value, Mapping):
            flat.extend(_flatten(path, value, f"{name}."))
        else:
            raise WeightsError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
    return flat


def _one_line(error: BaseException) -> str:
    """Return the first sentence of a library's error, without paths into that library."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:160]
