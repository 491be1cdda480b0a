"""How far a score could be off: bootstrap intervals over images and over cells (Efron 1979, percentile method).

Every score here is a formula of sums: over images, or over cells. Drawing as many images (or cells) with replacement as
there are, and putting the sums of the draw into the formula, tells how the score would vary from sample to sample.

- Over images: says what other images of the same kind would give. Needs a dozen or more; undefined for one.
- Over cells: all cells of all images are drawn from. Cells of one image are alike, so the interval is too narrow as a
  statement about other images, but it is all that one image can tell.

What is drawn "over cells" are the reference cells and, beside them, the spurious predicted ones.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from dinocell.eval.metrics.ctc import MISSED_COST, SPLIT_COST, SPURIOUS_COST, is_matched, seg_and_det
from dinocell.eval.metrics.matching import find_matches
from dinocell.eval.metrics.overlaps import ContingencyTable

_DRAWN_TOGETHER = 1 << 22  # cells, 32 MB of positions

Sums = Float64[np.ndarray, "draws quantities"]


class Interval(NamedTuple):
    """A score, and between which values the middle share of the resampled ones lies.

    ``low`` and ``high`` are NaN where there are fewer than two units to draw from.
    """

    value: float
    low: float
    high: float
    num_undefined: int
    """Draws in which the score had no value (no reference cell among them); the interval is that of the others."""


def ctc_intervals(
    tables: Iterable[ContingencyTable],
    *,
    over: Literal["images", "cells"] = "images",
    confidence: float = 0.95,
    num_draws: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return intervals of ``seg``, ``det`` and ``op_csb``; the values are those of ``ctc_score``.

    Raises
    ------
    ValueError
        If an option is out of its range.
    """
    units = _units((_ctc_cells(table) for table in tables), over=over, num_quantities=3)
    return bootstrap(units, _ctc_formula, confidence=confidence, num_draws=num_draws, seed=seed)


def matching_intervals(
    tables: Iterable[ContingencyTable],
    *,
    threshold: int | float = 0.5,
    over: Literal["images", "cells"] = "images",
    confidence: float = 0.95,
    num_draws: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return intervals of ``average_precision``, ``precision``, ``recall``, ``f1`` and ``panoptic_quality``.

    The values are those of ``matching_score`` at the IoU ``threshold``.

    Raises
    ------
    ValueError
        If an option is out of its range.
    """
    units = _units((_matching_cells(table, threshold) for table in tables), over=over, num_quantities=4)
    return bootstrap(units, _matching_formula, confidence=confidence, num_draws=num_draws, seed=seed)


def bootstrap(
    units: Float64[np.ndarray, "units quantities"],
    formula: Callable[[Sums], Mapping[str, np.ndarray]],
    *,
    confidence: float = 0.95,
    num_draws: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Draw units with replacement and return an interval for each score.

    Parameters
    ----------
    units
        What each image or cell adds to the sums.
    formula
        Makes scores of sums, one row a draw; NaN where a score is undefined.
    confidence
        Share of the draws' scores that lie in the interval, in (0, 1).
    num_draws
        2,000 fix the ends of a 95 % interval to about a twentieth of its width.
    seed
        The same seed gives the same draws for the same number of units, so two models on the same images are compared
        on the same draws.

    Raises
    ------
    ValueError
        If ``confidence`` is not in (0, 1) or ``num_draws`` is below 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, such as 0.95, got {confidence}")
    if num_draws < 1:
        raise ValueError(f"num_draws: expected at least 1, got {num_draws}")
    values = {name: float(scores[0]) for name, scores in formula(np.ones((1, len(units))) @ units).items()}
    if len(units) < 2:
        return {name: Interval(value, np.nan, np.nan, 0) for name, value in values.items()}
    drawn = formula(_drawn_sums(units, num_draws, np.random.default_rng(seed)))
    return {name: _interval(value, drawn[name], confidence) for name, value in values.items()}


def _drawn_sums(units: np.ndarray, num_draws: int, generator: np.random.Generator) -> np.ndarray:
    number = len(units)
    sums = np.empty((num_draws, units.shape[1]))
    together = max(1, _DRAWN_TOGETHER // number)
    for first in range(0, num_draws, together):
        drawn = generator.integers(number, size=(min(together, num_draws - first), number))
        for row, positions in enumerate(drawn, start=first):
            sums[row] = np.bincount(positions, minlength=number) @ units
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
    if over not in ("images", "cells"):
        raise ValueError(f"over: expected images or cells, got {over!r}")
    units = [rows if over == "cells" else rows.sum(axis=0, keepdims=True) for rows in cells]
    return np.concatenate([np.empty((0, num_quantities)), *units])


def _ctc_cells(table: ContingencyTable) -> np.ndarray:
    """Return for each cell: Jaccard index, cost, whether it is one of the reference."""
    matched = is_matched(table)
    cells, matches = table.reference_index[matched], table.predicted_index[matched]
    num_sharing = np.bincount(matches, minlength=table.num_predicted)
    num_spurious = int((num_sharing == 0).sum())
    rows = np.zeros((table.num_reference + num_spurious, 3))
    rows[: table.num_reference, 1] = MISSED_COST
    # k reference cells with one match are k - 1 splits: each of the k takes its share.
    rows[cells, 1] = SPLIT_COST * (1 - 1 / num_sharing[matches])
    rows[cells, 0] = table.ious[matched]
    rows[: table.num_reference, 2] = 1
    rows[table.num_reference :, 1] = SPURIOUS_COST
    return rows


def _ctc_formula(sums: np.ndarray) -> dict[str, np.ndarray]:
    seg, det = seg_and_det(sums[:, 0], sums[:, 1], sums[:, 2])
    return {"seg": seg, "det": det, "op_csb": (seg + det) / 2}


def _matching_cells(table: ContingencyTable, threshold: int | float) -> np.ndarray:
    """Return for each cell: whether it is matched, IoU, whether it is missed, whether it is spurious."""
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
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: undefined, and counted as such
        return {
            "average_precision": matched / (matched + missed + spurious),
            "precision": matched / (matched + spurious),
            "recall": matched / (matched + missed),
            "f1": 2 * matched / (2 * matched + missed + spurious),
            "panoptic_quality": 2 * iou / (2 * matched + missed + spurious),
        }
