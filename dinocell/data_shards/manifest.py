"""The manifest of a shard set: its content, without opening a shard.

A set is a folder, on a local disk, in a bucket or on a web server::

    manifest.json       see below
    index.npy           (samples, 2) uint64: first byte and size of each sample in its shard, shard by shard
    rejected.jsonl      one line per input or tile that gave no sample, with the reason
    shard-000000.tar    samples (sample.py)
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt64

from dinocell.errors import ImageError, ShardError, one_line
from dinocell.images.storage import local_path, open_bytes

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


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Intensity statistics of a channel over all kept tiles.

    Attributes
    ----------
    percentiles
        Value by percentile (``PERCENTILES``), accurate to 1/128 of itself; the other statistics are exact.
    """

    num_tiles: int
    num_pixels: int
    minimum: float
    maximum: float
    mean: float
    std: float
    percentiles: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a shard set.

    Attributes
    ----------
    channels
        Intensity statistics by channel name, in the order of the source.
    shapes
        Number of samples by shape and type, such as ``5 x 512 x 512 uint16``.
    rejected
        Number of inputs and tiles without a sample, by kind of reason; each is listed in ``rejected.jsonl``.
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

    Raise ShardError if there is none, or it is damaged or of another version.
    """
    path = file_address(location, MANIFEST)
    folder = local_path(location)
    if folder is not None and not (folder / MANIFEST).exists():
        raise ShardError(
            f"{location}: the build is unfinished (no {MANIFEST}); run it again, or 'dinocell shards merge'"
            if (folder / ".build").exists()
            else f"{location}: no shard set (no {MANIFEST}); 'dinocell shards build' makes one"
        )
    try:
        content = json.loads(open_bytes(path))
        found = content.pop("format"), content.pop("version")
        problem = f"{found[0]!r} version {found[1]}, this DINOCell reads {FORMAT_NAME!r} version {FORMAT_VERSION}"
        if found == (FORMAT_NAME, FORMAT_VERSION):
            manifest = _parse_manifest(content)
            problem = _problem_of(manifest)
            if not problem:
                return manifest
    except (ImageError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"cannot be read, or damaged ({type(error).__name__}: {error})"
    raise ShardError(f"{path}: {problem}; build the set again")


def _parse_manifest(content: dict[str, Any]) -> Manifest:
    content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
    for name, statistics in content["channels"].items():
        if "deviation" in statistics:  # the name in version 0.1
            statistics["std"] = statistics.pop("deviation")
        content["channels"][name] = ChannelStatistics(**statistics)
    return Manifest(**content)


def _problem_of(manifest: Manifest) -> str:
    for shard in manifest.shards:
        # Copies of remote shards are written under these names: a manifest must not choose another folder.
        if not re.fullmatch(r"\w[\w.-]*\.tar", shard.file) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            return f"damaged: expected the name of a .tar file and a sha256, got {shard.file!r} and {shard.sha256!r}"
    if not manifest.shards:
        return f"the set is empty, {REJECTED} lists the reasons"
    num_samples = sum(shard.num_samples for shard in manifest.shards)
    if manifest.num_samples != num_samples or num_samples < 1:
        return f"damaged: num_samples is {manifest.num_samples}, the shards have {num_samples}"
    return ""


def check_files(location: str | Path, manifest: Manifest) -> None:
    """Check that the shards of a local set exist and are complete; raise ShardError with the first that are not."""
    problems = []
    for shard in manifest.shards:
        path = local_path(file_address(location, shard.file))
        assert path is not None
        if not path.exists():
            problems.append(f"{shard.file} is missing")
        elif (size := path.stat().st_size) != shard.num_bytes:
            problems.append(f"{shard.file} has {size} bytes instead of {shard.num_bytes}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ShardError(f"{location}: {'; '.join(problems[:3])}{more}; copy the set again, or remove and build it")


def read_index(location: str | Path, manifest: Manifest) -> UInt64[np.ndarray, "samples 2"]:
    """Return first byte and size of every sample; memory-mapped if the set is local.

    Raise ShardError if it is missing, damaged, or does not fit the manifest.
    """
    path = file_address(location, INDEX)
    local = local_path(path)
    try:
        index: UInt64[np.ndarray, "samples 2"] = (
            np.load(io.BytesIO(open_bytes(path)), allow_pickle=False)
            if local is None
            else np.load(local, mmap_mode="r", allow_pickle=False)
        )
        problem = f"expected uint64 of ({manifest.num_samples}, 2), got {index.dtype} of {index.shape}"
        if index.shape == (manifest.num_samples, 2) and index.dtype == np.uint64:
            return index
    except (ImageError, OSError, ValueError, EOFError) as error:
        problem = one_line(error)
    raise ShardError(f"{path}: cannot be read, or not of this manifest ({problem}); build the set again")


def file_address(location: str | Path, name: str) -> str:
    """Return the path or address of a file of the set; the query of a web address is kept at the end."""
    text = str(location)
    folder, mark, query = text.partition("?") if text.startswith(("http://", "https://")) else (text, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


# Intensity statistics of a channel over a whole data set, from histograms that are summed over shards.
#
# A value's bin is the upper half of its float32 bits: sign, exponent and 7 bits of the mantissa. So a bin is at most
# 1/128 of its value wide, for data of any type and range, and integers up to 256 have bins of their own.

PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)
_NUM_BINS = 1 << 16
# Attributes that are saved; all but the extremes are sums.
_SUMS, _EXTREMES = ("num_tiles", "num_pixels", "sum", "sum_of_squares"), ("minimum", "maximum")


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
            # Few distinct values: count each, then sum over the values instead of the pixels.
            weights = np.bincount(plane.ravel())
            values = np.arange(len(weights), dtype=np.float64)
            present = np.flatnonzero(weights)
            low, high = present[0], present[-1]
            self.sum += float(values @ weights)
            self.sum_of_squares += float(values**2 @ weights)
            self.counts += np.bincount(_bins(values), weights=weights, minlength=_NUM_BINS).astype(np.int64)
        else:
            values = plane.astype(np.float64).ravel()
            low, high = values.min(), values.max()
            self.sum += float(values.sum())
            self.sum_of_squares += float(values @ values)
            self.counts += np.bincount(_bins(values), minlength=_NUM_BINS)
        self.minimum, self.maximum = min(self.minimum, float(low)), max(self.maximum, float(high))
        self.num_tiles += 1
        self.num_pixels += plane.size

    def merge(self, other: "Histogram") -> None:
        """Add another histogram."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.counts += other.counts

    def to_json(self) -> dict[str, Any]:
        """Return numbers for ``from_json``, without empty bins."""
        bins = np.flatnonzero(self.counts)
        content = {name: getattr(self, name) for name in (*_SUMS, *_EXTREMES)}
        return {**content, "bins": bins.tolist(), "counts": self.counts[bins].tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Histogram":
        """Return the histogram that ``to_json`` saved."""
        histogram = cls()
        for name in (*_SUMS, *_EXTREMES):
            setattr(histogram, name, content[name])
        histogram.counts[content["bins"]] = content["counts"]
        return histogram

    def statistics(self) -> ChannelStatistics:
        """Return the statistics of at least one value."""
        mean = self.sum / self.num_pixels
        variance = max(0.0, self.sum_of_squares / self.num_pixels - mean**2)
        order = np.argsort(_BIN_VALUES, kind="stable")
        ranks = np.array(PERCENTILES) / 100 * (self.num_pixels - 1)
        bins = order[np.searchsorted(np.cumsum(self.counts[order]), ranks, side="right")]
        values = _BIN_VALUES[bins].clip(self.minimum, self.maximum).tolist()
        return ChannelStatistics(
            num_tiles=self.num_tiles,
            num_pixels=self.num_pixels,
            minimum=self.minimum,
            maximum=self.maximum,
            mean=mean,
            std=variance**0.5,
            percentiles={f"{percent:g}": value for percent, value in zip(PERCENTILES, values, strict=True)},
        )


def _bins(values: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)


# The value of each bin: its centre, or its lower end up to 256, where integers are only at the lower ends.
_LOWER = (np.arange(_NUM_BINS, dtype=np.uint32) << 16).view(np.float32)
_UPPER = ((np.arange(_NUM_BINS, dtype=np.uint32) << 16) | 0xFFFF).view(np.float32)
with np.errstate(all="ignore"):
    _BIN_VALUES = np.nan_to_num(
        np.where(np.abs(_LOWER) <= 256, _LOWER, _LOWER / 2 + _UPPER / 2).astype(np.float64), nan=np.inf
    )
