"""Which tiles of a field become samples: where they lie, and which show nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped


class Tile(NamedTuple):
    """A tile of a field: its first row and column, height and width."""

    row: int
    column: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """How a field is cut, and which tiles are left out.

    Attributes
    ----------
    size
        Side of a tile in pixels; 0 takes whole fields.
    overlap
        Pixels that neighbouring tiles share at least; 0 lets gaps be.
    cover
        Cut as many tiles as it takes to see every pixel. Otherwise the number of tiles a side is rounded, tiles are
        spread evenly, and at the outer borders or between tiles less than half a tile is left out (1080 px: two tiles
        of 512).
    min_size
        Fields whose shorter side has fewer pixels are left out.
    min_structure
        Tiles in which no channel has at least this much structure (``contrast_score``) are left out as blank; 0 keeps all
        but those of one value.
    max_saturated
        Tiles in which a channel has a larger share of pixels at the field's highest value are left out.
    """

    size: int = 512
    overlap: int = 0
    cover: bool = False
    min_size: int = 64
    min_contrast: int | float = 5.0
    max_saturated: int | float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0 or self.min_size < 1:
            raise ValueError(f"size: expected 0 (whole fields) or more, got {self.size}; min_size {self.min_size}")
        if not 0 <= self.overlap <= max(0, self.size - 1):
            raise ValueError(f"overlap: expected 0 to {max(0, self.size - 1)}, got {self.overlap}")
        if self.min_contrast < 0 or not 0 < self.max_saturated <= 1:
            raise ValueError(
                "min_structure: expected 0 or more, max_saturated: more than 0 up to 1, "
                f"got {self.min_contrast} and {self.max_saturated}"
            )


def tiles(height: int, width: int, settings: TileSettings) -> Iterator[Tile]:
    """Return the tiles of a field, row by row. A side shorter than a tile gives one tile of that length."""
    rows, columns = (_starts(length, settings) for length in (height, width))
    for row in rows:
        for column in columns:
            tile_height, tile_width = (min(settings.size or side, side) for side in (height, width))
            yield Tile(row, column, tile_height, tile_width)


def _starts(length: int, settings: TileSettings) -> list[int]:
    size = settings.size
    if size == 0 or length <= size:
        return [0]
    steps = (length - settings.overlap) / (size - settings.overlap)
    number = max(1, -int(-steps // 1) if settings.cover else int(steps + 0.5))
    left_out = length - settings.overlap - number * (size - settings.overlap)
    if settings.overlap and left_out >= 0:  # all of it at the borders: tiles further apart would share less
        return [left_out // 2 + index * (size - settings.overlap) for index in range(number)]
    if left_out >= 0:  # gaps: as much before the first tile as between two
        gap = left_out / (number + 1)
        return [int(gap + index * (size + gap)) for index in range(number)]
    return [round(index * (length - size) / (number - 1)) for index in range(number)]


def contrast_score(plane: Shaped[np.ndarray, "h w"]) -> float:
    """Say how much more a plane varies at the scale of cells (about 16 to 128 px) than noise alone would.

    Means of 8 x 8 px blocks of independent noise of deviation s vary by s / 8; s is estimated from second differences
    along the rows (their median absolute value, robust to edges). Of the block means, the smooth part (a Gaussian of
    64 px), which is illumination, is taken away first. 1 is pure noise, 3 an empty field of a real microscope, cells
    give 8 to several 100. 0 if the plane has one value, infinite if it varies without noise.
    """
    import cv2

    values = plane.astype(np.float32)
    blocks = [max(1, side // 8) for side in values.shape]
    coarse = cv2.resize(values, (blocks[1], blocks[0]), interpolation=cv2.INTER_AREA)
    smooth = cv2.GaussianBlur(coarse, (0, 0), sigmaX=8, borderType=cv2.BORDER_REFLECT)
    signal = float(np.subtract(coarse, smooth).std())
    if signal == 0:
        return 0.0
    rows = values[:: max(1, len(values) // 128)]  # 128 rows are enough for a median
    differences = np.abs(rows[:, 2:] - 2 * rows[:, 1:-1] + rows[:, :-2])
    noise = 0.0
    if differences.size:
        # Of a normal variable, the median of the absolute value is 0.6745 deviations; 1 + 4 + 1 = 6 variances.
        noise = float(np.median(differences)) / (0.6745 * 6**0.5)
    return signal / (noise / 8) if noise else float("inf")


def rejection_reason(
    pixels: Shaped[np.ndarray, "c h w"], highest: Shaped[np.ndarray, " c"], settings: TileSettings
) -> tuple[str, str] | None:
    """Return which kind of useless tile this is and why, or None if it is a good one.

    Parameters
    ----------
    highest
        The highest value of each channel in the whole field.
    """
    lowest, top = pixels.min(axis=(1, 2)), pixels.max(axis=(1, 2))
    if (lowest == top).all():
        return "blank", "every channel has one value"
    if settings.min_contrast:
        found = 0.0
        for plane in pixels:
            found = max(found, contrast_score(plane))
            if found >= settings.min_contrast:
                break
        else:
            return "blank", f"structure {found:.2f}, at least {settings.min_contrast:g} needed (--min-structure)"
    for number, plane in enumerate(pixels):
        share = float(np.count_nonzero(plane == highest[number]) / plane.size) if top[number] > 0 else 0.0
        if share > settings.max_saturated:
            return "saturated", f"channel {number}: {share:.0%} of the pixels at {highest[number]} (--max-saturated)"
    return None
