"""Losses of maps: their weights, and Cellpose's for flows."""

import math

import pytest
import torch

from dinocell.finetune.learner import map_loss


def test_the_loss_weighs_cells_and_differences() -> None:
    maps, targets = torch.zeros(1, 1, 1, 4), torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4)
    assert float(map_loss(maps, targets, "distance")) == pytest.approx(0.5)
    assert float(map_loss(maps, targets, "distance", foreground_weight=1.0)) == pytest.approx(4 / 4 / 1.5)
    with_edges = float(map_loss(maps.expand(1, 1, 2, 4), targets.expand(1, 1, 2, 4), "distance", gradient_weight=3.0))
    assert with_edges == pytest.approx(0.5 + 3 * (1 / 3))


def test_the_loss_of_flows_is_cellposes() -> None:
    maps = torch.tensor([0.5, -0.5, 0.25]).view(1, 3, 1, 1)
    targets = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    expected = 0.5 * torch.nn.functional.mse_loss(5 * maps[:, :2], 5 * targets[:, :2]) - math.log(0.25)
    assert float(map_loss(maps, targets, "flows")) == pytest.approx(float(expected))
