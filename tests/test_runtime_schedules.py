"""Schedules against arrays made with NumPy's linspace and cosine, and through the recipe loader."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinocell.configs.load import load_config, to_yaml
from dinocell.errors import ConfigError
from dinocell.runtime.schedules import Freeze, Schedule, value_at
from dinocell.ssl.config import Schedules


def whole(schedule: Schedule, num_steps: int) -> np.ndarray:
    return np.array([value_at(schedule, step, num_steps) for step in range(num_steps)])


def plain(schedule: Schedule, num_steps: int) -> np.ndarray:
    """Concatenate the four parts as arrays."""

    def steps(span: float) -> int:
        return span if isinstance(span, int) else round(span * num_steps)

    hold = steps(schedule.hold)
    warmup = min(steps(schedule.warmup), num_steps - hold)
    held = np.full(hold, schedule.start)
    linear = np.linspace(schedule.start, schedule.peak, warmup, endpoint=False)
    rest = num_steps - hold - warmup
    if schedule.end is None:
        return np.concatenate([held, linear, np.full(rest, schedule.peak)])
    length = rest if schedule.cosine is None else max(1, steps(schedule.cosine))
    share = (1 + np.cos(np.linspace(0, np.pi, length))) / 2
    cosine = schedule.end + (schedule.peak - schedule.end) * share
    return np.concatenate([held, linear, cosine, np.full(max(rest - length, 0), schedule.end)])[:num_steps]


spans = st.one_of(st.integers(0, 20), st.floats(0, 0.5))


@settings(max_examples=300, deadline=None)
@given(
    num_steps=st.integers(40, 60),
    peak=st.floats(-5, 5),
    start=st.floats(-5, 5),
    end=st.floats(-5, 5),
    hold=spans,
    warmup=spans,
    cosine=st.one_of(st.none(), st.integers(1, 100), st.floats(0.01, 3)),
    constant=st.booleans(),
)
def test_any_schedule_equals_the_plain_arrays(
    num_steps: int,
    peak: float,
    start: float,
    end: float,
    hold: int | float,
    warmup: int | float,
    cosine: int | float | None,
    constant: bool,
) -> None:
    schedule = Schedule(
        peak=peak,
        start=start,
        end=None if constant else end,
        hold=hold,
        warmup=warmup,
        cosine=None if constant else cosine,
    )
    np.testing.assert_allclose(whole(schedule, num_steps), plain(schedule, num_steps), rtol=1e-9, atol=1e-12)


def test_two_halves_fit_into_an_odd_number_of_steps() -> None:
    values = whole(Schedule(peak=1.0, hold=0.5, warmup=0.5), 43)
    np.testing.assert_array_equal(values[:22], 0)
    np.testing.assert_allclose(values[22:], np.arange(21) / 21)


def test_warmup_meets_the_peak_and_the_cosine_ends_exactly() -> None:
    values = whole(Schedule(peak=2.0, end=1e-6, warmup=4), 11)
    np.testing.assert_allclose(values[:5], [0, 0.5, 1, 1.5, 2])
    assert values[10] == 1e-6
    assert value_at(Schedule(peak=0.996, end=1.0), 99, 100) == 1.0


def test_fractions_and_steps_are_equivalent() -> None:
    steps = Schedule(peak=1.0, end=0.1, hold=10, warmup=20, cosine=50)
    fractions = Schedule(peak=1.0, end=0.1, hold=0.1, warmup=0.2, cosine=0.5)
    np.testing.assert_array_equal(whole(steps, 100), whole(fractions, 100))


def test_constant_schedule_does_not_change_when_the_run_grows() -> None:
    schedule = Schedule(peak=4e-4, warmup=10)
    np.testing.assert_array_equal(whole(schedule, 50), whole(schedule, 80)[:50])


def test_cosine_longer_than_the_run_is_cut_off() -> None:
    np.testing.assert_allclose(
        whole(Schedule(peak=1.0, end=0.0, cosine=125), 100), whole(Schedule(peak=1.0, end=0.0), 125)[:100]
    )


def test_freeze_is_a_factor_of_zero_then_a_ramp_then_one() -> None:
    np.testing.assert_allclose(whole(Freeze(freeze=2, warmup=4).factor(), 8), [0, 0, 0, 0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_array_equal(whole(Freeze(freeze=3).factor(), 5), [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(whole(Freeze().factor(), 3), [1, 1, 1])


def test_run_of_one_step_has_a_value() -> None:
    assert value_at(Schedule(peak=3.0, end=1.0), 0, 1) == 3.0
    assert value_at(Schedule(peak=3.0), 0, 1) == 3.0
    assert value_at(Schedule(peak=3.0, start=1.0, warmup=1), 0, 1) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peak": float("nan")}, "peak: expected a finite number, got nan"),
        ({"peak": 1.0, "start": float("inf")}, "start: expected a finite number"),
        ({"peak": 1.0, "end": float("inf")}, "end: expected a finite number"),
        ({"peak": 1.0, "warmup": -1}, "warmup: expected at least 0, got -1"),
        ({"peak": 1.0, "hold": -0.5}, "hold: expected at least 0, got -0.5"),
        ({"peak": 1.0, "warmup": float("nan")}, "warmup: expected at least 0, got nan"),
        ({"peak": 1.0, "warmup": 100.0}, "warmup: .* got 100.0"),
        ({"peak": 1.0, "cosine": 5}, "cosine: expected"),
        ({"peak": 1.0, "end": 0.0, "cosine": 0}, "cosine: expected"),
        ({"peak": 1.0, "end": 0.0, "cosine": 0.0}, "cosine: expected"),
    ],
)
def test_impossible_schedules_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**values)  # type: ignore[arg-type]


def test_warmups_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="hold and warmup are 6 \\+ 5 steps, the run has 10"):
        value_at(Schedule(peak=1.0, hold=6, warmup=5), 0, 10)


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("teacher_momentum", Schedule(peak=0.99, end=1.01), "teacher_momentum: expected values from 0 to 1, got 1.01"),
        ("learning_rate", Schedule(peak=-1e-4), "learning_rate: expected values from 0 to inf, got -0.0001"),
        ("weight_decay", Schedule(peak=0.1, end=-0.1), "weight_decay"),
        ("teacher_temperature", Schedule(peak=0.07, warmup=0.3), "teacher_temperature: .* got 0.0"),
    ],
)
def test_values_out_of_range_are_refused(name: str, schedule: Schedule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedules(**{name: schedule})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    schedules: Schedules = field(default_factory=Schedules)


def test_schedules_load_from_a_recipe_and_write_themselves_back(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("schedules:\n  learning_rate: {peak: 4e-3, warmup: 0.1}\n  last_layer: {freeze: 1250}\n")
    recipe = load_config(Recipe, path, ["schedules.learning_rate.warmup=1000"])
    assert recipe.schedules.learning_rate == Schedule(peak=4e-3, end=1e-6, warmup=1000)
    assert isinstance(recipe.schedules.learning_rate.warmup, int)
    assert recipe.schedules.last_layer.freeze == 1250
    path.write_text("schedules:\n  learning_rate: {peak: 4e-3, hold: 5}\n  last_layer: {hold: 1250}\n")
    former = load_config(type(recipe), path)
    assert (former.schedules.learning_rate.hold, former.schedules.last_layer.freeze) == (5, 1250)
    path.write_text(to_yaml(recipe))
    assert load_config(Recipe, path) == recipe


def test_impossible_schedule_of_a_recipe_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"schedules.learning_rate.*warmup: "):
        load_config(Recipe, None, ["schedules.learning_rate.warmup=80.5"])
