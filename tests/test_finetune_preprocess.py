"""Preparation of images: against NumPy and scikit-image's idea of equalisation, for any type and range."""

import dataclasses

import numpy as np
import pytest

from dinocell.errors import ImageError
from dinocell.finetune.preprocess import SegmenterSettings, equalised, prepare


def picture(height: int = 70, width: int = 91) -> np.ndarray:
    return np.random.default_rng(3).gamma(2.0, 300.0, (height, width)).astype(np.uint16)


def test_standardised_has_mean_0_and_deviation_1_over_the_whole_image() -> None:
    prepared = prepare(picture(), SegmenterSettings())
    assert prepared.dtype == np.float32
    np.testing.assert_allclose((prepared.mean(), prepared.std()), (0, 1), atol=1e-4)


def test_unit_spans_0_to_1() -> None:
    prepared = prepare(picture(), SegmenterSettings(convention="unit", clahe_clip=0.0))
    assert (prepared.min(), prepared.max()) == (0, 1)


def test_without_equalisation_it_is_percentiles_and_eight_bits() -> None:
    image = picture()
    low, high = np.percentile(image, (1, 99))
    eight_bits = np.clip((image - low) / (high - low), 0, 1) * 255
    settings = SegmenterSettings(convention="unit", clahe_clip=0.0, percentiles=(1.0, 99.0))
    np.testing.assert_allclose(prepare(image, settings) * 255, eight_bits, atol=1.01)


def test_gain_and_offset_of_the_camera_do_not_matter() -> None:
    image = picture().astype(np.float32)
    np.testing.assert_allclose(
        prepare(image * 8 + 64, SegmenterSettings()), prepare(image, SegmenterSettings()), atol=0.03
    )


def test_a_tile_means_the_same_pixels_in_a_larger_image() -> None:
    settings = SegmenterSettings()
    large = np.random.default_rng(5).integers(0, 256, (256, 256), dtype=np.uint8)
    part = equalised(np.ascontiguousarray(large[:128, :128]), settings)
    np.testing.assert_array_equal(part[:112, :112], equalised(large, settings)[:112, :112])


@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (33, 31)])
def test_small_images_keep_their_shape(shape: tuple[int, int]) -> None:
    prepared = prepare(picture(*shape), SegmenterSettings())
    assert prepared.shape == shape
    assert np.isfinite(prepared).all()


@pytest.mark.parametrize("convention", ["standardised", "unit"])
def test_a_constant_image_becomes_0(convention: str) -> None:
    settings = dataclasses.replace(SegmenterSettings(), convention=convention)
    assert not prepare(np.full((40, 40), 7, np.uint16), settings).any()


def test_complex_and_not_finite_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="expected real numbers"):
        prepare(np.zeros((8, 8), complex), SegmenterSettings())
    with pytest.raises(ImageError):
        prepare(np.full((8, 8), np.nan), SegmenterSettings())


@pytest.mark.parametrize(
    "wrong", [{"percentiles": (5.0, 5.0)}, {"clahe_clip": -1.0}, {"clahe_tile_px": 1}, {"cell_fill": 0.6}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(SegmenterSettings(), **wrong)
