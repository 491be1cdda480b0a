"""Scores by IoU against dense tables and SciPy's assignment solver."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dinocell.eval.metrics.matching import THRESHOLDS, MatchingScore, find_matches, matching_score, matching_score_from
from dinocell.eval.metrics.overlaps import contingency_table

NAN = math.nan


def dense_ious(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    cells, others = (np.unique(image[image != 0]) for image in (reference, prediction))
    ious = np.zeros((len(cells), len(others)))
    for row, cell in enumerate(cells):
        for column, other in enumerate(others):
            a, b = reference == cell, prediction == other
            ious[row, column] = (a & b).sum() / (a | b).sum()
    return ious


def best_assignment(ious: np.ndarray, threshold: float) -> np.ndarray:
    """IoUs of the one-to-one matching with the most pairs at the threshold, and among these the largest sum."""
    gain = (ious >= threshold) * (1 + ious / (2 * max(ious.shape, default=1)))
    matched = ious[linear_sum_assignment(gain, maximize=True)]
    return matched[matched >= threshold]


def plain_aji(reference: np.ndarray, prediction: np.ndarray) -> float:
    """Kumar et al. 2017, algorithm 1, over masks."""
    intersection = union = 0
    unused = {label: int((prediction == label).sum()) for label in np.unique(prediction) if label}
    others = dict(unused)
    for label in np.unique(reference[reference != 0]):
        cell = reference == label
        ious = {other: (cell & (prediction == other)).sum() / (cell | (prediction == other)).sum() for other in others}
        best = max(ious, key=ious.__getitem__, default=None)
        if best is None or ious[best] == 0:
            union += int(cell.sum())
            continue
        intersection += int((cell & (prediction == best)).sum())
        union += int((cell | (prediction == best)).sum())
        unused.pop(best, None)
    union += sum(unused.values())
    return intersection / union if union else NAN


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells that touch; a prediction with shifts, misses, halves and inventions."""
    generator = np.random.default_rng(seed)
    points = generator.uniform(0, 50, (20, 2))
    rows, columns = np.mgrid[:50, :60]
    squared = (rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2
    reference = np.where(squared.min(-1) < 60, squared.argmin(-1) + 1, 0)
    prediction = np.roll(reference, generator.integers(-1, 2, 2), (0, 1))
    for label in range(1, 21):
        fate = generator.integers(5)
        if fate == 0:
            prediction[prediction == label] = 0
        elif fate == 1:
            prediction[(prediction == label) & (columns > points[label - 1, 1] + 1)] = 40 + label
    return reference, prediction


def check_against_oracles(reference: np.ndarray, prediction: np.ndarray, score: MatchingScore) -> None:
    ious = dense_ious(reference, prediction)
    num_reference, num_predicted = ious.shape
    for at in score.at:
        matched = best_assignment(ious, at.threshold)
        tp, fn, fp = len(matched), num_reference - len(matched), num_predicted - len(matched)
        assert (at.num_matched, at.num_missed, at.num_spurious) == (tp, fn, fp)
        assert at.average_precision == pytest.approx(tp / (tp + fp + fn) if tp + fp + fn else NAN, nan_ok=True)
        assert at.precision == pytest.approx(tp / (tp + fp) if tp + fp else NAN, nan_ok=True)
        assert at.recall == pytest.approx(tp / (tp + fn) if tp + fn else NAN, nan_ok=True)
        assert at.f1 == pytest.approx(tp / (tp + (fp + fn) / 2) if tp + fp + fn else NAN, nan_ok=True)
        quality = matched.sum() / (tp + fp / 2 + fn / 2) if tp + fp + fn else NAN
        assert at.panoptic_quality == pytest.approx(quality, nan_ok=True)
        assert at.mean_matched_iou == pytest.approx(matched.mean() if tp else NAN, nan_ok=True)
    assert score.aji == pytest.approx(plain_aji(reference, prediction), nan_ok=True)
    assert score.count_error == num_predicted - num_reference


@pytest.mark.parametrize("seed", range(8))
def test_cells_with_mistakes_equal_the_oracles(seed: int) -> None:
    reference, prediction = random_pair(seed)
    check_against_oracles(reference, prediction, matching_score(reference, prediction))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_small_pair_equals_the_oracles(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 5))
    ids = st.lists(st.integers(0, 3), min_size=height * width, max_size=height * width)
    reference, prediction = (np.array(data.draw(ids), np.uint8).reshape(height, width) for _ in range(2))
    check_against_oracles(reference, prediction, matching_score(reference, prediction, thresholds=(0.5, 0.6, 0.75, 1)))


