"""Search thresholds on a grid: score every point over all images pooled, and take the best.

What a point costs is the evaluator's business: it gets a map and one value of the first threshold, on which the costly
part of the work depends, and returns what all the points with that value add (`Sums`), over the other thresholds.
"""

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Float64, Integer

from dinocell.errors import DinocellError
from dinocell.eval.ctc import MISSED_COST, SPLIT_COST, SPURIOUS_COST, ctc_score_from, seg_and_det
from dinocell.eval.matching import find_matches
from dinocell.eval.overlaps import Overlaps
from dinocell.eval.threshold_map import draw_heat_map
from dinocell.runtime.atomic import replacing

Metric = Literal["op_csb", "seg", "det", "ap50", "f1_50"]
METRICS: tuple[Metric, ...] = ("op_csb", "seg", "det", "ap50", "f1_50")

Point = TypeVar("Point", bound=tuple[Any, ...])
Evaluator = Callable[[np.ndarray, np.ndarray, float], Float64[np.ndarray, "... sums"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class GridSearch(Generic[Point]):
    """Scores of every point; NaN where the point is impossible, or no reference cell is there.

    Attributes
    ----------
    point
        The named tuple of a point.
    axes
        The values of each threshold, by its name, in the order of the tuple.
    scores
        By metric, over all images pooled; an axis a threshold.
    """

    point: Callable[..., Point]
    axes: Mapping[str, Sequence[float | bool | None]]
    metric: Metric
    scores: dict[Metric, Float64[np.ndarray, "..."]]
    num_images: int

    @property
    def best(self) -> Point:
        """The point of the highest score; of equal ones that whose neighbours score best, as chance counts least there.

        Raises
        ------
        DinocellError
            If no point has a score.
        """
        return self.point(*self._values(self._best_place))

    @property
    def best_score(self) -> float:
        """The highest score of ``metric``."""
        return float(np.nanmax(self.scores[self.metric]))

    @property
    def _best_place(self) -> tuple[int, ...]:
        scores = self.scores[self.metric]
        if np.isnan(scores).all():
            raise DinocellError(f"no thresholds found: {self.metric} is undefined everywhere (no reference cell?)")
        ties = np.argwhere(scores == np.nanmax(scores)).tolist()
        around = [_mean_around(scores, *place) for place in ties]
        return tuple(ties[int(np.argmax(around))])

    def _values(self, place: Sequence[int]) -> list[float | bool | None]:
        return [values[index] for values, index in zip(self.axes.values(), place, strict=True)]

    def write_csv(self, path: str | Path) -> None:
        """Write one line a point."""
        with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*self.axes, *METRICS])
            for place in product(*(range(len(values)) for values in self.axes.values())):
                values = [_written(value) for value in self._values(place)]
                writer.writerow([*values, *(f"{self.scores[metric][place]:.6f}" for metric in METRICS)])

    def write_heat_map(self, path: str | Path) -> None:
        """Draw the metric over the first two thresholds, at the best values of the others, as a PNG."""
        row, column, *others = self._best_place
        shown: tuple[slice | int, ...] = (slice(None), slice(None), *others)
        rows, columns = ((name, np.array(values, float).tolist()) for name, values in list(self.axes.items())[:2])
        draw_heat_map(
            path,
            self.scores[self.metric][shown],
            rows=rows,
            columns=columns,
            best=(row, column),
            title=f"{self.metric} over {self.num_images} image(s): best {self.best_score:.3f}",
        )


def _written(value: float | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.6g}"


def search_grid(
    maps: Sequence[Float[np.ndarray, "..."]],
    references: Sequence[Integer[np.ndarray, "_ _"]],
    point: Callable[..., Point],
    axes: Mapping[str, Sequence[float | bool | None]],
    evaluate: Evaluator,
    *,
    metric: Metric,
    workers: int | None,
    progress: Callable[[int, int], None],
) -> GridSearch[Point]:
    """Score every point of a grid with an evaluator.

    Parameters
    ----------
    maps, references
        As many; memory maps are read one at a time.
    point, axes
        See `GridSearch`.
    evaluate
        Gets a map, its reference and a value of the first threshold, and returns `Sums` over the other thresholds; NaN
        where a point is impossible.
    metric
        What the best point is the best of.
    workers
        Threads; None takes one a core. They do not change the result.
    progress
        Called with the number of evaluations done and of all.

    Raises
    ------
    DinocellError
        If maps and references do not fit together, or there is no such metric.
    """
    if len(maps) != len(references) or not len(maps):
        raise DinocellError(f"expected as many maps as references, got {len(maps)} and {len(references)}")
    if metric not in METRICS:
        raise DinocellError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    first = next(iter(axes.values()))
    sums = np.zeros((*(len(values) for values in axes.values()), len(Sums._fields)))
    tasks = list(product(range(len(maps)), range(len(first))))

    def run(task: tuple[int, int]) -> tuple[int, np.ndarray]:
        image, row = task
        value = first[row]
        assert value is not None
        return row, evaluate(np.asarray(maps[image]), np.asarray(references[image]), value)

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for done, (row, found) in enumerate(pool.map(run, tasks), start=1):
            sums[row] += found
            progress(done, len(tasks))
    return GridSearch(point=point, axes=axes, metric=metric, scores=_pooled_scores(sums), num_images=len(maps))


def keep_maps(folder: str | Path, maps: Iterable[Float[np.ndarray, "*_"]]) -> list[np.memmap]:
    """Write maps to ``folder`` as they come, one file each, and return them memory-mapped, for a search."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for number, distance in enumerate(maps):
        path = folder / f"{number:06d}.npy"
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.asarray(distance, np.float32), allow_pickle=False)
        kept.append(np.lib.format.open_memmap(path, mode="r"))
    return kept


class Sums(NamedTuple):
    """What is summed over images at each point."""

    jaccard: float
    num_splits: int
    num_missed: int
    num_spurious: int
    num_reference: int
    num_predicted: int
    num_matched_50: int


def sums_of(table: Overlaps) -> Sums:
    """Return what one image adds."""
    score = ctc_score_from([table])
    return Sums(
        jaccard=score.seg * score.num_reference if score.num_reference else 0.0,
        num_splits=score.num_splits,
        num_missed=score.num_missed,
        num_spurious=score.num_spurious,
        num_reference=score.num_reference,
        num_predicted=score.num_predicted,
        num_matched_50=len(find_matches(table, 0.5)),
    )


def _pooled_scores(sums: np.ndarray) -> dict[Metric, np.ndarray]:
    """Return the scores of sums over images, whose last axis is that of `Sums`."""
    each = dict(zip(Sums._fields, np.moveaxis(sums, -1, 0), strict=True))
    matched, both = each["num_matched_50"], each["num_reference"] + each["num_predicted"]
    cost = SPLIT_COST * each["num_splits"] + MISSED_COST * each["num_missed"] + SPURIOUS_COST * each["num_spurious"]
    flat = seg_and_det(*(np.ravel(values) for values in (each["jaccard"], cost, each["num_reference"])))
    seg, det = (score.reshape(both.shape) for score in flat)
    with np.errstate(invalid="ignore"):
        ap50, f1_50 = matched / (both - matched), 2 * matched / both
    scores: dict[Metric, np.ndarray] = {"op_csb": (seg + det) / 2, "seg": seg, "det": det, "ap50": ap50, "f1_50": f1_50}
    return scores


def _mean_around(scores: np.ndarray, row: int, column: int, *others: int) -> float:
    """Return the mean of a point and its eight neighbours along the first two axes."""
    near: tuple[slice | int, ...] = (slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2), *others)
    return float(np.nanmean(scores[near]))
