"""An image in memory, and the mapping of its grey levels to 8 bits."""

import math
import struct
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

from dinocell.errors import ImageError, one_line

COLOURS = ("red", "green", "blue")
# An axis at least this long is rows, not channels: no microscope records images of fewer rows.
MAX_CHANNELS = 16
# Percentiles of a channel that are mapped to 0 and 1 before channels are averaged.
MEAN_PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    """One frame of an image file, with the file's values and type.

    Attributes
    ----------
    pixels
        In native byte order and C order: bool, any integer or any float.
    channel_names
        One name per channel, or empty if unknown. Colour files have ``red``, ``green``, ``blue`` (and ``alpha``, unless
        it is constant: such an alpha is dropped on reading).
    pixel_size_um
        Side of a pixel in micrometres; None if unknown or different along the two axes.
    """

    pixels: Shaped[np.ndarray, "c h w"]
    channel_names: tuple[str, ...] = ()
    pixel_size_um: float | None = None

    def __post_init__(self) -> None:
        assert len(self.channel_names) in (0, len(self.pixels)), "expected a name for every channel, or none"

    @property
    def is_colour(self) -> bool:
        """Whether the first three channels are red, green and blue."""
        return self.channel_names[:3] == COLOURS

    def select(self, channel: int | str) -> "Image":
        """Return one channel, by its index or its name; ``mean``, unless a channel has that name: see `mean`."""
        if channel == "mean" and "mean" not in self.channel_names:
            return self.mean()
        index = self.channel_names.index(channel) if channel in self.channel_names else channel
        if isinstance(index, str) or not 0 <= index < len(self.pixels):
            names = f": {', '.join(self.channel_names)}" if self.channel_names else ""
            raise ImageError(
                f"no channel {channel!r} in an image of {len(self.pixels)} channel(s){names} (the first is 0)"
            )
        return self._keep(slice(index, index + 1))

    def _keep(self, channels: slice) -> "Image":
        return replace(self, pixels=self.pixels[channels], channel_names=self.channel_names[channels])

    def mean(self) -> "Image":
        """Return the mean of the channels without alpha, each first scaled by its own percentiles to 0..1, float32.

        The percentiles are `MEAN_PERCENTILES`, those of pretraining's views: without them the brightest channel would
        dominate. An image of one channel, and a grey image stored as RGB, are returned unscaled.
        """
        image = self.grey().without_alpha()
        if len(image.pixels) == 1:
            return image
        total = np.zeros(image.pixels.shape[1:], np.float32)
        for plane in image.pixels:
            low, high = percentile_range(plane, *MEAN_PERCENTILES)
            scale = np.float32(1 / (high - low)) if high > low else np.float32(0)
            total += np.clip((plane.astype(np.float32) - np.float32(low)) * scale, 0, 1)
        return replace(image, pixels=(total / len(image.pixels))[None], channel_names=("mean",))

    def plane(self, channel: int | str | None = None) -> Shaped[np.ndarray, "h w"]:
        """Return one plane: the channel chosen as in `select`, or by default the `mean` of all channels."""
        return np.asarray((self.mean() if channel is None else self.select(channel)).pixels[0])

    def grey(self) -> "Image":
        """Return one channel if a grey image is stored as red = green = blue, else the image itself.

        Colours are not converted: an image with real colour keeps its channels. An alpha next to three equal planes is
        dropped with them.
        """
        if not self.is_colour:
            return self
        red, green, blue = self.pixels[:3]
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            return self
        return replace(self, pixels=self.pixels[:1], channel_names=())

    def without_alpha(self) -> "Image":
        """Return the image without an alpha as its last channel."""
        return self._keep(slice(-1)) if self.channel_names[-1:] == ("alpha",) else self


def square_pixel(across: float | None, down: float | None) -> float | None:
    """Return the side of a pixel; None if it is unknown, not positive and finite, or different along the two axes.

    Files of uncalibrated microscopes contain 0, infinity or NaN (also in OME-XML).
    """
    if across is None or down is None or not (0 < across < math.inf and abs(across - down) <= 0.001 * across):
        return None
    return float(across)


def is_constant(plane: Shaped[np.ndarray, "h w"]) -> bool:
    """Return whether all pixels are equal, as in an alpha channel without information."""
    return bool((plane == plane[0, 0]).all())


