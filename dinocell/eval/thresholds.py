"""Find the two thresholds of the watershed that score best: every pair of a grid, on maps that are predicted once.

For each peak threshold a map is flooded once, at the lowest fill threshold; every higher one is a cut of that flood
(`dinocell.eval.watershed.cut`, equal in every pixel). Cuts are then mended and scored exactly as
`dinocell.eval.watershed.distance_to_labels` and `dinocell.eval.ctc` would.
"""

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Integer

from dinocell.errors import DinocellError
from dinocell.eval.ctc import MISSED_COST, SPLIT_COST, SPURIOUS_COST, ctc_score_from, seg_and_det
from dinocell.eval.matching import find_matches
from dinocell.eval.mending import Mending, mend
from dinocell.eval.overlaps import Overlaps, find_overlaps
from dinocell.eval.threshold_map import draw_heat_map
from dinocell.eval.watershed import cut, flood
from dinocell.runtime.atomic import replacing

Metric = Literal["op_csb", "seg", "det", "ap50", "f1_50"]
METRICS: tuple[Metric, ...] = ("op_csb", "seg", "det", "ap50", "f1_50")

# SAMCell's grid: 20 x 20 points from 0.1 to 0.9 and from 0.05 to 0.5.
CELLS_MAX_RANGE = (0.1, 0.9)
CELL_FILL_RANGE = (0.05, 0.5)
STEPS = 20


class Thresholds(NamedTuple):
    """One point of the search."""

    cells_max: float
    cell_fill: float
    merge_px: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdSearch:
    """Scores of every point; NaN where ``cell_fill`` exceeds ``cells_max``, or no reference cell is there.

    Attributes
    ----------
    scores
        By metric, over all images pooled; axes ``cells_max``, ``cell_fill``, ``merge_px``.
    """

    cells_max: tuple[float, ...]
    cell_fill: tuple[float, ...]
    merge_px: tuple[float | None, ...]
    metric: Metric
    scores: dict[Metric, Float64[np.ndarray, "m f g"]]
    num_images: int

    @property
    def best(self) -> Thresholds:
        """The point of the highest score; of equal ones that whose neighbours score best, as chance counts least there.

        Raises
        ------
        DinocellError
            If no point has a score.
        """
        scores = self.scores[self.metric]
        if np.isnan(scores).all():
            raise DinocellError(f"no thresholds found: {self.metric} is undefined everywhere (no reference cell?)")
        ties = np.argwhere(scores == np.nanmax(scores)).tolist()
        around = [mean_around(scores[..., merge], row, column) for row, column, merge in ties]
        peak, fill, merge = ties[int(np.argmax(around))]
        return Thresholds(self.cells_max[peak], self.cell_fill[fill], self.merge_px[merge])

    @property
    def best_score(self) -> float:
        """The highest score of ``metric``."""
        return float(np.nanmax(self.scores[self.metric]))

    def write_csv(self, path: str | Path) -> None:
        """Write one line a point."""
        with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["cells_max", "cell_fill", "merge_px", *METRICS])
            for m, f, g in product(*(range(size) for size in self.scores["seg"].shape)):
                values = [f"{self.scores[metric][m, f, g]:.6f}" for metric in METRICS]
                merge_px = self.merge_px[g]
                fixed = [f"{self.cells_max[m]:.6g}", f"{self.cell_fill[f]:.6g}", "" if merge_px is None else merge_px]
                writer.writerow([*fixed, *values])

    def write_heat_map(self, path: str | Path) -> None:
        """Draw the metric over the two thresholds, at the best ``merge_px``, as a PNG."""
        best = self.best
        draw_heat_map(
            path,
            self.scores[self.metric][..., self.merge_px.index(best.merge_px)],
            rows=("cells_max", self.cells_max),
            columns=("cell_fill", self.cell_fill),
            best=(self.cells_max.index(best.cells_max), self.cell_fill.index(best.cell_fill)),
            title=f"{self.metric} over {self.num_images} image(s): best {self.best_score:.3f}",
        )


