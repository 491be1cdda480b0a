"""Scores of a method on one image or on several pooled, with bootstrap confidence intervals.

The bootstrap (Efron 1979, percentile method): every score is a formula of sums over units, images or cells. The units
are resampled with replacement, and the formula of the resampled sums shows how the score varies from sample to sample.

- Over images: the interval generalises to other images of the same kind. Needs a dozen or more; undefined for one.
- Over cells: all reference cells and spurious predicted cells of all images are resampled. Cells of one image are
  alike, so the interval is too narrow for other images, but it is all that a single image allows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from dinocell.eval.metrics.ctc import (
    MISSED_COST,
    SPLIT_COST,
    SPURIOUS_COST,
    OfficialScores,
    ctc_score_from,
    is_matched,
    seg_and_det,
)
from dinocell.eval.metrics.matching import find_matches, matching_score_from
from dinocell.eval.metrics.overlaps import ContingencyTable

# With fewer images, an interval over images is unreliable; cells are resampled instead.
_ENOUGH_IMAGES = 12
_DRAWN_TOGETHER = 1 << 22  # indices, 32 MB

Sums = Float64[np.ndarray, "draws quantities"]


class Interval(NamedTuple):
    """A score and its confidence interval; ``low`` and ``high`` are NaN for fewer than two units."""

    value: float
    low: float
    high: float
    num_undefined: int
    """Resamples without a score (no reference cell); they are excluded from the interval."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores in [0, 1] and counts of one image, or of several pooled; NaN where a score is undefined.

    ``seg``, ``det``, ``op_csb``, ``num_missed``, ``num_spurious`` and ``num_splits`` are defined in
    `dinocell.eval.metrics.ctc`, the others in `dinocell.eval.metrics.matching` (``precision``, ``recall``, ``f1`` and
    ``panoptic_quality`` at an IoU of 0.5; ``mean_ap`` over 0.5, 0.55, ..., 0.95).
    """

    seg: float
    det: float
    op_csb: float
    ap_50: float
    ap_75: float
    mean_ap: float
    precision: float
    recall: float
    f1: float
    panoptic_quality: float
    aji: float
    num_reference: int
    num_predicted: int
    num_missed: int
    num_spurious: int
    num_splits: int


SCORE_NAMES = tuple(field.name for field in fields(Scores) if field.type is float)


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """One method on one image."""

    method: str
    dataset: str
    image: str
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class PooledScores:
    """One method on one set, or on ``all`` sets; all cells have equal weight.

    Attributes
    ----------
    mean_over_images
        Means of the scores of single images, by name; undefined scores are excluded.
    intervals
        95 % bootstrap intervals of the pooled ``seg``, ``det``, ``op_csb``, ``ap_50``, ``precision``, ``recall``,
        ``f1`` and ``panoptic_quality``.
    drawn
        Units of the bootstrap: ``images``, or ``cells`` for fewer than 12 images.
    official
        SEG and DET by the Cell Tracking Challenge's own programs, if they were run.
    """

    method: str
    dataset: str
    num_images: int
    scores: Scores
    mean_over_images: dict[str, float]
    intervals: dict[str, Interval]
    drawn: Literal["images", "cells"]
    official: OfficialScores | None = None


def score_tables(tables: Sequence[ContingencyTable]) -> Scores:
    """Return the pooled scores of images from their contingency tables."""
    ctc, matching = ctc_score_from(tables), matching_score_from(tables)
    at = {score.threshold: score for score in matching.at}
    half = at[0.5]
    return Scores(
        seg=ctc.seg,
        det=ctc.det,
        op_csb=ctc.op_csb,
        ap_50=half.average_precision,
        ap_75=at[0.75].average_precision,
        mean_ap=matching.mean_average_precision,
        precision=half.precision,
        recall=half.recall,
        f1=half.f1,
        panoptic_quality=half.panoptic_quality,
        aji=matching.aji,
        num_reference=ctc.num_reference,
        num_predicted=ctc.num_predicted,
        num_missed=ctc.num_missed,
        num_spurious=ctc.num_spurious,
        num_splits=ctc.num_splits,
    )


def pool(method: str, dataset: str, tables: Sequence[ContingencyTable]) -> PooledScores:
    """Return the scores of a method on a set from the contingency tables of its images."""
    drawn: Literal["images", "cells"] = "images" if len(tables) >= _ENOUGH_IMAGES else "cells"
    matching = matching_intervals(tables, over=drawn)
    intervals = ctc_intervals(tables, over=drawn) | {"ap_50": matching.pop("average_precision")} | matching
    images = [score_tables([table]) for table in tables]
    means = {name: _mean([getattr(scores, name) for scores in images]) for name in SCORE_NAMES}
    return PooledScores(
        method=method,
        dataset=dataset,
        num_images=len(tables),
        scores=score_tables(tables),
        mean_over_images=means,
        intervals=intervals,
        drawn=drawn,
    )


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def ctc_intervals(
    tables: Iterable[ContingencyTable], *, over: Literal["images", "cells"] = "images", **draws: Any
) -> dict[str, Interval]:
    """Return intervals of ``seg``, ``det`` and ``op_csb`` of `ctc_score`; ``draws`` are options of `bootstrap`."""
    units = _units((_ctc_cells(table) for table in tables), over=over, num_quantities=3)
    return bootstrap(units, _ctc_formula, **draws)


def matching_intervals(
    tables: Iterable[ContingencyTable],
    *,
    threshold: int | float = 0.5,
    over: Literal["images", "cells"] = "images",
    **draws: Any,
) -> dict[str, Interval]:
    """Return intervals of ``average_precision``, ``precision``, ``recall``, ``f1`` and ``panoptic_quality``.

    They are the scores of `matching_score` at the IoU ``threshold``; ``draws`` are options of `bootstrap`.
    """
    units = _units((_matching_cells(table, threshold) for table in tables), over=over, num_quantities=4)
    return bootstrap(units, _matching_formula, **draws)


def bootstrap(
    units: Float64[np.ndarray, "units quantities"],
    formula: Callable[[Sums], Mapping[str, np.ndarray]],
    *,
    confidence: float = 0.95,
    num_draws: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Resample units with replacement and return an interval for each score.

    Parameters
    ----------
    units
        Contribution of each image or cell to the sums.
    formula
        Computes scores from sums, one row per resample; NaN where a score is undefined.
    confidence
        Confidence level, in (0, 1).
    num_draws
        Number of resamples. 2,000 determine the ends of a 95 % interval to about a twentieth of its width.
    seed
        The same seed gives the same resamples for the same number of units, so two models on the same images are
        compared on the same resamples.
    """
    if not (0 < confidence < 1 and num_draws >= 1):
        raise ValueError(f"expected 0 < confidence < 1 and num_draws >= 1, got {confidence} and {num_draws}")
    values = {name: float(scores[0]) for name, scores in formula(np.ones((1, len(units))) @ units).items()}
    if len(units) < 2:
        return {name: Interval(value, np.nan, np.nan, 0) for name, value in values.items()}
    drawn = formula(_drawn_sums(units, num_draws, np.random.default_rng(seed)))
    return {name: _interval(value, drawn[name], confidence) for name, value in values.items()}