def native(pixels: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Return an array in native byte order and C order."""
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


# What parsers raise on damaged headers besides ValueError, RuntimeError and OSError, found by changing random bytes:
# tifffile, zarr and bioio use tags and attributes unchecked, Pillow raises SyntaxError, NumPy TokenError.
_HEADER_ERRORS = (
    *(TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    *(SyntaxError, struct.error, tokenize.TokenError),
)


@contextmanager
def header_errors() -> Iterator[None]:
    """Turn what parsers raise on damaged headers and metadata into ValueError."""
    try:
        yield
    except _HEADER_ERRORS as error:
        raise ValueError(one_line(error)) from error


def as_image(image: Shaped[np.ndarray, "..."]) -> Image:
    """Return an array as an image: (h w), (c h w) or (h w c); three channels, or four of 8 bit, are colours.

    Raise ImageError if it is empty, of another shape, or has too many channels.
    """
    shape = image.shape
    if image.ndim == 2:
        image = image[None]
    # Channels last: a short axis after a long one. A colour image may have few rows, but not so few columns.
    elif image.ndim == 3 and (shape[2] <= MAX_CHANNELS < shape[0] or (shape[2] in (3, 4) and shape[0] > 4)):
        image = np.moveaxis(image, 2, 0)
    if image.size == 0 or image.ndim != 3 or len(image) > MAX_CHANNELS:
        raise ImageError(
            f"expected an image (h w), (c h w) or (h w c) of at most {MAX_CHANNELS} channels, got an array of {shape}"
        )
    is_rgba = len(image) == 4 and image.dtype == np.uint8
    names = (*COLOURS, "alpha") if is_rgba else COLOURS if len(image) == 3 else ()
    return Image(pixels=image, channel_names=names)


class Range(NamedTuple):
    """The grey levels that are mapped to black and white."""

    low: float
    high: float


def percentile_range(pixels: Shaped[np.ndarray, "..."], low: int | float, high: int | float) -> Range:
    """Return the grey levels at two percentiles (0 to 100) of all pixels, interpolated as by ``numpy.percentile``.

    Raise ImageError if a value is not finite, or there are no pixels.
    """
    pixels = _checked(pixels)
    if pixels.dtype in (np.uint8, np.uint16):
        counts = np.bincount(pixels.ravel()).cumsum()  # 20 times faster than sorting 4 megapixels
        ranks = np.array([low, high]) / 100 * (pixels.size - 1)
        below, above = (np.searchsorted(counts, to_rank(ranks), side="right") for to_rank in (np.floor, np.ceil))
        return Range(*(below + (above - below) * (ranks - np.floor(ranks))).tolist())
    if pixels.dtype.kind in "iu" or pixels.dtype == np.float16:
        pixels = pixels.astype(np.float64)  # differences of levels may overflow these types
    return Range(*(float(level) for level in np.percentile(pixels, (low, high))))


def to_uint8(pixels: Shaped[np.ndarray, "*shape"], low: int | float, high: int | float) -> UInt8[np.ndarray, "*shape"]:
    """Map grey levels linearly: ``low`` and below to 0, ``high`` and above to 255, rounded to the nearest.

    If ``low`` equals ``high``, as in a constant image, values up to it become 0 and all others 255.

    Raise ImageError if a value is not finite.
    """
    assert -math.inf < low <= high < math.inf, f"expected low <= high, got {low} and {high}"
    pixels = _checked(pixels)
    if pixels.dtype in (np.uint8, np.uint16):
        # A lookup table of all levels, instead of arithmetic on every pixel.
        table = _mapped(np.arange(np.iinfo(pixels.dtype).max + 1, dtype=np.float64), low, high)
        return np.asarray(table[pixels])
    return _mapped(pixels.astype(np.float64), low, high)


def _mapped(levels: Shaped[np.ndarray, "*s"], low: int | float, high: int | float) -> UInt8[np.ndarray, "*s"]:
    if low == high:
        return np.where(levels > high, 255, 0).astype(np.uint8)
    return np.rint(np.clip((levels - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _checked(pixels: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Return pixels, bool as uint8; raise ImageError if there are none, or values that are not finite."""
    bad = int(pixels.size - np.isfinite(pixels).sum()) if pixels.dtype.kind == "f" else 0
    if bad or pixels.size == 0:
        raise ImageError(
            f"{bad} of {pixels.size} values are not finite (NaN or infinite); replace them first"
            if bad
            else "the image has no pixels"
        )
    return pixels.view(np.uint8) if pixels.dtype == np.bool_ else pixels
