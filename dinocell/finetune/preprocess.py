"""From an image to the segmenter's input: the same in training and inference, with settings stored in its file.

The whole image is prepared at once, never tile by tile: a tile without cells would otherwise be stretched to full
contrast, and the same cell would look different from tile to tile.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Real, Shaped, UInt8

from dinocell.errors import ImageError
from dinocell.finetune.targets import TARGETS, Postprocessing, TargetName
from dinocell.images.image import as_image, percentile_range, to_uint8

# Pixel sizes that differ by less are taken as equal: resampling would cost more than it gains.
_SAME_SCALE = 0.02
# A larger factor is a wrong unit rather than another magnification, and may need more memory than there is.
_MAX_SCALE = 16


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings:
    """What a segmenter needs besides its tensors; stored in its file.

    Attributes
    ----------
    convention
        ``standardised``: zero mean and unit variance over the image; ``unit``: 0 to 1. The backbone's own.
    percentiles
        Grey levels at these percentiles of the image become black and white.
    clahe_clip, clahe_tile_px
        Contrast-limited adaptive histogram equalisation (OpenCV): clip limit, 0 for none, and the side of a tile, which
        is fixed in pixels so that it means the same in every image (SAMCell: 1.0 and 32 px of its 256 px windows).
    pixel_size_um
        Pixel size of the training images; None if they differ or it is unknown.
    window_px
        Side of the crops in training, and so of the tiles in which images are segmented: a network that was trained on
        crops of 128 px predicts other maps in tiles of 256 px.
    target
        What the maps are: distance to the cell's boundary, or flows and the cell probability.
    cells_max, cell_fill, merge_px, restore_border, min_area_px
        Postprocessing of distance maps (`dinocell.eval.segmentation.watershed.distance_to_labels`): SAMCell's
        thresholds unless the training found better ones.
    probability, flow_error
        Postprocessing of flows (`dinocell.eval.segmentation.flows.flows_to_labels`, which uses ``min_area_px`` too):
        the paper's thresholds unless the training found better ones.
    trained_on
        Names of the training sets, for people to read.
    """

    convention: Literal["standardised", "unit"] = "standardised"
    percentiles: tuple[float, float] = (0.1, 99.9)
    clahe_clip: float = 1.0
    clahe_tile_px: int = 32
    pixel_size_um: float | None = None
    window_px: int = 256
    target: TargetName = "distance"
    cells_max: float = 0.47
    cell_fill: float = 0.09
    merge_px: float | None = 3.0
    restore_border: bool = True
    min_area_px: int = 0
    probability: float = 0.5
    flow_error: float = 0.4
    trained_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.percentiles
        valid = {
            "percentiles: expected 0 <= low < high <= 100": 0 <= low < high <= 100,
            "window_px: expected at least 16": self.window_px >= 16,
            "clahe_clip: expected 0 (off) or more": self.clahe_clip >= 0,
            "clahe_tile_px: expected at least 2": self.clahe_tile_px >= 2,
        }
        for expected, is_valid in valid.items():
            if not is_valid:
                raise ValueError(f"{expected}, got {getattr(self, expected.partition(':')[0])}")
        for target in TARGETS.values():  # a file holds the parameters of both
            self._postprocessing(target.postprocessing)

    @property
    def postprocessing(self) -> Postprocessing:
        """How this segmenter's maps become labels."""
        return self._postprocessing(TARGETS[self.target].postprocessing)

    def _postprocessing(self, kind: type[Postprocessing]) -> Postprocessing:
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})


def prepare(
    image: Shaped[np.ndarray, "..."],
    settings: SegmenterSettings,
    *,
    channel: int | str | None = None,
    pixel_size_um: int | float | None = None,
) -> Float32[np.ndarray, "rows columns"]:
    """Return an image of any real type and range as the segmenter's input.

    One plane is chosen and resampled to the pixel size of the training. Grey levels are stretched between two
    percentiles and rounded to 8 bits, equalised, then brought to the convention. A constant image becomes 0.

    Parameters
    ----------
    image
        (h w), (c h w) or (h w c).
    channel
        The channel to use; None: the mean of all, each rescaled to its own range first.
    pixel_size_um
        Pixel size of the image; None: the image is not resampled.

    Raises
    ------
    ImageError
        If the image is empty or of another shape, a value is not finite, there is no such channel, or the pixel size
        is out of proportion to that of the training.
    """
    grey = to_grey(image, settings, channel=channel, pixel_size_um=pixel_size_um)
    return IntensityRange.of(grey, settings).apply(grey)


