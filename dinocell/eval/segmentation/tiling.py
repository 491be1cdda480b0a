"""A network on an image of any size: overlapping windows, mirrored borders, blended without seams.

Each axis is covered by windows whose cores (``stride`` pixels) tile it; around its core every window sees a margin,
which at the image's border is its mirror image. Weights rise over ``overlap`` pixels from a window's edge, as half a
cosine taken at pixel centres, and along each axis they are divided by their sum: so they sum to 1 everywhere, none is
ever 0, and the product over the two axes needs no map of weights. Only a band of rows, one window
high, is held at a time.

The defaults are SAMCell's (256 px windows, 32 px of margin, so a stride of 192 px). ``stride=224`` has 16 px of margin,
neighbours that meet in a single ramp, and on large images a quarter fewer windows.
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
    """Run a model over an image in windows and return its maps, in float32.

    What the model sees is the image's own values, as float32: normalise with the statistics of the whole image, before
    or inside ``model``, so that all windows are treated alike. The maps do not depend on the batch size, up to what the
    model's own arithmetic does with it.

    Parameters
    ----------
    image
        Numbers of any real type; a memory map is read a band of rows at a time.
    model
        Maps windows (b c h w), float32, to maps (b k h w) of the same height and width.
    window
        Side of a window in pixels.
    overlap
        Length in pixels of the ramp at each edge of a window, at most half of it.
    stride
        From window to window, in pixels: 1 to ``window - overlap``; ``window - 2 * overlap`` if None.
    device
        Where the windows are put and blended; None: where a module's parameters are, else the CPU.
    precision
        Of the model's matrix products; ``auto``: bfloat16 (autocast) on GPUs that have it, float32
        elsewhere. Blending is always in float32.
    out
        Written to and returned instead of a new array: (k h w), of a floating type, such as a memory map.
    progress
        Called after each batch with the windows that are done and their total.

    Raises
    ------
    ValueError
        If an option is out of its range, the image is empty, not (c h w) or holds values that are not finite, a module
        is in training mode, or the model's maps are of another size than its windows or not finite.
    """
    stride = window - 2 * overlap if stride is None else stride
    _check(image, model, window=window, overlap=overlap, stride=stride, batch_size=batch_size)
    if precision not in get_args(Precision):
        raise ValueError(f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}")
    device = _device_of(model) if device is None else torch.device(device)
    use_bfloat16 = uses_bfloat16(precision, device)

    rows, columns = (_cover(length, window, stride, overlap, device) for length in image.shape[1:])
    places = [(row, column) for row in rows for column in columns]
    windows = _windows(image, rows, columns, window)
    canvas: _Canvas | None = None
    with torch.inference_mode():
        for first in range(0, len(places), batch_size):
            batch = places[first : first + batch_size]
            pixels = torch.from_numpy(np.stack([next(windows) for _ in batch])).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
                maps = model(pixels)
            if canvas is None:
                canvas = _Canvas(maps, window, image.shape[1:], out, device)
            canvas.add(batch, maps)
            if progress is not None:
                progress(first + len(batch), len(places))
        assert canvas is not None  # an image of one pixel has one window
        return canvas.finish()


class _Span(NamedTuple):
    """A window along one axis: its first pixel, which may lie outside the image, and its weights, 0 out there."""

    start: int
    weights: Tensor


def _cover(length: int, window: int, stride: int, overlap: int, device: torch.device) -> list[_Span]:
    """Place windows along an axis, the last one with its margin on the image's end; weights sum to 1 on each pixel."""
    number = math.ceil(length / stride)
    margin = (window - stride) // 2
    if number == 1:
        starts = [-((window - length) // 2)]
    else:
        starts = [min(index * stride - margin, length - stride - margin) for index in range(number)]
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / max(overlap, 1))
    profile = np.ones(window)
    profile[:overlap] = ramp
    profile[window - overlap :] = ramp[::-1]

    total = np.zeros(length + 2 * window)  # with room for what lies outside, which counts for nothing
    for start in starts:
        total[start + window : start + 2 * window] += profile
    total[:window] = total[window + length :] = np.inf
    return [
        _Span(start, torch.from_numpy(profile / total[start + window : start + 2 * window]).float().to(device))
        for start in starts
    ]


def _windows(
    image: np.ndarray, rows: list[_Span], columns: list[_Span], window: int
) -> Iterator[Float32[np.ndarray, "c h w"]]:
    """Give the windows row by row, from one mirrored band of the image at a time."""
    left = columns[0].start
    mirrored = _mirror(np.arange(left, columns[-1].start + window), image.shape[2])
    for row in rows:
        inside = _mirror(np.arange(row.start, row.start + window), image.shape[1])
        # First the rows, then their columns: a memory map reads these rows and no others.
        with np.errstate(over="ignore"):  # becomes infinite, which the next line refuses
            band = image[:, inside][:, :, mirrored].astype(np.float32, copy=False)
        if not np.isfinite(band).all():
            bad = np.count_nonzero(~np.isfinite(band))
            raise ValueError(
                f"image: expected finite values, got {bad} that are not (NaN, infinite, or beyond float32) in "
                f"rows {inside.min()} to {inside.max()}; replace them first"
            )
        for column in columns:
            yield band[:, :, column.start - left : column.start - left + window]


def _mirror(positions: np.ndarray, length: int) -> np.ndarray:
    """Fold positions outside 0..length-1 back, as often as it takes; the border pixel itself is not repeated."""
    period = max(2 * (length - 1), 1)
    folded = positions % period
    return np.minimum(folded, period - folded) if length > 1 else np.zeros_like(positions)


class _Canvas:
    """Sums weighted maps; holds the rows that windows may still add to, and writes out those that none will."""

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
        """Add the maps of windows; each window row lies below the one before."""
        _check_maps(maps, (len(places), len(self._held), self._window, self._window))
        for (row, column), window_maps in zip(places, _array(maps.float()), strict=True):
            self._write_above(max(row.start, 0))
            weighted = window_maps * (_array(row.weights)[:, None] * _array(column.weights))
            top, bottom = max(row.start, 0), min(row.start + self._window, self._height)
            left, right = max(column.start, 0), min(column.start + self._window, self._width)
            _array(self._held)[:, top - self._top : bottom - self._top, left:right] += weighted[
                :, top - row.start : bottom - row.start, left - column.start : right - column.start
            ]

    def finish(self) -> np.ndarray:
        """Write out what is left, and return the whole."""
        self._write_above(self._height)
        return self._out

    def _write_above(self, row: int) -> None:
        number = row - self._top
        if number == 0:
            return
        done = self._held[:, :number].cpu().numpy()
        if not np.isfinite(done).all():
            raise ValueError(
                f"model: expected finite maps, got {np.count_nonzero(~np.isfinite(done))} values that are not in rows "
                f"{self._top} to {row - 1}"
            )
        self._out[:, self._top : row] = done
        rest = torch.zeros_like(self._held)
        _array(rest)[:, : self._window - number] = _array(self._held)[:, number:]
        self._held, self._top = rest, row


def _array(tensor: Tensor) -> Any:
    """Return a tensor in main memory as NumPy's array: torch would wake its threads for each window.

    With other work on the processor, that made blending 5 times slower; NumPy and torch read the same here.
    """
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _check(image: np.ndarray, model: object, *, window: int, overlap: int, stride: int, batch_size: int) -> None:
    if image.ndim != 3:
        hint = "; one channel goes in as image[None]" if image.ndim == 2 else ""
        raise ValueError(f"image: expected (c h w), got an array of shape {image.shape}{hint}")
    if image.size == 0:
        raise ValueError(f"image: expected at least one pixel, got an array of shape {image.shape}")
    if image.dtype.kind not in "biuf":
        raise ValueError(f"image: expected real numbers, got values of type {image.dtype}")
    if window < 1 or batch_size < 1:
        raise ValueError(f"window and batch_size: expected at least 1, got {window} and {batch_size}")
    if not 0 <= 2 * overlap <= window:
        raise ValueError(f"overlap: expected 0 to {window // 2} for windows of {window} px, got {overlap}")
    if not 1 <= stride <= window - overlap:
        raise ValueError(
            f"stride: expected 1 to {window - overlap} (window {window} px, overlap {overlap} px), got {stride}"
        )
    if isinstance(model, nn.Module) and model.training:
        raise ValueError(
            "model: in training mode, in which dropout and batch norm make maps depend on chance and on the batch; "
            "call model.eval() first"
        )


def _check_maps(maps: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(maps.shape) != expected:
        raise ValueError(f"model: expected maps (b k h w) of {expected}, got {tuple(maps.shape)}")


def _device_of(model: object) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
