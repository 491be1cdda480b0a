"""Schedules: a value is held, then follows a linear warm-up and a cosine, and is constant until the end.

Used for the learning rate, the weight decay, the teacher's momentum and temperature, the weights of losses, and frozen
parts. A value depends only on the step and the length of the run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dinocell.errors import ConfigError

# Of `Freeze`; a `Schedule` still has ``hold``.
RENAMED_KEYS = {"hold": "freeze"}

Span = int | float
"""A part of a run: an integer is a number of steps, a number with a decimal point a fraction of the run."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value over a run.

    =============  ==================================================================================
    ``hold``       at ``start``
    ``warmup``     linear from ``start`` to ``peak``, which is reached with the step after it
    ``cosine``     half a cosine from ``peak`` to ``end``; null: for the rest of the run
    then           at ``end``
    =============  ==================================================================================

    ``hold``, ``warmup`` and ``cosine`` are steps (integers) or fractions of the run (0.1); ``peak`` alone is constant.
    Without ``end`` the value stays at ``peak``; such a run can be extended without changing earlier values. A cosine
    longer than the rest of the run is cut off.
    """

    peak: float
    start: float = 0.0
    end: float | None = None
    hold: int | float = 0
    warmup: int | float = 0
    cosine: int | float | None = None

    def __post_init__(self) -> None:
        for name, expected in self._problems():
            raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)}")

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Yield the fields that are invalid, and what is expected of them."""
        for name in ("peak", "start", "end"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                yield name, "a finite number"
        for name in ("hold", "warmup", "cosine"):
            span = getattr(self, name)
            if span is not None and not (span >= 0 and math.isfinite(span)):
                yield name, "at least 0"
            if isinstance(span, float) and span > 1 and name != "cosine":
                yield name, "a fraction of at most 1.0 (or steps, without a decimal point)"
        if self.cosine is not None and (self.end is None or self.cosine == 0):
            yield "cosine", "more than 0 steps and an end value (or no cosine, for a constant)"


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """A factor on a learning rate: 0 for ``freeze``, then rising linearly to 1 over ``warmup``."""

    freeze: int | float = 0
    warmup: int | float = 0

    def __post_init__(self) -> None:
        self.factor()  # a schedule checks its fields

    def factor(self) -> Schedule:
        """Return the factor on the learning rate as a schedule."""
        return Schedule(peak=1.0, hold=self.freeze, warmup=self.warmup)


def value_at(schedule: Schedule, step: int, num_steps: int) -> float:
    """Return the value of a step from 0 to ``num_steps - 1``, where ``num_steps`` is the length of the run.

    Raises ConfigError if ``hold`` and ``warmup`` do not fit into the run.
    """
    assert 0 <= step < num_steps, f"step {step} of {num_steps}"
    hold, warmup = num_steps_of(schedule.hold, num_steps), num_steps_of(schedule.warmup, num_steps)
    if isinstance(schedule.hold, float) and isinstance(schedule.warmup, float) and schedule.hold + schedule.warmup <= 1:
        warmup = min(warmup, num_steps - hold)  # both fractions may have been rounded up
    if hold + warmup > num_steps:
        raise ConfigError(f"hold and warmup are {hold} + {warmup} steps, the run has {num_steps}: make them shorter")
    if step < hold:
        return schedule.start
    if step < hold + warmup:
        return schedule.start + (schedule.peak - schedule.start) * (step - hold) / warmup
    if schedule.end is None:
        return schedule.peak
    rest = num_steps - hold - warmup
    cosine = rest if schedule.cosine is None else max(1, num_steps_of(schedule.cosine, num_steps))
    done = step - hold - warmup
    if done >= cosine - 1:  # the last step of the cosine and all later ones are exactly at the end
        return schedule.end if cosine > 1 or done > 0 else schedule.peak
    return schedule.end + (schedule.peak - schedule.end) * 0.5 * (1 + math.cos(math.pi * done / (cosine - 1)))


def num_steps_of(span: Span, num_steps: int) -> int:
    """Return a span in steps: integers as they are, fractions of the run rounded to the nearest step."""
    return span if isinstance(span, int) else round(span * num_steps)


def check_range(name: str, schedule: Schedule, low: float, high: float) -> None:
    """Raise :class:`ConfigError` if a schedule takes values outside a range."""
    start = schedule.start if schedule.hold or schedule.warmup else None
    for value in (schedule.peak, start, schedule.end):
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{name}: expected values from {low:g} to {high:g}, got {value}")
