"""Images for probes: of a shard set, of a source (HPA, CHAMMI, ...), or of a folder with one folder per class.

All yield channels scaled to [0, 1], channel names and labels, by index and from any index, so that extraction can be
distributed and resumed.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Shaped

from dinocell.data_shards.read import stream
from dinocell.data_shards.sample import SampleInfo
from dinocell.data_shards.sources.field import Field, FieldFile, LabelValue, Rejected, Source, read_field
from dinocell.errors import DinocellError, ImageError, require
from dinocell.images.listing import base_name, list_files
from dinocell.images.read import has_image_name

_log = logging.getLogger(__name__)
_READ_AHEAD, _READERS = 16, 4
# Percentiles of a channel that are mapped to 0 and 1, as in the views of pretraining.
_PERCENTILES = ("0.1", "99.9")


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeImage:
    """One image: channels in [0, 1], (c h w); ``pixels`` is None if unreadable, for the reason ``problem``."""

    id: str
    pixels: Float32[np.ndarray, "c h w"] | None
    channel_names: tuple[str, ...]
    labels: Mapping[str, LabelValue]
    problem: str = ""


@runtime_checkable
class ImageSet(Protocol):
    """Images by index, always in the same order."""

    name: str

    def __len__(self) -> int:
        """Return the number of images."""

    def images(self, start: int, stop: int) -> Iterator[ProbeImage]:
        """Return the images from ``start`` to ``stop`` (exclusive)."""


class ShardImages:
    """The samples of a shard set, scaled by the percentiles of each channel over the set.

    ``cache`` and ``cache_gb`` apply to remote sets, see `dinocell.data_shards.read.stream`.
    """

    def __init__(self, location: str | Path, *, cache: str | Path | None = None, cache_gb: float = 50.0) -> None:
        self.name = str(location)
        self._open = partial(stream, location, batch_size=1, shuffle=False, cache=cache, cache_gb=cache_gb)
        self._manifest = self._open().sets[0].manifest
        self.channel_names = tuple(self._manifest.channels)
        self._ranges = {}
        for channel, statistics in self._manifest.channels.items():
            low, high = (statistics.percentiles.get(percentile) for percentile in _PERCENTILES)
            if low is None or high is None or high <= low:
                low, high = statistics.minimum, max(statistics.maximum, statistics.minimum + 1)
            self._ranges[channel] = (float(low), float(high))

    def __len__(self) -> int:
        return self._manifest.num_samples

    def images(self, start: int, stop: int) -> Iterator[ProbeImage]:
        """Return samples in the order of the set; a damaged one is reported, not replaced."""
        for batch in self._open(position=start, stop=stop):
            info = batch.infos[0]
            labels = _labels(info)
            name = f"{info.field}@{info.row},{info.column}"
            if batch.damaged:
                yield ProbeImage(id=name, pixels=None, channel_names=(), labels=labels, problem=batch.damaged[0])
                continue
            low, high = np.array([self._ranges[channel] for channel in info.channels], np.float32).T[:, :, None, None]
            pixels = np.clip((batch.tile(0).numpy().astype(np.float32) - low) / (high - low), 0, 1)
            yield ProbeImage(id=name, pixels=pixels, channel_names=info.channels, labels=labels)


class FieldImages:
    """The fields of a source. 8-bit images keep their scale; others are scaled by their percentiles."""

    def __init__(self, source: Source, name: str) -> None:
        self.name = name
        listed = list(source.fields())
        self._fields = [entry for entry in listed if isinstance(entry, Field)]
        rejected = [entry for entry in listed if isinstance(entry, Rejected)]
        if rejected:
            _log.warning("%s: %d inputs skipped; the first: %s", name, len(rejected), rejected[0].reason)
        expected = "expected a folder with one folder of images per class, or a set as published"
        require(self._fields, f"{name}: no image found; {expected}")

    def __len__(self) -> int:
        return len(self._fields)

    def images(self, start: int, stop: int) -> Iterator[ProbeImage]:
        """Return fields in the order of the source, read ahead by some threads."""
        upcoming = islice(self._fields, start, stop)
        with ThreadPoolExecutor(_READERS) as readers:
            ahead = [readers.submit(_read, field) for field in islice(upcoming, _READ_AHEAD)]
            while ahead:
                done = ahead.pop(0)
                ahead.extend(readers.submit(_read, field) for field in islice(upcoming, 1))
                yield done.result()


@dataclass(frozen=True, kw_only=True)
class ClassFolders:
    """A source: a folder with a folder of images for each class; the class is the label ``class``.

    Hidden files and folders are skipped, linked folders are searched.
    """

    input: Path

    def fields(self) -> Iterator[Field | Rejected]:
        """List the images, class by class."""
        folders = [path for path in sorted(self.input.glob("*")) if path.is_dir() and not path.name.startswith(".")]
        for folder in folders:
            label = base_name(folder)  # in one Unicode normalisation, as file systems differ
            for file in list_files(folder, folders_as_files=(".zarr",)):
                if has_image_name(Path(file.name).name):
                    yield Field(id=f"{label}/{file.name}", files=(FieldFile(path=file.path),), labels={"class": label})


def _labels(entry: Field | SampleInfo) -> dict[str, LabelValue]:
    """Return the labels of a field or sample, with its plate, well and site."""
    places = {key: value for key in ("plate", "well", "site") if (value := getattr(entry, key)) is not None}
    return {**entry.labels, **{key: value for key, value in places.items() if key not in entry.labels}}


def _read(field: Field) -> ProbeImage:
    labels = _labels(field)
    try:
        image = read_field(field)
        pixels = to_unit(image.pixels)
    except ImageError as error:
        return ProbeImage(id=field.id, pixels=None, channel_names=(), labels=labels, problem=str(error))
    return ProbeImage(id=field.id, pixels=pixels, channel_names=image.channel_names, labels=labels)


def to_unit(pixels: Shaped[np.ndarray, "c h w"]) -> Float32[np.ndarray, "c h w"]:
    """Scale channels to [0, 1]: 8 bit by 255, others by their percentiles 0.1 and 99.9.

    An ImageError if a value is not finite, or beyond float32.
    """
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255
    with np.errstate(over="ignore"):
        values = pixels.astype(np.float32)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    problem = f"{bad} of {values.size} values are not finite (NaN or infinite); replace them first"
    require(bad == 0, problem, ImageError)
    low, high = np.percentile(values, (0.1, 99.9), axis=(1, 2), keepdims=True).astype(np.float32)
    return np.asarray(np.clip((values - low) / np.maximum(high - low, np.float32(1e-12)), 0, 1))


def labels_of(rows: Sequence[Mapping[str, LabelValue]], column: str, name: str) -> list[str]:
    """Return a column of labels as strings.

    A DinocellError if no image has it; the message lists the existing columns.
    """
    if not any(column in row for row in rows):
        columns = sorted({key for row in rows for key in row})
        raise DinocellError(f"{name}: no label {column!r}; existing labels: {', '.join(columns) or 'none'}")
    return [str(row.get(column, "")) for row in rows]
