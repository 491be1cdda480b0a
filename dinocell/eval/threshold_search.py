"""Find the postprocessing parameters that score best: a grid search on maps that are predicted once.

Every grid point is scored exactly as if the maps were postprocessed with its parameters and scored by
`dinocell.eval.metrics.ctc`; `dinocell.eval.segmentation.pipeline` shares the work between points.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float64, Integer

from dinocell.errors import DinocellError, require
from dinocell.eval.metrics.ctc import Counts, count, ctc_score, seg_and_det
from dinocell.eval.metrics.matching import find_matches, matching_score
from dinocell.eval.metrics.overlaps import contingency_table
from dinocell.eval.segmentation.pipeline import (
    CELL_FILL_RANGE,
    CELLS_MAX_RANGE,
    DECODERS,
    STEPS,
    Axes,
    Decoded,
    DINOCellPipeline,
    decode,
    decode_distance_grid,
    threshold_values,
)
from dinocell.eval.segmentation.refine import Refinement
from dinocell.finetune.model import DINOCell
from dinocell.finetune.targets import DistancePostprocessing, Postprocessing
from dinocell.finetune.train import Scored
from dinocell.labelled.dataset import LabelledImage
from dinocell.runtime.files import replacing, write_table

Metric = Literal["op_csb", "seg", "det", "ap50", "f1_50"]
METRICS: tuple[Metric, ...] = get_args(Metric)

# The heat map shows scores down to this much below the best: one point without any cell would otherwise leave all
# others in one colour.
_SHOWN_BELOW_BEST = 0.1
_MAX_TICKS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class GridSearch:
    """Scores of every grid point; NaN where the point is impossible, or there is no reference cell.

    Attributes
    ----------
    parameters
        Parameters that the search does not vary.
    axes
        Values of each varied parameter, by its name.
    scores
        By metric, over all images pooled; one axis per varied parameter.
    """

    parameters: Postprocessing
    axes: Axes
    metric: Metric
    scores: Mapping[Metric, Float64[np.ndarray, "..."]]
    num_images: int

    @property
    def best(self) -> Postprocessing:
        """The parameters of the highest score; among ties, those whose grid neighbours score best.

        A DinocellError if no point has a score.
        """
        return replace(self.parameters, **self.best_point)  # type: ignore[arg-type]

    @property
    def best_point(self) -> dict[str, float | bool | None]:
        """The varied parameters of `best`, by name."""
        return dict(zip(self.axes, self._values(self._best_place), strict=True))

    @property
    def best_score(self) -> float:
        """The highest score of ``metric``."""
        return float(np.nanmax(self.scores[self.metric]))

    @property
    def _best_place(self) -> tuple[int, ...]:
        scores = self.scores[self.metric]
        if np.isnan(scores).all():
            raise DinocellError(f"no thresholds found: {self.metric} is undefined everywhere (no reference cell?)")
        # Neighbours break ties, because a high score next to low ones is more likely to be chance.
        ties = np.argwhere(scores == np.nanmax(scores)).tolist()
        return tuple(max(ties, key=lambda place: _mean_of_neighbours(scores, *place)))

    def _values(self, place: Sequence[int]) -> list[float | bool | None]:
        return [values[index] for values, index in zip(self.axes.values(), place, strict=True)]

    def write_csv(self, path: str | Path) -> None:
        """Write one row per grid point."""
        rows = [[*self.axes, *METRICS]]
        for place in product(*(range(len(values)) for values in self.axes.values())):
            scores = (f"{self.scores[metric][place]:.6f}" for metric in METRICS)
            rows.append([*map(_to_cell, self._values(place)), *scores])
        write_table(Path(path), rows)

    def write_heat_map(self, path: str | Path) -> None:
        """Draw the metric over the first two parameters, at the best values of the others, as a PNG."""
        from matplotlib.figure import Figure

        (row_name, rows), (column_name, columns) = list(self.axes.items())[:2]
        row, column, *others = self._best_place
        shown: tuple[slice | int, ...] = (slice(None), slice(None), *others)
        scores = self.scores[self.metric][shown]
        high = float(np.nanmax(scores))
        low = max(float(np.nanmin(scores)), high - _SHOWN_BELOW_BEST)
        figure = Figure(figsize=(2 + 0.3 * len(columns), 1.5 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("lightgrey")  # impossible points
        image = axes.imshow(np.ma.masked_invalid(scores), vmin=low, vmax=high, cmap="viridis")
        axes.plot(column, row, "s", markersize=10, markerfacecolor="none", markeredgecolor="red", markeredgewidth=2)
        for values, set_ticks in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
            ticks = range(0, len(values), -(-len(values) // _MAX_TICKS))
            set_ticks(ticks, [f"{values[tick]:.2f}" for tick in ticks], fontsize=8)
        axes.set_ylabel(row_name)
        axes.set_xlabel(column_name)
        axes.set_title(f"{self.metric} over {self.num_images} image(s): best {self.best_score:.3f}", fontsize=9)
        figure.colorbar(image, extend="min")
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, format="png", dpi=100)


def _to_cell(value: float | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.6g}"


def _mean_of_neighbours(scores: Float64[np.ndarray, "..."], row: int, column: int, *others: int) -> float:
    """Return the mean of a point and its eight neighbours along the first two axes."""
    near: tuple[slice | int, ...] = (slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2), *others)
    return float(np.nanmean(scores[near]))


def search(
    distances: Sequence[Float[np.ndarray, "_ _"]],
    references: Sequence[Integer[np.ndarray, "_ _"]],
    *,
    cells_max_range: tuple[int | float, int | float] = CELLS_MAX_RANGE,
    cell_fill_range: tuple[int | float, int | float] = CELL_FILL_RANGE,
    steps: int = STEPS,
    merge_px: Sequence[int | float | None] | None = None,
    restore_border: Sequence[bool] | None = None,
    refinement: Refinement | None = None,
    metric: Metric = "op_csb",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> GridSearch:
    """Score every pair of thresholds of distance maps on a grid, over all images pooled.

    A DinocellError if a range or a map is invalid, and as in `search_parameters`, which explains the other parameters.

    Parameters
    ----------
    cells_max_range, cell_fill_range, steps
        Minimum and maximum of each threshold, and the number of evenly spaced values.
    merge_px, restore_border
        Values of these to try with each pair; None: only that of ``refinement``.
    refinement
        Refinement after the watershed, the same for all points.
    """
    refinement = refinement or Refinement()
    merges = (refinement.merge_px,) if merge_px is None else merge_px
    axes: Axes = {
        "cells_max": threshold_values("cells_max", *cells_max_range, steps),
        "cell_fill": threshold_values("cell_fill", *cell_fill_range, steps),
        "merge_px": tuple(None if value is None else float(value) for value in merges),
        "restore_border": (refinement.restore_border,) if restore_border is None else tuple(restore_border),
    }
    parameters = DistancePostprocessing(min_area_px=refinement.min_area_px)
    decode_grid = partial(decode_distance_grid, refinement=refinement)
    return search_parameters(
        distances, references, parameters, axes, decode_grid, metric=metric, workers=workers, progress=progress
    )


def search_parameters(
    maps: Sequence[Float[np.ndarray, "..."]],
    references: Sequence[Integer[np.ndarray, "_ _"]],
    parameters: Postprocessing,
    axes: Axes | None = None,
    decode_grid: Callable[..., Decoded] | None = None,
    *,
    metric: Metric = "op_csb",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> GridSearch:
    """Score the postprocessing parameters of a target on a grid, over all images pooled.

    A DinocellError if there is no such parameter or metric, or maps and references do not fit together.

    Parameters
    ----------
    maps, references
        Predicted maps, (h w) with values 0 to 1 or for flows (3 h w), and label images of the same sizes. Memory maps
        are read one at a time, so they may exceed the memory; see `store_maps`.
    parameters
        Parameters that the grid does not vary.
    axes
        Values of the parameters to vary, replacing those of the target's default grid.
    decode_grid
        Decoder of the maps; None: the target's.
    metric
        The metric that the best point maximises.
    workers
        Threads; None: one per core. They do not change the result.
    progress
        Called with the number of completed tasks, one per image and value of the first axis, and their total.
    """
    grid = dict(DECODERS[parameters.target].axes(parameters))
    for name in (axes or {}).keys() - grid.keys():
        raise DinocellError(f"{name}: not a parameter of target {parameters.target}, which has {', '.join(grid)}")
    axes = grid | dict(axes or {})
    decode_points = decode_grid or partial(DECODERS[parameters.target].decode_grid, parameters=parameters)
    sizes = f"{len(maps)} and {len(references)}"
    require(0 < len(maps) == len(references), f"expected as many maps as references, got {sizes}")
    require(metric in METRICS, f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    first, *rest = (tuple(values) for values in axes.values())
    sums = np.zeros((len(first), *map(len, rest), len(Counts._fields) + 1))

    def run(task: tuple[int, int]) -> tuple[int, Float64[np.ndarray, "..."]]:
        image, row = task
        reference = np.asarray(references[image])
        counts = np.full(sums.shape[1:], np.nan)  # impossible points are not decoded and stay undefined
        for place, labels in decode_points(np.asarray(maps[image]), axes, first[row]):
            table = contingency_table(reference, labels)
            counts[place] = (*count(table), len(find_matches(table, 0.5)))
        return row, counts

    tasks = list(product(range(len(maps)), range(len(first))))
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for done, (row, counts) in enumerate(pool.map(run, tasks), start=1):
            sums[row] += counts
            progress(done, len(tasks))
    return GridSearch(
        parameters=parameters, axes=axes, metric=metric, scores=_pooled_scores(sums), num_images=len(maps)
    )


def store_maps(folder: str | Path, maps: Iterable[Float[np.ndarray, "..."]]) -> list[np.memmap]:
    """Write maps to ``folder`` one by one, a file each, and return them memory-mapped, for a search."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mapped = []
    for index, values in enumerate(maps):
        path = folder / f"{index:06d}.npy"
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.asarray(values, np.float32), allow_pickle=False)
        mapped.append(np.lib.format.open_memmap(path, mode="r"))
    return mapped


