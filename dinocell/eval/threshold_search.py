"""Find the thresholds of the watershed and the mending that score best: a grid, on maps that are predicted once.

For each peak threshold a map is flooded once, at the lowest fill threshold; every higher one is a cut of that flood
(`dinocell.eval.segmentation.watershed.cut`, equal in every pixel). Cuts are then mended and scored exactly as
`dinocell.eval.segmentation.watershed.distance_to_labels` and `dinocell.eval.metrics.ctc` would.
"""

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Float64, Integer

from dinocell.errors import DinocellError
from dinocell.eval.metrics.ctc import MISSED_COST, SPLIT_COST, SPURIOUS_COST, ctc_score_from, seg_and_det
from dinocell.eval.metrics.matching import find_matches
from dinocell.eval.metrics.overlaps import ContingencyTable, contingency_table
from dinocell.eval.segmentation.flows import find_masks, keep
from dinocell.eval.segmentation.refine import Mending, mend
from dinocell.eval.segmentation.watershed import cut, flood
from dinocell.images.read import write_png
from dinocell.runtime.files import replacing

# --- grid_search ---------------------------------------------------------------------------------------------------
#
# Search thresholds on a grid: score every point over all images pooled, and take the best.
#
# What a point costs is the evaluator's business: it gets a map and one value of the first threshold, on which the
# costly
# part of the work depends, and returns what all the points with that value add (`Sums`), over the other thresholds.

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


def sums_of(table: ContingencyTable) -> Sums:
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
        they need not fit into memory; see `dinocell.eval.threshold_search.keep_maps`.
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
                table = contingency_table(reference, mend(plain, flooded.distance, cell_fill=fill, mending=mending))
                found[number, which, way] = sums_of(table)
    return found


def _grid(name: str, low: int | float, high: int | float, steps: int) -> tuple[float, ...]:
    if not 0 <= low <= high < 1 or steps < 1:
        raise DinocellError(
            f"{name}: expected 0 <= least <= largest < 1 and at least 1 step, got {low}, {high}, {steps}"
        )
    return tuple(np.linspace(low, high, steps if high > low else 1).round(9).tolist())


# --- flow_thresholds -----------------------------------------------------------------------------------------------
#
# Find the two thresholds of flows that score best: every pair of a grid, on maps that are predicted once.
#
# For each chance the flows are followed once; whatever is then dropped for its flow error is a choice among the cells
# found, exactly as `dinocell.eval.segmentation.flows.flows_to_labels` makes it.

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
        return np.array([sums_of(contingency_table(reference, labels)) for labels in chosen], float)

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


# --- threshold_map -------------------------------------------------------------------------------------------------
#
# A heat map of scores over two thresholds.

_CELL_PX, _LEFT_PX, _TOP_PX, _LINE_PX = 32, 84, 62, 14
_SHOWN_LABELS = 10
# Scores that far below the best are dark: one grid point that finds nothing would leave all others in one colour.
_SHOWN_BELOW_BEST = 0.1


def draw_heat_map(
    path: str | Path,
    scores: Float64[np.ndarray, "m n"],
    *,
    rows: tuple[str, Sequence[float]],
    columns: tuple[str, Sequence[float]],
    best: tuple[int, int],
    title: str,
) -> None:
    """Write a PNG: a square a point, dark 0.1 below the best or less, bright the best, which is framed; grey undefined.

    Parameters
    ----------
    rows, columns
        Name and values of each axis.

    Raises
    ------
    ImageError
        If the picture cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    colours = np.repeat(np.repeat(_colours(scores), _CELL_PX, axis=0), _CELL_PX, axis=1)
    height, width = colours.shape[:2]
    sheet = Image.new("RGB", (max(_LEFT_PX + width + 12, 500), _TOP_PX + height + 12), "white")
    sheet.paste(Image.fromarray(colours), (_LEFT_PX, _TOP_PX))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    low, high = _range(scores)
    draw.text((4, 4), f"{title} (lowest {np.nanmin(scores):.3f})", fill="black", font=font)
    axes = f"{rows[0]} down, {columns[0]} across; dark: {low:.3f} or less, bright: {high:.3f}"
    draw.text((4, _TOP_PX - 2 * _LINE_PX - 8), axes, fill="black", font=font)
    for number in _shown(len(columns[1])):
        draw.text((_LEFT_PX + number * _CELL_PX, _TOP_PX - _LINE_PX - 4), f"{columns[1][number]:.2f}", "black", font)
    for number in _shown(len(rows[1])):
        draw.text((44, _TOP_PX + number * _CELL_PX + 8), f"{rows[1][number]:.2f}", fill="black", font=font)
    top, left = (offset + index * _CELL_PX for offset, index in zip((_TOP_PX, _LEFT_PX), best, strict=True))
    draw.rectangle((left, top, left + _CELL_PX - 1, top + _CELL_PX - 1), outline="red", width=3)
    write_png(path, np.asarray(sheet).transpose(2, 0, 1))


def _range(scores: np.ndarray) -> tuple[float, float]:
    """Return the scores of the darkest and of the brightest colour."""
    high = float(np.nanmax(scores))
    return max(float(np.nanmin(scores)), high - _SHOWN_BELOW_BEST), high


def _colours(scores: np.ndarray) -> np.ndarray:
    import cv2

    low, high = _range(scores)
    levels = np.nan_to_num(np.clip((scores - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
    colours = np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1])
    colours[np.isnan(scores)] = 200
    return colours


def _shown(number: int) -> range:
    return range(0, number, max(1, -(-number // _SHOWN_LABELS)))
