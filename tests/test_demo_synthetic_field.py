"""Synthetic fields: the same again for the same seed, honest masks, and classes that every stain shows."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import regionprops

from dinocell.demo.synthetic.field import CELL_SHAPES, CELL_TYPES, STAINS, SyntheticConfig, SyntheticField, make_field

ALL_STAINS = tuple(STAINS)


def digest(field: SyntheticField) -> str:
    parts = (field.pixels, field.labels, field.nuclei, field.classes)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_another_process_draws_the_same_field() -> None:
    code = (
        "import hashlib; from dinocell.demo.synthetic.field import *;"
        "f = make_field(7, SyntheticConfig(size=(96, 128)));"
        "print(hashlib.sha256(b''.join(p.tobytes() for p in (f.pixels, f.labels, f.nuclei, f.classes))).hexdigest())"
    )
    make_field(1)  # what was drawn before does not matter
    here = digest(make_field(7, SyntheticConfig(size=(96, 128))))
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


def test_seed_sequence_is_not_used_up_and_seeds_differ() -> None:
    sequence = np.random.SeedSequence((3, 14))
    assert digest(make_field(sequence)) == digest(make_field(sequence))
    assert digest(make_field(np.random.SeedSequence(5))) == digest(make_field(5))
    assert digest(make_field(5)) != digest(make_field(6))
    first, second = np.random.SeedSequence(5).spawn(2)
    assert digest(make_field(first)) != digest(make_field(second))


def test_channels_noise_and_depth_leave_the_cells_as_they_were() -> None:
    base = make_field(2, SyntheticConfig(size=(128, 160)))
    for config in (
        SyntheticConfig(size=(128, 160), channels=("Mito", "Phase")),
        SyntheticConfig(size=(128, 160), bit_depth=8, photons=50.0, haze=0.0, illumination=0.0),
    ):
        other = make_field(2, config)
        np.testing.assert_array_equal(other.labels, base.labels)
        np.testing.assert_array_equal(other.classes, base.classes)
    alone = make_field(2, SyntheticConfig(size=(128, 160), channels=("Mito",)))
    np.testing.assert_array_equal(alone.pixels[0], base.pixels[base.channel_names.index("Mito")])


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_shapes_and_types_are_as_configured(bit_depth: int) -> None:
    config = SyntheticConfig(size=(80, 144), channels=("DNA", "AGP", "Phase"), bit_depth=bit_depth)
    field = make_field(0, config)
    assert field.pixels.shape == (3, 80, 144)
    assert field.pixels.dtype == np.dtype(f"uint{bit_depth}")
    assert field.labels.shape == field.nuclei.shape == (80, 144)
    assert field.labels.dtype == field.nuclei.dtype == np.int32
    assert field.channel_names == ("DNA", "AGP", "Phase")
    assert field.class_names == tuple(kind.name for kind in CELL_TYPES)
    assert field.classes.shape == (field.labels.max(),)


@pytest.mark.parametrize("seed", range(4))
def test_ids_are_consecutive_and_every_cell_is_one_piece_with_a_nucleus(seed: int) -> None:
    field = make_field(seed)
    n = int(field.labels.max())
    assert n >= 10
    np.testing.assert_array_equal(np.unique(field.labels), np.arange(n + 1))
    np.testing.assert_array_equal(np.unique(field.nuclei), np.arange(n + 1))
    assert (field.labels[field.nuclei > 0] == field.nuclei[field.nuclei > 0]).all()
    for label in range(1, n + 1):
        assert ndimage.label(field.labels == label)[1] == 1


def test_cells_touch_when_asked_to_and_keep_away_when_not() -> None:
    def touching_share(touching: float) -> float:
        pairs, cells = set(), 0
        for seed in range(4):
            config = SyntheticConfig(channels=("DNA",), num_cells=(14, 14), touching=touching)
            labels = make_field(seed, config).labels
            cells += int(labels.max())
            for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
                border = (a != b) & (a > 0) & (b > 0)
                pairs |= {(seed, int(i)) for i in (*a[border], *b[border])}
        return len(pairs) / cells

    assert touching_share(1.0) > 0.8
    assert touching_share(0.0) < 0.4


def test_every_fluorescence_channel_shows_every_cell_above_the_background() -> None:
    for seed in range(3):
        field = make_field(seed, SyntheticConfig(illumination=0.1))
        # Away from the cells, where no haze of theirs reaches.
        background = ndimage.distance_transform_edt(field.labels == 0) > 4
        for name, channel in zip(field.channel_names, field.pixels, strict=True):
            ground, noise = channel[background].mean(), channel[background].std()
            where = field.nuclei if name == "DNA" else field.labels
            means = ndimage.mean(channel, where, np.arange(1, field.labels.max() + 1))
            assert means.min() > ground + 2 * noise, (seed, name)


def test_phase_contrast_has_a_grey_ground_and_bright_halos() -> None:
    field = make_field(0, SyntheticConfig(channels=("Phase",), touching=0.2, num_cells=(10, 10), illumination=0.05))
    image = field.pixels[0].astype(float) / 65535
    away = ndimage.distance_transform_edt(field.labels == 0)
    ground = np.median(image[away > 12])
    assert 0.3 < ground < 0.8
    assert image[(away > 0) & (away <= 3)].mean() > ground + 0.01
    assert image[field.labels > 0].mean() < ground


def single_cell_features(channel: np.ndarray, nuclei: np.ndarray) -> np.ndarray:
    """Describe the surroundings of each nucleus, without its brightness: radial profile, spectrum, quantiles."""
    padded = np.pad(channel.astype(np.float64), 20, mode="reflect")
    offset = np.hypot(*(np.mgrid[:40, :40] - 19.5)).astype(int)
    frequency = (40 * np.hypot(np.fft.fftfreq(40)[:, None], np.fft.fftfreq(40)[None, :])).astype(int)
    rows = []
    for row, column in np.rint(ndimage.center_of_mass(nuclei > 0, nuclei, range(1, nuclei.max() + 1))).astype(int):
        window = padded[row : row + 40, column : column + 40]
        window = (window - window.mean()) / window.std()
        profile = (np.bincount(offset.ravel(), window.ravel()) / np.bincount(offset.ravel()))[:20]
        spectrum = np.bincount(frequency.ravel(), np.log1p(np.abs(np.fft.fft2(window))).ravel())[:20]
        rows.append([*profile, *spectrum / 30, *np.quantile(window, [0.05, 0.25, 0.5, 0.75, 0.95])])
    return np.array(rows)


def test_classes_can_be_told_apart_in_every_channel_alone_but_not_trivially() -> None:
    fields = [make_field(seed, SyntheticConfig(channels=ALL_STAINS)) for seed in range(24)]
    classes = np.concatenate([field.classes for field in fields])
    split = sum(len(field.classes) for field in fields[:16])
    for number, name in enumerate(ALL_STAINS):
        features = np.concatenate([single_cell_features(field.pixels[number], field.nuclei) for field in fields])
        features = (features - features[:split].mean(0)) / features[:split].std(0)
        squared = ((features[split:, None] - features[None, :split]) ** 2).sum(-1)
        votes = classes[:split][np.argsort(squared, axis=1)[:, :15]]
        guess = np.array([np.bincount(vote, minlength=4).argmax() for vote in votes])
        accuracy = (guess == classes[split:]).mean()
        assert 0.4 < accuracy < 0.95, (name, accuracy)


def test_class_weights_make_pure_fields() -> None:
    field = make_field(0, SyntheticConfig(num_classes=3, class_weights=(0.0, 0.0, 2.0)))
    assert set(field.classes) == {2}
    assert field.class_names == ("epithelial", "spindle", "round")


@pytest.mark.parametrize("num_cells", [0, 1])
def test_empty_and_single_cell_fields_are_drawn(num_cells: int) -> None:
    field = make_field(0, SyntheticConfig(num_cells=(num_cells, num_cells), channels=ALL_STAINS))
    assert field.labels.max() == len(field.classes) <= num_cells
    assert field.pixels.shape == (6, 256, 256)


@pytest.mark.parametrize("size", [(16, 16), (16, 300), (333, 41)])
def test_odd_and_small_sizes_are_drawn(size: tuple[int, int]) -> None:
    assert make_field(4, SyntheticConfig(size=size, channels=ALL_STAINS)).pixels.shape == (6, *size)


def test_pictures_are_neither_black_nor_saturated() -> None:
    for seed in range(3):
        for bit_depth in (8, 16):
            config = SyntheticConfig(channels=ALL_STAINS, bit_depth=bit_depth)
            for name, channel in zip(ALL_STAINS, make_field(seed, config).pixels, strict=True):
                top = 2**bit_depth - 1
                assert (channel == top).mean() < 0.01, name
                assert np.ptp(np.quantile(channel, [0.01, 0.99])) > 0.1 * top, name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (8, 256)}, r"size: expected \(rows, columns\) of at least 16 px each, got \(8, 256\)"),
        ({"channels": ("DNA", "GFP")}, "channels: expected some of DNA, RNA, ER, AGP, Mito, Phase, got .*GFP"),
        ({"channels": ()}, "channels: expected some of"),
        ({"channels": ("ER", "ER")}, "channels: expected each stain once"),
        ({"num_cells": (9, 3)}, "num_cells: expected"),
        ({"cell_radius_px": 1.0}, "cell_radius_px: expected at least 4, got 1.0"),
        ({"touching": 1.5}, "touching: expected a share"),
        ({"num_classes": 5}, "num_classes: expected a number from 1 to 4, that of cell_types, got 5"),
        ({"num_classes": 2, "class_weights": (1.0,)}, r"class_weights: expected 2 numbers .* got \(1.0,\)"),
        ({"class_weights": (0.0, 0.0, 0.0, 0.0)}, "class_weights: expected"),
        ({"blur_px": (2.0, 1.0)}, "blur_px: expected"),
        ({"haze": 1.0}, "haze: expected"),
        ({"illumination": -0.1}, "illumination: expected"),
        ({"photons": float("nan")}, "photons: expected a number above 0"),
        ({"read_noise": -1.0}, "read_noise: expected"),
        ({"bit_depth": 12}, "bit_depth: expected 8 or 16, got 12"),
    ],
)
def test_impossible_configurations_are_refused_by_name(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**wrong)


def test_every_cell_shows_a_nucleus_however_crowded_the_field() -> None:
    config = SyntheticConfig(size=(96, 96), num_cells=(40, 60), touching=1.0, cell_radius_px=16.0)
    for seed in range(25):
        field = make_field(seed, config)
        np.testing.assert_array_equal(np.unique(field.nuclei), np.unique(field.labels))
        inside = field.nuclei > 0
        np.testing.assert_array_equal(field.nuclei[inside], field.labels[inside])


def test_cells_that_lie_beyond_the_edge_are_left_out() -> None:
    crowded = SyntheticConfig(size=(1024, 1024), num_cells=(1048, 1048), cell_radius_px=14.0, channels=("DNA",))
    field = make_field(0, crowded)
    assert 800 < field.labels.max() <= 1048


def test_shapes_differ_in_outline_and_not_in_area() -> None:
    areas, elongations = [], []
    for number, shape in enumerate(CELL_SHAPES):
        weights = tuple(float(number == other) for other in range(len(CELL_SHAPES)))
        config = SyntheticConfig(cell_types=CELL_SHAPES, class_weights=weights, touching=0.0, channels=("DNA",))
        fields = [make_field(seed, config) for seed in range(8)]
        assert fields[0].class_names[number] == shape.name
        cells = [cell for field in fields for cell in regionprops(field.labels)]
        areas.append(np.median([cell.area for cell in cells]))
        elongations.append(np.median([cell.axis_major_length / cell.axis_minor_length for cell in cells]))
    assert max(areas) < 1.2 * min(areas)
    disc, rod, arms, star = elongations
    assert rod > arms > max(disc, star)
    same = ("brightness", "chromatin", "chromatin_grain", "nucleoli", "edge_actin", "fibre_actin", "mito_grain")
    assert all(len({getattr(shape, name) for shape in CELL_SHAPES}) == 1 for name in same)
