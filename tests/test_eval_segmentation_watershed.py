"""The watershed against scikit-image's, its cuts against floods from scratch, and bad input."""

import inspect
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import watershed

from dinocell.errors import DinocellError
from dinocell.eval.segmentation.refine import PLAIN, Refinement, refine_labels
from dinocell.eval.segmentation.watershed import cut, distance_to_labels, flood
from dinocell.labelled.distance import labels_to_distance

# The suite checks annotations at run time, which would stop these before our own message does.
unchecked = inspect.unwrap(distance_to_labels)
THRESHOLDS = [(0.47, 0.09), (0.6, 0.3), (0.3, 0.29), (0.5, 0.0), (0.4, 0.4)]


def plain(distance: np.ndarray, cells_max: float = 0.47, cell_fill: float = 0.09) -> np.ndarray:
    return distance_to_labels(distance, cells_max=cells_max, cell_fill=cell_fill, merge_px=None, restore_border=False)


def library(distance: np.ndarray, cells_max: float = 0.47, cell_fill: float = 0.09) -> np.ndarray:
    """Label as the rule is written down, with scikit-image and SciPy alone."""
    peaks, _ = ndimage.label(distance > cells_max, np.ones((3, 3)))
    return watershed(-distance, peaks, connectivity=1, mask=distance > cell_fill)


