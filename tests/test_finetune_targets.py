"""Targets: their losses, and their postprocessing parameters."""

import math

import pytest
import torch

from dinocell.errors import DinocellError
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.finetune.targets import TARGETS, DistancePostprocessing, FlowPostprocessing


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
