"""From an image to what the segmenter sees: the same in training and in use, and stored with the weights.

The whole image is treated at once, never a window by itself: a window without cells would otherwise be stretched to
full contrast, and the same cell would look different from window to window.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Real, Shaped, UInt8

from dinocell.errors import ImageError
from dinocell.images.image import percentile_range, to_uint8

Target = Literal["distance", "flows"]


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings:
    """What a segmenter needs besides its tensors; stored in its file.

    Attributes
    ----------
    convention
        ``standardised``: mean 0 and deviation 1 over the image; ``unit``: 0 to 1. The backbone's own.
    percentiles
        Grey levels at these percentiles of the image become black and white.
    clahe_clip, clahe_tile_px
        Contrast-limited adaptive histogram equalisation (OpenCV): clip limit, 0 for none, and the side of a tile, which
        is fixed in pixels so that it means the same in every image (SAMCell: 1.0 and 32 px of its 256 px windows).
    pixel_size_um
        Side of a pixel of the training images; None if they differed or did not say.
    window_px
        Side of the crops of the training, and so of the windows in which images are segmented: a network that knows
        crops of 128 px draws other maps in windows of 256.
    target
        What the maps are: distance to the cell's boundary, or flows and the chance of a cell.
    cells_max, cell_fill, merge_px, restore_border, min_area_px
        How maps become cells (`dinocell.eval.segmentation.watershed.distance_to_labels`): SAMCell's thresholds unless
        the training found better ones.
    probability, flow_error
        How flows become cells (`dinocell.eval.segmentation.flows.flows_to_labels`, which takes ``min_area_px`` too):
        the paper's thresholds unless the training found better ones. Only for target ``flows``, as those above for
        ``distance``.
    trained_on
        Names of the training sets, for people to read.
    """

    convention: Literal["standardised", "unit"] = "standardised"
    percentiles: tuple[float, float] = (0.1, 99.9)
    clahe_clip: float = 1.0
    clahe_tile_px: int = 32
    pixel_size_um: float | None = None
    window_px: int = 256
    target: Target = "distance"
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
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles: expected 0 <= low < high <= 100, got {low} and {high}")
        if self.window_px < 16:
            raise ValueError(f"window_px: expected at least 16, got {self.window_px}")
        if self.clahe_clip < 0 or self.clahe_tile_px < 2:
            raise ValueError(
                f"clahe_clip: expected 0 (off) or more, got {self.clahe_clip}; "
                f"clahe_tile_px: expected at least 2, got {self.clahe_tile_px}"
            )
        if not 0 <= self.cell_fill <= self.cells_max < 1:
            raise ValueError(
                f"expected 0 <= cell_fill <= cells_max < 1, got cell_fill {self.cell_fill}, cells_max {self.cells_max}"
            )
        if not 0 <= self.probability < 1 or not self.flow_error > 0:
            raise ValueError(
                f"expected 0 <= probability < 1 and flow_error > 0, got {self.probability} and {self.flow_error}"
            )


def prepare(image: Shaped[np.ndarray, "h w"], settings: SegmenterSettings) -> Float32[np.ndarray, "h w"]:
    """Return an image of any real type and range as the segmenter's input.

    Grey levels are stretched between two percentiles and rounded to 8 bits, equalised, then brought to the convention.
    A constant image becomes 0.

    Raises
    ------
    ImageError
        If the image is empty or a value is not finite.
    """
    if image.dtype.kind not in "biuf":
        raise ImageError(f"expected real numbers, got values of type {image.dtype}")
    grey = grey_levels(image, settings)
    return levels_of(grey, settings).apply(grey)


def grey_levels(image: Shaped[np.ndarray, "h w"], settings: SegmenterSettings) -> UInt8[np.ndarray, "h w"]:
    """Stretch grey levels between the two percentiles, round them to 8 bits, and equalise them.

    Raises
    ------
    ImageError
        If the image is empty or a value is not finite.
    """
    low, high = percentile_range(image, *settings.percentiles)
    grey = to_uint8(image, low, high)
    return equalised(grey, settings) if grey.any() else grey  # equalisation would lift a constant image: 0.008, not 0


def equalised(image: UInt8[np.ndarray, "h w"], settings: SegmenterSettings) -> UInt8[np.ndarray, "h w"]:
    """Apply CLAHE in tiles of a fixed number of pixels; the image is mirrored up to whole tiles."""
    if settings.clahe_clip == 0:
        return image
    side = settings.clahe_tile_px
    height, width = image.shape
    rows, columns = -(-height // side), -(-width // side)
    padded = cv2.copyMakeBorder(image, 0, rows * side - height, 0, columns * side - width, cv2.BORDER_REFLECT_101)
    clahe = cv2.createCLAHE(clipLimit=settings.clahe_clip, tileGridSize=(columns, rows))
    return np.asarray(clahe.apply(padded)[:height, :width])


class Levels(NamedTuple):
    """The grey level that becomes 0, and the step that becomes 1."""

    zero: float
    unit: float

    def apply(self, image: Real[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
        """Map grey levels."""
        return (image.astype(np.float32) - np.float32(self.zero)) * np.float32(1 / self.unit)


def levels_of(image: UInt8[np.ndarray, "h w"], settings: SegmenterSettings) -> Levels:
    """Return how 8-bit grey levels come to the convention; a constant image becomes 0 (``standardised``)."""
    if settings.convention == "unit":
        return Levels(0.0, 255.0)
    counts = np.bincount(image.ravel(), minlength=256).astype(np.float64)
    grey = np.arange(256, dtype=np.float64)
    mean = float(counts @ grey) / image.size
    deviation = float(np.sqrt(counts @ (grey - mean) ** 2 / image.size))
    return Levels(mean, deviation or 1.0)