def random_map(seed: int, num_values: int | None, size: tuple[int, int] = (61, 73), sigma: float = 2.0) -> np.ndarray:
    """Smooth noise over [0, 1], rounded to ``num_values`` steps: plateaus, ties and saddles everywhere."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(size), sigma)
    unit = (noise - noise.min()) / (noise.max() - noise.min())
    return (unit if num_values is None else np.round(unit * num_values) / num_values).astype(np.float32)


def discs(seed: int, size: int = 200, num_cells: int = 60) -> np.ndarray:
    """Round cells that touch, each pixel with the nearest centre: mirrored slopes, so that ties abound."""
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, size, (num_cells, 2))
    rows, columns = np.mgrid[:size, :size]
    squared = (rows[..., None] - centres[:, 0]) ** 2 + (columns[..., None] - centres[:, 1]) ** 2
    return np.where(squared.min(-1) < 13**2, squared.argmin(-1) + 1, 0)


@pytest.mark.parametrize("num_values", [3, 8, 40, 255, 65535, None])
@pytest.mark.parametrize("sigma", [0.6, 1.5, 3.0])
def test_random_maps_equal_scikit_image_pixel_for_pixel(num_values: int | None, sigma: float) -> None:
    for seed in range(6):
        distance = random_map(seed, num_values, sigma=sigma)
        for cells_max, cell_fill in THRESHOLDS:
            expected = library(distance, cells_max, cell_fill)
            np.testing.assert_array_equal(plain(distance, cells_max, cell_fill), expected)


@pytest.mark.parametrize("seed", range(4))
def test_perfect_and_blurred_maps_equal_scikit_image_pixel_for_pixel(seed: int) -> None:
    distance = labels_to_distance(discs(seed))
    noise = np.random.default_rng(seed).normal(0, 0.02, distance.shape)
    blurred = np.clip(ndimage.gaussian_filter(distance, 1.5) + noise, 0, 1).astype(np.float32)
    for each in (distance, blurred, np.round(blurred * 65535) / np.float32(65535)):
        assert library(each).max() > 20
        np.testing.assert_array_equal(plain(each), library(each))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_small_map_equals_scikit_image(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    values = st.lists(st.integers(0, 6), min_size=height * width, max_size=height * width)
    distance = np.array(data.draw(values), np.float32).reshape(height, width) / 6
    np.testing.assert_array_equal(plain(distance), library(distance))


def test_curved_nested_and_one_pixel_peaks_become_cells() -> None:
    distance = np.full((40, 60), 0.2, np.float32)
    distance[5:35, 5:35] = 0.9  # a frame around ...
    distance[10:30, 10:30] = 0.2
    distance[19, 19] = 0.5  # ... one pixel
    distance[5:20, 45:48] = distance[5:8, 45:55] = distance[17:20, 45:55] = 0.8  # a C: its centroid is outside it
    labels = plain(distance)
    assert labels.max() == 3
    assert len({labels[5, 5], labels[19, 19], labels[5, 45]}) == 3
    np.testing.assert_array_equal(labels, library(distance))


def test_peaks_that_touch_at_a_corner_are_one() -> None:
    distance = np.array([[0.9, 0.2, 0.0], [0.2, 0.9, 0.0], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(plain(distance), [[1, 1, 0], [1, 1, 0], [0, 0, 0]])


def test_thresholds_are_exclusive() -> None:
    distance = np.array([[0.5, 0.25, 0.0, 0.625, 0.375]], np.float32)
    np.testing.assert_array_equal(plain(distance, 0.5, 0.25), [[0, 0, 0, 1, 1]])


def test_regions_without_a_peak_are_background() -> None:
    distance = np.zeros((9, 20), np.float32)
    distance[2:7, 2:7], distance[4, 4], distance[2:7, 12:17] = 0.3, 0.9, 0.3
    assert (plain(distance) > 0).sum() == 25


@pytest.mark.parametrize("value", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 6)])
def test_constant_maps_are_one_cell_or_none(value: float, shape: tuple[int, int]) -> None:
    labels = distance_to_labels(np.full(shape, value, np.float32))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.full(shape, int(value == 1)))


def test_every_floating_type_and_layout_gives_the_labels_of_the_plain_array() -> None:
    distance = random_map(5, 255)
    expected = distance_to_labels(distance)
    for same in (distance.astype(np.float64), np.asfortranarray(distance), distance.astype(">f4")):
        np.testing.assert_array_equal(distance_to_labels(same), expected)
    for view in (distance.T, distance[::2, 1::3], distance[::-1, ::-1], distance.astype(np.float16)):
        view.flags.writeable = False
        before = view.copy()
        np.testing.assert_array_equal(
            distance_to_labels(view), distance_to_labels(np.ascontiguousarray(view, np.float32))
        )
        np.testing.assert_array_equal(view, before)


def test_ids_have_no_gaps_and_follow_the_first_peaks() -> None:
    labels = distance_to_labels(random_map(2, None, sigma=1.5), min_area_px=30)
    ids, area_px = np.unique(labels[labels > 0], return_counts=True)
    np.testing.assert_array_equal(ids, np.arange(1, len(ids) + 1))
    assert area_px.min() >= 30
    every = plain(random_map(2, None, sigma=1.5))
    assert list(np.unique(every)) == list(range(every.max() + 1))


def test_small_cells_are_dropped_and_the_others_stay_as_they_were() -> None:
    distance = random_map(3, None, sigma=1.5)
    every, large = distance_to_labels(distance), distance_to_labels(distance, min_area_px=40)
    area_px = np.bincount(every.ravel())
    kept = (every > 0) & (area_px[every] >= 40)
    assert 0 < large.max() < every.max()
    np.testing.assert_array_equal(large > 0, kept)


def test_values_slightly_outside_the_unit_range_are_accepted() -> None:
    distance = random_map(4, None) * np.float32(1.3) - np.float32(0.1)
    assert distance.min() < 0
    assert distance.max() > 1
    np.testing.assert_array_equal(plain(distance), library(distance))
    assert plain(distance, cell_fill=0.0).max() > 0


@pytest.mark.parametrize("num_values", [5, 40, 255, 65535, None])
def test_cut_of_one_flood_equals_floods_from_scratch(num_values: int | None) -> None:
    for seed in range(5):
        distance = random_map(seed, num_values, size=(120, 140))
        for cells_max in (0.35, 0.47, 0.7):
            flooded = flood(distance, cells_max=cells_max, lowest_fill=0.05)
            for cell_fill in (0.05, 0.09, 0.2, 0.31, 0.35):
                np.testing.assert_array_equal(cut(flooded, cell_fill), plain(distance, cells_max, cell_fill))
            if flooded.exact_below < np.inf:
                at_the_ground = float(flooded.exact_below)
                np.testing.assert_array_equal(cut(flooded, at_the_ground), plain(distance, cells_max, at_the_ground))


def test_only_maps_with_ties_between_peaks_need_a_second_flood() -> None:
    rounded = [flood(random_map(seed, 255, (120, 140)), cells_max=0.47, lowest_fill=0.05) for seed in range(5)]
    assert sum(each.exact_below < 0.47 for each in rounded) >= 2
    # Without it one border pixel would differ, which is why `cut` takes care.
    needed = sum(
        (np.where(each.taken_at > np.float32(0.35), each.labels, 0) != plain(each.distance, 0.47, 0.35)).sum()
        for each in rounded
    )
    assert needed > 0
    for seed in range(5):
        assert flood(random_map(seed, None), cells_max=0.47, lowest_fill=0.05).exact_below == np.inf


def test_cut_drops_pixels_reached_through_lower_ones() -> None:
    distance = np.array([[0.9, 0.4, 0.1, 0.3, 0.3]], np.float32)
    flooded = flood(distance, cells_max=0.5, lowest_fill=0.05)
    np.testing.assert_array_equal(cut(flooded, 0.05), [[1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(cut(flooded, 0.2), [[1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(flooded.taken_at, np.array([[0.9, 0.4, 0.1, 0.1, 0.1]], np.float32))


def test_a_refined_cut_equals_the_full_pipeline() -> None:
    distance = labels_to_distance(discs(7))
    flooded = flood(distance, cells_max=0.6, lowest_fill=0.05)
    for options in (Refinement(), Refinement(merge_px=1.5, min_area_px=50), Refinement(restore_border=False), PLAIN):
        labels = refine_labels(cut(flooded, 0.2), distance, cell_fill=0.2, refinement=options)
        expected = distance_to_labels(distance, cells_max=0.6, cell_fill=0.2, **vars(options))
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (np.zeros((2, 4, 4), np.float32), r"distance: .*\(2, 4, 4\)"),
        (np.zeros((4, 4), np.uint8), "distance: .*uint8"),
        (np.zeros((4, 4), bool), "distance: .*bool"),
        (np.zeros((0, 5), np.float32), r"distance: .*\(0, 5\)"),
        (np.array([[0.1, np.nan]]), "distance: .*NaN"),
        (np.array([[0.1, np.inf]]), "distance: .*0.1 to inf"),
        (np.array([[0.0, 31.0]]), "distance: .*0 to 31; .*labels_to_distance"),
        (np.array([[-4.0, 0.5]]), "distance: .*-4 to 0.5"),
    ],
)
def test_maps_that_are_no_distance_maps_are_refused_in_one_line(distance: np.ndarray, message: str) -> None:
    with pytest.raises(DinocellError, match=message) as caught:
        unchecked(distance)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells_max": 1.0}, "cells_max: .*1.0"),
        ({"cells_max": float("nan")}, "cells_max: .*nan"),
        ({"cell_fill": -0.1}, "cell_fill: .*-0.1"),
        ({"cells_max": 0.3, "cell_fill": 0.4}, "cell_fill: .*cells_max.*0.4"),
        ({"merge_px": 0.0}, "merge_px: .*0.0"),
        ({"merge_px": float("nan")}, "merge_px: .*nan"),
        ({"merge_depth": -0.1}, "merge_depth: .*-0.1"),
        ({"min_area_px": -1}, "min_area_px: .*-1"),
        ({"blur_px": float("inf")}, "blur_px: .*inf"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(DinocellError, match=message) as caught:
        distance_to_labels(np.zeros((4, 4), np.float32), **options)
    assert "\n" not in str(caught.value)


def test_cut_below_the_flood_or_above_the_peaks_is_refused() -> None:
    flooded = flood(random_map(0, None), cells_max=0.5, lowest_fill=0.2)
    for cell_fill in (0.1, 0.6, float("nan")):
        with pytest.raises(DinocellError, match="cell_fill: "):
            cut(flooded, cell_fill)


def test_sixty_thousand_cells_keep_their_ids() -> None:
    labels = np.zeros((1250, 1250), np.int32)
    for row in range(1, 4):
        for column in range(1, 4):
            labels[row::5, column::5] = np.arange(1, 62501).reshape(250, 250)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = distance_to_labels(labels_to_distance(labels))
    np.testing.assert_array_equal(found, labels)
