"""Find the two thresholds of flows that score best: every pair of a grid, on maps that are predicted once.

For each chance the flows are followed once; whatever is then dropped for its flow error is a choice among the cells
found, exactly as `dinocell.eval.flows.flows_to_labels` makes it.
"""

import csv
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Integer

from dinocell.errors import DinocellError
from dinocell.eval.flows import find_masks, keep
from dinocell.eval.overlaps import find_overlaps
from dinocell.eval.threshold_map import draw_heat_map
from dinocell.eval.thresholds import METRICS, Metric, Sums, mean_around, pooled_scores, sums_of
from dinocell.runtime.atomic import replacing

# Chances on both sides of a half, and flow errors from what only clean cells keep below to what drops nearly nothing.
PROBABILITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FLOW_ERRORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 4.0)


class FlowThresholds(NamedTuple):
    """One point of the search."""

    probability: float
    flow_error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowSearch:
    """Scores of every point; NaN where no reference cell is there.

    Attributes
    ----------
    scores
        By metric, over all images pooled; axes ``probabilities``, ``flow_errors``.
    """

    probabilities: tuple[float, ...]
    flow_errors: tuple[float, ...]
    metric: Metric
    scores: dict[Metric, Float64[np.ndarray, "m f"]]
    num_images: int

    @property
    def best(self) -> FlowThresholds:
        """The point of the highest score; of equal ones that whose neighbours score best, as chance counts least there.

        Raises
        ------
        DinocellError
            If no point has a score.
        """
        row, column = self._best_place
        return FlowThresholds(self.probabilities[row], self.flow_errors[column])

    @property
    def _best_place(self) -> tuple[int, int]:
        scores = self.scores[self.metric]
        if np.isnan(scores).all():
            raise DinocellError(f"no thresholds found: {self.metric} is undefined everywhere (no reference cell?)")
        ties = np.argwhere(scores == np.nanmax(scores)).tolist()
        row, column = ties[int(np.argmax([mean_around(scores, *place) for place in ties]))]
        return row, column

    @property
    def best_score(self) -> float:
        """The highest score of ``metric``."""
        return float(np.nanmax(self.scores[self.metric]))

    def write_csv(self, path: str | Path) -> None:
        """Write one line a point."""
        with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*FlowThresholds._fields, *METRICS])
            for m, f in product(range(len(self.probabilities)), range(len(self.flow_errors))):
                values = [f"{self.scores[metric][m, f]:.6f}" for metric in METRICS]
                writer.writerow([self.probabilities[m], self.flow_errors[f], *values])

    def write_heat_map(self, path: str | Path) -> None:
        """Draw the metric over the two thresholds as a PNG."""
        draw_heat_map(
            path,
            self.scores[self.metric],
            rows=("probability", self.probabilities),
            columns=("flow_error", self.flow_errors),
            best=self._best_place,
            title=f"{self.metric} over {self.num_images} image(s): best {self.best_score:.3f}",
        )


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
) -> FlowSearch:
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
    if len(flows) != len(references) or not len(flows):
        raise DinocellError(f"expected as many maps as references, got {len(flows)} and {len(references)}")
    if metric not in METRICS:
        raise DinocellError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    sums = np.zeros((len(probabilities), len(flow_errors), len(Sums._fields)))
    tasks = list(product(range(len(flows)), range(len(probabilities))))

    def run(task: tuple[int, int]) -> tuple[int, list[Sums]]:
        image, row = task
        masks = find_masks(np.asarray(flows[image]), probability=probabilities[row])
        reference = np.asarray(references[image])
        chosen = (keep(masks, flow_error=error, min_area_px=min_area_px) for error in flow_errors)
        return row, [sums_of(find_overlaps(reference, labels)) for labels in chosen]

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for done, (row, found) in enumerate(pool.map(run, tasks), start=1):
            sums[row] += np.array(found)
            progress(done, len(tasks))
    return FlowSearch(
        probabilities=tuple(map(float, probabilities)),
        flow_errors=tuple(map(float, flow_errors)),
        metric=metric,
        scores=pooled_scores(sums),
        num_images=len(flows),
    )
