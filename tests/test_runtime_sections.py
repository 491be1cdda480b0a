"""Checks of the values of sections: a range holds for each number, and says what it is."""

import math
from types import SimpleNamespace

import pytest

from dinocell.runtime.sections import check, check_ascending, refuse


@pytest.mark.parametrize("value", [0, 0.5, 1, (0.0, 1.0), None])
def test_values_in_the_range_are_accepted(value: object) -> None:
    check(SimpleNamespace(share=value), "share", ge=0, le=1)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, (0.5, 2.0)])
def test_values_out_of_the_range_are_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"^share: expected at least 0 and at most 1, got"):
        check(SimpleNamespace(share=value), "share", ge=0, le=1)


def test_open_ranges_exclude_their_ends_and_infinity_unless_it_is_the_maximum() -> None:
    for value in (0, 1):
        with pytest.raises(ValueError, match="more than 0 and less than 1"):
            check(SimpleNamespace(share=value), "share", gt=0, lt=1)
    with pytest.raises(ValueError, match="clip: expected more than 0, got inf"):
        check(SimpleNamespace(clip=math.inf), "clip", gt=0)
    check(SimpleNamespace(clip=math.inf), "clip", gt=0, le=math.inf)


def test_a_pair_is_a_minimum_and_a_maximum() -> None:
    check_ascending(SimpleNamespace(scale=(1, 1)), "scale")
    with pytest.raises(ValueError, match=r"scale: .*got 2 and 1"):
        check_ascending(SimpleNamespace(scale=(2, 1)), "scale")


def test_the_first_conflict_is_reported() -> None:
    refuse((False, "none"))
    with pytest.raises(ValueError, match="second"):
        refuse((False, "first"), (True, "second"), (True, "third"))
