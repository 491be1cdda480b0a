"""One augmented crop: a single affine map for image and cells, the target computed from the cells that came out.

Targets are never interpolated: cells are turned and scaled by nearest neighbour, over a region so much larger than
the crop that every cell of the crop is whole in it, and their maps are computed anew. So the target is what the
map of the whole turned image would be.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Integer, UInt8
from scipy import ndimage
from skimage.measure import label

from dinocell.finetune.config import AugmentConfig
from dinocell.labelled.distance import labels_to_distance
from dinocell.labelled.flows import labels_to_flows

# Of the region whose cells are transformed: twice this and the crop. Only a giant cell is larger than that.
_MAX_CONTEXT_PX = 384


class Crop(NamedTuple):
    """Grey levels 0 to 255 (still to be normalised) and the cells of a crop; ``context`` pixels around it are kept."""

    image: Float32[np.ndarray, "s s"]
    labels: Integer[np.ndarray, "t t"]
    context: int
    inverted: bool

    def distance(self) -> Float32[np.ndarray, "s s"]:
        """Return the distance map of the crop."""
        size = self.image.shape[0]
        whole = labels_to_distance(self.labels)
        return np.ascontiguousarray(whole[self.context : self.context + size, self.context : self.context + size])

    def flows(self) -> Float32[np.ndarray, "3 s s"]:
        """Return the flow maps of the crop: those of its whole cells; cells that lie outside cost nothing.

        A cell and its mirror image beyond the border have one number and, where they do not touch, a middle each.
        """
        size = self.image.shape[0]
        inner = np.s_[self.context : self.context + size, self.context : self.context + size]
        pieces = np.asarray(label(self.labels, connectivity=2), dtype=np.int32)  # type: ignore[no-untyped-call]
        is_seen = np.zeros(int(pieces.max(initial=0)) + 1, bool)
        is_seen[pieces[inner]] = True
        whole = labels_to_flows(np.where(is_seen[pieces], pieces, 0))
        return np.ascontiguousarray(whole[:, inner[0], inner[1]])


def cut(
    image: UInt8[np.ndarray, "h w"],
    labels: Integer[np.ndarray, "h w"],
    config: AugmentConfig,
    generator: np.random.Generator,
) -> Crop:
    """Draw and cut a crop of ``config.crop`` pixels; beyond the image's border its mirror image is seen.

    Parameters
    ----------
    image
        Equalised grey levels.
    labels
        Its cells.
    generator
        Source of every choice.
    """
    size = config.crop
    turn = math.radians(generator.uniform(-config.rotation_deg, config.rotation_deg))
    scale = generator.uniform(*config.scale)
    mirrored = generator.random() < config.flip
    inverted = bool(generator.random() < config.inversion)
    brightness = generator.uniform(*config.brightness)
    centre = _centre(labels, size / scale, config.with_cells, generator)
    context = min(_MAX_CONTEXT_PX, math.ceil(_largest_cell(labels) * scale))
    # From a pixel of the crop to a pixel of the image: about the crop's centre, turned, scaled, mirrored.
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if mirrored else 1.0, 1.0])
    pixels = _warped(image, linear, centre, size, cv2.INTER_LINEAR).astype(np.float32)
    levels = np.clip((255 - pixels if inverted else pixels) * np.float32(brightness), 0, 255)
    # OpenCV turns float32, which holds ids up to 16 million exactly.
    cells = _warped(labels.astype(np.float32), linear, centre, size + 2 * context, cv2.INTER_NEAREST).astype(np.int32)
    return Crop(image=_spoilt(levels, config, generator), labels=cells, context=context, inverted=inverted)


def plain(image: UInt8[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"], size: int) -> list[Crop]:
    """Cut an image into crops without augmentation, mirrored at the lower and right border, in reading order."""
    height, width = image.shape
    rows, columns = -(-height // size) * size - height, -(-width // size) * size - width
    whole = [
        cv2.copyMakeBorder(each, 0, rows, 0, columns, cv2.BORDER_REFLECT_101)
        for each in (image.astype(np.float32), labels.astype(np.float32))
    ]
    context = min(_MAX_CONTEXT_PX, math.ceil(_largest_cell(labels)))
    cells = cv2.copyMakeBorder(whole[1], context, context, context, context, cv2.BORDER_REFLECT_101).astype(np.int32)
    return [
        Crop(
            image=np.ascontiguousarray(whole[0][top : top + size, left : left + size]),
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


def _spoilt(
    levels: Float32[np.ndarray, "s s"], config: AugmentConfig, generator: np.random.Generator
) -> Float32[np.ndarray, "s s"]:
    """Blur, then add noise, as focus and then the camera do."""
    if config.blur_px > 0:
        levels = cv2.GaussianBlur(
            levels, (0, 0), max(generator.uniform(0, config.blur_px), 1e-3)
        )  # 0 is not for OpenCV
    if config.noise > 0:
        deviation = np.float32(255 * generator.uniform(0, config.noise))
        levels = np.clip(levels + deviation * generator.standard_normal(levels.shape, np.float32), 0, 255)
    return levels


def _centre(labels: np.ndarray, seen: float, with_cells: float, generator: np.random.Generator) -> np.ndarray:
    """Draw the middle of a crop that shows ``seen`` pixels of the image, as column and row of pixel centres."""
    sides = np.array(labels.shape[::-1])
    low = (np.minimum(seen, sides) - 1) / 2
    high = np.maximum(low, sides - 1 - low)
    anywhere: np.ndarray = generator.uniform(low, high)
    aims_at_cell = generator.random() < with_cells
    if not aims_at_cell:
        return anywhere
    # A pixel of a cell, by rejection: cells fill much of most images.
    shift = generator.uniform(-0.4, 0.4, 2) * seen
    for _ in range(32):
        row, column = (int(generator.integers(side)) for side in labels.shape)
        if labels[row, column]:
            aimed: np.ndarray = np.clip(np.array([column, row]) + shift, low, high)
            return aimed
    return anywhere


def _largest_cell(labels: np.ndarray) -> float:
    """Return the diagonal of the largest bounding box, in pixels."""
    boxes = [box for box in ndimage.find_objects(labels) if box is not None]
    return max((math.hypot(*(part.stop - part.start for part in box)) for box in boxes), default=0.0)
