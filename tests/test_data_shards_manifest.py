"""Statistics: exact moments, percentiles to 1/128, and histograms that add up."""

import json

import numpy as np
import pytest

from dinocell.data_shards.manifest import PERCENTILES, Histogram

RNG = np.random.default_rng(0)
PLANES = {
    "uint8": RNG.integers(0, 256, (50, 60)).astype(np.uint8),
    "uint16": (RNG.gamma(2, 900, (50, 60)) + 120).astype(np.uint16),
    "int16": RNG.integers(-500, 500, (50, 60)).astype(np.int16),
    "float32": RNG.normal(-1, 30, (50, 60)).astype(np.float32),
    "float64": RNG.uniform(1e-6, 1e-3, (50, 60)),
}


def histogram(*planes: np.ndarray) -> Histogram:
    made = Histogram()
    for plane in planes:
        made.add(plane)
    return made


@pytest.mark.parametrize("name", list(PLANES))
def test_statistics_are_those_of_numpy(name: str) -> None:
    plane = PLANES[name]
    known = histogram(plane, plane).statistics()
    values = plane.astype(np.float64)
    assert (known.minimum, known.maximum) == (values.min(), values.max())
    assert known.mean == pytest.approx(values.mean(), rel=1e-9)
    assert known.std == pytest.approx(values.std(), rel=1e-6)
    assert (known.num_tiles, known.num_pixels) == (2, 2 * plane.size)
    for percent in PERCENTILES:
        low, high = (np.percentile(values, max(0.0, min(100.0, percent + step))) for step in (-0.1, 0.1))
        slack = max(abs(low), abs(high)) / 100
        assert low - slack <= known.percentiles[f"{percent:g}"] <= high + slack


def test_integers_up_to_256_are_exact() -> None:
    plane = PLANES["uint8"]
    known = histogram(plane).statistics()
    for percent in PERCENTILES:
        assert known.percentiles[f"{percent:g}"] == np.percentile(plane, percent, method="lower")


@pytest.mark.parametrize("name", list(PLANES))
def test_histograms_add_up_and_survive_json(name: str) -> None:
    plane = PLANES[name]
    whole = histogram(plane[:20], plane[20:])
    merged = Histogram.from_json(json.loads(json.dumps(histogram(plane[:20]).to_json())))
    merged.merge(histogram(plane[20:]))
    assert merged.statistics() == whole.statistics()
