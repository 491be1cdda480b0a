import numpy as np
import pytest

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.segmentation.refine import measure_cells, measure_selected


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    config = SyntheticConfig(size=(96, 120), num_cells=(25, 25), cell_radius_px=9.0)
    labels = make_field(seed, config).labels.astype(np.int32)
    return labels, np.random.default_rng(seed).random(labels.shape).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_cells_are_measured_as_all_are(seed: int, share: float) -> None:
    labels, distance = random_case(seed)
    which = np.random.default_rng(seed).random(int(labels.max()) + 3) < share  # two labels that are not there
    some, every = measure_selected(labels, distance, which), measure_cells(labels, distance, len(which) - 1)
    which[0] = False
    for name in ("radius_px", "middle", "peak"):
        np.testing.assert_array_equal(getattr(some, name), np.where(which, getattr(every, name), 0))


def test_scattered_pieces_of_one_label_count_as_one_cell() -> None:
    labels, distance = random_case(0)
    labels[labels == 2] = 1
    which = np.arange(int(labels.max()) + 1) == 1
    some, every = measure_selected(labels, distance, which), measure_cells(labels, distance, len(which) - 1)
    assert (some.radius_px[1], some.middle[1], some.peak[1]) == (every.radius_px[1], every.middle[1], every.peak[1])


def test_a_label_that_fills_the_image_is_given_half_its_longer_side() -> None:
    labels, distance = np.ones((6, 10), np.int32), np.full((6, 10), 0.5, np.float32)
    assert measure_selected(labels, distance, np.array([False, True])).radius_px[1] == 5
