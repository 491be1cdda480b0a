"""Tiling of a field, and which tiles are rejected as blank or saturated."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from dinocell.errors import ShardError


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
    rows, columns = (_starts(length, settings) for length in (height, width))
    for row in rows:
        for column in columns:
            tile_height, tile_width = (min(settings.size or side, side) for side in (height, width))
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
                return "saturated", f"channel {channel}: {fraction:.0%} of pixels at {maxima[channel]} (--max-saturated)"
    return None
