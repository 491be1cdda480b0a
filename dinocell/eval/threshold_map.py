"""A heat map of scores over two thresholds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from dinocell.data_shards.images import write_png

_CELL_PX, _LEFT_PX, _TOP_PX, _LINE_PX = 32, 84, 62, 14
_SHOWN_LABELS = 10
# Scores that far below the best are dark: one grid point that finds nothing would leave all others in one colour.
_SHOWN_BELOW_BEST = 0.1


def draw_heat_map(
    path: str | Path,
    scores: Float64[np.ndarray, "m n"],
    *,
    rows: tuple[str, Sequence[float]],
    columns: tuple[str, Sequence[float]],
    best: tuple[int, int],
    title: str,
) -> None:
    """Write a PNG: a square a point, dark 0.1 below the best or less, bright the best, which is framed; grey undefined.

    Parameters
    ----------
    rows, columns
        Name and values of each axis.

    Raises
    ------
    ImageError
        If the picture cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    colours = np.repeat(np.repeat(_colours(scores), _CELL_PX, axis=0), _CELL_PX, axis=1)
    height, width = colours.shape[:2]
    sheet = Image.new("RGB", (max(_LEFT_PX + width + 12, 500), _TOP_PX + height + 12), "white")
    sheet.paste(Image.fromarray(colours), (_LEFT_PX, _TOP_PX))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    low, high = _range(scores)
    draw.text((4, 4), f"{title} (lowest {np.nanmin(scores):.3f})", fill="black", font=font)
    axes = f"{rows[0]} down, {columns[0]} across; dark: {low:.3f} or less, bright: {high:.3f}"
    draw.text((4, _TOP_PX - 2 * _LINE_PX - 8), axes, fill="black", font=font)
    for number in _shown(len(columns[1])):
        draw.text((_LEFT_PX + number * _CELL_PX, _TOP_PX - _LINE_PX - 4), f"{columns[1][number]:.2f}", "black", font)
    for number in _shown(len(rows[1])):
        draw.text((44, _TOP_PX + number * _CELL_PX + 8), f"{rows[1][number]:.2f}", fill="black", font=font)
    top, left = (offset + index * _CELL_PX for offset, index in zip((_TOP_PX, _LEFT_PX), best, strict=True))
    draw.rectangle((left, top, left + _CELL_PX - 1, top + _CELL_PX - 1), outline="red", width=3)
    write_png(path, np.asarray(sheet).transpose(2, 0, 1))


def _range(scores: np.ndarray) -> tuple[float, float]:
    """Return the scores of the darkest and of the brightest colour."""
    high = float(np.nanmax(scores))
    return max(float(np.nanmin(scores)), high - _SHOWN_BELOW_BEST), high


def _colours(scores: np.ndarray) -> np.ndarray:
    import cv2

    low, high = _range(scores)
    levels = np.nan_to_num(np.clip((scores - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
    colours = np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1])
    colours[np.isnan(scores)] = 200
    return colours


def _shown(number: int) -> range:
    return range(0, number, max(1, -(-number // _SHOWN_LABELS)))
