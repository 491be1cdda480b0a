"""The manifest of a shard set: what is in it, without opening a shard.

A set is a folder, on this disk, in a bucket or behind a web address::

    manifest.json       below
    index.npy           (samples, 2) uint64: first byte and number of bytes of each sample in its shard, shard by shard
    rejected.jsonl      one line an input or tile that gave no sample, with the reason
    shard-000000.tar    samples (sample.py)
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dinocell.data_shards.locations import local_path, open_bytes
from dinocell.data_shards.statistics import ChannelStatistics
from dinocell.errors import ImageError, ShardError

FORMAT_NAME = "dinocell shards"
FORMAT_VERSION = 1
MANIFEST, INDEX, REJECTED = "manifest.json", "index.npy", "rejected.jsonl"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a set."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        # Copies of remote shards are written under these names: a foreign manifest must not choose where.
        if not re.fullmatch(r"\w[\w.-]*\.tar", self.file) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"expected the name of a .tar file and a sha256, got {self.file!r} and {self.sha256!r}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in a shard set.

    Attributes
    ----------
    channels
        Intensity statistics by channel name, in the order in which the source names them.
    shapes
        Number of samples by shape and type, such as ``5 x 512 x 512 uint16``.
    rejected
        Number of inputs and tiles without a sample, by kind of reason; each is listed in ``rejected.jsonl``.
    settings
        The source and the settings that the set was built with.
    """

    num_samples: int
    num_fields: int
    shards: tuple[Shard, ...]
    channels: Mapping[str, ChannelStatistics]
    shapes: Mapping[str, int]
    rejected: Mapping[str, int]
    settings: Mapping[str, Any]
    index_sha256: str
    written_by: str

    @property
    def num_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> str:
        """Return the content of ``manifest.json``."""
        content = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(location: str | Path) -> Manifest:
    """Read the manifest of the set at a folder or address.

    Raises
    ------
    ShardError
        If there is none, or it is damaged or of another version.
    """
    path = beside(location, MANIFEST)
    folder = local_path(location)
    if folder is not None and not (folder / MANIFEST).exists():
        unfinished = (folder / ".build").exists()
        if unfinished:
            raise ShardError(f"{location}: the build is unfinished; run it again, or 'shards merge' (no {MANIFEST})")
        raise ShardError(f"{location}: no shard set (no {MANIFEST}); 'dinocell shards build' makes one")
    try:
        content = json.loads(open_bytes(path))
    except (ImageError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read ({error}); build the set again") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT_NAME:
        raise ShardError(f"{path}: not the manifest of a DINOCell shard set")
    version = content.pop("version", None)
    if version != FORMAT_VERSION:
        raise ShardError(f"{path}: version {version}, this DINOCell reads {FORMAT_VERSION}; build the set again")
    try:
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        content["channels"] = {name: ChannelStatistics(**known) for name, known in content["channels"].items()}
        manifest = Manifest(**content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ShardError(f"{path}: damaged ({type(error).__name__}: {error}); build the set again") from error
    if manifest.num_samples == 0 and not manifest.shards:
        raise ShardError(f"{location}: the set is empty, {REJECTED} says why; build it again from other images")
    if manifest.num_samples != sum(shard.num_samples for shard in manifest.shards) or manifest.num_samples < 1:
        raise ShardError(f"{path}: damaged (the shards do not add up to {manifest.num_samples} samples)")
    return manifest


def check_files(location: str | Path, manifest: Manifest) -> None:
    """Check that the shards of a set on this disk are there, in their full length.

    Raises
    ------
    ShardError
        If they are not; the message names the first of them.
    """
    wrong = []
    for shard in manifest.shards:
        path = local_path(beside(location, shard.file))
        assert path is not None
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            wrong.append(f"{shard.file} is missing")
        else:
            if size != shard.num_bytes:
                wrong.append(f"{shard.file} has {size} bytes instead of {shard.num_bytes}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ShardError(f"{location}: {'; '.join(wrong[:3])}{more}; copy or build the set again")


def read_index(location: str | Path, manifest: Manifest) -> UInt64[np.ndarray, "samples 2"]:
    """Return first byte and number of bytes of every sample; memory-mapped where the set lies on this disk.

    Raises
    ------
    ShardError
        If it is missing, damaged, or does not fit the manifest.
    """
    import io

    path = beside(location, INDEX)
    local = local_path(path)
    try:
        if local is not None:
            index: np.ndarray = np.load(local, mmap_mode="r", allow_pickle=False)
        else:
            index = np.load(io.BytesIO(open_bytes(path)), allow_pickle=False)
    except (ImageError, OSError, ValueError, EOFError) as error:
        raise ShardError(f"{path}: cannot be read ({' '.join(str(error).split())}); build the set again") from error
    if index.shape != (manifest.num_samples, 2) or index.dtype != np.uint64:
        raise ShardError(
            f"{path}: expected uint64 of ({manifest.num_samples}, 2), got {index.dtype} of {index.shape}; "
            "manifest and index are not of one build"
        )
    return index


def beside(location: str | Path, name: str) -> str:
    """Return the path or address of a file of the set; what a web address has after ``?`` goes to its end."""
    text = str(location)
    folder, mark, query = text.partition("?") if text.startswith(("http://", "https://")) else (text, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"
