"""Masks from flows: equal to a plain reference version, and the labels that the flows were made from."""

import inspect
import time

import numpy as np
import pytest
from scipy import ndimage

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.segmentation.flows import find_masks, flows_to_labels, keep
from dinocell.finetune.targets import labels_to_flows

unchecked = inspect.unwrap(flows_to_labels)
FIELD = make_field(3, SyntheticConfig(size=(64, 80), channels=("AGP",), num_cells=(6, 9), cell_radius_px=9.0))


def as_predicted(labels: np.ndarray, seed: int, noise: float = 0.2) -> np.ndarray:
    """Return flows as a network gives them: smoothed, shorter where directions meet, with noise."""
    flows = labels_to_flows(labels)
    smooth = np.stack([ndimage.gaussian_filter(plane, 1.0) for plane in flows])
    noisy = smooth + np.random.default_rng(seed).normal(0, noise, flows.shape) * np.array([1, 1, 0.3])[:, None, None]
    noisy[2] = np.clip(noisy[2], 0, 1)
    return noisy.astype(np.float32)


def reference(flows: np.ndarray, probability: float, flow_error: float, min_area_px: int) -> np.ndarray:
    """Do the same pixel by pixel, with dictionaries."""
    _, height, width = flows.shape
    is_cell = flows[2] > probability
    field = {(r, c): flows[:2, r, c].astype(float) for r, c in np.argwhere(is_cell).tolist()}
    nothing = np.zeros(2)

    def flow_at(place: np.ndarray) -> np.ndarray:
        top, left = int(place[0]), int(place[1])
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        down, across = place - (top, left)
        upper = field.get((top, left), nothing) * (1 - across) + field.get((top, right), nothing) * across
        lower = field.get((bottom, left), nothing) * (1 - across) + field.get((bottom, right), nothing) * across
        return upper * (1 - down) + lower * down

    def end_of(start: tuple[int, int]) -> tuple[int, int]:
        place = before = np.array(start, float)
        for step in range(1, 201):
            place = np.clip(place + flow_at(place), 0, (height - 1, width - 1))
            if step % 8 == 0:
                if (np.abs(place - before) <= 1 / 64).all():
                    break
                before = place
        return int(np.floor(place[0] + 0.5)), int(np.floor(place[1] + 0.5))

    ends = {start: end_of(start) for start in field}
    counts: dict[tuple[int, int], int] = {}
    for end in ends.values():
        counts[end] = counts.get(end, 0) + 1

    def near(place: tuple[int, int], reach: int) -> list[tuple[int, int]]:
        steps = range(-reach, reach + 1)
        return [(place[0] + down, place[1] + right) for down in steps for right in steps]

    peaks = [p for p, n in counts.items() if n >= 10 and n == max(counts.get(q, 0) for q in near(p, 2))]
    around = np.zeros((height, width), bool)
    for row, column in (place for peak in peaks for place in near(peak, 1)):
        if 0 <= row < height and 0 <= column < width:
            around[row, column] = True
    sinks, _ = ndimage.label(around, np.ones((3, 3)))
    belongs = {place: int(sinks[place]) for place in counts}
    for _ in range(5):
        before = dict(belongs)
        for place, number in before.items():
            belongs[place] = number or max(before.get(each, 0) for each in near(place, 1))
    labels = np.zeros((height, width), np.int32)
    for start, end in ends.items():
        labels[start] = belongs[end]
    for cell in set(labels.ravel().tolist()) - {0}:
        hole = ndimage.binary_fill_holes(labels == cell) & (labels != cell)
        pieces, number = ndimage.label(hole)
        for piece in range(1, number + 1):
            if not labels[pieces == piece].any():
                labels[pieces == piece] = cell
    wanted = labels_to_flows(labels)
    kept = np.zeros_like(labels)
    for cell in sorted(set(labels.ravel().tolist()) - {0}, key=lambda cell: int(np.flatnonzero(labels == cell)[0])):
        inside = labels == cell
        error = ((flows[:2, inside].astype(float) - wanted[:2, inside]) ** 2).sum(0).mean()
        if error <= flow_error and inside.sum() >= min_area_px:
            kept[inside] = kept.max() + 1
    return kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("probability", "flow_error", "area"), [(0.5, 0.4, 0), (0.3, 0.3, 40), (0.0, 4.0, 0)])