def test_a_cell_cut_in_halves_is_matched_once_at_one_half() -> None:
    halves = np.array([[1, 1, 2, 2, 0, 5, 5, 5, 5]]), np.array([[3, 3, 3, 3, 0, 6, 6, 7, 7]])
    for reference, prediction in (halves, halves[::-1]):
        at = matching_score(reference, prediction, thresholds=(0.5, 0.51)).at
        assert [score.num_matched for score in at] == [2, 0]
        assert at[0].panoptic_quality == pytest.approx(1 / 3)


def test_an_iou_of_three_fifths_is_a_match_at_three_fifths() -> None:
    at = matching_score(np.array([[1, 1, 1, 1, 0]]), np.array([[0, 1, 1, 1, 1]])).at
    assert [score.threshold for score in at if score.num_matched] == [0.5, 0.55, 0.6]
    assert THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def test_mean_average_precision_is_the_mean_over_the_thresholds() -> None:
    score = matching_score(*random_pair(3))
    assert score.mean_average_precision == pytest.approx(np.mean([at.average_precision for at in score.at]))
    assert 0 < score.mean_average_precision < score.at[0].average_precision


def test_frames_are_pooled_and_their_own_scores_stand_beside() -> None:
    pairs = [random_pair(seed) for seed in range(4)]
    score = matching_score(*map(list, zip(*pairs, strict=True)))
    alone = [matching_score(*pair) for pair in pairs]
    matched = sum(each.at[0].num_matched for each in alone)
    cells = sum(each.num_reference + each.num_predicted for each in alone)
    assert score.at[0].f1 == pytest.approx(2 * matched / cells)
    assert score.count_error == sum(each.count_error for each in alone)
    assert [image.aji for image in score.images] == [each.aji for each in alone]
    mean = score.mean_over_images(lambda image: image.at[0].average_precision)
    assert mean.value == pytest.approx(np.mean([each.at[0].average_precision for each in alone]))
    assert mean.num_images == 4
    # The frames side by side, cells renumbered, are the pooled score in one image.
    sides = zip(*pairs, strict=True)
    joined = [np.hstack([np.where(image, image + 100 * k, 0) for k, image in enumerate(side)]) for side in sides]
    together = matching_score(*joined)
    assert together.aji == pytest.approx(score.aji)
    for pooled, at in zip(score.at, together.at, strict=True):
        assert dataclasses.asdict(at) == pytest.approx(dataclasses.asdict(pooled))


@pytest.mark.parametrize(("cells", "found"), [(0, 0), (0, 3), (3, 0)])
def test_undefined_scores_are_nan_with_their_counts(cells: int, found: int) -> None:
    reference, prediction = np.arange(4)[None] * (cells > 0), np.arange(4)[None] * (found > 0)
    score = matching_score(reference, prediction)
    at = score.at[0]
    either = NAN if cells == found == 0 else 0
    assert (at.average_precision, at.f1, at.panoptic_quality) == pytest.approx((either,) * 3, nan_ok=True)
    assert at.precision == pytest.approx(0 if found else NAN, nan_ok=True)
    assert at.recall == pytest.approx(0 if cells else NAN, nan_ok=True)
    assert score.relative_count_error == pytest.approx(1 if cells else NAN, nan_ok=True)
    assert (score.num_reference, score.num_predicted, score.count_error) == (cells, found, found - cells)


def test_images_without_a_value_are_not_in_the_mean() -> None:
    empty, full = np.zeros((1, 4), int), np.arange(4)[None]
    score = matching_score([empty, full], [empty, full])
    assert score.mean_over_images(lambda image: image.aji) == (1, 1)
    value, num_images = matching_score([empty], [empty]).mean_over_images(lambda image: image.aji)
    assert math.isnan(value)
    assert num_images == 0


def test_scores_of_tables_equal_scores_of_images() -> None:
    pairs = [random_pair(seed) for seed in range(3)]
    tables = [contingency_table(*pair) for pair in pairs]
    assert matching_score_from(tables) == matching_score(*map(list, zip(*pairs, strict=True)))


@pytest.mark.parametrize("thresholds", [(), (0.4,), (0.5, 1.01), (NAN,)])
def test_thresholds_that_need_a_solver_or_make_no_sense_are_refused(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"thresholds: expected IoUs from 0.5 to 1, got"):
        matching_score(*random_pair(0), thresholds=thresholds)
    if thresholds:
        with pytest.raises(ValueError, match=r"thresholds: expected IoUs from 0.5 to 1, got"):
            find_matches(contingency_table(*random_pair(0)), thresholds[-1])
