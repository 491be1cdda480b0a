"""Labelled sets as a stream of crops: the order of images, crops as network input and target, and the loader.

A crop depends only on the seed and its number in the run: neither the workers nor the number of ranks change it, and a
run that resumes at a step gets the same crops as one that was not interrupted.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Integer, UInt8
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinocell.finetune.config import AugmentConfig
from dinocell.finetune.preprocess import IntensityRange, SegmenterSettings, to_grey
from dinocell.finetune.sets import ImageIndex, Split
from dinocell.finetune.targets import TARGETS, Target
from dinocell.labelled.dataset import LabelledImage

# --- augmentation ---------------------------------------------------------------------------------------------------
#
# One augmented crop: a single affine map for image and labels, the target computed from the transformed labels.
#
# Targets are never interpolated: labels are transformed by nearest neighbour, over a region large enough to contain
# every
# cell of the crop completely, and their maps are recomputed. So the target equals the map of the whole transformed
# image.

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


# Prepared images that a worker caches: a small set is prepared only once.
_CACHED_IMAGES = 64


class Batch(NamedTuple):
    """Crops as network input, and their target maps."""

    images: Float[Tensor, "b 1 s s"]
    targets: Float[Tensor, "b k s s"]


class CropDataset(Dataset[Batch]):
    """The crops of a run; crop ``n`` is the same on every rank and worker, and after a restart.

    Parameters
    ----------
    weights
        Share of each set; None: in proportion to its number of images.
    crops_per_image
        Crops per image and epoch; None: enough to cover the median image once.
    """

    def __init__(
        self,
        split: Split,
        settings: SegmenterSettings,
        augment: AugmentConfig,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        crops_per_image: int | None = None,
    ) -> None:
        self._split, self._settings, self._augment, self._seed = split, settings, augment, seed
        members: dict[int, list[ImageIndex]] = {}
        for index in split.training:
            members.setdefault(index.data_set, []).append(index)
        self._members = list(members.values())
        if crops_per_image is None:
            sides = [split.sets[index.data_set][index.image].labels.shape for index in split.training[:16]]
            area = float(np.median([height * width for height, width in sides]))
            crops_per_image = max(1, round(area / augment.crop**2))
        total = crops_per_image * len(split.training)
        shares = np.array([len(images) for images in self._members] if weights is None else list(weights), float)
        self._quotas = np.maximum(1, np.rint(total * shares / shares.sum())).astype(int)
        self._prepare = lru_cache(maxsize=_CACHED_IMAGES)(self._prepare_uncached)

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker starts with an empty cache; the sets open their files again.
        return {name: value for name, value in vars(self).items() if name != "_prepare"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare = lru_cache(maxsize=_CACHED_IMAGES)(self._prepare_uncached)

    @property
    def epoch_length(self) -> int:
        """Number of crops in an epoch."""
        return int(self._quotas.sum())

    def __getitem__(self, number: int) -> Batch:
        image, labels, intensities = self._prepare(self.image_of(number))
        generator = np.random.default_rng([self._seed, 1, number])
        return to_batch(random_crop(image, labels, self._augment, generator), intensities, self._settings)

    def image_of(self, number: int) -> ImageIndex:
        """Return the image that a crop is taken from; every image of a set is used once before any is used again."""
        epoch, within = divmod(number, self.epoch_length)
        # Within an epoch, the slots of all sets are shuffled together.
        slot = int(_shuffled(self._seed, 2, epoch, self.epoch_length)[within])
        data_set = int(np.searchsorted(np.cumsum(self._quotas), slot, side="right"))
        # The slot's place among all slots of its set in the run gives the pass over the set and the image in it.
        nth = epoch * int(self._quotas[data_set]) + slot - int(self._quotas[:data_set].sum())
        members = self._members[data_set]
        turn, index = divmod(nth, len(members))
        return members[int(_shuffled(self._seed, 3 + data_set, turn, len(members))[index])]

    def _prepare_uncached(
        self, index: ImageIndex
    ) -> tuple[UInt8[np.ndarray, "h w"], Int32[np.ndarray, "h w"], IntensityRange]:
        return prepare_labelled(self._split.sets[index.data_set][index.image], self._settings)


@lru_cache(maxsize=16)
def _shuffled(seed: int, stream: int, turn: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, turn]).permutation(length)


def prepare_labelled(
    image: LabelledImage, settings: SegmenterSettings
) -> tuple[UInt8[np.ndarray, "h w"], Int32[np.ndarray, "h w"], IntensityRange]:
    """Return equalised grey levels, labels, and the intensity range of the whole image.

    Labels keep their ids unless these exceed the number of pixels: crops are warped as float32, which holds integers up
    to 16 million exactly.
    """
    grey = to_grey(np.asarray(image.pixels), settings)
    labels = np.asarray(image.labels)
    if labels.max() > labels.size:
        labels = np.unique(np.append(labels, labels.dtype.type(0)), return_inverse=True)[1][:-1].reshape(labels.shape)
    return grey, np.ascontiguousarray(labels, dtype=np.int32), IntensityRange.of(grey, settings)


def to_batch(crop: Crop, intensities: IntensityRange, settings: SegmenterSettings) -> Batch:
    """Return a crop as a batch of one."""
    if crop.inverted:
        intensities = intensities.inverted(settings)
    maps = crop.encode(TARGETS[settings.target])
    return Batch(torch.from_numpy(intensities.apply(crop.image))[None, None], torch.from_numpy(maps)[None])


def loader(
    crops: CropDataset,
    *,
    first_step: int,
    last_step: int,
    batch_size: int,
    rank: int,
    ranks: int,
    workers: int,
    pin_memory: bool = False,
) -> "DataLoader[Batch]":
    """Return this rank's batches of the steps from ``first_step`` (counted from 0) up to ``last_step``, exclusive.

    ``batch_size`` is the total over all ranks; a rank takes every ``ranks``-th crop of it.
    """
    steps = range(first_step, last_step)
    crop_numbers = [list(range(step * batch_size + rank, (step + 1) * batch_size, ranks)) for step in steps]
    return DataLoader(
        crops,
        batch_sampler=crop_numbers,
        num_workers=workers,
        collate_fn=concatenate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Join batches to one."""
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def validation_batches(
    images: Sequence[LabelledImage], settings: SegmenterSettings, *, crop: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the crops of whole images, without augmentation, in batches."""
    waiting: list[Batch] = []
    for image in images:
        grey, labels, intensities = prepare_labelled(image, settings)
        for tile in tile_image(grey, labels, crop):
            waiting.append(to_batch(tile, intensities, settings))
            if len(waiting) == batch_size:
                yield concatenate(waiting)
                waiting = []
    if waiting:
        yield concatenate(waiting)
