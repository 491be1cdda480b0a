"""Preparation of images of any type and range, against NumPy."""

import dataclasses

import numpy as np
import pytest

from dinocell.errors import DinocellError, ImageError
from dinocell.finetune.preprocess import IntensityRange, SegmenterSettings, equalise, prepare


def noise_image(height: int = 70, width: int = 91) -> np.ndarray:
    return np.random.default_rng(3).gamma(2.0, 300.0, (height, width)).astype(np.uint16)


def test_standardised_images_have_zero_mean_and_unit_variance() -> None:
    prepared = prepare(noise_image(), SegmenterSettings())
    assert prepared.dtype == np.float32
    np.testing.assert_allclose((prepared.mean(), prepared.std()), (0, 1), atol=1e-4)


def test_unit_spans_0_to_1() -> None:
    prepared = prepare(noise_image(), SegmenterSettings(convention="unit", clahe_clip=0.0))
    assert (prepared.min(), prepared.max()) == (0, 1)


def test_without_equalisation_grey_levels_are_percentile_scaled_eight_bits() -> None:
    image = noise_image()
    low, high = np.percentile(image, (1, 99))
    eight_bits = np.clip((image - low) / (high - low), 0, 1) * 255
    settings = SegmenterSettings(convention="unit", clahe_clip=0.0, percentiles=(1.0, 99.0))
    np.testing.assert_allclose(prepare(image, settings) * 255, eight_bits, atol=1.01)


def test_gain_and_offset_of_the_camera_have_no_effect() -> None:
    image = noise_image().astype(np.float32)
    np.testing.assert_allclose(
        prepare(image * 8 + 64, SegmenterSettings()), prepare(image, SegmenterSettings()), atol=0.03
    )


def test_equalisation_does_not_depend_on_the_size_of_the_image() -> None:
    settings = SegmenterSettings()
    large = np.random.default_rng(5).integers(0, 256, (256, 256), dtype=np.uint8)
    part = equalise(np.ascontiguousarray(large[:128, :128]), settings)
    np.testing.assert_array_equal(part[:112, :112], equalise(large, settings)[:112, :112])


@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (33, 31)])
def test_small_images_keep_their_shape(shape: tuple[int, int]) -> None:
    prepared = prepare(noise_image(*shape), SegmenterSettings())
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


def test_a_channel_and_the_mean_of_channels_are_prepared() -> None:
    one, two = noise_image(), noise_image()[::-1]
    stack, settings = np.stack([one, two]), SegmenterSettings()
    np.testing.assert_array_equal(prepare(stack, settings, channel=1), prepare(two, settings))
    assert not np.array_equal(prepare(stack, settings), prepare(one, settings))


@pytest.mark.parametrize(("pixel_size_um", "shape"), [(0.5, (35, 46)), (2.0, (140, 182)), (1.01, (70, 91))])
def test_an_image_is_resampled_to_the_pixel_size_of_the_training(pixel_size_um: float, shape: tuple[int, int]) -> None:
    settings = SegmenterSettings(pixel_size_um=1.0)
    assert prepare(noise_image(), settings, pixel_size_um=pixel_size_um).shape == shape
    assert prepare(noise_image(), SegmenterSettings(), pixel_size_um=pixel_size_um).shape == (70, 91)


def test_a_pixel_size_out_of_proportion_is_refused() -> None:
    with pytest.raises(ImageError, match="pixel_size_um"):
        prepare(noise_image(), SegmenterSettings(pixel_size_um=0.5), pixel_size_um=325)
    with pytest.raises(DinocellError, match="pixel_size_um"):
        prepare(noise_image(), SegmenterSettings(), pixel_size_um=-1.0)


@pytest.mark.parametrize("convention", ["standardised", "unit"])
def test_inverted_contrast_is_prepared_as_the_inverted_image(convention: str) -> None:
    settings = dataclasses.replace(SegmenterSettings(), convention=convention)
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    inverted = IntensityRange.of(grey, settings).inverted(settings).apply(255 - grey)
    np.testing.assert_allclose(inverted, IntensityRange.of(255 - grey, settings).apply(255 - grey), atol=1e-5)