def _pooled_scores(sums: Float64[np.ndarray, "... counts"]) -> dict[Metric, Float64[np.ndarray, "..."]]:
    """Return the scores of summed counts, which are the last axis, the matches at an IoU of 0.5 after `Counts`."""
    *counts, matched = np.moveaxis(sums, -1, 0)
    total = Counts(*counts)
    flat = seg_and_det(*(np.ravel(values) for values in (total.jaccard, total.cost, total.num_reference)))
    seg, det = (score.reshape(sums.shape[:-1]) for score in flat)
    num_cells = total.num_reference + total.num_predicted
    with np.errstate(invalid="ignore"):
        ap50, f1_50 = matched / (num_cells - matched), 2 * matched / num_cells
    return {"op_csb": (seg + det) / 2, "seg": seg, "det": det, "ap50": ap50, "f1_50": f1_50}


def score_segmenter(
    model: DINOCell,
    images: Sequence[LabelledImage],
    find_thresholds: bool,
    *,
    crop_size: int | None = None,
    stride: int | None = None,
) -> Scored:
    """Return SEG, DET, OP_CSB and F1 over all images pooled.

    With ``find_thresholds`` the best point of a grid (distance maps: 20 x 20 thresholds, four merge distances, with and
    without boundary refinement; flows: 9 x 9 thresholds) is scored and returned as settings, unless the model's own
    settings score at least as well. The model is not changed, and predicts every image once.

    ``crop_size`` and ``stride`` are those of the tiles, see `DINOCellPipeline`.
    """
    pipeline = DINOCellPipeline(model, next(model.parameters()).device, crop_size, stride=stride)
    maps = [pipeline.maps(np.asarray(image.pixels), pixel_size_um=image.pixel_size_um) for image in images]
    references = [np.ascontiguousarray(image.labels, dtype=np.int32) for image in images]
    labels = [pipeline.cells(image_maps) for image_maps in maps]
    settings: dict[str, float | bool | None] = {}
    if find_thresholds and any(reference.any() for reference in references):
        parameters = model.settings.postprocessing
        search = search_parameters(maps, references, parameters, DECODERS[model.target].training_axes)
        if not ctc_score(references, labels).op_csb >= search.best_score:
            settings = search.best_point
            labels = [decode(image_maps, search.best) for image_maps in maps]
    ctc, matching = ctc_score(references, labels), matching_score(references, labels)
    metrics = {"score/seg": ctc.seg, "score/det": ctc.det, "score/op_csb": ctc.op_csb}
    metrics["score/f1_at_0.5"] = matching.at[0].f1
    return Scored({name: float(value) for name, value in metrics.items()}, settings)
