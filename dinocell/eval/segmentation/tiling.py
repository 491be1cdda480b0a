"""Predict images of any size: overlapping tiles, mirrored at the image's border, blended without seams.

The cores of the tiles (``stride`` pixels per side) cover the image without overlap. Around its core each tile has a
margin, mirrored at the image's border. Weights rise over ``overlap`` pixels from a tile's edge, as half a cosine at
pixel centres, and are divided by their sum along each axis: so they sum to 1 everywhere, none is 0, and the product
over the two axes needs no weight map. Only a band of rows, one tile high, is in memory at a time.

The defaults are SAMCell's (256 px tiles, 32 px margin, hence a stride of 192 px). With ``stride=224`` the margin is
16 px, neighbours share a single ramp, and large images need a quarter fewer tiles.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn

from dinocell.runtime.device import Precision, uses_bfloat16


def predict(
    image: Shaped[np.ndarray, "c h w"],
    model: Callable[[Tensor], Tensor],
    *,
    window: int = 256,
    overlap: int = 32,
    stride: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    out: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "k h w"]:
    """Run a model over the tiles of an image and return its maps, in float32.

    The model receives the image's values as float32: normalise with the statistics of the whole image, before or inside
    ``model``, so that all tiles are treated alike. The batch size changes the maps by rounding in the model at most. A
    ValueError if an option is out of range, the image is empty, not (c h w) or not finite, a module is in training
    mode, or the model's maps differ in size from the tiles or are not finite.

    Parameters
    ----------
    image
        Of any real type; a memory map is read a band of rows at a time.
    model
        Returns for tiles (b c h w), float32, maps (b k h w) of the same height and width.
    window
        Side of a tile in pixels.
    overlap
        Length in pixels of the ramp at each edge of a tile, at most half of its side.
    stride
        Distance between tiles in pixels: 1 to ``window - overlap``; None: ``window - 2 * overlap``.
    device
        Device of the tiles and the blending; None: that of a module's parameters, else the CPU.
    precision
        Of the model's matrix products; ``auto``: bfloat16 (autocast) on GPUs that support it, else float32. Blending
        is always in float32.
    out
        Array to write to and return, such as a memory map: (k h w), of a floating type.
    progress
        Called after each batch with the number of finished tiles and their total.
    """
    stride = window - 2 * overlap if stride is None else stride
    _check(image, model, window=window, overlap=overlap, stride=stride, batch_size=batch_size, precision=precision)
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = "cpu" if parameter is None else parameter.device
    device = torch.device(device)
    use_bfloat16 = uses_bfloat16(precision, device)

    rows, columns = (_cover(length, window, stride, overlap, device) for length in image.shape[1:])
    places = [(row, column) for row in rows for column in columns]
    tiles = _tiles(image, rows, columns, window)
    canvas: _Canvas | None = None
    with torch.inference_mode():
        for first in range(0, len(places), batch_size):
            batch = places[first : first + batch_size]
            pixels = torch.from_numpy(np.stack([next(tiles) for _ in batch])).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
                maps = model(pixels)
            if canvas is None:
                canvas = _Canvas(maps, window, image.shape[1:], out, device)
            canvas.add(batch, maps)
            if progress is not None:
                progress(first + len(batch), len(places))
        assert canvas is not None  # every image has at least one tile
        return canvas.finish()


class _Span(NamedTuple):
    """A tile along one axis: its first pixel, which may be outside the image, and its weights, 0 outside."""

    start: int
    weights: Tensor


def _cover(length: int, window: int, stride: int, overlap: int, device: torch.device) -> list[_Span]:
    """Return the tiles along an axis; their weights sum to 1 on each pixel."""
    num_tiles = math.ceil(length / stride)
    margin = (window - stride) // 2
    # A single tile is centred on the image; of several, the core of the last one ends with the image.
    if num_tiles == 1:
        starts = [-((window - length) // 2)]
    else:
        starts = [min(index * stride - margin, length - stride - margin) for index in range(num_tiles)]
    # The profile of one tile: a half-cosine ramp at both ends, 1 between.
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / max(overlap, 1))
    profile = np.ones(window)
    profile[:overlap] = ramp
    profile[window - overlap :] = ramp[::-1]

    # Sum the profiles; dividing by infinity makes weights outside the image 0.
    total = np.zeros(length + 2 * window)
    for start in starts:
        total[start + window : start + 2 * window] += profile
    total[:window] = total[window + length :] = np.inf
    return [
        _Span(start, torch.from_numpy(profile / total[start + window : start + 2 * window]).float().to(device))
        for start in starts
    ]


def _tiles(
    image: np.ndarray, rows: list[_Span], columns: list[_Span], window: int
) -> Iterator[Float32[np.ndarray, "c h w"]]:
    """Yield the tiles row by row, from one mirrored band of the image at a time."""
    left = columns[0].start
    mirrored = _mirror(np.arange(left, columns[-1].start + window), image.shape[2])
    for row in rows:
        inside = _mirror(np.arange(row.start, row.start + window), image.shape[1])
        # First the rows, then their columns: only these rows of a memory map are read.
        with np.errstate(over="ignore"):  # becomes infinite, an error below
            band = image[:, inside][:, :, mirrored].astype(np.float32, copy=False)
        _check_finite("image", band, int(inside.min()), int(inside.max()))
        for column in columns:
            yield band[:, :, column.start - left : column.start - left + window]


def _mirror(positions: np.ndarray, length: int) -> np.ndarray:
    """Reflect positions outside 0..length-1, repeatedly if needed; the border pixel itself is not repeated."""
    period = max(2 * (length - 1), 1)
    folded = positions % period
    return np.minimum(folded, period - folded) if length > 1 else np.zeros_like(positions)


class _Canvas:
    """Sums weighted maps in a band of rows, and writes out the rows that no further tile will change."""

    def __init__(
        self, maps: Tensor, window: int, size: tuple[int, ...], out: np.ndarray | None, device: torch.device
    ) -> None:
        _check_maps(maps, (len(maps), maps.shape[1] if maps.ndim == 4 else 1, window, window))
        shape = (maps.shape[1], *size)
        if out is not None and (out.shape != shape or out.dtype.kind != "f"):
            raise ValueError(f"out: expected a floating array of {shape}, got {out.dtype} of {out.shape}")
        self._out = np.empty(shape, np.float32) if out is None else out
        self._window, self._height, self._width = window, *size
        self._held = torch.zeros((shape[0], window, self._width), device=device)
        self._top = 0

    def add(self, places: list[tuple[_Span, _Span]], maps: Tensor) -> None:
        """Add the maps of tiles, which come row by row from the top."""
        _check_maps(maps, (len(places), len(self._held), self._window, self._window))
        for (row, column), tile_maps in zip(places, _array(maps.float()), strict=True):
            self._write_above(max(row.start, 0))
            weighted = tile_maps * (_array(row.weights)[:, None] * _array(column.weights))
            # Add what is inside the image; the band begins at row ``_top`` of the image.
            top, bottom = max(row.start, 0), min(row.start + self._window, self._height)
            left, right = max(column.start, 0), min(column.start + self._window, self._width)
            _array(self._held)[:, top - self._top : bottom - self._top, left:right] += weighted[
                :, top - row.start : bottom - row.start, left - column.start : right - column.start
            ]

    def finish(self) -> np.ndarray:
        """Write out the remaining rows, and return all maps."""
        self._write_above(self._height)
        return self._out

    def _write_above(self, row: int) -> None:
        """Write out the rows above ``row``, and move the band down to it."""
        num_rows = row - self._top
        if num_rows == 0:
            return
        done = self._held[:, :num_rows].cpu().numpy()
        _check_finite("model", done, self._top, row - 1)
        self._out[:, self._top : row] = done
        rest = torch.zeros_like(self._held)
        _array(rest)[:, : self._window - num_rows] = _array(self._held)[:, num_rows:]
        self._held, self._top = rest, row


def _array(tensor: Tensor) -> Any:
    """Return a tensor on the CPU as a NumPy array: torch would wake its threads for each tile.

    With other load on the CPU that made blending 5 times slower. The same expressions work on both.
    """
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _check(
    image: np.ndarray, model: object, *, window: int, overlap: int, stride: int, batch_size: int, precision: str
) -> None:
    hint = "; add a channel axis: image[None]" if image.ndim == 2 else ""
    checks = (
        (
            image.ndim == 3 and image.size > 0 and image.dtype.kind in "biuf",
            f"image: expected real numbers (c h w), at least one pixel, got {image.dtype}, {image.shape}{hint}",
        ),
        (window > 0 < batch_size, f"window and batch_size: expected at least 1, got {window} and {batch_size}"),
        (0 <= 2 * overlap <= window, f"overlap: expected 0 to {window // 2} for tiles of {window} px, got {overlap}"),
        (
            1 <= stride <= window - overlap,
            f"stride: expected 1 to {window - overlap} (tile {window} px, overlap {overlap} px), got {stride}",
        ),
        (
            precision in get_args(Precision),
            f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}",
        ),
        (
            not (isinstance(model, nn.Module) and model.training),
            "model: in training mode, where dropout and batch norm change the maps; call model.eval() first",
        ),
    )
    for is_valid, message in checks:
        if not is_valid:
            raise ValueError(message)


def _check_maps(maps: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(maps.shape) != expected:
        raise ValueError(f"model: expected maps (b k h w) of {expected}, got {tuple(maps.shape)}")


def _check_finite(name: str, values: np.ndarray, first_row: int, last_row: int) -> None:
    is_finite = np.isfinite(values)
    if not is_finite.all():
        raise ValueError(
            f"{name}: expected finite values, got {values.size - np.count_nonzero(is_finite)} that are not (NaN, "
            f"infinite, or beyond float32) in rows {first_row} to {last_row}"
        )
