"""Find the thresholds of the watershed and the mending that score best: a grid, on maps that are predicted once.

For each peak threshold a map is flooded once, at the lowest fill threshold; every higher one is a cut of that flood
(`dinocell.eval.watershed.cut`, equal in every pixel). Cuts are then mended and scored exactly as
`dinocell.eval.watershed.distance_to_labels` and `dinocell.eval.ctc` would.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from dinocell.errors import DinocellError
from dinocell.eval.grid_search import GridSearch, Metric, Sums, search_grid, sums_of
from dinocell.eval.mending import Mending, mend
from dinocell.eval.overlaps import find_overlaps
from dinocell.eval.watershed import cut, flood

# SAMCell's grid: 20 x 20 points from 0.1 to 0.9 and from 0.05 to 0.5.
CELLS_MAX_RANGE = (0.1, 0.9)
CELL_FILL_RANGE = (0.05, 0.5)
STEPS = 20


class Thresholds(NamedTuple):
    """One point of the search."""

    cells_max: float
    cell_fill: float
    merge_px: float | None
    restore_border: bool


def search(
    distances: Sequence[Float[np.ndarray, "_ _"]],
    references: Sequence[Integer[np.ndarray, "_ _"]],
    *,
    cells_max_range: tuple[int | float, int | float] = CELLS_MAX_RANGE,
    cell_fill_range: tuple[int | float, int | float] = CELL_FILL_RANGE,
    steps: int = STEPS,
    merge_px: Sequence[int | float | None] | None = None,
    restore_border: Sequence[bool] | None = None,
    mending: Mending | None = None,
    metric: Metric = "op_csb",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> GridSearch[Thresholds]:
    """Score every pair of thresholds of a grid, over all images pooled.

    Parameters
    ----------
    distances, references
        Predicted maps (0 to 1) and label images, as many, of equal sizes. Memory maps are read one at a time, so
        they need not fit into memory; see `dinocell.eval.grid_search.keep_maps`.
    cells_max_range, cell_fill_range, steps
        Least and largest value of each threshold, and how many of each, evenly spaced.
    merge_px, restore_border
        Values of these to try with each pair; None tries that of ``mending``.
    mending
        What else is done after the flood, the same for all points; ``mending.PLAIN`` for the plain watershed.
    metric
        What the best point is the best of.
    workers
        Threads; None takes one a core. They do not change the result.
    progress
        Called with the number of floods done and of all.

    Raises
    ------
    DinocellError
        If a range or a map is impossible, or maps and references do not fit together.
    """
    mending = mending or Mending()
    peaks = _grid("cells_max", *cells_max_range, steps)
    fills = _grid("cell_fill", *cell_fill_range, steps)
    tried = (mending.merge_px,) if merge_px is None else merge_px
    merges = tuple(None if value is None else float(value) for value in tried)
    borders = (mending.restore_border,) if restore_border is None else tuple(restore_border)
    mendings = [[replace(mending, merge_px=value, restore_border=restored) for restored in borders] for value in merges]

    def evaluate(distance: np.ndarray, reference: np.ndarray, cells_max: float) -> np.ndarray:
        return _scored(distance, reference, cells_max, fills, mendings)

    return search_grid(
        distances,
        references,
        Thresholds,
        {"cells_max": peaks, "cell_fill": fills, "merge_px": merges, "restore_border": borders},
        evaluate,
        metric=metric,
        workers=workers,
        progress=progress,
    )


def _scored(
    distance: np.ndarray,
    reference: np.ndarray,
    cells_max: float,
    fills: Sequence[float],
    mendings: Sequence[Sequence[Mending]],
) -> np.ndarray:
    """Flood once, then cut, mend and score at every fill threshold, none above the peaks'; (f g r sums)."""
    found = np.full((len(fills), len(mendings), len(mendings[0]), len(Sums._fields)), np.nan)
    possible = [(number, fill) for number, fill in enumerate(fills) if fill <= cells_max]
    if not possible:
        return found
    flooded = flood(distance, cells_max=cells_max, lowest_fill=possible[0][1])
    for number, fill in possible:
        plain = cut(flooded, fill)
        for which, ways in enumerate(mendings):
            for way, mending in enumerate(ways):
                table = find_overlaps(reference, mend(plain, flooded.distance, cell_fill=fill, mending=mending))
                found[number, which, way] = sums_of(table)
    return found


def _grid(name: str, low: int | float, high: int | float, steps: int) -> tuple[float, ...]:
    if not 0 <= low <= high < 1 or steps < 1:
        raise DinocellError(
            f"{name}: expected 0 <= least <= largest < 1 and at least 1 step, got {low}, {high}, {steps}"
        )
    return tuple(np.linspace(low, high, steps if high > low else 1).round(9).tolist())
