"""One shard: the tiles of a list of fields, one after the other, into a tar file."""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

import numpy as np

from dinocell.data_shards.sample import codec
from dinocell.data_shards.sources.field import Field, Rejected, read_field
from dinocell.images.image import Image, percentile_range, to_uint8
from dinocell.data_shards.sample import encode_sample, sample_key
from dinocell.data_shards.manifest import Histogram
from dinocell.data_shards.build.tiles import TileSettings, tiles, unusable
from dinocell.errors import ImageError, ShardError

# By plate and channel: the source's levels that become 0 and 255.
Levels = Mapping[str, Mapping[str, tuple[float, float]]]

# An outage of the storage must not end as a set without most of its fields.
_FEW = 3


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What decides about the content of a shard, besides its fields.

    Attributes
    ----------
    codec
        ``pco``, ``png`` or ``npy`` (``codecs.py``).
    bit_depth
        8 maps every channel to uint8; None keeps the source's type.
    percentiles
        For 8 bit: the share of the values, in percent, at or below 0 and at or below 255.
    levels_of
        For 8 bit: over a whole ``plate``, which keeps its fields comparable, or each ``field`` by itself.
    max_unreadable
        A shard more of whose fields than this cannot be read is not written: it is the storage that fails then.
    """

    tiles: TileSettings = field(default_factory=TileSettings)
    codec: str = "pco"
    bit_depth: int | None = None
    percentiles: tuple[int | float, int | float] = (0.1, 99.9)
    levels_of: str = "plate"
    max_unreadable: int | float = 0.5

    def __post_init__(self) -> None:
        codec(self.codec, np.dtype(np.uint8))
        low, high = self.percentiles
        if self.bit_depth not in (None, 8) or self.levels_of not in ("plate", "field"):
            raise ShardError(
                f"bit_depth: expected None or 8, levels_of: plate or field, got {self.bit_depth}, {self.levels_of}"
            )
        if not 0 <= low < high <= 100:
            raise ShardError(f"percentiles: expected 0 <= low < high <= 100, got {low:g} and {high:g}")
        if not 0 <= self.max_unreadable <= 1:
            raise ShardError(f"max_unreadable: expected a share from 0 to 1, got {self.max_unreadable:g}")


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltShard:
    """What is in a shard that was just written; ``index`` holds first byte and number of bytes of each sample."""

    num_fields: int
    num_bytes: int
    sha256: str
    index: list[tuple[int, int]]
    histograms: Mapping[str, Histogram]
    channel_orders: list[tuple[str, ...]]
    shapes: Counter[str]
    rejected: list[Rejected]

    def to_json(self) -> dict[str, Any]:
        """Return what the build's record of the shard keeps."""
        return {
            "num_fields": self.num_fields,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            "index": self.index,
            "histograms": {name: histogram.to_json() for name, histogram in self.histograms.items()},
            "channel_orders": self.channel_orders,
            "shapes": self.shapes,
            "rejected": [asdict(item) for item in self.rejected],
        }


def build_shard(
    fields: Sequence[Field], file: IO[bytes], settings: ShardSettings, levels: Levels, *, strict: bool
) -> BuiltShard:
    """Write the tiles of fields to a tar file.

    Raises
    ------
    ShardError
        If too many fields cannot be read, or one if ``strict``.
    """
    writer = _ShardWriter(file, settings, levels)
    for each in fields:
        try:
            picture = usable(read_field(each), settings)
        except ImageError as error:
            kind = error.kind if isinstance(error, UnusableFieldError) else "unreadable"
            if strict and kind == "unreadable":
                raise ShardError(
                    f"{error} (field {each.id}; without --strict it would be listed and skipped)"
                ) from error
            writer.rejected.append(Rejected(input=each.id, kind=kind, reason=str(error)))
        else:
            writer.add(each, picture)
    unreadable = [item.reason for item in writer.rejected if item.kind == "unreadable"]
    check_in_reach(unreadable, len(fields), settings, of="a shard")
    return writer.finish()


def check_in_reach(unreadable: Sequence[str], num_fields: int, settings: ShardSettings, *, of: str) -> None:
    """Raise ShardError if so many fields cannot be read, for the given reasons, that it must be the storage's fault."""
    if len(unreadable) > max(_FEW, settings.max_unreadable * num_fields):
        raise ShardError(
            f"{len(unreadable)} of {num_fields} fields of {of} cannot be read; is the storage in reach? "
            f"The first: {unreadable[0]} (--max-unreadable 1 builds without them)"
        )


