"""One shard: fields are tiled, blank and saturated tiles rejected, and the others written to a tar file."""

import hashlib
import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from dinocell.data_shards.manifest import Histogram
from dinocell.data_shards.sample import CODECS, encode_sample, get_codec, sample_key
from dinocell.data_shards.sources.field import Field, Rejected, read_field
from dinocell.errors import ImageError, ShardError
from dinocell.images.image import Image, percentile_range, to_uint8


class Tile(NamedTuple):
    """A tile of a field: its first row and column, height and width."""

    row: int
    column: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """How a field is tiled, and which tiles are rejected.

    Attributes
    ----------
    size
        Side of a tile in pixels; 0 keeps whole fields. The number of tiles per side is rounded and the tiles are spread
        evenly, so that less than half a tile per side is not covered (1080 px: two tiles of 512).
    overlap
        Minimum number of pixels that neighbouring tiles share; 0 allows gaps.
    min_size
        Fields whose shorter side has fewer pixels are rejected.
    min_contrast
        Tiles in which no channel has this ``contrast_score`` are rejected as blank; 0 rejects only constant tiles.
    max_saturated
        Tiles in which a channel has a larger fraction of pixels at the field's maximum are rejected.
    """

    size: int = 512
    overlap: int = 0
    min_size: int = 64
    min_contrast: int | float = 5.0
    max_saturated: int | float = 0.5

    def __post_init__(self) -> None:
        max_overlap = max(0, self.size - 1)
        check_values(
            ("size", self.size, self.size >= 0, "0 (whole fields) or more"),
            ("overlap", self.overlap, 0 <= self.overlap <= max_overlap, f"0 to {max_overlap}"),
            ("min_size", self.min_size, self.min_size >= 1, "1 or more"),
            ("min_contrast", self.min_contrast, self.min_contrast >= 0, "0 or more"),
            ("max_saturated", self.max_saturated, 0 < self.max_saturated <= 1, "more than 0, at most 1"),
        )


def check_values(*checks: tuple[str, object, bool, str]) -> None:
    """Raise ShardError for the first invalid setting of (name, value, is valid, what is expected)."""
    for name, value, is_valid, expected in checks:
        if not is_valid:
            raise ShardError(f"{name}: expected {expected}, got {value}")


def tiles(height: int, width: int, settings: TileSettings) -> Iterator[Tile]:
    """Return the tiles of a field, row by row. A side shorter than a tile gives one tile of that length."""
    tile_height, tile_width = (min(settings.size or side, side) for side in (height, width))
    for row, column in itertools.product(_starts(height, settings), _starts(width, settings)):
        yield Tile(row, column, tile_height, tile_width)


