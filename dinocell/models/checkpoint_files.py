"""Read the named tensors of a checkpoint file, without ever running code from it.

PyTorch files are read with ``weights_only=True``, all others as safetensors; the first bytes decide, not the suffix.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dinocell.errors import WeightsError, one_line
from dinocell.models.locate import naming, require

METADATA_KEY = "dinocell"
"""Entry of our own files with their card and configuration."""

_MAX_DEPTH = 16  # of nested dictionaries and lists; released files have 3
_MAX_ENTRIES = 1_000_000  # of one tree; shared branches count once per reference
_MAX_JSON_BYTES = 64 << 20
_MAX_NAME = 300
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)

_CONTAINERS = ("teacher", "model_ema", "ema", "student", "model", "state_dict", "module")
_BESIDE_A_MODEL = (
    *("teacher", "student", "gram_teacher", "model_ema", "optimizer"),
    *("dino_loss", "ibot_patch_loss", "koleo_loss"),
)


class RawWeights(NamedTuple):
    """The tensors of a checkpoint under the names in the file, and its descriptions.

    ``container`` is the entry of a training checkpoint that was used (``teacher``, ...), if any; ``metadata`` is our
    entry, ``sidecar`` the same from ``<file>.card.json`` next to a file that cannot hold it, ``hub_config`` the
    ``config.json`` of a Hugging Face folder.
    """

    tensors: dict[str, Tensor]
    container: str | None = None
    metadata: Mapping[str, Any] | None = None
    hub_config: Mapping[str, Any] | None = None
    sidecar: Mapping[str, Any] | None = None


def sidecar_path(path: Path) -> Path:
    """Return the path of the card of a bare state dict."""
    return path.with_name(path.name + ".card.json")


def read_raw(path: Path) -> RawWeights:
    """Read a file or a Hugging Face folder, completely and without running code from it.

    Errors are a :class:`WeightsError` of one line that names the file.
    """
    if path.is_dir():
        return _read_folder(path)
    tensors, container, metadata = _read_file(path)
    card = sidecar_path(path)
    if metadata is not None or not card.exists():
        return RawWeights(tensors, container, metadata)
    sidecar = _read_json(card)
    with naming(card):
        return RawWeights(tensors, container, sidecar=_checked_metadata(sidecar))


def _read_folder(folder: Path) -> RawWeights:
    tensors: dict[str, Tensor] = {}
    metadata = None
    with naming(folder):
        config = _read_json(folder / "config.json")
        require("model_type" in config, "config.json: no 'model_type'; expected a Hugging Face model configuration")
        names = _weight_files(folder)
    for name in names:
        shard, _, own = _read_file(folder / name)
        with naming(folder / name):
            require(not tensors.keys() & shard, "holds a tensor of another shard; download the folder again")
        tensors.update(shard)
        metadata = metadata or own
    return RawWeights(tensors, metadata=metadata, hub_config=config)


def _weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weights, in transformers' order: the single file first, which may be newer."""
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (folder / name).exists():
            return [name]
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = _as_mapping(_read_json(index).get("weight_map"), f"weight_map in {index.name}").values()
            require(all(isinstance(shard, str) for shard in shards), f"{index.name}: no 'weight_map' to file names")
            for shard in shards:
                is_inside = Path(shard).name == shard != ".." and shard.isprintable() and len(shard) <= _MAX_NAME
                require(is_inside, f"the index names {shard[:_MAX_NAME]!r}, which is outside the folder")
                require((folder / shard).exists(), f"{shard}: missing, but in the index; download it again")
            if shards:
                return sorted(set(shards))
    raise WeightsError(f"holds a config.json but no {' or '.join(names)}")


def _read_json(path: Path) -> Mapping[str, Any]:
    with naming(path):
        require(path.stat().st_size <= _MAX_JSON_BYTES, f"expected at most {_MAX_JSON_BYTES} bytes of JSON")
        with _parsing("not valid JSON"):
            content = json.loads(path.read_bytes())
        _leaves(content)
        return _as_mapping(content, "its JSON")


@contextmanager
def _parsing(problem: str) -> Iterator[None]:
    """Report what a parser of damaged bytes raises, which can be anything."""
    try:
        yield
    except Exception as error:
        raise WeightsError(f"{problem} ({one_line(error)})") from error


def _as_mapping(content: Any, name: str) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name} should be a dictionary, got {type(content).__name__}")
    return content


