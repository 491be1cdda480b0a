"""What differs between two configurations, in words: whether a folder's run is the one that is asked for."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dinocell.configs.schema import join, show


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ("compute",)) -> list[str]:
    """Return what differs between two plain configurations, one ``key: old -> new`` each.

    Parameters
    ----------
    old, new
        As :func:`dinocell.configs.load.to_dict` or :func:`~dinocell.configs.load.read_mapping` give them.
    ignore
        Dotted keys or sections that may differ; ``compute`` holds the knobs that do not change results.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    differing = []
    for key in [*before, *(key for key in after if key not in before)]:
        if any(key == ignored or key.startswith(f"{ignored}.") for ignored in ignore):
            continue
        texts = [show(side[key]) if key in side else "(absent)" for side in (before, after)]
        if not _same(before.get(key, _ABSENT), after.get(key, _ABSENT)):
            differing.append(f"{key}: {texts[0]} -> {texts[1]}")
    return differing


_ABSENT = object()


def _same(one: Any, other: Any) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or (one == other and isinstance(one, bool) == isinstance(other, bool))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, join(prefix, str(name)))
        else:
            yield join(prefix, str(name)), list(value) if isinstance(value, tuple) else value
