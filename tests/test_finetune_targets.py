"""Targets: their losses and postprocessing parameters, and flows against a plain reference implementation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.finetune.targets import TARGETS, DistancePostprocessing, FlowPostprocessing, labels_to_flows

FIELD = make_field(3, SyntheticConfig(size=(70, 90), channels=("AGP",), num_cells=(6, 9), cell_radius_px=9.0))


def test_the_loss_of_distance_maps_weights_cells_and_differences() -> None:
    maps, targets = torch.zeros(1, 1, 1, 4), torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4)
    assert float(TARGETS["distance"].loss(maps, targets)) == pytest.approx(0.5)
    assert float(TARGETS["distance"].loss(maps, targets, foreground_weight=1.0)) == pytest.approx(4 / 4 / 1.5)
    with_edges = float(
        TARGETS["distance"].loss(maps.expand(1, 1, 2, 4), targets.expand(1, 1, 2, 4), gradient_weight=3.0)
    )
    assert with_edges == pytest.approx(0.5 + 3 * (1 / 3))


def test_the_loss_of_flows_is_cellposes() -> None:
    maps = torch.tensor([0.5, -0.5, 0.25]).view(1, 3, 1, 1)
    targets = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    expected = 0.5 * torch.nn.functional.mse_loss(5 * maps[:, :2], 5 * targets[:, :2]) - math.log(0.25)
    assert float(TARGETS["flows"].loss(maps, targets)) == pytest.approx(float(expected))


def test_settings_give_the_postprocessing_of_their_target() -> None:
    settings = SegmenterSettings(cells_max=0.6, merge_px=None, min_area_px=5, probability=0.7)
    assert settings.postprocessing == DistancePostprocessing(cells_max=0.6, merge_px=None, min_area_px=5)
    flows = SegmenterSettings(target="flows", cells_max=0.6, min_area_px=5, probability=0.7)
    assert flows.postprocessing == FlowPostprocessing(probability=0.7, min_area_px=5)


def test_the_plain_rule_has_the_thresholds_and_no_refinement() -> None:
    plain = DistancePostprocessing(cells_max=0.6, min_area_px=9).plain()
    assert plain == DistancePostprocessing(cells_max=0.6, merge_px=None, restore_border=False)
    assert FlowPostprocessing(min_area_px=9).plain() == FlowPostprocessing(flow_error=math.inf)


def test_thresholds_of_the_other_target_or_out_of_range_are_refused() -> None:
    parameters = DistancePostprocessing()
    assert parameters.with_thresholds(cells_max=0.5, flow_error=None) == DistancePostprocessing(cells_max=0.5)
    with pytest.raises(DinocellError, match="flow_error"):
        parameters.with_thresholds(flow_error=0.4)
    with pytest.raises(DinocellError, match="cell_fill"):
        parameters.with_thresholds(cell_fill=0.9)
    with pytest.raises(DinocellError, match="probability"):
        FlowPostprocessing().with_thresholds(probability=1.0)


def reference(labels: np.ndarray) -> np.ndarray:
    """Compute the docstring's definition, cell by cell over the whole image.

    Opposite neighbours are added first: otherwise rounding gives the middle of a symmetrical cell a direction.
    """
    flows = np.zeros((3, *labels.shape))
    for cell in set(labels.ravel().tolist()) - {0}:
        mask = np.pad(labels == cell, 1)
        places = np.argwhere(mask)
        middle = min(places.tolist(), key=lambda place: tuple_distance(place, np.median(places, axis=0)))
        extent = (places.max(0) - places.min(0) + 1).sum()
        heat = np.zeros(mask.shape)
        for _ in range(2 * int(extent)):
            heat[tuple(middle)] += 1
            spread = heat
            for axis in (1, 0):
                spread = (np.roll(spread, -1, axis) + np.roll(spread, 1, axis)) + spread
            heat = np.where(mask, spread / 9, 0)
        heat = np.log1p(heat)
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


def generated() -> np.ndarray:
    return FIELD.labels


def concave() -> np.ndarray:
    labels = np.zeros((24, 30), np.int32)
    labels[3:20, 4:8], labels[16:20, 4:22], labels[3:16, 8:20] = 7, 7, 9  # a cell around the corner of another
    labels[0, 0], labels[22:24, 25:30] = 3, 2
    return labels


def at_borders() -> np.ndarray:
    labels = np.zeros((31, 26), np.uint16)
    labels[:7, :6], labels[24:, 19:], labels[12:19, 22:] = 1, 2, 4
    labels[0, 25], labels[30, 0], labels[15, :9] = 5, 6, 8
    return labels


def in_pieces() -> np.ndarray:
    labels = np.zeros((20, 24), np.int32)
    labels[1:9, 1:9], labels[3:5, 14:16], labels[12:18, 3:9], labels[13:16, 12:20] = 1, 1, 2, 2
    labels[0, 23] = 2
    return labels


def thin() -> np.ndarray:
    labels = np.zeros((5, 130), np.int32)  # the heat at its ends is far below the rounding of that in the middle
    labels[1, 3:127], labels[3, :] = 1, 2
    return labels


# Sums of at most 400 steps in float64, all terms positive: heat is right to 1e-13 of itself. A direction is a
# difference of two neighbours' logarithms; where that is more than 1e-6 of them, as in these shapes, it is right to
# 1e-7, the rounding of the result to float32.
@pytest.mark.parametrize("make", [generated, concave, at_borders, in_pieces, thin])
def test_flows_equal_the_reference(make: Callable[[], np.ndarray]) -> None:
    labels = make()
    np.testing.assert_allclose(labels_to_flows(labels), reference(labels), rtol=0, atol=1e-6)


def test_one_pixel_cells_and_the_middle_of_symmetrical_cells_have_no_flow() -> None:
    labels = np.zeros((23, 20), np.int32)
    labels[2, 3], labels[6:21, 5:16] = 1, 2
    flows = labels_to_flows(labels)
    np.testing.assert_array_equal(flows[:, 2, 3], [0, 0, 1])
    np.testing.assert_array_equal(flows[:, 13, 10], [0, 0, 1])


def test_pieces_of_a_cell_without_the_source_are_cell_but_have_no_flow() -> None:
    rows, columns, inside = labels_to_flows(in_pieces())
    np.testing.assert_array_equal(inside, in_pieces() > 0)
    assert not rows[3:5, 14:16].any()
    assert not columns[3:5, 14:16].any()


def test_flows_are_unit_vectors_inside_cells_and_zero_outside() -> None:
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


def test_flows_do_not_depend_on_other_cells() -> None:
    alone = np.where(FIELD.labels == 2, 2, 0)
    inside = alone > 0
    np.testing.assert_array_equal(labels_to_flows(alone)[:, inside], labels_to_flows(FIELD.labels)[:, inside])


def test_no_cells_give_no_flows_and_negative_ids_are_rejected() -> None:
    for shape in ((4, 5), (0, 5), (0, 0)):
        flows = labels_to_flows(np.zeros(shape, np.uint8))
        assert flows.shape == (3, *shape)
        assert not flows.any()
    with pytest.raises(ValueError, match=r"labels: .* -1"):
        labels_to_flows(np.array([[0, -1]]))
