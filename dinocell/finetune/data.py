"""The training data of a run: labelled sets, opened or built, split into training and validation, as a stream of crops.

A crop depends only on the seed and its number in the run: neither the workers nor the number of ranks change it, and a
run that resumes at a step gets the same crops as one that was not interrupted.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import groupby, islice, takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Integer, UInt8
from rich.console import Console
from scipy import ndimage
from skimage.segmentation import relabel_sequential
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinocell.errors import DinocellError, ImageError
from dinocell.finetune.config import AugmentConfig, DataConfig
from dinocell.finetune.preprocess import IntensityRange, SegmenterSettings, to_grey
from dinocell.finetune.targets import TARGETS, Target
from dinocell.labelled.build import build_labelled
from dinocell.labelled.dataset import LabelledImage, LabelledSet, open_labelled
from dinocell.labelled.layouts import folder_pairs
from dinocell.runtime.distributed import World
from dinocell.runtime.files import write_atomically
from dinocell.runtime.progress import start_progress

_ADVICE = {"several channels": "choose one with data.channel", "not a label image": "see data.encoding"}
_MAX_NAMES = 10  # of skipped pairs; dataset.json lists all
# Prepared images that a worker caches: a small set is prepared only once.
_CACHED_IMAGES = 64
# Maximum margin around a crop in which labels are transformed too. Only a giant cell is larger than that.
_MAX_CONTEXT_PX = 384


class ImageIndex(NamedTuple):
    """The index of a set, and of an image in it."""

    data_set: int
    image: int


class Split(NamedTuple):
    """Training and validation images; the latter may be in sets of their own."""

    sets: tuple[LabelledSet, ...]
    training: tuple[ImageIndex, ...]
    validation: tuple[ImageIndex, ...]

    def validation_images(self) -> list[LabelledImage]:
        """Open the validation images."""
        return [self.sets[index.data_set][index.image] for index in self.validation]


def open_sets(config: DataConfig, folder: Path, *, rebuild: bool = False) -> list[Path]:
    """Return the folders of the labelled sets; ``data.images`` and ``data.masks`` are built as one under ``folder``.

    ``rebuild`` builds it even if it exists: the images may have changed. DinocellError if nothing can be used.
    """
    if config.images is None or config.masks is None:
        return [Path(name) for name in config.sets]
    output = folder / "labelled"
    if rebuild or not (output / "dataset.json").exists():
        root, images, masks = _patterns(config.images, config.masks)
        pairs = folder_pairs(root, images=images, masks=masks, encoding=config.encoding)
        channel = int(config.channel) if config.channel and config.channel.isdecimal() else config.channel
        bar = start_progress(Console(stderr=True), total_steps=len(pairs), batch_size=1)
        try:
            build_labelled(
                pairs,
                output,
                source=str(root),
                channel=channel,
                overwrite=output.exists(),
                advice=_ADVICE,
                progress=bar.advance,
            )
        except ImageError as error:  # the folder is not one that the user knows
            reason = str(error).removeprefix(f"{output}: ")
            raise DinocellError(f"data.images, data.masks: {reason}") from error
        finally:
            bar.close()
    return [output]


def _patterns(images: str, masks: str) -> tuple[Path, str, str]:
    """Return a common folder and two patterns relative to it."""
    folders, patterns, literal = {}, [], []
    for name, pattern in (("images", images), ("masks", masks)):
        path = Path(pattern).absolute()
        if not set("{*") & set(pattern):
            folders[f"data.{name}"] = path
        path = path if "{" in pattern else path / "{name}.*"
        patterns.append(path)
        literal.append(Path(*takewhile(lambda part: not set("{*") & set(part), path.parts[:-1])))
    root = folders["data.images, data.masks"] = Path(os.path.commonpath(literal))
    for names, folder in folders.items():
        if not folder.is_dir():
            raise DinocellError(f"{names}: no folder {folder}; set a folder, or a pattern such as images/{{name}}.tif")
    relative = [path.relative_to(root).as_posix() for path in patterns]
    return root, relative[0], relative[1]


def split(sets: Sequence[Path], config: DataConfig, *, seed: int, record: Path | None) -> Split:
    """Split the images at random by ``seed``, and write their names to ``record``.

    DinocellError if there are too few images, or, with ``strict``, if pairs were skipped when the sets were built.
    """
    opened = [open_labelled(folder) for folder in [*sets, *map(Path, config.validation_sets)]]
    if config.strict and any(data_set.description.get("skipped") for data_set in opened):
        raise DinocellError(
            f"images and masks that cannot be used: {'; '.join(skipped_pairs(opened))}. Fix them, or remove data.strict"
        )
    indices = [ImageIndex(index, image) for index, data_set in enumerate(opened) for image in range(len(data_set))]
    training = [index for index in indices if index.data_set < len(sets)]
    validation = indices[len(training) :]
    if not config.validation_sets:
        if len(training) < 2:
            raise DinocellError(
                f"{config.images or ', '.join(map(str, sets))}: one image cannot be split into training and "
                "validation; add images, or set data.validation_sets"
            )
        order = np.random.default_rng([seed, 0x5B117]).permutation(len(training))
        num_validation = min(len(training) - 1, max(1, round(config.validation_share * len(training))))
        validation = [training[place] for place in sorted(order[:num_validation])]
        training = [training[place] for place in sorted(order[num_validation:])]
    if record is not None:
        names = {
            part: [f"{opened[index.data_set].folder}: {opened[index.data_set].names[index.image]}" for index in members]
            for part, members in (("training", training), ("validation", validation))
        }
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(names, indent=1, ensure_ascii=False) + "\n")
    return Split(tuple(opened), tuple(training), tuple(validation))


def skipped_pairs(sets: Sequence[LabelledSet]) -> Iterator[str]:
    """Yield a line for each reason why pairs of image and mask were skipped when the sets were built."""
    by_kind: dict[str, list[dict[str, str]]] = {}
    for skip in (skip for data_set in sets for skip in data_set.description.get("skipped", [])):
        by_kind.setdefault(skip["kind"], []).append(skip)
    for kind, same in by_kind.items():
        more = f" and {len(same) - _MAX_NAMES} more" if len(same) > _MAX_NAMES else ""
        names = ", ".join(skip["name"] for skip in same[:_MAX_NAMES])
        reason = "" if kind == "no cells" else f"; the first: {same[0]['reason']}"
        yield f"{kind}: {len(same)} ({names}{more}){reason}"


class PreparedImage(NamedTuple):
    """Equalised grey levels and labels of a whole image, and the range that normalises its crops."""

    grey: UInt8[np.ndarray, "h w"]
    labels: Int32[np.ndarray, "h w"]
    intensities: IntensityRange


class Crop(NamedTuple):
    """Grey levels 0 to 255 (not yet normalised) and labels, which extend ``context`` pixels beyond the crop.

    Targets are never interpolated: labels are transformed by nearest neighbour, over a region large enough to contain
    every cell of the crop completely, and their maps are recomputed. So the target equals the map of the whole
    transformed image.
    """

    image: Float32[np.ndarray, "s s"]
    labels: Integer[np.ndarray, "t t"]
    context: int
    inverted: bool

    def encode(self, target: Target) -> Float32[np.ndarray, "k s s"]:
        """Return the target maps of the crop."""
        inner = slice(self.context, self.context + self.image.shape[0])
        return target.encode(self.labels, (inner, inner))


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
        self._members = [list(images) for _, images in groupby(split.training, key=attrgetter("data_set"))]
        if crops_per_image is None:
            areas = [split.sets[index.data_set][index.image].labels.size for index in split.training[:16]]
            crops_per_image = max(1, round(float(np.median(areas)) / augment.crop**2))
        total = crops_per_image * len(split.training)
        shares = np.array([len(images) for images in self._members] if weights is None else list(weights), float)
        self._quotas = np.maximum(1, np.rint(total * shares / shares.sum())).astype(int)

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker starts with an empty cache; the sets open their files again.
        return {name: value for name, value in vars(self).items() if name != "_prepared"}

    @cached_property
    def _prepared(self) -> Callable[[ImageIndex], PreparedImage]:
        @lru_cache(maxsize=_CACHED_IMAGES)
        def prepared(index: ImageIndex) -> PreparedImage:
            return prepare_labelled(self._split.sets[index.data_set][index.image], self._settings)

        return prepared

    @property
    def epoch_length(self) -> int:
        """Number of crops in an epoch."""
        return int(self._quotas.sum())

    def __getitem__(self, number: int) -> Batch:
        image, labels, intensities = self._prepared(self.image_of(number))
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


@lru_cache(maxsize=16)
def _shuffled(seed: int, stream: int, turn: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, turn]).permutation(length)


def loader(crops: CropDataset, world: World, *, steps: range, batch_size: int, workers: int) -> "DataLoader[Batch]":
    """Return this rank's batches of some steps, counted from 0.

    ``batch_size`` is the total over all ranks; each takes every ``world.size``-th crop of it.
    """
    ends = [(step * batch_size + world.rank, (step + 1) * batch_size) for step in steps]
    return DataLoader(
        crops,
        batch_sampler=[list(range(first, end, world.size)) for first, end in ends],
        num_workers=workers,
        collate_fn=concatenate,
        pin_memory=world.device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )


def validation_batches(
    images: Sequence[LabelledImage], settings: SegmenterSettings, *, crop: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the crops of whole images, without augmentation, in batches."""
    prepared = (prepare_labelled(image, settings) for image in images)
    crops = (
        to_batch(tile, intensities, settings)
        for grey, labels, intensities in prepared
        for tile in tile_image(grey, labels, crop)
    )
    while batch := list(islice(crops, batch_size)):
        yield concatenate(batch)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Join batches to one."""
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def prepare_labelled(image: LabelledImage, settings: SegmenterSettings) -> PreparedImage:
    """Prepare an image; labels keep their ids unless these exceed the number of pixels.

    Crops are warped as float32, which holds integers up to 16 million exactly.
    """
    grey = to_grey(np.asarray(image.pixels), settings)
    labels = np.asarray(image.labels)
    if labels.max() > labels.size:
        labels = relabel_sequential(labels.copy())[0]  # type: ignore[no-untyped-call]
    return PreparedImage(grey, np.ascontiguousarray(labels, dtype=np.int32), IntensityRange.of(grey, settings))


def to_batch(crop: Crop, intensities: IntensityRange, settings: SegmenterSettings) -> Batch:
    """Return a crop as a batch of one."""
    if crop.inverted:
        intensities = intensities.inverted(settings)
    maps = crop.encode(TARGETS[settings.target])
    return Batch(torch.from_numpy(intensities.apply(crop.image))[None, None], torch.from_numpy(maps)[None])


def random_crop(
    image: UInt8[np.ndarray, "h w"],
    labels: Integer[np.ndarray, "h w"],
    config: AugmentConfig,
    generator: np.random.Generator,
) -> Crop:
    """Draw a crop of ``config.crop`` pixels from equalised grey levels; the image is mirrored beyond its border.

    Image and labels are transformed by one affine map.
    """
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
    context = min(_MAX_CONTEXT_PX, math.ceil(_largest_cell(labels)))
    cells = cv2.copyMakeBorder(padded_labels, context, context, context, context, cv2.BORDER_REFLECT_101).astype(
        np.int32
    )
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
