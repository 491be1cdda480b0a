"""One augmented crop: a single affine map for image and labels, the target computed from the transformed labels.

Targets are never interpolated: labels are transformed by nearest neighbour, over a region large enough to contain every
cell of the crop completely, and their maps are recomputed. So the target equals the map of the whole transformed image.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Integer, UInt8
from scipy import ndimage

from dinocell.finetune.config import AugmentConfig
from dinocell.finetune.targets import Target

# Maximum margin around a crop in which labels are transformed too. Only a giant cell is larger than that.
_MAX_CONTEXT_PX = 384


class Crop(NamedTuple):
    """Grey levels 0 to 255 (not yet normalised) and labels, which extend ``context`` pixels beyond the crop."""

    image: Float32[np.ndarray, "s s"]
    labels: Integer[np.ndarray, "t t"]
    context: int
    inverted: bool

    def encode(self, target: Target) -> Float32[np.ndarray, "k s s"]:
        """Return the target maps of the crop."""
        inner = slice(self.context, self.context + self.image.shape[0])
        return target.encode(self.labels, (inner, inner))


def random_crop(
    image: UInt8[np.ndarray, "h w"],
    labels: Integer[np.ndarray, "h w"],
    config: AugmentConfig,
    generator: np.random.Generator,
) -> Crop:
    """Draw a crop of ``config.crop`` pixels from equalised grey levels; the image is mirrored beyond its border."""
    size = config.crop
    angle = math.radians(generator.uniform(-config.rotation_deg, config.rotation_deg))
    scale = generator.uniform(*config.scale)
    mirrored = generator.random() < config.flip
    inverted = bool(generator.random() < config.invert_contrast)
    brightness = generator.uniform(*config.brightness)
    centre = _centre(labels, size / scale, config.with_cells, generator)
    context = min(_MAX_CONTEXT_PX, math.ceil(_largest_cell(labels) * scale))
    # The affine map from a pixel of the crop to a pixel of the image, about the crop's centre: flip, rotate, scale.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if mirrored else 1.0, 1.0])
    pixels = _warped(image, linear, centre, size, cv2.INTER_LINEAR).astype(np.float32)
    levels = np.clip((255 - pixels if inverted else pixels) * np.float32(brightness), 0, 255)
    # OpenCV warps float32, which holds ids up to 16 million exactly.
    cells = _warped(labels.astype(np.float32), linear, centre, size + 2 * context, cv2.INTER_NEAREST).astype(np.int32)
    return Crop(image=_blur_and_add_noise(levels, config, generator), labels=cells, context=context, inverted=inverted)


def tile_image(image: UInt8[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"], size: int) -> list[Crop]:
    """Split an image into crops without augmentation, in reading order; mirrored at the lower and right border."""
    height, width = image.shape
    rows, columns = -(-height // size) * size - height, -(-width // size) * size - width
    padded, padded_labels = (
        cv2.copyMakeBorder(plane.astype(np.float32), 0, rows, 0, columns, cv2.BORDER_REFLECT_101)
        for plane in (image, labels)
    )
    margin = (min(_MAX_CONTEXT_PX, math.ceil(_largest_cell(labels))),) * 4
    context = margin[0]
    cells = cv2.copyMakeBorder(padded_labels, *margin, cv2.BORDER_REFLECT_101).astype(np.int32)
    return [
        Crop(
            image=np.ascontiguousarray(padded[top : top + size, left : left + size]),
            labels=np.ascontiguousarray(cells[top : top + size + 2 * context, left : left + size + 2 * context]),
            context=context,
            inverted=False,
        )
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]


def _warped(source: np.ndarray, linear: np.ndarray, centre: np.ndarray, size: int, interpolation: int) -> np.ndarray:
    offset = centre - linear @ np.full(2, (size - 1) / 2)
    matrix = np.concatenate([linear, offset[:, None]], axis=1)
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(source, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101))


def _blur_and_add_noise(
    levels: Float32[np.ndarray, "s s"], config: AugmentConfig, generator: np.random.Generator
) -> Float32[np.ndarray, "s s"]:
    """Blur, as a lens out of focus does, then add the noise of the camera."""
    if config.blur_px > 0:
        sigma = max(generator.uniform(0, config.blur_px), 1e-3)  # OpenCV does not accept 0
        levels = cv2.GaussianBlur(levels, (0, 0), sigma)
    if config.noise > 0:
        std = np.float32(255 * generator.uniform(0, config.noise))
        levels = np.clip(levels + std * generator.standard_normal(levels.shape, np.float32), 0, 255)
    return levels


def _centre(labels: np.ndarray, seen: float, with_cells: float, generator: np.random.Generator) -> np.ndarray:
    """Draw the centre (column, row) of a crop that covers ``seen`` pixels of the image."""
    sides = np.array(labels.shape[::-1])
    low = (np.minimum(seen, sides) - 1) / 2
    high = np.maximum(low, sides - 1 - low)
    anywhere = np.asarray(generator.uniform(low, high))
    if generator.random() >= with_cells:
        return anywhere
    # Centre on a pixel of a cell, shifted at random. Rejection sampling: cells fill much of most images.
    shift = generator.uniform(-0.4, 0.4, 2) * seen
    for _ in range(32):
        row, column = (int(generator.integers(side)) for side in labels.shape)
        if labels[row, column]:
            return np.asarray(np.clip(np.array([column, row]) + shift, low, high))
    return anywhere


def _largest_cell(labels: np.ndarray) -> float:
    """Return the diagonal of the largest bounding box, in pixels."""
    boxes = [box for box in ndimage.find_objects(labels) if box is not None]
    return max((math.hypot(*(side.stop - side.start for side in box)) for box in boxes), default=0.0)
