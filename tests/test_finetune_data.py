"""Training data: the split of labelled sets, the order of images, the shares of ranks, and reproducible crops."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from dinocell.errors import DinocellError
from dinocell.finetune.config import AugmentConfig, DataConfig
from dinocell.finetune.data import CropDataset, loader, open_sets, prepare_labelled, split, tile_image
from dinocell.finetune.preprocess import SegmenterSettings, prepare
from dinocell.labelled.build import build_labelled
from dinocell.labelled.dataset import LabelledImage
from dinocell.labelled.layouts import folder_pairs
from dinocell.runtime.distributed import World


def test_the_split_is_by_image_fixed_by_the_seed_and_recorded(labelled_folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "split.json"
    config = DataConfig(sets=("x",), validation_share=0.4)
    divided = split([labelled_folder / "set"], config, seed=3, record=record)
    assert split([labelled_folder / "set"], config, seed=3, record=None).validation == divided.validation
    names = json.loads(record.read_text())
    assert len(names["validation"]) == 2
    assert not set(names["validation"]) & set(names["training"])


def test_one_image_cannot_be_split(tmp_path: Path, labelled_folder: Path) -> None:
    pairs = folder_pairs(labelled_folder, images="images/f0.{name}", masks="masks/f0.{name}")
    build_labelled(pairs, tmp_path / "one")
    with pytest.raises(DinocellError, match="one image"):
        split([tmp_path / "one"], DataConfig(sets=("x",)), seed=0, record=None)


@pytest.mark.parametrize("wrong", ["images/f0.tif", "pictures"])
def test_a_missing_folder_of_images_is_named(wrong: str, labelled_folder: Path, tmp_path: Path) -> None:
    config = DataConfig(images=str(labelled_folder / wrong), masks=str(labelled_folder / "masks"))
    with pytest.raises(DinocellError, match=f"data.images: no folder {labelled_folder / wrong}"):
        open_sets(config, tmp_path)


def test_every_image_is_used_equally_often_in_every_epoch(labelled_folder: Path) -> None:
    divided = split([labelled_folder / "set"], DataConfig(sets=("x",)), seed=0, record=None)
    crops = CropDataset(divided, SegmenterSettings(), AugmentConfig(crop=64), seed=1, crops_per_image=3)
    for epoch in range(3):
        numbers = range(epoch * crops.epoch_length, (epoch + 1) * crops.epoch_length)
        counts = np.bincount([crops.image_of(number).image for number in numbers], minlength=6)
        assert sorted(counts) == [0, 3, 3, 3, 3, 3]


def test_two_ranks_together_see_the_crops_of_one(labelled_folder: Path) -> None:
    divided = split([labelled_folder / "set"], DataConfig(sets=("x",)), seed=0, record=None)
    crops = CropDataset(divided, SegmenterSettings(), AugmentConfig(crop=64), seed=1, crops_per_image=2)
    settings: dict[str, Any] = {"steps": range(1, 3), "batch_size": 4, "workers": 0}
    alone = list(loader(crops, World(), **settings))
    halves = [list(loader(crops, World(rank=rank, size=2), **settings)) for rank in range(2)]
    for whole, first, second in zip(alone, *halves, strict=True):
        torch.testing.assert_close(whole.images[0::2], first.images)
        torch.testing.assert_close(whole.targets[1::2], second.targets)


def test_a_pickled_dataset_gives_the_same_crops(labelled_folder: Path) -> None:
    divided = split([labelled_folder / "set"], DataConfig(sets=("x",)), seed=0, record=None)
    crops = CropDataset(divided, SegmenterSettings(), AugmentConfig(crop=64), seed=1, crops_per_image=3)
    sent = pickle.dumps(crops)
    assert len(sent) < 10_000, "no images are pickled"
    other = pickle.loads(sent)
    for number in range(0, 3 * crops.epoch_length, 4):
        torch.testing.assert_close(other[number], crops[number], rtol=0, atol=0)
    assert other.epoch_length == crops.epoch_length


@pytest.mark.parametrize("convention", ["standardised", "unit"])
def test_training_and_inference_prepare_images_equally(convention: Literal["standardised", "unit"]) -> None:
    settings = SegmenterSettings(convention=convention)
    noise = np.random.default_rng(0).integers(0, 256, (1, 40, 50), dtype=np.uint8)
    for pixels in (noise, np.full_like(noise, 7)):
        labels = np.zeros((40, 50), np.int32)
        image = LabelledImage(pixels=pixels, labels=labels, distance=None, crowd=None, name="a", pixel_size_um=None)
        grey, _, levels = prepare_labelled(image, settings)
        np.testing.assert_array_equal(levels.apply(grey), prepare(pixels[0], settings))


def test_ids_that_float32_cannot_represent_stay_separate() -> None:
    """Crops are warped as float32."""
    labels = np.zeros((64, 64), np.int32)
    labels[10:30, 10:30], labels[10:30, 30:50], labels[40:50, 5:60] = 2**24, 2**24 + 1, 2**31 - 1
    image = LabelledImage(
        pixels=np.zeros((1, 64, 64), np.uint8), labels=labels, distance=None, crowd=None, name="a", pixel_size_um=None
    )
    grey, cells, _ = prepare_labelled(image, SegmenterSettings())
    (crop,) = tile_image(grey, cells, 64)
    inner = crop.labels[crop.context : crop.context + 64, crop.context : crop.context + 64]
    np.testing.assert_array_equal(inner, np.unique(labels, return_inverse=True)[1].reshape(64, 64))
    few = np.where(labels > 0, 7, 0).astype(np.int32)
    np.testing.assert_array_equal(prepare_labelled(replace(image, labels=few), SegmenterSettings())[1], few)


def test_every_crop_of_a_run_is_different(labelled_folder: Path) -> None:
    divided = split([labelled_folder / "set"], DataConfig(sets=("x",)), seed=0, record=None)
    crops = CropDataset(divided, SegmenterSettings(), AugmentConfig(crop=64), seed=1, crops_per_image=3)
    assert len({crops[number].images.numpy().tobytes() for number in range(30)}) == 30