def search(
    distances: Sequence[Float[np.ndarray, "_ _"]],
    references: Sequence[Integer[np.ndarray, "_ _"]],
    *,
    cells_max_range: tuple[int | float, int | float] = CELLS_MAX_RANGE,
    cell_fill_range: tuple[int | float, int | float] = CELL_FILL_RANGE,
    steps: int = STEPS,
    merge_px: Sequence[int | float | None] | None = None,
    mending: Mending | None = None,
    metric: Metric = "op_csb",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ThresholdSearch:
    """Score every pair of thresholds of a grid, over all images pooled.

    Parameters
    ----------
    distances, references
        Predicted maps (0 to 1) and label images, as many, of equal sizes. Memory maps are read one at a time, so
        they need not fit into memory; see ``keep_maps``.
    cells_max_range, cell_fill_range, steps
        Least and largest value of each threshold, and how many of each, evenly spaced.
    merge_px
        Values of this to try with each pair; None tries that of ``mending``.
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
    merges = tuple(merge_px) if merge_px is not None else (mending.merge_px,)
    mendings = [replace(mending, merge_px=value) for value in merges]
    if len(distances) != len(references) or not len(distances):
        raise DinocellError(f"expected as many maps as references, got {len(distances)} and {len(references)}")
    if metric not in METRICS:
        raise DinocellError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    sums = np.zeros((len(peaks), len(fills), len(merges), len(Sums._fields)))
    tasks = list(product(range(len(distances)), range(len(peaks))))

    def run(task: tuple[int, int]) -> tuple[int, np.ndarray]:
        image, peak = task
        return peak, _scored(distances[image], references[image], peaks[peak], fills, mendings)

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for done, (peak, found) in enumerate(pool.map(run, tasks), start=1):
            sums[peak] += found
            progress(done, len(tasks))
    scores = pooled_scores(sums)
    impossible = np.array(fills)[None, :] > np.array(peaks)[:, None]
    for score in scores.values():
        score[impossible] = np.nan
    return ThresholdSearch(
        cells_max=peaks,
        cell_fill=fills,
        merge_px=merges,
        metric=metric,
        scores=scores,
        num_images=len(distances),
    )


def keep_maps(folder: str | Path, maps: Iterable[Float[np.ndarray, "*_"]]) -> list[np.memmap]:
    """Write maps to ``folder`` as they come, one file each, and return them memory-mapped, for ``search``."""
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


def _scored(
    distance: np.ndarray, reference: np.ndarray, cells_max: float, fills: Sequence[float], mendings: Sequence[Mending]
) -> np.ndarray:
    """Flood once, then cut, mend and score at every fill threshold; (f g sums)."""
    found = np.zeros((len(fills), len(mendings), len(Sums._fields)))
    possible = [(number, fill) for number, fill in enumerate(fills) if fill <= cells_max]
    if not possible:
        return found
    flooded = flood(np.asarray(distance), cells_max=cells_max, lowest_fill=possible[0][1])
    reference = np.asarray(reference)
    for number, fill in possible:
        plain = cut(flooded, fill)
        for which, mending in enumerate(mendings):
            table = find_overlaps(reference, mend(plain, flooded.distance, cell_fill=fill, mending=mending))
            found[number, which] = sums_of(table)
    return found


def pooled_scores(sums: np.ndarray) -> dict[Metric, np.ndarray]:
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


def _grid(name: str, low: int | float, high: int | float, steps: int) -> tuple[float, ...]:
    if not 0 <= low <= high < 1 or steps < 1:
        raise DinocellError(
            f"{name}: expected 0 <= least <= largest < 1 and at least 1 step, got {low}, {high}, {steps}"
        )
    return tuple(np.linspace(low, high, steps if high > low else 1).round(9).tolist())


def mean_around(scores: np.ndarray, row: int, column: int) -> float:
    """Return the mean of a point and its eight neighbours."""
    near = scores[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
    return float(np.nanmean(near))
