"""Flows: equal to a plain reference version, unit vectors that lead to the middle of their own cell."""

import numpy as np
import pytest

from dinocell.data_shards.flows import labels_to_flows
from dinocell.data_shards.synthetic import SyntheticConfig, make_field

FIELD = make_field(3, SyntheticConfig(size=(70, 90), channels=("AGP",), num_cells=(6, 9), cell_radius_px=9.0))


def reference(labels: np.ndarray) -> np.ndarray:
    """Do what the docstring says, cell by cell over the whole image, with loops over neighbours."""
    flows = np.zeros((3, *labels.shape))
    for cell in set(labels.ravel().tolist()) - {0}:
        mask = np.pad(labels == cell, 1)
        places = np.argwhere(mask)
        middle = min(places.tolist(), key=lambda place: tuple_distance(place, np.median(places, axis=0)))
        extent = (places.max(0) - places.min(0) + 1).sum()
        heat = np.zeros(mask.shape)
        for _ in range(2 * int(extent)):
            heat[tuple(middle)] += 1
            spread = np.zeros_like(heat)
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    spread += np.roll(heat, (down, right), (0, 1))
            heat = np.where(mask, spread / 9, 0)
        heat = np.log(1 + heat)
        for row, column in places:
            vector = np.array(
                [heat[row + 1, column] - heat[row - 1, column], heat[row, column + 1] - heat[row, column - 1]]
            )
            length = np.sqrt((vector**2).sum())
            flows[:2, row - 1, column - 1] = vector / length if length else 0
            flows[2, row - 1, column - 1] = 1
    return flows


def tuple_distance(place: list[int], middle: np.ndarray) -> float:
    return float(((np.array(place) - middle) ** 2).sum())


def bent() -> np.ndarray:
    labels = np.zeros((24, 30), np.int32)
    labels[3:20, 4:8], labels[16:20, 4:22], labels[3:16, 8:20] = 7, 7, 9  # a cell around the corner of another
    labels[0, 0], labels[22:24, 25:30] = 3, 2
    return labels


@pytest.mark.parametrize("labels", [FIELD.labels, bent()], ids=["field", "bent"])
def test_flows_are_those_of_the_plain_version(labels: np.ndarray) -> None:
    np.testing.assert_allclose(labels_to_flows(labels), reference(labels), atol=1e-4)


def test_flows_are_unit_vectors_inside_cells_and_nothing_outside() -> None:
    rows, columns, inside = labels_to_flows(FIELD.labels)
    length = np.hypot(rows, columns)
    np.testing.assert_array_equal(inside, FIELD.labels > 0)
    assert not length[FIELD.labels == 0].any()
    moving = length > 0
    np.testing.assert_allclose(length[moving], 1, atol=1e-6)
    assert moving[FIELD.labels > 0].mean() > 0.97


def test_ids_may_have_gaps_and_be_larger_than_the_image() -> None:
    large = np.where(FIELD.labels > 0, FIELD.labels.astype(np.int64) * 10**9, 0)
    np.testing.assert_array_equal(labels_to_flows(large), labels_to_flows(FIELD.labels))
    full = np.full((5, 6), 10**9)
    assert (labels_to_flows(full)[2] == 1).all()


def test_a_cell_does_not_feel_its_neighbours() -> None:
    alone = np.where(FIELD.labels == 2, 2, 0)
    inside = alone > 0
    np.testing.assert_array_equal(labels_to_flows(alone)[:, inside], labels_to_flows(FIELD.labels)[:, inside])


def test_no_cells_give_no_flows_and_negative_ids_are_refused() -> None:
    assert not labels_to_flows(np.zeros((4, 5), np.uint8)).any()
    with pytest.raises(ValueError, match=r"ids of at least 0 .* got -1"):
        labels_to_flows(np.array([[0, -1]]))