def _drawn_sums(units: np.ndarray, num_draws: int, generator: np.random.Generator) -> np.ndarray:
    num_units = len(units)
    sums = np.empty((num_draws, units.shape[1]))
    together = max(1, _DRAWN_TOGETHER // num_units)
    for first in range(0, num_draws, together):
        drawn = generator.integers(num_units, size=(min(together, num_draws - first), num_units))
        for row, indices in enumerate(drawn, start=first):
            sums[row] = np.bincount(indices, minlength=num_units) @ units
    return sums


def _interval(value: float, drawn: np.ndarray, confidence: float) -> Interval:
    defined = drawn[~np.isnan(drawn)]
    num_undefined = len(drawn) - len(defined)
    if defined.size == 0:
        return Interval(value, np.nan, np.nan, num_undefined)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, (tail, 1 - tail)).tolist()
    return Interval(value, low, high, num_undefined)


def _units(cells: Iterable[np.ndarray], *, over: str, num_quantities: int) -> np.ndarray:
    units = [rows if over == "cells" else rows.sum(axis=0, keepdims=True) for rows in cells]
    return np.concatenate([np.empty((0, num_quantities)), *units])


def _ctc_cells(table: ContingencyTable) -> np.ndarray:
    """Return for each cell: Jaccard index, cost, 1 for a reference cell."""
    matched = is_matched(table)
    cells, matches = table.reference_index[matched], table.predicted_index[matched]
    num_sharing = np.bincount(matches, minlength=table.num_predicted)
    num_spurious = int((num_sharing == 0).sum())
    rows = np.zeros((table.num_reference + num_spurious, 3))
    rows[: table.num_reference, 1] = MISSED_COST
    # k reference cells with the same match are k - 1 splits, shared equally among them.
    rows[cells, 1] = SPLIT_COST * (1 - 1 / num_sharing[matches])
    rows[cells, 0] = table.ious[matched]
    rows[: table.num_reference, 2] = 1
    rows[table.num_reference :, 1] = SPURIOUS_COST
    return rows


def _ctc_formula(sums: np.ndarray) -> dict[str, np.ndarray]:
    seg, det = seg_and_det(sums[:, 0], sums[:, 1], sums[:, 2])
    return {"seg": seg, "det": det, "op_csb": (seg + det) / 2}


def _matching_cells(table: ContingencyTable, threshold: int | float) -> np.ndarray:
    """Return for each cell: matched (0 or 1), IoU, missed, spurious."""
    pairs = find_matches(table, threshold)
    num_spurious = table.num_predicted - len(pairs)
    rows = np.zeros((table.num_reference + num_spurious, 4))
    rows[: table.num_reference, 2] = 1
    rows[table.reference_index[pairs], 0] = 1
    rows[table.reference_index[pairs], 1] = table.ious[pairs]
    rows[table.reference_index[pairs], 2] = 0
    rows[table.num_reference :, 3] = 1
    return rows


def _matching_formula(sums: np.ndarray) -> dict[str, np.ndarray]:
    matched, iou, missed, spurious = sums.T
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, an undefined score
        return {
            "average_precision": matched / (matched + missed + spurious),
            "precision": matched / (matched + spurious),
            "recall": matched / (matched + missed),
            "f1": 2 * matched / (2 * matched + missed + spurious),
            "panoptic_quality": 2 * iou / (2 * matched + missed + spurious),
        }
