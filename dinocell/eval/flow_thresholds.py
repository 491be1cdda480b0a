"""Find the two thresholds of flows that score best: every pair of a grid, on maps that are predicted once.

For each chance the flows are followed once; whatever is then dropped for its flow error is a choice among the cells
found, exactly as `dinocell.eval.flows.flows_to_labels` makes it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from dinocell.eval.flows import find_masks, keep
from dinocell.eval.grid_search import GridSearch, Metric, search_grid, sums_of
from dinocell.eval.overlaps import find_overlaps

# Chances on both sides of a half, and flow errors from what only clean cells keep below to what drops nearly nothing.
PROBABILITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FLOW_ERRORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 4.0)


class FlowThresholds(NamedTuple):
    """One point of the search."""

    probability: float
    flow_error: float


def search_flows(
    flows: Sequence[Float[np.ndarray, "3 _ _"]],
    references: Sequence[Integer[np.ndarray, "_ _"]],
    *,
    probabilities: Sequence[int | float] = PROBABILITIES,
    flow_errors: Sequence[int | float] = FLOW_ERRORS,
    min_area_px: int = 0,
    metric: Metric = "op_csb",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> GridSearch[FlowThresholds]:
    """Score every pair of thresholds of a grid, over all images pooled.

    Parameters
    ----------
    flows, references
        Predicted maps and label images, as many, of equal sizes; memory maps are read one at a time.
    probabilities, flow_errors
        Values of each threshold, ascending.
    min_area_px
        Smaller cells are dropped at every point.
    metric
        What the best point is the best of.
    workers
        Threads; None takes one a core. They do not change the result.
    progress
        Called with the number of followed maps and of all.

    Raises
    ------
    DinocellError
        If a threshold or a map is impossible, or maps and references do not fit together.
    """

    def evaluate(maps: np.ndarray, reference: np.ndarray, probability: float) -> np.ndarray:
        masks = find_masks(maps, probability=probability)
        chosen = (keep(masks, flow_error=error, min_area_px=min_area_px) for error in flow_errors)
        return np.array([sums_of(find_overlaps(reference, labels)) for labels in chosen], float)

    return search_grid(
        flows,
        references,
        FlowThresholds,
        {"probability": tuple(map(float, probabilities)), "flow_error": tuple(map(float, flow_errors))},
        evaluate,
        metric=metric,
        workers=workers,
        progress=progress,
    )
