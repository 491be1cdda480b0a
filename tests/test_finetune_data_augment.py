"""Crops: the affine map, and targets computed from the transformed labels."""

import cv2
import numpy as np
import pytest
from scipy import ndimage

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.finetune.config import AugmentConfig
from dinocell.finetune.data import random_crop, tile_image
from dinocell.finetune.targets import TARGETS, labels_to_flows
from dinocell.labelled.distance import labels_to_distance

STILL = AugmentConfig(
    flip=0.0, rotation_deg=0.0, scale=(1.0, 1.0), brightness=(1.0, 1.0), invert_contrast=0.0, with_cells=0.0
)
SMALL = SyntheticConfig(size=(96, 112), channels=("AGP",), num_cells=(6, 10), cell_radius_px=12.0)


def test_the_target_of_an_unrotated_crop_is_part_of_the_map_of_the_whole_image() -> None:
    made = make_field(3, SMALL)
    image = (made.pixels[0] >> 8).astype(np.uint8)
    still = AugmentConfig(
        crop=64,
        flip=0.0,
        rotation_deg=0.0,
        scale=(1.0, 1.0),
        brightness=(1.0, 1.0),
        invert_contrast=0.0,
        with_cells=0.0,
    )
    crop = random_crop(image, made.labels, still, np.random.default_rng(0))
    found = cv2.matchTemplate(image.astype(np.float32), crop.image, cv2.TM_SQDIFF)
    top, left = np.unravel_index(found.argmin(), found.shape)
    whole = labels_to_distance(made.labels)[top : top + 64, left : left + 64]
    # The crop's place is not a whole pixel, so cells at its edges may differ by one.
    assert np.abs(crop.encode(TARGETS["distance"])[0] - whole).mean() < 0.03


def test_a_crop_of_the_images_size_without_augmentation_is_the_image() -> None:
    made = make_field(3, SMALL)
    image, labels = (np.ascontiguousarray(each[:96, :96]) for each in (made.pixels[0] >> 8, made.labels))
    still = AugmentConfig(
        crop=96,
        flip=0.0,
        rotation_deg=0.0,
        scale=(1.0, 1.0),
        brightness=(1.0, 1.0),
        invert_contrast=0.0,
        with_cells=0.0,
    )
    crop = random_crop(image.astype(np.uint8), labels, still, np.random.default_rng(0))
    np.testing.assert_array_equal(crop.image, image)
    np.testing.assert_array_equal(crop.labels[crop.context :, crop.context :][:96, :96], labels)


@pytest.mark.parametrize("seed", range(4))
def test_the_target_is_computed_from_the_transformed_labels(seed: int) -> None:
    made = make_field(4, SMALL)
    image = (made.pixels[0] >> 8).astype(np.uint8)
    crop = random_crop(image, made.labels, AugmentConfig(crop=64), np.random.default_rng(seed))
    inner = crop.labels[crop.context : crop.context + 64, crop.context : crop.context + 64]
    distance = crop.encode(TARGETS["distance"])[0]
    np.testing.assert_array_equal(distance > 0, inner > 0)
    assert set(np.unique(crop.labels)) <= set(np.unique(made.labels))
    np.testing.assert_array_equal(distance, labels_to_distance(crop.labels)[crop.context :, crop.context :][:64, :64])


@pytest.mark.parametrize("seed", range(3))
def test_the_flows_of_a_crop_are_computed_from_the_transformed_labels(seed: int) -> None:
    made = make_field(4, SMALL)
    image = (made.pixels[0] >> 8).astype(np.uint8)
    crop = random_crop(image, made.labels, AugmentConfig(crop=64), np.random.default_rng(seed))
    inner = np.s_[crop.context : crop.context + 64, crop.context : crop.context + 64]
    pieces = np.zeros_like(crop.labels)
    for number in np.unique(crop.labels[crop.labels > 0]):
        found, _ = ndimage.label(crop.labels == number, np.ones((3, 3)))
        pieces[found > 0] = found[found > 0] + pieces.max()
    np.testing.assert_array_equal(crop.encode(TARGETS["flows"]), labels_to_flows(pieces)[:, inner[0], inner[1]])
    np.testing.assert_array_equal(crop.encode(TARGETS["flows"])[2] > 0, crop.labels[inner] > 0)


def test_a_cell_and_its_mirror_image_have_separate_centres() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[4:20, 10:26] = 1  # near the upper border, beyond which it is seen again
    image = np.zeros((40, 40), np.uint8)
    settings = AugmentConfig(crop=64, scale=(1.0, 1.0), with_cells=0.0)
    for seed in range(8):
        crop = random_crop(image, labels, settings, np.random.default_rng(seed))
        flows = crop.encode(TARGETS["flows"])
        is_cell = flows[2] > 0
        assert is_cell.sum() > 400, "more than the cell itself"
        still = is_cell & (np.hypot(flows[0], flows[1]) == 0)
        assert still.sum() < 0.02 * is_cell.sum()


def test_tiles_cover_the_image_in_order() -> None:
    made = make_field(5, SMALL)
    image = (made.pixels[0] >> 8).astype(np.uint8)
    crops = tile_image(image, made.labels, 64)
    rows = [np.concatenate([crop.image for crop in crops[start : start + 2]], axis=1) for start in (0, 2)]
    np.testing.assert_array_equal(np.concatenate(rows)[:96, :112], image)
    maps = [
        np.concatenate([crop.encode(TARGETS["distance"])[0] for crop in crops[start : start + 2]], axis=1)
        for start in (0, 2)
    ]
    np.testing.assert_allclose(np.concatenate(maps)[:90, :106], labels_to_distance(made.labels)[:90, :106], atol=0.5)


def test_blur_and_noise_change_grey_levels_only() -> None:
    made = make_field(4, SMALL)
    image = np.full(made.labels.shape, 128, np.uint8) + (made.labels % 5 * 8).astype(np.uint8)  # nothing is clipped
    clear = AugmentConfig(crop=64)
    plain_crop = random_crop(image, made.labels, clear, np.random.default_rng(1))
    noisy = random_crop(image, made.labels, AugmentConfig(crop=64, noise=0.1), np.random.default_rng(1))
    blurred = random_crop(image, made.labels, AugmentConfig(crop=64, blur_px=3.0), np.random.default_rng(1))
    for crop in (noisy, blurred):
        np.testing.assert_array_equal(crop.labels, plain_crop.labels)
        assert crop.image.min() >= 0
        assert crop.image.max() <= 255
    inner = (plain_crop.image > 80) & (plain_crop.image < 175)
    assert 0 < (noisy.image - plain_crop.image)[inner].std() < 0.1 * 255
    assert np.abs(np.diff(blurred.image)).sum() < np.abs(np.diff(plain_crop.image)).sum()
    stds = []
    for seed in range(40):
        with_noise, without = (
            random_crop(image, made.labels, AugmentConfig(crop=64, noise=noise), np.random.default_rng(seed)).image
            for noise in (0.05, 0.0)
        )
        inner = (without > 80) & (without < 175)
        stds.append((with_noise - without)[inner].std())
    assert max(stds) < 1.1 * 0.05 * 255
    assert min(stds) < 0.2 * 0.05 * 255
    assert 0.3 < np.mean(stds) / (0.05 * 255) < 0.7
