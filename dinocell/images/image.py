"""One image in memory, and how its grey levels become 8 bits."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8

from dinocell.errors import ImageError

COLOURS = ("red", "green", "blue")
# Channels are told from rows by their number: no microscope takes images of fewer rows.
MOST_CHANNELS = 16
# Percentiles of a channel that become 0 and 1 before channels are averaged.
MEAN_PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    """One frame of an image file, with the values and the type that the file holds.

    Attributes
    ----------
    pixels
        In native byte order and C order: bool, any integer or any float.
    channel_names
        One name a channel, or empty if the file does not say. Colour files say ``red``, ``green``, ``blue`` (and
        ``alpha``, where it says something: an alpha that is the same everywhere is dropped on reading).
    pixel_size_um
        Side of a pixel in micrometres; None if the file does not say, or says it differently along the two axes.
    """

    pixels: Shaped[np.ndarray, "c h w"]
    channel_names: tuple[str, ...] = ()
    pixel_size_um: float | None = None

    def __post_init__(self) -> None:
        if self.channel_names and len(self.channel_names) != len(self.pixels):
            raise ValueError(
                f"channel_names: expected {len(self.pixels)} names or none, got {', '.join(self.channel_names)}"
            )

    @property
    def is_colour(self) -> bool:
        """Whether the first three channels are red, green and blue."""
        return self.channel_names[:3] == COLOURS

    def select(self, channel: int | str) -> "Image":
        """Return one channel, by its number (from 0) or its name; ``mean``, where none is called so: see `mean`.

        Raises
        ------
        ImageError
            If there is no such channel.
        """
        if channel == "mean" and "mean" not in self.channel_names:
            return self.mean()
        known = f"{len(self.pixels)} channel(s)" + (f": {', '.join(self.channel_names)}" if self.channel_names else "")
        if isinstance(channel, str):
            if channel not in self.channel_names:
                raise ImageError(f"no channel {channel!r} in an image of {known}")
            channel = self.channel_names.index(channel)
        if not 0 <= channel < len(self.pixels):
            raise ImageError(f"no channel {channel} in an image of {known} (the first is 0)")
        return replace(
            self, pixels=self.pixels[channel : channel + 1], channel_names=self.channel_names[channel : channel + 1]
        )

    def mean(self) -> "Image":
        """Return the mean of the channels (alpha aside), each first mapped from its own percentiles to 0 to 1, float32.

        The percentiles are `MEAN_PERCENTILES`, those of pretraining's views: without them the brightest stain would be
        all that is seen. One channel, and a grey image stored as RGB, stay as they are.
        """
        image = self.grey()
        if image.channel_names[-1:] == ("alpha",):
            image = replace(image, pixels=image.pixels[:-1], channel_names=image.channel_names[:-1])
        if len(image.pixels) == 1:
            return image
        total = np.zeros(image.pixels.shape[1:], np.float32)
        for plane in image.pixels:
            low, high = percentile_range(plane, *MEAN_PERCENTILES)
            scale = np.float32(1 / (high - low)) if high > low else np.float32(0)
            total += np.clip((plane.astype(np.float32) - np.float32(low)) * scale, 0, 1)
        return replace(image, pixels=(total / len(image.pixels))[None], channel_names=("mean",))

    def plane(self, channel: int | str | None = None) -> Shaped[np.ndarray, "h w"]:
        """Return the one plane that is looked at: a channel, see `select`, or else the `mean` of all.

        Raises
        ------
        ImageError
            If there is no such channel.
        """
        plane: np.ndarray = (self.mean() if channel is None else self.select(channel)).pixels[0]
        return plane

    def grey(self) -> "Image":
        """Return one channel where a grey image was stored as red = green = blue; any other image as it is.

        Nothing is lost and nothing is weighted: an image with real colour keeps its channels, and it is the caller who
        decides what to do with them. An alpha beside three equal planes goes with them.
        """
        if not self.is_colour:
            return self
        red, green, blue = self.pixels[:3]
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            return self
        return replace(self, pixels=self.pixels[:1], channel_names=())


def square_pixel(across: float | None, down: float | None) -> float | None:
    """Return the side of a pixel; None where it is not known, not a positive number, or not the same along both axes.

    Files say 0, infinite or NaN (in OME's XML too) where a microscope was not calibrated.
    """
    if across is None or down is None or not (0 < across < math.inf and abs(across - down) <= 0.001 * across):
        return None
    return float(across)


def as_image(image: Shaped[np.ndarray, "..."]) -> Image:
    """Return an array as an image: (h w), (c h w) or (h w c); three channels, or four of 8 bit, are colours.

    Raises
    ------
    ImageError
        If it is empty, of another shape, or has too many channels.
    """
    if image.size == 0 or image.ndim not in (2, 3):
        raise ImageError(f"expected an image (h w), (c h w) or (h w c), got an array of shape {image.shape}")
    if image.ndim == 2:
        return Image(pixels=image[None])
    rows, _, last = image.shape
    # A colour image may be as low as others have channels; none with so many channels is 3 or 4 pixels wide.
    if last <= MOST_CHANNELS < rows or (last in (3, 4) and rows > 4):
        image = np.moveaxis(image, 2, 0)
    if image.shape[0] > MOST_CHANNELS:
        raise ImageError(f"expected at most {MOST_CHANNELS} channels, got an array of shape {image.shape}")
    is_rgba = len(image) == 4 and image.dtype == np.uint8
    names = (*COLOURS, "alpha") if is_rgba else COLOURS if len(image) == 3 else ()
    return Image(pixels=image, channel_names=names)


@runtime_checkable
class Frames(Protocol):
    """An open image file: its frames, read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image: ...

    def close(self) -> None:
        """Close the file."""


class Range(NamedTuple):
    """The grey levels that become black and white."""

    low: float
    high: float


def percentile_range(pixels: Shaped[np.ndarray, "..."], low: int | float, high: int | float) -> Range:
    """Return the grey levels at two percentiles (0 to 100) of all pixels, as ``numpy.percentile`` interpolates them.

    Raises
    ------
    ImageError
        If a value is not finite, or if there is none.
    """
    if not 0 <= low <= high <= 100:
        raise ValueError(f"percentiles: expected 0 <= low <= high <= 100, got {low} and {high}")
    if pixels.size == 0:
        raise ImageError("an image without pixels has no grey levels")
    if pixels.dtype == np.bool_:
        pixels = pixels.view(np.uint8)
    if pixels.dtype in (np.uint8, np.uint16):
        counts = np.bincount(pixels.ravel()).cumsum()  # 20 times faster than sorting 4 megapixels
        return Range(*(_level_of(counts, pixels.size, percent) for percent in (low, high)))
    _check_finite(pixels)
    if pixels.dtype.kind in "iu" or pixels.dtype == np.float16:
        pixels = pixels.astype(np.float64)  # NumPy takes differences of levels, which such types may not hold
    return Range(*(float(level) for level in np.percentile(pixels, (low, high))))


def to_uint8(pixels: Shaped[np.ndarray, "*shape"], low: int | float, high: int | float) -> UInt8[np.ndarray, "*shape"]:
    """Map grey levels linearly: ``low`` and below to 0, ``high`` and above to 255, rounded to the nearest.

    Where ``low`` equals ``high``, as in a constant image, everything up to it is 0 and everything above is 255.

    Raises
    ------
    ImageError
        If a value is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"range: expected low <= high, got {low} and {high}")
    if pixels.dtype == np.bool_:
        pixels = pixels.view(np.uint8)
    if pixels.dtype in (np.uint8, np.uint16):
        table = _mapped(np.arange(np.iinfo(pixels.dtype).max + 1, dtype=np.float64), low, high)
        return np.asarray(table[pixels])
    _check_finite(pixels)
    return _mapped(pixels.astype(np.float64), low, high)


def _mapped(levels: np.ndarray, low: int | float, high: int | float) -> np.ndarray:
    if low == high:
        return np.where(levels > high, 255, 0).astype(np.uint8)
    return np.rint(np.clip((levels - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _level_of(counts: np.ndarray, total: int, percent: float) -> float:
    """Return the percentile from a cumulative histogram: between the two nearest ranks, linearly."""
    rank = percent / 100 * (total - 1)
    below = int(np.searchsorted(counts, math.floor(rank), side="right"))
    above = int(np.searchsorted(counts, math.ceil(rank), side="right"))
    return below + (above - below) * (rank - math.floor(rank))


def _check_finite(pixels: np.ndarray) -> None:
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        bad = int(pixels.size - np.isfinite(pixels).sum())
        raise ImageError(f"{bad} of {pixels.size} values are not finite (NaN or infinite); replace them first")
