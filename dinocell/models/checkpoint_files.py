"""Bytes on disk -> named tensors, without ever running what a file says.

PyTorch files are read with ``weights_only=True``, everything else as safetensors; the first bytes decide, not the
suffix.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dinocell.errors import WeightsError

METADATA_KEY = "dinocell"
"""Where our own files keep their card and configuration."""

_MAX_DEPTH = 16  # of nested dictionaries and lists; real files have 3
_MAX_ENTRIES = 1_000_000  # of one tree, shared branches counted as often as they are referred to
_MAX_JSON_BYTES = 64 << 20
_MAX_NAME = 300
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_CONTAINERS = ("teacher", "model_ema", "ema", "student", "model", "state_dict", "module")
_BESIDE_A_MODEL = (
    *("teacher", "student", "gram_teacher", "model_ema", "optimizer"),
    *("dino_loss", "ibot_patch_loss", "koleo_loss"),
)


class RawWeights(NamedTuple):
    """The tensors of a checkpoint under the names that the file uses, and what came with them.

    ``container`` says which entry of a training checkpoint was taken (``teacher``, ...), if any; ``metadata`` is our
    own block, ``sidecar`` the same from ``<file>.card.json`` beside a file that cannot hold it, ``hub_config`` the
    ``config.json`` of a Hugging Face folder.
    """

    tensors: dict[str, Tensor]
    container: str | None = None
    metadata: Mapping[str, Any] | None = None
    hub_config: Mapping[str, Any] | None = None
    sidecar: Mapping[str, Any] | None = None


def sidecar_path(path: Path) -> Path:
    """Return where the card of a bare state dict lies."""
    return path.with_name(path.name + ".card.json")


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
    beside = sidecar_path(path)
    sidecar = _checked_metadata(beside, _read_json(beside)) if metadata is None and beside.exists() else None
    return RawWeights(tensors, container, metadata, sidecar=sidecar)


def _read_folder(folder: Path) -> RawWeights:
    config = _read_json(folder / "config.json")
    if "model_type" not in config:
        raise WeightsError(f"{folder / 'config.json'}: no 'model_type'; expected a Hugging Face model configuration")
    names = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    metadata = None
    for name in names:
        if Path(name).name != name or name == ".." or not name.isprintable() or len(name) > _MAX_NAME:
            raise WeightsError(f"{folder}: the index names {name[:_MAX_NAME]!r}, which is outside the folder")
        if not (folder / name).exists():
            raise WeightsError(f"{folder / name}: missing, but the index of the folder names it; download it again")
        shard, _, own = _read_file(folder / name)
        if twice := next((tensor for tensor in shard if tensor in tensors), None):
            raise WeightsError(
                f"{folder / name}: holds {twice!r}, and so does another shard; download the folder again"
            )
        tensors.update(shard)
        metadata = metadata or own
    return RawWeights(tensors, metadata=metadata, hub_config=config)


def _weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weights, in transformers' order: the whole file first, which may be newer."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).exists():
            return [whole]
        index = folder / f"{whole}.index.json"
        if index.exists():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise WeightsError(f"{index}: no 'weight_map' of tensor names to files")
            if shards:
                return sorted(set(shards.values()))
    raise WeightsError(f"{folder}: holds a config.json but no model.safetensors or pytorch_model.bin")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        content = json.loads(path.read_text(encoding="utf-8")) if size <= _MAX_JSON_BYTES else None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON ({_one_line(error)})") from error
    if size > _MAX_JSON_BYTES:
        raise WeightsError(f"{path}: expected at most {_MAX_JSON_BYTES} bytes of JSON, got {size}")
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    _check_tree(path, content)
    return content


def _read_file(path: Path) -> tuple[dict[str, Tensor], str | None, Mapping[str, Any] | None]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not start:
        raise WeightsError(f"{path}: the file is empty")
    # One in 32 safetensors files begins like a pickle: with the length of a header of 128, 384, ... bytes. A pickle's
    # first eight bytes are no such length.
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and not is_safetensors):
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
            text = (file.metadata() or {}).get(METADATA_KEY)
            metadata = None if text is None else json.loads(text)
    except Exception as error:
        raise WeightsError(f"{path}: damaged safetensors file ({_one_line(error)})") from error
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    return tensors, None if text is None else _checked_metadata(path, metadata)


def _read_torch(path: Path, *, zipped: bool) -> Any:
    try:
        if zipped:
            _check_not_compressed(path)
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
    _check_tree(path, content)
    metadata = _checked_metadata(path, content[METADATA_KEY]) if METADATA_KEY in content else None
    container = None
    while inner := next((n for n in _CONTAINERS if isinstance(content.get(n), Mapping)), None):
        content, container = content[inner], container or inner
    flat = _flatten(path, {k: v for k, v in content.items() if k != METADATA_KEY})
    tensors = dict(flat)
    if len(tensors) != len(flat):
        raise WeightsError(f"{path}: two tensors have the same name; expected one model in a file")
    return *_own_part(tensors, container), metadata


def _own_part(tensors: dict[str, Tensor], container: str | None) -> tuple[dict[str, Tensor], str | None]:
    """Take the teacher (else the student) out of a flat dictionary that holds both."""
    for name in ("teacher", "student"):
        own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
        if own:
            # What else training writes beside a model is left alone; a stray name is kept, and refused as unexpected.
            own |= {key: t for key, t in tensors.items() if key.split(".", 1)[0] not in (name, *_BESIDE_A_MODEL)}
            return own, container or name
    return tensors, container


def _flatten(path: Path, tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    flat: list[tuple[str, Tensor]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            _check_tensor(path, name, value)
            flat.append((name, value.detach()))
        elif isinstance(value, Mapping):
            flat.extend(_flatten(path, value, f"{name}."))
        else:
            raise WeightsError(f"{path}: entry {name[:_MAX_NAME]!r} is a {type(value).__name__}, expected a tensor")
    return flat


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse what is not a plain array of numbers that the file really holds, before anybody computes with it."""
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise WeightsError(f"{path}: damaged, a tensor is called {name[:40]!r}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
        raise WeightsError(
            f"{path}: {name}: expected a plain dense tensor, got a sparse, nested, quantised or empty one"
        )
    if tensor.dtype not in (*_FLOATS, *_INTEGERS):
        raise WeightsError(f"{path}: {name}: expected floating-point numbers of 16 to 64 bits, got {tensor.dtype}")
    # A stride of 0 lets a few bytes pose as terabytes.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise WeightsError(f"{path}: {name}: shape {tuple(tensor.shape)} needs more numbers than the file holds")


def _check_not_compressed(path: Path) -> None:
    """Refuse an archive that would grow on reading; PyTorch stores its entries as they are."""
    with zipfile.ZipFile(path) as archive:
        grown = sum(entry.file_size for entry in archive.infolist())
    if grown > path.stat().st_size:
        raise ValueError(f"its entries claim {grown} bytes, the file has {path.stat().st_size}")


def _checked_metadata(path: Path, metadata: Any) -> Mapping[str, Any]:
    """Return our own block if it is plain data: text, finite numbers of usual size, lists, dictionaries."""
    if not isinstance(metadata, Mapping):
        raise WeightsError(f"{path}: its {METADATA_KEY!r} entry should be a dictionary, got {type(metadata).__name__}")
    for leaf in _check_tree(path, metadata):
        is_number = type(leaf) in (int, float)
        if is_number and not abs(leaf) < 1e9:
            raise WeightsError(f"{path}: its {METADATA_KEY!r} entry is damaged: a number is infinite or absurdly large")
        if not is_number and type(leaf) not in (str, bool, type(None)):
            raise WeightsError(f"{path}: its {METADATA_KEY!r} entry is damaged: holds a {type(leaf).__name__}")
    return metadata


def _check_tree(path: Path, root: Any) -> list[Any]:
    """Return the leaves of nested dictionaries and lists; refuse trees that are too deep (or cyclic) or too large."""
    leaves: list[Any] = []
    level, seen = [root], 0
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for node in level:
            children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else None
            if children is None:
                leaves.append(node)
                continue
            seen += len(children)
            if seen > _MAX_ENTRIES:
                raise WeightsError(f"{path}: damaged, it claims more than {_MAX_ENTRIES} entries")
            inner.extend(children)
        level = inner
        if not level:
            return leaves
    raise WeightsError(f"{path}: damaged, its dictionaries are nested more than {_MAX_DEPTH} deep")


def _one_line(error: BaseException) -> str:
    """Return the first sentence of a library's error, without paths into that library."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:160]
