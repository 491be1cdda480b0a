"""Merging and boundary refinement on drawn shapes, against brute force, and on real masks."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.segmentation.refine import (
    CellMeasures,
    Refinement,
    estimate_blur_px,
    measure_cells,
    measure_selected,
    refine_boundaries,
    refine_labels,
)
from dinocell.eval.segmentation.watershed import distance_to_labels
from dinocell.labelled.distance import distance_to_boundary, labels_to_distance

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


def disc(labels: np.ndarray, label: int, row: float, column: float, radius: float) -> None:
    rows, columns = np.mgrid[: labels.shape[0], : labels.shape[1]]
    labels[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = label


def dumbbell(waist_px: int) -> np.ndarray:
    """Two discs of radius 14 as one cell, joined by a bar of this width."""
    labels = np.zeros((50, 110), np.int32)
    labels[25 - waist_px // 2 : 25 - waist_px // 2 + waist_px, 25:85] = 1
    disc(labels, 1, 25, 25, 14)
    disc(labels, 1, 25, 85, 14)
    return labels


def touching(radius: int = 14, overlap: int = 3) -> np.ndarray:
    """Two discs that meet along a straight border."""
    labels = np.zeros((50, 80), np.int32)
    disc(labels, 1, 25, 20, radius)
    disc(labels, 2, 25, 20 + 2 * radius - overlap, radius)
    return labels


def blurred(distance: np.ndarray, sigma: float = 1.5, noise: float = 0.02) -> np.ndarray:
    smooth = ndimage.gaussian_filter(distance, sigma) + np.random.default_rng(0).normal(0, noise, distance.shape)
    return np.clip(smooth, 0, 1).astype(np.float32)


@pytest.mark.parametrize(("waist_px", "merge_px", "num_cells"), [(11, 3.0, 1), (5, 3.0, 2), (5, 2.0, 1), (11, 6.5, 2)])
def test_one_cell_with_a_waist_is_one_if_the_waist_is_wide_enough(
    waist_px: int, merge_px: float, num_cells: int
) -> None:
    distance = labels_to_distance(dumbbell(waist_px))
    assert distance_to_labels(distance, merge_px=None).max() == 2
    assert distance_to_labels(distance, merge_px=merge_px).max() == num_cells


@pytest.mark.parametrize("distance", [labels_to_distance(touching()), blurred(labels_to_distance(touching()))])
def test_two_cells_that_touch_stay_two(distance: np.ndarray) -> None:
    assert distance_to_labels(distance).max() == 2


def test_peaks_of_noise_merge_into_their_cell() -> None:
    labels = np.zeros((60, 60), np.int32)
    disc(labels, 1, 30, 30, 25)
    noisy = blurred(labels_to_distance(labels), noise=0.03)
    assert distance_to_labels(noisy, merge_depth=0).max() > 1
    assert distance_to_labels(noisy).max() == 1
    # The first peak in raster order is one of noise; the border is restored by the width of the whole cell.
    refined, area = distance_to_labels(noisy, blur_px=0), (labels > 0).sum()
    assert (distance_to_labels(noisy, restore_border=False) > 0).sum() < 0.9 * area
    assert (refined > 0).sum() == pytest.approx(area, rel=0.06)
    assert (
        distance_to_labels(noisy, merge_px=None).max() == distance_to_labels(noisy, merge_px=None, merge_depth=0).max()
    )


def test_merging_is_transitive_and_leaves_other_cells_alone() -> None:
    labels = np.zeros((1, 12), np.int32)
    labels[0, :9] = [1, 1, 2, 2, 3, 3, 4, 4, 4]
    distance = np.array([[0.9, 0.85, 0.85, 0.9, 0.85, 0.9, 0.2, 0.9, 0.2, 0, 0, 0]], np.float32)
    merged = refine_labels(labels, distance, cell_fill=0.09, refinement=Refinement(merge_px=50, restore_border=False))
    np.testing.assert_array_equal(merged, [[1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0]])


def test_measures_equal_those_of_each_mask_by_itself() -> None:
    labels = touching()
    labels[labels == 2] = 7
    distance = blurred(labels_to_distance(labels))
    measures = measure_cells(labels, distance, 7)
    for label in (1, 7):
        depth = ndimage.distance_transform_edt(labels == label)
        assert measures.radius_px[label] == pytest.approx(depth.max())
        assert measures.middle[label] == distance[depth >= depth.max() - 1e-4].max()
        assert measures.peak[label] == distance[labels == label].max()
    assert not measures.radius_px[[0, 2, 3, 4, 5, 6]].any()


def brute_force_growth(labels: np.ndarray, reach_px: np.ndarray) -> np.ndarray:
    """Give each free pixel the nearest label within reach, the smaller id of two as near."""
    best = np.full(labels.shape, np.inf)
    grown = labels.copy()
    for label in range(1, len(reach_px)):
        squared = np.round(ndimage.distance_transform_edt(labels != label) ** 2)
        takes = (labels == 0) & (squared <= reach_px[label] ** 2 + 1e-4) & (squared < best)
        grown[takes], best[takes] = label, squared[takes]
    return grown


@pytest.mark.parametrize("seed", range(8))
def test_growth_of_a_perfect_map_equals_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(generator.random((70, 90)), 2)
    # Blobs cut into squares, so that labels touch, numbered at random.
    squares = np.add.outer(np.arange(70) // 8 * 12, np.arange(90) // 8)
    count = int(squares.max()) + 1
    ids = generator.permutation(np.r_[1 : count + 1])
    labels = np.where(blobs > np.quantile(blobs, 0.7), ids[squares], 0).astype(np.int32)
    labels[generator.random(labels.shape) < 0.02] = 0
    cell_fill = generator.uniform(0.2, 0.75)
    distance = np.ones(labels.shape, np.float32)
    measures = measure_cells(labels, distance, count)
    grown = refine_boundaries(labels, distance, measures, cell_fill=cell_fill, blur_px=0)
    expected = brute_force_growth(labels, cell_fill / (1 - cell_fill) * measures.radius_px.astype(float))
    np.testing.assert_array_equal(grown, expected)


def test_boundary_refinement_recovers_a_perfect_disc() -> None:
    labels = np.zeros((90, 90), np.int32)
    disc(labels, 1, 45, 45, 33.5)
    distance = labels_to_distance(labels)
    plain = distance_to_labels(distance, merge_px=None, restore_border=False)
    assert (plain > 0).sum() < 0.88 * (labels > 0).sum()
    assert (distance_to_labels(distance) != labels).sum() < 0.01 * (labels > 0).sum()


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_blur_is_estimated_from_the_peaks(sigma: float) -> None:
    labels = np.zeros((400, 400), np.int32)
    for number in range(16):
        disc(labels, number + 1, 50 + 100 * (number // 4), 50 + 100 * (number % 4), 20 + number)
    distance = ndimage.gaussian_filter(labels_to_distance(labels), sigma) if sigma else labels_to_distance(labels)
    plain = distance_to_labels(distance, merge_px=None, restore_border=False)
    estimate = estimate_blur_px(measure_cells(plain, distance, 16), 0.09)
    assert estimate == pytest.approx(sigma, rel=0.2, abs=0.05)


@pytest.mark.parametrize("radius", [6, 9, 14, 30])
def test_blurred_discs_have_nearly_their_size_if_the_blur_is_considered(radius: int) -> None:
    labels = np.zeros((3 * radius + 20, 3 * radius + 20), np.int32)
    disc(labels, 1, labels.shape[0] // 2, labels.shape[1] // 2, radius)
    distance = ndimage.gaussian_filter(labels_to_distance(labels), 1.5)
    area = (labels > 0).sum()
    knowing = abs((distance_to_labels(distance, blur_px=1.5) > 0).sum() / area - 1)
    estimated = abs((distance_to_labels(distance) > 0).sum() / area - 1)
    ignoring = abs((distance_to_labels(distance, blur_px=0) > 0).sum() / area - 1)
    assert knowing <= ignoring
    assert knowing < 0.12
    assert estimated < 0.15


def test_a_contour_pushed_out_of_a_small_cell_by_blur_is_moved_inwards() -> None:
    labels = np.zeros((40, 40), np.int32)
    disc(labels, 1, 20, 20, 6)
    distance = ndimage.gaussian_filter(labels_to_distance(labels), 1.5)
    area = (labels > 0).sum()
    assert (distance_to_labels(distance, restore_border=False) > 0).sum() > 1.1 * area
    assert (distance_to_labels(distance, blur_px=1.5) > 0).sum() == pytest.approx(area, rel=0.09)


def test_without_cells_of_sufficient_size_the_blur_is_zero() -> None:
    assert estimate_blur_px(CellMeasures(np.zeros(1), np.zeros(1), np.zeros(1)), 0.09) == 0
    labels = np.zeros((9, 9), np.int32)
    labels[4, 4] = 1
    assert (distance_to_labels(np.where(labels, 0.6, 0).astype(np.float32)) == labels).all()


def test_a_cell_over_the_whole_image_stays_whole() -> None:
    np.testing.assert_array_equal(distance_to_labels(np.full((20, 30), 0.8, np.float32)), np.ones((20, 30)))


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels: .*\(3, 4\).*\(4, 3\)"):
        # The suite checks annotations at run time, which would stop this before our own message does.
        inspect.unwrap(refine_labels)(
            np.zeros((4, 3), np.int32), np.zeros((3, 4), np.float32), cell_fill=0.1, refinement=Refinement()
        )


def test_refinement_does_not_write_to_its_input() -> None:
    labels, distance = touching(), labels_to_distance(touching())
    labels.flags.writeable = distance.flags.writeable = False
    refined = refine_labels(labels, distance, cell_fill=0.09, refinement=Refinement(min_area_px=1))
    assert refined is not labels


@pytest.mark.slow
def test_real_elongated_cells_are_recovered() -> None:
    path = REAL_DATA / "usiigaci_t98g" / "set8" / "instances_ids.png"
    if not path.exists():
        pytest.skip("no real masks at ../shared/data/usiigaci_t98g")
    labels = np.array(Image.open(path)).astype(np.int32)
    found = distance_to_labels(labels_to_distance(labels))
    plain = distance_to_labels(labels_to_distance(labels), merge_px=None, restore_border=False)

    def jaccard(result: np.ndarray) -> float:
        scores = []
        for label in np.unique(labels[labels > 0]):
            mask = labels == label
            counts = np.bincount(result[mask], minlength=2)[1:]
            best = int(counts.argmax()) + 1
            scores.append((mask & (result == best)).sum() / (mask | (result == best)).sum())
        return float(np.mean(scores))

    assert jaccard(found) > 0.975 > 0.9 > jaccard(plain)
    assert distance_to_boundary(found).max() == pytest.approx(distance_to_boundary(labels).max(), rel=0.05)


def test_the_boundary_of_a_merged_cell_is_that_of_the_undivided_cell() -> None:
    whole = np.zeros((70, 70), np.int32)
    disc(whole, 1, 35, 35, 30)
    distance = labels_to_distance(whole)
    cut_region = np.where(distance > 0.09, whole, 0).astype(np.int32)
    fragments = np.where((cut_region > 0) & (np.arange(70)[:, None] > 12), 2, cut_region).astype(np.int32)
    options = Refinement(merge_px=0.5, blur_px=0)
    expected = refine_labels(cut_region, distance, cell_fill=0.09, refinement=options)
    assert fragments.max() == 2
    np.testing.assert_array_equal(refine_labels(fragments, distance, cell_fill=0.09, refinement=options), expected)


def test_the_minimum_area_is_inclusive() -> None:
    distance = np.array([[0.9, 0.9, 0.0, 0.9, 0.9, 0.9]], np.float32)
    for min_area_px, num_cells in ((0, 2), (2, 2), (3, 1), (4, 0)):
        labels = distance_to_labels(distance, min_area_px=min_area_px, restore_border=False)
        assert labels.max() == num_cells


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    config = SyntheticConfig(size=(96, 120), num_cells=(25, 25), cell_radius_px=9.0)
    labels = make_field(seed, config).labels.astype(np.int32)
    return labels, np.random.default_rng(seed).random(labels.shape).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_selected_cells_have_the_measures_of_all_cells(seed: int, share: float) -> None:
    labels, distance = random_case(seed)
    which = np.random.default_rng(seed).random(int(labels.max()) + 3) < share  # two missing labels
    some, every = measure_selected(labels, distance, which), measure_cells(labels, distance, len(which) - 1)
    which[0] = False
    for name in ("radius_px", "middle", "peak"):
        np.testing.assert_array_equal(getattr(some, name), np.where(which, getattr(every, name), 0))


def test_scattered_fragments_of_one_label_are_measured_as_one_cell() -> None:
    labels, distance = random_case(0)
    labels[labels == 2] = 1
    which = np.arange(int(labels.max()) + 1) == 1
    some, every = measure_selected(labels, distance, which), measure_cells(labels, distance, len(which) - 1)
    assert (some.radius_px[1], some.middle[1], some.peak[1]) == (every.radius_px[1], every.middle[1], every.peak[1])


def test_the_radius_of_a_label_that_fills_the_image_is_half_its_longer_side() -> None:
    labels, distance = np.ones((6, 10), np.int32), np.full((6, 10), 0.5, np.float32)
    assert measure_selected(labels, distance, np.array([False, True])).radius_px[1] == 5
