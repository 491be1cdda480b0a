"""The real images of `patch_probe`: which are pretrained on, which may be labelled, which are only tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinocell.demo.otsu import otsu_baseline
from dinocell.demo.synthetic.config import SyntheticConfig
from dinocell.demo.synthetic.field import make_field
from dinocell.images.image import percentile_range, to_uint8
from dinocell.images.read import read_image
from dinocell.labelled.distance import labels_to_distance
from dinocell.labelled.layouts import Pair, dsb2018_pairs, folder_pairs

# Choices of the labelled images: the mean of the first few, and of all, which depends less on what is chosen.
CHOICES, ALL_CHOICES = 3, 12


@dataclass(frozen=True)
class Image:
    """An image from 0 to 1 by its 0.1 and 99.9 percentiles (h w), and its distance map (h w).

    ``stains`` are all channels of the field (c h w), ``pixels`` first, where there are several.
    """

    pixels: Tensor
    distance: Tensor
    stains: Tensor | None = None


@dataclass(frozen=True)
class ImageSet:
    """A set with its split: ``pool`` may be pretrained on and labelled, ``more`` pretrained on, ``unseen`` tests."""

    pool: list[Image]
    more: list[Image]
    unseen: list[Image]
    num_labelled: int
    policy: str = "average"

    def choices(self) -> list[list[int]]:
        """Return the numbers of the labelled images of the pool, for each choice."""
        order = [np.random.default_rng(choice).permutation(len(self.pool)) for choice in range(ALL_CHOICES)]
        return [each[: self.num_labelled].tolist() for each in order]


def dic_images(data: Path) -> ImageSet:
    """Read BBBC030: of the images by name, every second one is a test image."""
    images = [read(pair) for pair in folder_pairs(_dic(data)[0], images="images/{name}.tif", masks="masks/{name}.tif")]
    return ImageSet(images[::2], [], images[1::2], num_labelled=2)


def nuclei_images(data: Path) -> ImageSet:
    """Read the fluorescence images of the Data Science Bowl, of which the first 20 by name are tests, and BBBC039."""
    folder, more = _nuclei(data)
    pairs = [pair for pair in dsb2018_pairs(folder) if _is_fluorescence(pair)]
    images = [read(pair) for pair in pairs]
    fields = folder_pairs(more, images="images/{name}.tif", masks="masks/{name}.png", encoding="regions")
    return ImageSet(images[20:], [read(pair) for pair in fields], images[:20], num_labelled=4)


def two_stain_images(data: Path) -> ImageSet:
    """Read BBBC013: FKHR-GFP is probed for the nuclei of the DNA stain, thresholded; every fourth field is a test."""
    images = []
    for path in sorted(_two_stains(data)[0].glob("*.tif")):
        signal, dna = read_image(path, frames_as_channels=True).pixels
        stains = torch.from_numpy(np.stack([unit_range(signal), unit_range(dna)]))
        distance = torch.from_numpy(labels_to_distance(otsu_baseline(dna)))
        images.append(Image(stains[0], distance, stains))
    pool = [image for number, image in enumerate(images) if number % 4 != 3]
    return ImageSet(pool, [], images[3::4], num_labelled=4, policy="bag")


def _two_stains(data: Path) -> list[Path]:
    return [data / "fields" / "bbbc013_u2os_2ch"]


def _dic(data: Path) -> list[Path]:
    return [data / "pairs" / "bbbc030_cho_dic"]


def _nuclei(data: Path) -> list[Path]:
    return [data / "dsb2018_stage1_train", data / "bbbc039"]


def _is_fluorescence(pair: Pair) -> bool:
    """Return whether an image is grey on a dark ground, not stained tissue."""
    pixels = pair.read().image.grey().pixels
    return len(pixels) == 1 and float(pixels.mean()) < 128


def read(pair: Pair) -> Image:
    content = pair.read()
    unit = torch.from_numpy(unit_range(content.image.grey().pixels[0]))
    return Image(unit, torch.from_numpy(labels_to_distance(content.labels)))


def unit_range(plane: np.ndarray) -> np.ndarray:
    """Return a plane in 256 steps from 0 to 1, its 0.1 and 99.9 percentiles."""
    return to_uint8(plane, *percentile_range(plane, 0.1, 99.9)) / np.float32(255)


def generated_images() -> ImageSet:
    """Return a few small fields: for the short form, which needs no data."""
    look = SyntheticConfig(size=(128, 192), num_cells=(6, 10), channels=("ER", "DNA"))
    images = []
    for field in (make_field(number, look) for number in range(6)):
        stains = torch.from_numpy(np.stack([unit_range(plane) for plane in field.pixels]))
        images.append(Image(stains[0], torch.from_numpy(labels_to_distance(field.labels)), stains))
    return ImageSet(images[:4], [], images[4:], num_labelled=2, policy="bag")


SETS: dict[str, tuple[Callable[[Path], ImageSet], Callable[[Path], list[Path]]]] = {
    "dic": (dic_images, _dic),
    "nuclei": (nuclei_images, _nuclei),
    "stains": (two_stain_images, _two_stains),
}
