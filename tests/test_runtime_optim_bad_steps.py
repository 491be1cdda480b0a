"""Steps that are not finite: skipped exactly, counted, and too many in a row are an error."""

import pytest
import torch
from torch import nn

from dinocell.errors import DinocellError
from dinocell.runtime.optim import NonfiniteSteps, adamw, parameter_groups, set_rates

CPU = torch.device("cpu")
GOOD, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def made() -> tuple[nn.Linear, torch.optim.Optimizer]:
    layer = nn.Linear(3, 2)
    optimizer = adamw(parameter_groups({"head": layer}, depth=1))
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    return layer, optimizer


def snapshot(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [optimizer.state[each][name] for each in layer.parameters() for name in ("exp_avg", "exp_avg_sq", "step")]
    return [each.detach().clone() for each in (*layer.parameters(), *moments)]


@pytest.mark.parametrize("bad", [NAN, INFINITE])
def test_a_bad_step_changes_neither_weights_nor_moments(bad: torch.Tensor) -> None:
    layer, optimizer = made()
    steps = NonfiniteSteps(CPU, most=10, advice="")
    steps.step(optimizer, [GOOD, GOOD])
    before = snapshot(layer, optimizer)
    steps.step(optimizer, [GOOD, bad])
    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(layer, optimizer), strict=True))
    steps.step(optimizer, [GOOD])
    assert not torch.equal(before[0], layer.weight)
    assert float(steps.total) == 1


def test_only_bad_steps_in_a_row_are_too_many() -> None:
    _, optimizer = made()
    steps = NonfiniteSteps(CPU, most=2, advice="Do this.")
    for value in (NAN, GOOD, NAN, GOOD, NAN):
        steps.step(optimizer, [value])
        steps.check()
    steps.step(optimizer, [NAN])
    with pytest.raises(DinocellError, match=r"2 steps in a row .* not finite; no weight .* Do this\."):
        steps.check()
    assert float(steps.total) == 4


def test_the_count_goes_on_from_its_state() -> None:
    _, optimizer = made()
    first, second = (NonfiniteSteps(CPU, most=2, advice="") for _ in range(2))
    first.step(optimizer, [NAN])
    state = first.state()
    first.step(optimizer, [GOOD])
    second.restore(state)
    second.check()
    second.step(optimizer, [NAN])
    assert float(second.total) == 2
    with pytest.raises(DinocellError, match="2 steps in a row"):
        second.check()
