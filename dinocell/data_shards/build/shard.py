"""One shard: the tiles of a list of fields, one after the other, in a tar file."""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

import numpy as np
from jaxtyping import Shaped

from dinocell.data_shards.build.tiles import TileSettings, check_values, rejection_reason, tiles
from dinocell.data_shards.manifest import Histogram
from dinocell.data_shards.sample import CODECS, encode_sample, get_codec, sample_key
from dinocell.data_shards.sources.field import Field, Rejected, read_field
from dinocell.errors import ImageError, ShardError
from dinocell.images.image import Image, percentile_range, to_uint8

# By plate and channel: the source's values that become 0 and 255.
IntensityRanges = Mapping[str, Mapping[str, tuple[float, float]]]

# So many unreadable fields never stop a build; a larger fraction than max_unreadable suggests a failing storage.
_FEW = 3


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Settings that determine the content of a shard, together with its fields.

    Attributes
    ----------
    codec
        ``pco``, ``png`` or ``npy`` (see ``dinocell.data_shards.sample``).
    bit_depth
        8 converts every channel to uint8, with one intensity range per plate, so that its fields stay comparable; None
        keeps the source's type.
    percentiles
        For 8 bit: the percentiles that become 0 and 255.
    max_unreadable
        Maximum fraction of unreadable fields in a shard. If it is exceeded, the build stops: a storage failure must not
        result in a set that lacks most fields.
    """

    tiles: TileSettings = field(default_factory=TileSettings)
    codec: str = "pco"
    bit_depth: int | None = None
    percentiles: tuple[int | float, int | float] = (0.1, 99.9)
    max_unreadable: int | float = 0.5

    def __post_init__(self) -> None:
        low, high = self.percentiles
        check_values(
            ("codec", self.codec, self.codec in CODECS, f"one of {', '.join(CODECS)}"),
            ("bit_depth", self.bit_depth, self.bit_depth in (None, 8), "None or 8"),
            ("percentiles", self.percentiles, 0 <= low < high <= 100, "0 <= low < high <= 100"),
            ("max_unreadable", self.max_unreadable, 0 <= self.max_unreadable <= 1, "0 to 1"),
        )
        get_codec(self.codec, np.dtype(np.uint8))  # is it installed?


def build_shard(
    fields: Sequence[Field], file: IO[bytes], settings: ShardSettings, ranges: IntensityRanges, *, strict: bool
) -> dict[str, Any]:
    """Write the tiles of fields to a tar file, and return the record of the shard; ``index`` has first byte and size.

    Raise ShardError if too many fields cannot be read, or one if ``strict``.
    """
    writer = _ShardWriter(file, settings, ranges)
    unreadable: list[str] = []
    for field_ in fields:
        try:
            image = prepare_image(read_field(field_), settings)
        except UnusableFieldError as error:
            writer.rejected.append(Rejected(input=field_.id, kind=error.kind, reason=str(error)))
        except ImageError as error:
            if strict:
                raise ShardError(f"{error} (field {field_.id}; without --strict it would be skipped)") from error
            unreadable.append(str(error))
            writer.rejected.append(Rejected(input=field_.id, kind="unreadable", reason=str(error)))
        else:
            writer.add(field_, image)
    check_num_unreadable(unreadable, len(fields), settings, of="a shard")
    return writer.finish()


def check_num_unreadable(reasons: Sequence[str], num_fields: int, settings: ShardSettings, *, of: str) -> None:
    """Raise ShardError if so many fields cannot be read, for these reasons, that the storage must be at fault."""
    if len(reasons) > max(_FEW, settings.max_unreadable * num_fields):
        raise ShardError(
            f"{len(reasons)} of {num_fields} fields of {of} cannot be read; check the storage. "
            f"The first: {reasons[0]} (--max-unreadable 1 builds without them)"
        )


class UnusableFieldError(ImageError):
    """A field that can be read but gives no sample."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def prepare_image(image: Image, settings: ShardSettings) -> Image:
    """Return a field's image, bool as uint8; raise UnusableFieldError if it is too small, not finite or of another type."""
    pixels = image.pixels.view(np.uint8) if image.pixels.dtype == np.bool_ else image.pixels
    _, height, width = pixels.shape
    dtypes = CODECS[settings.codec].dtypes
    problem = None
    if min(height, width) < settings.tiles.min_size:
        problem = "too small", f"{height} x {width} pixels, minimum side {settings.tiles.min_size} (--min-size)"
    elif pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        num_bad = pixels.size - int(np.isfinite(pixels).sum())
        problem = "not finite", f"{num_bad} of {pixels.size} values are NaN or infinite"
    elif settings.bit_depth is None and pixels.dtype.name not in dtypes:
        problem = "type", f"codec {settings.codec}: expected {', '.join(dtypes)}, got {pixels.dtype}"
    if problem:
        raise UnusableFieldError(*problem)
    return replace(image, pixels=pixels)


