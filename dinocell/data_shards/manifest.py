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
from jaxtyping import Shaped, UInt64

from dinocell.errors import ImageError, ShardError
from dinocell.images.storage import local_path, open_bytes

# --- statistics ----------------------------------------------------------------------------------------------------
#
# Intensity statistics of a channel over a whole data set, from histograms that add up, shard by shard.
#
# A value's bin is the upper half of its float32 bits: sign, exponent and 7 bits of the mantissa, so that a bin is at
# most
# 1/128 of its value wide, in whatever type and range the data come. Whole numbers up to 256 have bins of their own.

PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)
_NUM_BINS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """What is known of a channel's values over all kept tiles.

    Attributes
    ----------
    percentiles
        Value by percentile (``PERCENTILES``), to 1/128 of itself; minimum, maximum, mean and deviation are exact.
    """

    num_tiles: int
    num_pixels: int
    minimum: float
    maximum: float
    mean: float
    std: float
    percentiles: dict[str, float]


class Histogram:
    """Counts, sums and extremes of one channel's values."""

    def __init__(self) -> None:
        self.num_tiles = self.num_pixels = 0
        self.minimum, self.maximum = float("inf"), float("-inf")
        self.sum = self.sum_of_squares = 0.0
        self.counts = np.zeros(_NUM_BINS, np.int64)

    def add(self, plane: Shaped[np.ndarray, "h w"]) -> None:
        """Count a tile's values."""
        if plane.dtype in (np.uint8, np.uint16):
            levels = np.bincount(plane.ravel())
            values = np.arange(len(levels), dtype=np.float64)
            present = np.flatnonzero(levels)
            self.minimum = min(self.minimum, float(present[0]))
            self.maximum = max(self.maximum, float(present[-1]))
            self.sum += float(values @ levels)
            self.sum_of_squares += float(values**2 @ levels)
            self.counts += np.bincount(_bins(values), weights=levels, minlength=_NUM_BINS).astype(np.int64)
        else:
            values = plane.astype(np.float64).ravel()
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))
            self.sum += float(values.sum())
            self.sum_of_squares += float(values @ values)
            self.counts += np.bincount(_bins(values), minlength=_NUM_BINS)
        self.num_tiles += 1
        self.num_pixels += plane.size

    def merge(self, other: "Histogram") -> None:
        """Add another's counts."""
        self.num_tiles += other.num_tiles
        self.num_pixels += other.num_pixels
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.sum += other.sum
        self.sum_of_squares += other.sum_of_squares
        self.counts += other.counts

    def to_json(self) -> dict[str, Any]:
        """Return numbers that ``from_json`` takes; empty bins are left out."""
        bins = np.flatnonzero(self.counts)
        return {
            "num_tiles": self.num_tiles,
            "num_pixels": self.num_pixels,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "sum": self.sum,
            "sum_of_squares": self.sum_of_squares,
            "bins": bins.tolist(),
            "counts": self.counts[bins].tolist(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Histogram":
        """Return what ``to_json`` wrote."""
        histogram = cls()
        for name in ("num_tiles", "num_pixels", "minimum", "maximum", "sum", "sum_of_squares"):
            setattr(histogram, name, content[name])
        histogram.counts[content["bins"]] = content["counts"]
        return histogram

    def statistics(self) -> ChannelStatistics:
        """Return what is to be known; there must be a value."""
        mean = self.sum / self.num_pixels
        variance = max(0.0, self.sum_of_squares / self.num_pixels - mean**2)
        return ChannelStatistics(
            num_tiles=self.num_tiles,
            num_pixels=self.num_pixels,
            minimum=self.minimum,
            maximum=self.maximum,
            mean=mean,
            std=variance**0.5,
            percentiles={f"{percent:g}": self._percentile(percent) for percent in PERCENTILES},
        )

    def _percentile(self, percent: float) -> float:
        order = np.argsort(_BIN_VALUES, kind="stable")
        reached = np.cumsum(self.counts[order])
        rank = percent / 100 * (self.num_pixels - 1)
        value = float(_BIN_VALUES[order[int(np.searchsorted(reached, rank, side="right"))]])
        return min(max(value, self.minimum), self.maximum)


def _bins(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)


# The value in the middle of each bin; of whole numbers up to 256, which fill only the lower end, the lower end.
_LOWER = (np.arange(_NUM_BINS, dtype=np.uint32) << 16).view(np.float32)
_UPPER = ((np.arange(_NUM_BINS, dtype=np.uint32) << 16) | 0xFFFF).view(np.float32)
with np.errstate(all="ignore"):
    _BIN_VALUES = np.nan_to_num(
        np.where(np.abs(_LOWER) <= 256, _LOWER, _LOWER / 2 + _UPPER / 2).astype(np.float64), nan=np.inf
    )


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
    path = file_address(location, MANIFEST)
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
        content["channels"] = {name: _statistics_from(known) for name, known in content["channels"].items()}
        manifest = Manifest(**content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ShardError(f"{path}: damaged ({type(error).__name__}: {error}); build the set again") from error
    if manifest.num_samples == 0 and not manifest.shards:
        raise ShardError(f"{location}: the set is empty, {REJECTED} says why; build it again from other images")
    if manifest.num_samples != sum(shard.num_samples for shard in manifest.shards) or manifest.num_samples < 1:
        raise ShardError(f"{path}: damaged (the shards do not add up to {manifest.num_samples} samples)")
    return manifest


def _statistics_from(content: dict[str, Any]) -> ChannelStatistics:
    return ChannelStatistics(**{"std" if key == "deviation" else key: value for key, value in content.items()})


def check_files(location: str | Path, manifest: Manifest) -> None:
    """Check that the shards of a set on this disk are there, in their full length.

    Raises
    ------
    ShardError
        If they are not; the message names the first of them.
    """
    wrong = []
    for shard in manifest.shards:
        path = local_path(file_address(location, shard.file))
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

    path = file_address(location, INDEX)
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


def file_address(location: str | Path, name: str) -> str:
    """Return the path or address of a file of the set; what a web address has after ``?`` goes to its end."""
    text = str(location)
    folder, mark, query = text.partition("?") if text.startswith(("http://", "https://")) else (text, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"
