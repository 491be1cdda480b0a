"""Sections that the recipes of pretraining and fine-tuning have in common, and checks of the values of sections."""

import math
from dataclasses import dataclass
from typing import Any

from dinocell.runtime.device import Precision


def check(
    section: Any,
    *names: str,
    ge: int | float = -math.inf,
    gt: int | float = -math.inf,
    le: int | float | None = None,
    lt: int | float = math.inf,
) -> None:
    """Refuse fields, numbers or tuples of numbers, out of range; None is accepted, and infinity only with ``le``.

    Parameters
    ----------
    ge, gt, le, lt
        The values must be at least, more than, at most, less than these.

    Raises
    ------
    ValueError
        With the name of the field, its range and its value.
    """
    bounds = {"at least": ge, "more than": gt, "at most": math.inf if le is None else le, "less than": lt}
    expected = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound))
    for name in names:
        value = getattr(section, name)
        for number in value if isinstance(value, tuple) else (value,):
            is_valid = number is None or (
                ge <= number and gt < number and (number < lt if le is None else number <= le)
            )
            refuse((not is_valid, f"{name}: expected {expected}, got {value}"))


def check_ascending(section: Any, *names: str) -> None:
    """Refuse pairs that are not a minimum and a maximum."""
    for name in names:
        low, high = getattr(section, name)
        refuse((low > high, f"{name}: expected a minimum and a maximum, got {low} and {high}"))


def refuse(*conflicts: tuple[bool, str]) -> None:
    """Raise :class:`ValueError` with the first message whose condition holds."""
    for is_wrong, message in conflicts:
        if is_wrong:
            raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Settings that change the results by rounding errors only.

    Attributes
    ----------
    device
        ``auto``: CUDA if available.
    dtype
        Of matrix products; ``auto``: bfloat16 on GPUs that support it (Ampere and later), float32 elsewhere.
        ``bfloat16`` is float32 on x86 CPUs without instructions for it (AVX512-BF16, AMX).
    workers
        Number of processes per rank that load data ahead.
    timeout_s
        Time that ranks wait for each other before all of them stop with an error.
    """

    device: str = "auto"
    dtype: Precision = "auto"
    workers: int = 2
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        check(self, "workers", ge=0)
        check(self, "timeout_s", gt=0)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW and its settings.

    Attributes
    ----------
    clip
        Maximum gradient norm of each part of the model: backbone, heads, decoder.
    max_nonfinite_steps
        Stop after so many consecutive steps with a non-finite loss or gradient. Such steps change no weight.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    max_nonfinite_steps: int = 10

    def __post_init__(self) -> None:
        check(self, "betas", ge=0, lt=1)
        check(self, "clip", gt=0, le=math.inf)  # infinite: no clipping
        check(self, "max_nonfinite_steps", ge=1)