class _HashingFile:
    """A file for writing that counts and hashes the bytes."""

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
    """An open shard, and the statistics of its content."""

    def __init__(self, file: IO[bytes], settings: ShardSettings, ranges: IntensityRanges) -> None:
        self._file = _HashingFile(file)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]
        self._settings, self._plate_ranges = settings, ranges
        self._num_fields = 0
        self._index: list[tuple[int, int]] = []
        self._histograms: dict[str, Histogram] = {}
        self._orders: set[tuple[str, ...]] = set()
        self._shapes: Counter[str] = Counter()
        self.rejected: list[Rejected] = []

    def add(self, field: Field, image: Image) -> None:
        """Write the tiles of a field."""
        maxima = image.pixels.max(axis=(1, 2))
        ranges = self._ranges(field, image)
        num_before = len(self._index)
        _, height, width = image.pixels.shape
        for tile in tiles(height, width, self._settings.tiles):
            pixels = image.pixels[:, tile.row : tile.row + tile.height, tile.column : tile.column + tile.width]
            if (rejection := rejection_reason(pixels, maxima, self._settings.tiles)) is not None:
                name = f"{field.id} (row {tile.row}, column {tile.column})"
                self.rejected.append(Rejected(input=name, kind=rejection[0], reason=rejection[1]))
                continue
            if ranges:
                pixels = np.stack([to_uint8(plane, *limits) for plane, limits in zip(pixels, ranges, strict=True)])
            self._write(field, image, pixels, row=tile.row, column=tile.column, ranges=ranges)
        self._num_fields += len(self._index) > num_before

    def finish(self) -> dict[str, Any]:
        """Close the tar file, and return its record: plain data for ``json``."""
        self._tar.close()
        return {
            "num_fields": self._num_fields,
            "num_bytes": self._file.num_bytes,
            "sha256": self._file.hash.hexdigest(),
            "index": self._index,
            "histograms": {name: histogram.to_json() for name, histogram in self._histograms.items()},
            "channel_orders": sorted(self._orders),
            "shapes": self._shapes,
            "rejected": [asdict(item) for item in self.rejected],
        }

    def _ranges(self, field: Field, image: Image) -> tuple[tuple[float, float], ...]:
        if self._settings.bit_depth is None or image.pixels.dtype == np.uint8:
            return ()
        of_plate = self._plate_ranges.get(field.plate or "", {})
        ranges = []
        for name, plane in zip(image.channel_names, image.pixels, strict=True):
            # A channel that none of the plate's sampled fields has uses the field's own range; it is recorded.
            low, high = of_plate[name] if name in of_plate else percentile_range(plane, *self._settings.percentiles)
            ranges.append((low, high))
        return tuple(ranges)

    def _write(self, field: Field, image: Image, pixels: Shaped[np.ndarray, "c h w"], **location: Any) -> None:
        info, members = encode_sample(
            pixels,
            codec_name=self._settings.codec,
            field=field.id,
            channels=image.channel_names,
            missing=field.missing,
            plate=field.plate,
            well=field.well,
            site=field.site,
            labels=field.labels,
            pixel_size_um=image.pixel_size_um,
            **location,
        )
        key = sample_key(field.id, info.row, info.column)
        start = self._tar.offset
        for suffix, content in members.items():
            header = tarfile.TarInfo(f"{key}.{suffix}")  # time 0 and no owner: the same bytes every time
            header.size, header.mode = len(content), 0o444
            self._tar.addfile(header, io.BytesIO(content))
        self._index.append((start, self._tar.offset - start))
        self._orders.add(image.channel_names)
        for name, plane in zip(image.channel_names, pixels, strict=True):
            self._histograms.setdefault(name, Histogram()).add(plane)
        self._shapes[f"{len(pixels)} x {info.height} x {info.width} {info.dtype}"] += 1