def _starts(length: int, settings: TileSettings) -> list[int]:
    size, step = settings.size, settings.size - settings.overlap
    if size == 0 or length <= size:
        return [0]
    num_tiles = max(1, int((length - settings.overlap) / step + 0.5))
    uncovered = length - settings.overlap - num_tiles * step
    if settings.overlap and uncovered >= 0:  # all of it at the borders: tiles further apart would share less
        return [uncovered // 2 + index * step for index in range(num_tiles)]
    if uncovered >= 0:  # equal gaps before the first tile, between tiles and after the last
        gap = uncovered / (num_tiles + 1)
        return [int(gap + index * (size + gap)) for index in range(num_tiles)]
    return [round(index * (length - size) / (num_tiles - 1)) for index in range(num_tiles)]


def contrast_score(plane: Shaped[np.ndarray, "h w"]) -> float:
    """Return how much more a plane varies at the scale of cells (about 16 to 128 px) than pure noise would.

    1 is pure noise, 3 an empty field of a real microscope; cells give 8 to several 100. 0 if the plane is constant,
    infinite if it varies without noise.
    """
    import cv2

    # Signal: means of 8 x 8 px blocks, minus their smooth part (a Gaussian of 64 px), which is illumination.
    values = plane.astype(np.float32)
    blocks = [max(1, side // 8) for side in values.shape]
    coarse = cv2.resize(values, (blocks[1], blocks[0]), interpolation=cv2.INTER_AREA)
    smooth = cv2.GaussianBlur(coarse, (0, 0), sigmaX=8, borderType=cv2.BORDER_REFLECT)
    signal = float(np.subtract(coarse, smooth).std())
    if signal == 0:
        return 0.0
    # Noise: from second differences along the rows, whose median absolute value is robust to edges. Of a normal
    # variable it is 0.6745 standard deviations, and the second difference has 1 + 4 + 1 = 6 times the variance.
    rows = values[:: max(1, len(values) // 128)]  # 128 rows are enough for a median
    differences = np.abs(rows[:, 2:] - 2 * rows[:, 1:-1] + rows[:, :-2])
    noise = float(np.median(differences)) / (0.6745 * 6**0.5) if differences.size else 0.0
    # The mean of 64 independent pixels has an eighth of their standard deviation.
    return signal / (noise / 8) if noise else float("inf")


def rejection_reason(
    pixels: Shaped[np.ndarray, "c h w"], maxima: Shaped[np.ndarray, " c"], settings: TileSettings
) -> tuple[str, str] | None:
    """Return the kind of reason and the reason for rejecting a tile, or None.

    Parameters
    ----------
    maxima
        The maximum of each channel in the whole field.
    """
    tile_minima, tile_maxima = pixels.min(axis=(1, 2)), pixels.max(axis=(1, 2))
    if (tile_minima == tile_maxima).all():
        return "blank", "every channel is constant"
    if settings.min_contrast:
        best = 0.0
        for plane in pixels:
            best = max(best, contrast_score(plane))
            if best >= settings.min_contrast:
                break
        else:
            return "blank", f"contrast {best:.2f}, minimum {settings.min_contrast:g} (--min-contrast)"
    for channel, plane in enumerate(pixels):
        if tile_maxima[channel] > 0:
            fraction = float(np.count_nonzero(plane == maxima[channel]) / plane.size)
            if fraction > settings.max_saturated:
                reason = f"channel {channel}: {fraction:.0%} of pixels at {maxima[channel]} (--max-saturated)"
                return "saturated", reason
    return None


# By plate and channel: the source's values that become 0 and 255.
IntensityRanges = Mapping[str, Mapping[str, tuple[float, float]]]

# So many unreadable fields never stop a build; a larger fraction than max_unreadable suggests a failing storage.
_FEW = 3
# The kind of reason for rejecting them.
UNREADABLE = "unreadable"


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
    """Write the tiles of fields to a tar file, open for writing and reading, and return the record of the shard.

    Raise ShardError if too many fields cannot be read, or one if ``strict``.
    """
    writer = _ShardWriter(file, settings, ranges)
    unreadable: list[str] = []
    for field_ in fields:
        result = read_usable(field_, settings)
        if isinstance(result, Image):
            writer.add(field_, result)
            continue
        writer.rejected.append(result)
        if result.kind == UNREADABLE:
            unreadable.append(result.reason)
            if strict:
                break
    check_num_unreadable(unreadable, len(fields), settings, of="a shard", strict=strict)
    return writer.finish()


def check_num_unreadable(
    reasons: Sequence[str], num_fields: int, settings: ShardSettings, *, of: str, strict: bool = False
) -> None:
    """Raise ShardError if so many fields cannot be read, for these reasons, that the storage must be at fault."""
    if len(reasons) > (0 if strict else max(_FEW, settings.max_unreadable * num_fields)):
        raise ShardError(
            f"{reasons[0]} (without --strict, this field would be skipped)"
            if strict
            else f"{len(reasons)} of {num_fields} fields of {of} cannot be read; check the storage. "
            f"The first: {reasons[0]} (--max-unreadable 1 builds without them)"
        )


def read_usable(field: Field, settings: ShardSettings) -> Image | Rejected:
    """Read a field, bool as uint8; rejected if it is unreadable, too small, not finite or of an unsupported type."""
    try:
        image = read_field(field)
    except ImageError as error:
        return Rejected(input=field.id, kind=UNREADABLE, reason=str(error))
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
    return Rejected(input=field.id, kind=problem[0], reason=problem[1]) if problem else replace(image, pixels=pixels)


class _ShardWriter:
    """An open shard, and the statistics of its content."""

    def __init__(self, file: IO[bytes], settings: ShardSettings, ranges: IntensityRanges) -> None:
        self._file, self._tar = file, tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
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
        num_bytes = self._file.tell()
        self._file.seek(0)
        return {
            "num_fields": self._num_fields,
            "num_bytes": num_bytes,
            "sha256": hashlib.file_digest(self._file, "sha256").hexdigest(),  # type: ignore[arg-type]
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
        # A channel that none of the plate's sampled fields has uses the field's own range; it is recorded.
        return tuple(
            of_plate.get(name) or percentile_range(plane, *self._settings.percentiles)
            for name, plane in zip(image.channel_names, image.pixels, strict=True)
        )

    def _write(self, field: Field, image: Image, pixels: Shaped[np.ndarray, "c h w"], **location: Any) -> None:
        metadata = {name: getattr(field, name) for name in ("missing", "plate", "well", "site", "labels")} | location
        info, members = encode_sample(
            pixels,
            codec_name=self._settings.codec,
            field=field.id,
            channels=image.channel_names,
            pixel_size_um=image.pixel_size_um,
            **metadata,
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