class UnusableFieldError(ImageError):
    """A field that was read and gives no sample."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def usable(picture: Image, settings: ShardSettings) -> Image:
    """Return a field's picture, bool as uint8.

    Raises
    ------
    UnusableFieldError
        If it is too small, or its values are not finite or of a type that the set cannot hold.
    """
    pixels = picture.pixels
    if pixels.dtype == np.bool_:
        pixels = pixels.view(np.uint8)
    _, height, width = pixels.shape
    if min(height, width) < settings.tiles.min_size:
        raise UnusableFieldError(
            "too small", f"{height} x {width} pixels, at least {settings.tiles.min_size} a side needed (--min-size)"
        )
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        bad = pixels.size - int(np.isfinite(pixels).sum())
        raise UnusableFieldError("not finite", f"{bad} of {pixels.size} values are NaN or infinite")
    if settings.bit_depth is None:
        try:
            codec(settings.codec, pixels.dtype)
        except ShardError as error:
            raise UnusableFieldError("type", str(error)) from error
    return replace(picture, pixels=pixels)


class _HashingFile:
    """A file to write to that counts and hashes what goes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.num_bytes


class _ShardWriter:
    """An open shard, and what is to be told about it."""

    def __init__(self, file: IO[bytes], settings: ShardSettings, levels: Levels) -> None:
        self._file = _HashingFile(file)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]
        self._settings, self._levels = settings, levels
        self._num_fields = 0
        self._index: list[tuple[int, int]] = []
        self._histograms: dict[str, Histogram] = {}
        self._orders: set[tuple[str, ...]] = set()
        self._shapes: Counter[str] = Counter()
        self.rejected: list[Rejected] = []

    def add(self, field: Field, picture: Image) -> None:
        """Write the tiles of a field."""
        highest = picture.pixels.max(axis=(1, 2))
        ranges = self._ranges(field, picture)
        num_before = len(self._index)
        _, height, width = picture.pixels.shape
        for tile in tiles(height, width, self._settings.tiles):
            rows, columns = (
                slice(start, start + size) for start, size in ((tile.row, tile.height), (tile.column, tile.width))
            )
            pixels = picture.pixels[:, rows, columns]
            useless = unusable(pixels, highest, self._settings.tiles)
            if useless is not None:
                where = f"{field.id} (row {tile.row}, column {tile.column})"
                self.rejected.append(Rejected(input=where, kind=useless[0], reason=useless[1]))
                continue
            if ranges:
                pixels = np.stack([to_uint8(plane, *level) for plane, level in zip(pixels, ranges, strict=True)])
            self._write(field, picture, pixels, tile.row, tile.column, ranges)
        self._num_fields += len(self._index) > num_before

    def finish(self) -> BuiltShard:
        """Close the tar file."""
        self._tar.close()
        return BuiltShard(
            num_fields=self._num_fields,
            num_bytes=self._file.num_bytes,
            sha256=self._file.hash.hexdigest(),
            index=self._index,
            histograms=self._histograms,
            channel_orders=sorted(self._orders),
            shapes=self._shapes,
            rejected=self.rejected,
        )

    def _ranges(self, field: Field, picture: Image) -> tuple[tuple[float, float], ...]:
        settings = self._settings
        if settings.bit_depth is None or picture.pixels.dtype == np.uint8:
            return ()
        known = self._levels.get(field.plate or "", {}) if settings.levels_of == "plate" else {}
        ranges = []
        for name, plane in zip(picture.channel_names, picture.pixels, strict=True):
            # A channel that none of the plate's chosen fields has takes the field's own levels; they are recorded.
            low, high = known[name] if name in known else percentile_range(plane, *settings.percentiles)
            ranges.append((low, high))
        return tuple(ranges)

    def _write(
        self,
        field: Field,
        picture: Image,
        pixels: np.ndarray,
        row: int,
        column: int,
        ranges: tuple[tuple[float, float], ...],
    ) -> None:
        info, members = encode_sample(
            pixels,
            codec_name=self._settings.codec,
            field=field.id,
            channels=picture.channel_names,
            row=row,
            column=column,
            missing=field.missing,
            ranges=ranges,
            plate=field.plate,
            well=field.well,
            site=field.site,
            labels=field.labels,
            pixel_size_um=picture.pixel_size_um,
        )
        key = sample_key(field.id, row, column)
        start = self._tar.offset
        for suffix, content in members.items():
            header = tarfile.TarInfo(f"{key}.{suffix}")  # time 0, nobody's: the same bytes every time
            header.size, header.mode = len(content), 0o444
            self._tar.addfile(header, io.BytesIO(content))
        self._index.append((start, self._tar.offset - start))
        self._orders.add(picture.channel_names)
        for name, plane in zip(picture.channel_names, pixels, strict=True):
            self._histograms.setdefault(name, Histogram()).add(plane)
        self._shapes[f"{len(pixels)} x {info.height} x {info.width} {info.dtype}"] += 1