def test_labels_equal_a_plain_reference_version(seed: int, probability: float, flow_error: float, area: int) -> None:
    field = make_field(seed, SyntheticConfig(size=(48, 56), channels=("AGP",), num_cells=(4, 8), cell_radius_px=8.0))
    flows = as_predicted(field.labels, seed)
    found = flows_to_labels(flows, probability=probability, flow_error=flow_error, min_area_px=area)
    expected = reference(flows, probability, flow_error, area)
    assert expected.max() > 1
    np.testing.assert_array_equal(found, expected)


def test_perfect_flows_give_back_the_labels() -> None:
    score = ctc_score(FIELD.labels, flows_to_labels(labels_to_flows(FIELD.labels)))
    assert score.det == 1
    assert score.seg > 0.98


def test_touching_cells_stay_apart_and_a_curved_cell_stays_whole() -> None:
    labels = np.zeros((60, 60), np.int32)
    labels[5:25, 5:25], labels[5:25, 25:45] = 1, 2
    labels[30:56, 5:14], labels[47:56, 5:50] = 3, 3
    np.testing.assert_array_equal(flows_to_labels(labels_to_flows(labels)), labels)


def test_holes_are_filled_and_bays_are_not() -> None:
    rows, columns = np.mgrid[:40, :40]
    disc = np.hypot(rows - 20, columns - 20) < 15
    flows = labels_to_flows(disc.astype(np.int32))
    flows[2, 19:22, 19:22] = 0
    assert (flows_to_labels(flows)[19:22, 19:22] == 1).all()
    flows = labels_to_flows(disc.astype(np.int32))
    flows[2, 20, 30:] = 0
    assert not flows_to_labels(flows)[20, 30:].any()


def test_background_enclosed_by_two_cells_stays_background() -> None:
    labels = np.zeros((30, 40), np.int32)
    labels[5:25, 5:20], labels[5:25, 20:35] = 1, 2
    labels[13:16, 19:21] = 0
    found = flows_to_labels(labels_to_flows(labels))
    assert not found[13:16, 19:21].any()
    assert found.max() == 2


def test_a_cell_of_high_flow_error_is_dropped_and_the_others_keep_their_order() -> None:
    labels = np.zeros((30, 80), np.int32)
    for number in range(3):
        labels[5:25, 5 + 25 * number : 25 + 25 * number] = number + 1
    flows = labels_to_flows(labels)
    flows[:2, labels == 2] = np.array([[0.3], [0.0]])  # all downwards
    assert flows_to_labels(flows, flow_error=4.0).max() == 3
    np.testing.assert_array_equal(flows_to_labels(flows), np.where(labels == 2, 0, np.minimum(labels, 2)))


def test_small_cells_are_dropped_and_empty_maps_have_no_cells() -> None:
    masks = find_masks(labels_to_flows(FIELD.labels), probability=0.5)
    areas = np.sort(masks.areas)
    kept = keep(masks, flow_error=4, min_area_px=int(areas[2]) + 1)
    assert kept.max() == np.count_nonzero(areas > areas[2])
    assert flows_to_labels(np.zeros((3, 7, 9), np.float32)).shape == (7, 9)
    assert not flows_to_labels(np.zeros((3, 1, 1), np.float32)).any()


def test_a_million_pixels_take_seconds() -> None:
    labels = np.kron(np.arange(1, 901).reshape(30, 30), np.ones((32, 32), np.int32)).astype(np.int32)
    flows = labels_to_flows(labels)
    flows_to_labels(flows[:, :64, :64])  # compiles
    began = time.perf_counter()
    np.testing.assert_array_equal(flows_to_labels(flows), labels)
    assert time.perf_counter() - began < 30  # a loop in Python takes minutes


@pytest.mark.parametrize(
    ("flows", "options", "message"),
    [
        (np.zeros((2, 4, 4), np.float32), {}, r"flows: .*\(2, 4, 4\)"),
        (np.zeros((3, 4, 4), np.int32), {}, "flows: .*int32"),
        (np.zeros((3, 0, 4), np.float32), {}, r"flows: .*\(3, 0, 4\)"),
        (np.full((3, 4, 4), np.nan, np.float32), {}, "flows: .*48 of 48"),
        (np.zeros((3, 4, 4), np.float32), {"probability": 1.0}, "probability: "),
        (np.zeros((3, 4, 4), np.float32), {"flow_error": 0}, "flow_error: "),
        (np.zeros((3, 4, 4), np.float32), {"min_area_px": -1}, "min_area_px: "),
    ],
)
def test_bad_input_is_refused_by_name(flows: np.ndarray, options: dict[str, float], message: str) -> None:
    with pytest.raises(DinocellError, match=message):
        unchecked(flows, **options)