def to_grey(
    image: Shaped[np.ndarray, "..."],
    settings: SegmenterSettings,
    *,
    channel: int | str | None = None,
    pixel_size_um: int | float | None = None,
) -> UInt8[np.ndarray, "rows columns"]:
    """Do the part of `prepare` up to the equalised 8-bit grey levels, on which training augments."""
    if image.dtype.kind not in "biuf":
        raise ImageError(f"expected real numbers, got values of type {image.dtype}")
    scale = _scale(pixel_size_um, settings)
    plane = as_image(image).plane(channel)
    if scale != 1:
        height, width = (max(1, round(side * scale)) for side in plane.shape)
        plane = resize(plane.astype(np.float32), (height, width))
    grey = to_uint8(plane, *percentile_range(plane, *settings.percentiles))
    return equalise(grey, settings) if grey.any() else grey  # CLAHE would turn a constant image's 0 into 0.008


def resize(plane: Float32[np.ndarray, "h w"], size: tuple[int, int]) -> Float32[np.ndarray, "rows columns"]:
    """Resample a plane to (rows, columns): averaged when it shrinks, bilinear when it grows."""
    method = cv2.INTER_AREA if size[0] < plane.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(plane, (size[1], size[0]), interpolation=method))


def _scale(pixel_size_um: int | float | None, settings: SegmenterSettings) -> float:
    """Return the factor by which an image is resized to the pixel size of the training."""
    if pixel_size_um is None:
        return 1.0
    trained = settings.pixel_size_um
    scale = 1.0 if trained is None else float(pixel_size_um) / trained
    if not (0 < pixel_size_um < math.inf and 1 / _MAX_SCALE <= scale <= _MAX_SCALE):
        raise ImageError(
            f"pixel_size_um: got {pixel_size_um:g} um, expected more than 0 and within a factor of {_MAX_SCALE} of the "
            f"training images' ({trained or 'unknown'}); is it in another unit? Set it with --pixel-size"
        )
    return 1.0 if abs(scale - 1) < _SAME_SCALE else scale


def equalise(image: UInt8[np.ndarray, "h w"], settings: SegmenterSettings) -> UInt8[np.ndarray, "h w"]:
    """Apply CLAHE in tiles of a fixed number of pixels; the image is mirrored up to whole tiles."""
    if settings.clahe_clip == 0:
        return image
    side = settings.clahe_tile_px
    height, width = image.shape
    rows, columns = -(-height // side), -(-width // side)
    padded = cv2.copyMakeBorder(image, 0, rows * side - height, 0, columns * side - width, cv2.BORDER_REFLECT_101)
    clahe = cv2.createCLAHE(clipLimit=settings.clahe_clip, tileGridSize=(columns, rows))
    return np.asarray(clahe.apply(padded)[:height, :width])


class IntensityRange(NamedTuple):
    """The grey level that becomes 0, and the difference of grey levels that becomes 1."""

    zero: float
    unit: float

    @classmethod
    def of(cls, grey: UInt8[np.ndarray, "h w"], settings: SegmenterSettings) -> "IntensityRange":
        """Return the range that brings 8-bit grey levels to the convention of the settings."""
        if settings.convention == "unit":
            return cls(0.0, 255.0)
        counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
        levels = np.arange(256, dtype=np.float64)
        mean = float(counts @ levels) / grey.size
        std = float(np.sqrt(counts @ (levels - mean) ** 2 / grey.size))
        return cls(mean, std or 1.0)

    def apply(self, grey: Real[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
        """Map grey levels."""
        return (grey.astype(np.float32) - np.float32(self.zero)) * np.float32(1 / self.unit)

    def inverted(self, settings: SegmenterSettings) -> "IntensityRange":
        """Return the range for the image with inverted contrast."""
        return self if settings.convention == "unit" else self._replace(zero=255 - self.zero)
