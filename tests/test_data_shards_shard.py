"""Tiles: their positions, and which are blank or overexposed."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinocell.data_shards.shard import TileSettings, contrast_score, rejection_reason, tiles

RNG = np.random.default_rng(0)


@given(length=st.integers(1, 3000), size=st.integers(1, 700), overlap=st.integers(0, 200))
def test_tiles_are_inside_the_field_and_evenly_spread(length: int, size: int, overlap: int) -> None:
    settings = TileSettings(size=size, overlap=min(overlap, size - 1))
    found = list(tiles(1, length, settings))
    columns = [tile.column for tile in found]
    assert columns == sorted(set(columns))
    assert all(tile.column >= 0 and tile.column + tile.width <= length for tile in found)
    assert {tile.width for tile in found} == {min(size, length)}
    gaps = [b.column - (a.column + a.width) for a, b in itertools.pairwise(found)]
    margins = [found[0].column, length - found[-1].column - found[-1].width]
    if settings.overlap:
        assert all(-gap >= settings.overlap for gap in gaps)
    assert max([0, *gaps, *margins]) <= size / 2 + 1


def test_real_field_sizes() -> None:
    settings = TileSettings(size=512)
    assert [tile.column for tile in tiles(512, 1080, settings)] == [18, 549]
    assert [tile.column for tile in tiles(512, 2048, settings)] == [0, 512, 1024, 1536]
    assert [tile.column for tile in tiles(512, 904, settings)] == [0, 392]
    assert [tile.column for tile in tiles(512, 1080, TileSettings(size=512, overlap=64))] == [60, 508]
    assert [tuple(tile) for tile in tiles(100, 700, TileSettings(size=0))] == [(0, 0, 100, 700)]


def test_contrast_is_one_for_noise_and_high_for_cells() -> None:
    for noise in (RNG.normal(1000, 50, (256, 256)), RNG.poisson(30, (256, 300)).astype(np.uint16)):
        assert 0.8 < contrast_score(noise) < 1.3
    rows, columns = np.mgrid[:256, :256]
    uneven = RNG.normal(1000, 50, (256, 256)) + 100 * rows / 256
    assert contrast_score(uneven) < 3
    cells = RNG.normal(1000, 50, (256, 256)) + 400 * ((rows // 16 + columns // 16) % 5 == 0)
    assert contrast_score(cells) > 8


def test_contrast_of_planes_without_noise() -> None:
    assert contrast_score(np.full((64, 64), 7, np.uint8)) == 0
    step = np.zeros((64, 64), np.uint8)
    step[20:30, 20:30] = 255
    assert contrast_score(step) == float("inf")
    assert contrast_score(np.array([[5]], np.uint8)) == 0


def kind(pixels: np.ndarray, **settings: float) -> str | None:
    found = rejection_reason(pixels, pixels.max(axis=(1, 2)), TileSettings(**settings))
    return None if found is None else found[0]


def test_tiles_without_contrast_in_any_channel_are_blank() -> None:
    noise = RNG.poisson(100, (2, 128, 128)).astype(np.uint16)
    constant = np.full((2, 128, 128), 9, np.uint16)
    cells = noise.copy()
    cells[1, 32:64, 32:64] += 500
    assert kind(noise) == "blank"
    assert kind(constant) == "blank"
    assert kind(cells) is None
    assert kind(noise, min_contrast=0) is None
    assert kind(constant, min_contrast=0) == "blank"


def test_overexposed_tiles_have_many_pixels_at_the_fields_maximum() -> None:
    cells = RNG.poisson(100, (1, 128, 128)).astype(np.uint16)
    cells[0, 10:40, 10:40] = 4095
    assert kind(cells) is None
    cells[0, :80] = 4095  # 62 %
    assert kind(cells) == "saturated"
    assert kind(cells, max_saturated=1.0) is None
    # The same tile of a field whose values go higher is bright, not overexposed.
    assert rejection_reason(cells, np.array([65535]), TileSettings()) is None


def test_a_dark_channel_does_not_reject_a_tile() -> None:
    pixels = np.zeros((2, 128, 128), np.uint16)
    pixels[1] = RNG.poisson(100, (128, 128))
    pixels[1, 32:64, 32:64] += 500
    assert kind(pixels) is None


@pytest.mark.parametrize(
    "wrong", [{"size": -1}, {"size": 8, "overlap": 8}, {"min_size": 0}, {"min_contrast": -1.0}, {"max_saturated": 0.0}]
)
def test_impossible_settings_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TileSettings(**wrong)