def _read_file(path: Path) -> tuple[dict[str, Tensor], str | None, Mapping[str, Any] | None]:
    with naming(path):
        with path.open("rb") as file:
            start = file.read(9)
        require(bool(start), "the file is empty")
        # One in 32 safetensors files begins like a pickle: with a header length of 128, 384, ... bytes. The first eight
        # bytes of a pickle are no such length.
        is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
        is_zip = start[:4] == b"PK\x03\x04"
        if is_zip or (start[:1] == b"\x80" and not is_safetensors):
            return _unwrap(_read_torch(path, is_zip=is_zip))
        require(start[8:9] == b"{", f"neither a PyTorch nor a safetensors file (it starts with {start[:4]!r})")
        tensors, metadata = _read_safetensors(path)
        return *_own_part(tensors, None), metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    with _parsing("damaged safetensors file"), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        text = (file.metadata() or {}).get(METADATA_KEY)
        metadata = None if text is None else json.loads(text)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    return tensors, None if text is None else _checked_metadata(metadata)


def _read_torch(path: Path, *, is_zip: bool) -> Any:
    try:
        if is_zip:
            # PyTorch stores entries uncompressed; a compressed archive could grow without limit.
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            require(unpacked <= path.stat().st_size, f"its entries claim {unpacked} bytes")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # see _parsing
        code = re.search(r"(?:Unsupported (?:global|class|operand)[^:]*: |GLOBAL )(?:GLOBAL )?([\w.]+)", str(error))
        raise WeightsError(
            f"refused, because it holds more than tensors ({code[1]}) and loading that could run code; "
            "ask its author for a file of tensors only"
            if code
            else f"damaged or incomplete PyTorch file ({one_line(error)})"
        ) from error


def _unwrap(content: Any) -> tuple[dict[str, Tensor], str | None, Mapping[str, Any] | None]:
    """Extract the model from a training checkpoint: the teacher if there is one."""
    content = _as_mapping(content, "its content")
    _leaves(content)
    metadata = _checked_metadata(content[METADATA_KEY]) if METADATA_KEY in content else None
    container = None
    while inner := next((n for n in _CONTAINERS if isinstance(content.get(n), Mapping)), None):
        content, container = content[inner], container or inner
    flat = _flatten({k: v for k, v in content.items() if k != METADATA_KEY})
    tensors = dict(flat)
    require(len(tensors) == len(flat), "two tensors have the same name; expected one model per file")
    return *_own_part(tensors, container), metadata


def _own_part(tensors: dict[str, Tensor], container: str | None) -> tuple[dict[str, Tensor], str | None]:
    """Select the teacher (else the student) in a flat dictionary that holds both."""
    for name in ("teacher", "student"):
        own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
        if own:
            # Other parts of a training checkpoint are dropped; unknown names are kept, and refused later.
            own |= {key: t for key, t in tensors.items() if key.split(".", 1)[0] not in (name, *_BESIDE_A_MODEL)}
            return own, container or name
    return tensors, container


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    flat: list[tuple[str, Tensor]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.extend(_flatten(value, f"{name}."))
            continue
        kind = type(value).__name__
        require(isinstance(value, Tensor), f"entry {name[:_MAX_NAME]!r} is a {kind}, expected a tensor")
        _check_tensor(name, value)
        flat.append((name, value.detach()))
    return flat


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Require a plain array of numbers that are all in the file."""
    require(name.isprintable() and len(name) <= _MAX_NAME, f"damaged, a tensor is called {name[:40]!r}")
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    require(is_dense and tensor.device.type == "cpu", f"{name}: expected a dense tensor, got a sparse or quantised one")
    require(tensor.dtype in _DTYPES, f"{name}: expected numbers of 16 to 64 bits, got {tensor.dtype}")
    # With strides of 0 a few bytes can claim to be terabytes.
    is_in_file = tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    require(is_in_file, f"{name}: shape {tuple(tensor.shape)} needs more numbers than the file holds")


def _checked_metadata(metadata: Any) -> Mapping[str, Any]:
    """Return our own entry if it is plain data: text, finite numbers of usual size, lists, dictionaries."""
    entry = f"its {METADATA_KEY!r} entry"
    for leaf in _leaves(metadata):
        is_valid = abs(leaf) < 1e9 if type(leaf) in (int, float) else type(leaf) in (str, bool, type(None))
        require(is_valid, f"{entry} is damaged: it holds a {type(leaf).__name__} of unusual size or kind")
    return _as_mapping(metadata, entry)


def _leaves(root: Any) -> list[Any]:
    """Return the leaves of nested dictionaries and lists, which must not be too deep (or cyclic) or too large."""
    leaves: list[Any] = []
    level, num_entries, depth = [root], 0, 0
    while level:
        require(depth < _MAX_DEPTH, f"damaged, its dictionaries are nested more than {_MAX_DEPTH} deep")
        inner: list[Any] = []
        for node in level:
            children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else None
            if children is None:
                leaves.append(node)
                continue
            num_entries += len(children)
            require(num_entries <= _MAX_ENTRIES, f"damaged, it claims more than {_MAX_ENTRIES} entries")
            inner.extend(children)
        level, depth = inner, depth + 1
    return leaves
