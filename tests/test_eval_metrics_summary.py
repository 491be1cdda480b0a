"""Bootstrap intervals against their scores, a plain loop, and their nominal coverage."""

import math

import numpy as np
import pytest

from dinocell.eval.metrics import summary as bootstrap_module
from dinocell.eval.metrics.ctc import ctc_score_from
from dinocell.eval.metrics.matching import matching_score_from
from dinocell.eval.metrics.overlaps import ContingencyTable, contingency_table
from dinocell.eval.metrics.summary import bootstrap, ctc_intervals, matching_intervals


def mean_of(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"mean": sums[:, 0] / sums[:, 1]}


def tables(count: int, *, seed: int = 0) -> list[ContingencyTable]:
    """Squares of 4 x 4 on a grid: some missed, some merged with the next, some shifted, some spurious."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        reference = np.zeros((24, 60), int)
        prediction = np.zeros((24, 60), int)
        for number in range(30):
            place = np.s_[number // 10 * 8 : number // 10 * 8 + 4, number % 10 * 6 : number % 10 * 6 + 4]
            if generator.random() < 0.8:
                reference[place] = number + 1
            if generator.random() < 0.8:
                merged = number % 10 > 0 and generator.random() < 0.3
                prediction[place] = number + 1 - merged
        found.append(contingency_table(reference, np.roll(prediction, generator.integers(0, 2), 1)))
    return found


@pytest.mark.parametrize("over", ["images", "cells"])
def test_values_are_the_scores(over: str) -> None:
    some = tables(7)
    score, intervals = ctc_score_from(some), ctc_intervals(some, over=over, num_draws=200)
    assert score.num_splits > 5
    for name, interval in intervals.items():
        assert interval.value == pytest.approx(getattr(score, name), abs=1e-12)
        assert interval.low < interval.value < interval.high
    at = matching_score_from(some, thresholds=(0.6,)).at[0]
    for name, interval in matching_intervals(some, threshold=0.6, over=over, num_draws=200).items():
        assert interval.value == pytest.approx(getattr(at, name), abs=1e-12)
        assert interval.low < interval.value < interval.high


def test_resampled_images_score_as_in_a_plain_loop() -> None:
    some = tables(6)
    generator = np.random.default_rng(3)
    drawn = [generator.integers(6, size=6) for _ in range(50)]
    plain = [ctc_score_from([some[k] for k in positions]) for positions in drawn]
    intervals = ctc_intervals(some, num_draws=50, seed=3, confidence=0.8)
    for name in ("seg", "det", "op_csb"):
        expected = np.quantile([getattr(score, name) for score in plain], (0.1, 0.9))
        assert intervals[name][1:3] == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_a_mean_has_its_nominal_coverage() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        units = np.stack([generator.exponential(size=60), np.ones(60)], axis=1)
        interval = bootstrap(units, mean_of, confidence=0.9, num_draws=300, seed=seed)["mean"]
        hits += interval.low <= 1 <= interval.high
    assert 0.82 < hits / 300 < 0.95


def test_spread_of_a_mean_is_its_standard_error() -> None:
    units = np.stack([np.random.default_rng(1).normal(size=400), np.ones(400)], axis=1)
    interval = bootstrap(units, mean_of, num_draws=4000)["mean"]
    half_width = 1.96 * units[:, 0].std() / 20
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.06)
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.06)


def test_seed_fixes_the_interval_and_memory_limits_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    some = tables(5)
    first = ctc_intervals(some, over="cells", num_draws=100, seed=4)
    assert ctc_intervals(some, over="cells", num_draws=100, seed=4) == first
    assert ctc_intervals(some, over="cells", num_draws=100, seed=5) != first
    monkeypatch.setattr(bootstrap_module, "_DRAWN_TOGETHER", 1)
    assert ctc_intervals(some, over="cells", num_draws=100, seed=4) == first


def test_more_confidence_is_a_wider_interval() -> None:
    some = tables(8)
    narrow, wide = (ctc_intervals(some, confidence=share)["op_csb"] for share in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_has_no_interval_over_images(count: int) -> None:
    interval = ctc_intervals(tables(count), over="images")["seg"]
    assert math.isnan(interval.value) == (count == 0)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_one_image_has_an_interval_over_cells() -> None:
    interval = ctc_intervals(tables(1), over="cells")["seg"]
    assert interval.low < interval.value < interval.high


def test_resamples_without_a_reference_cell_are_counted_and_excluded() -> None:
    empty = contingency_table(np.zeros((2, 2), int), np.eye(2, dtype=int))
    full = contingency_table(np.eye(2, dtype=int), np.eye(2, dtype=int))
    interval = ctc_intervals([empty, full], num_draws=1000)["seg"]
    assert interval[:3] == (1, 1, 1)
    assert 200 < interval.num_undefined < 300
    nothing = ctc_intervals([empty, empty], num_draws=10)["seg"]
    assert nothing == pytest.approx((math.nan, math.nan, math.nan, 10), nan_ok=True)


def test_precision_without_predictions_is_undefined_without_a_warning() -> None:
    missed = contingency_table(np.eye(2, dtype=int), np.zeros((2, 2), int))
    intervals = matching_intervals([missed, missed], num_draws=10)
    assert intervals["precision"] == pytest.approx((math.nan, math.nan, math.nan, 10), nan_ok=True)
    assert intervals["recall"] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 1.0}, "confidence .* got 1.0"),
        ({"confidence": 0.0}, "confidence"),
        ({"num_draws": 0}, "num_draws .* 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(np.ones((3, 2)), mean_of, **options)
