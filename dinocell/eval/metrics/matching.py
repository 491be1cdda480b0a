"""Scores of a segmentation by intersection over union: average precision, F1, panoptic quality, AJI, count error.

A predicted cell matches a reference cell if their intersection over union (IoU) reaches a threshold; every cell is
matched at most once. TP are the matched pairs, FN the reference cells without a match, FP the predicted ones.

- average precision: TP / (TP + FP + FN), so called by Cellpose (``cellpose/metrics.py``) and the Data Science Bowl
  2018; StarDist (``stardist/matching.py``) calls it accuracy. Its mean over the thresholds 0.5, 0.55, ..., 0.95
  is the Data Science Bowl's score of an image.
- precision TP / (TP + FP), recall TP / (TP + FN), F1 2 TP / (2 TP + FP + FN).
- panoptic quality: summed IoU of the matches / (TP + FP / 2 + FN / 2) (Kirillov et al. 2019, equation 1; as in
  StarDist an IoU that equals the threshold is a match).
- AJI, the aggregated Jaccard index (Kumar et al. 2017, IEEE TMI 36:1550): every reference cell is assigned the
  predicted cell of highest IoU; summed intersections / (summed unions + area of the unassigned predicted cells).
  Several reference cells may share one. Cellpose's function of that name differs: summed intersections of a one-to-one
  assignment / area of either foreground.
- count error: predicted cells minus reference cells.

At thresholds of 0.5 and more no assignment problem has to be solved: a cell has at most one IoU above 0.5, and at most
two of exactly 0.5 (a cell split into two halves).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dinocell.eval.metrics.overlaps import ContingencyTable, LabelImage, contingency_tables

# Hundredths, divided once: summed steps of 0.05 would miss an IoU of exactly 3/5.
THRESHOLDS = tuple(hundredths / 100 for hundredths in range(50, 100, 5))


class ImageMean(NamedTuple):
    """A mean, and the number of images in it."""

    value: float
    num_images: int


@dataclass(frozen=True, kw_only=True)
class ThresholdScore:
    """Scores at one IoU threshold, and the counts they are computed from; NaN where the divisor is 0."""

    threshold: float
    average_precision: float
    precision: float
    recall: float
    f1: float
    panoptic_quality: float
    mean_matched_iou: float
    num_matched: int
    num_missed: int
    num_spurious: int


@dataclass(frozen=True, kw_only=True)
class MatchingScore:
    """Scores over all cells of all frames (pooled); those of single frames are in ``images``.

    Attributes
    ----------
    at
        One entry per threshold, in the given order.
    mean_average_precision
        Mean over the thresholds.
    aji
        Aggregated Jaccard index; NaN if there is no cell on either side.
    count_error
        Predicted minus reference cells.
    relative_count_error
        Its absolute value per reference cell; NaN if there is none.
    images
        One score per frame, each without ``images``.
    """

    at: tuple[ThresholdScore, ...]
    mean_average_precision: float
    aji: float
    count_error: int
    relative_count_error: float
    num_reference: int
    num_predicted: int
    images: tuple["MatchingScore", ...] = ()

    def mean_over_images(self, value: Callable[["MatchingScore"], float]) -> ImageMean:
        """Return the unweighted mean over ``images`` of a value, such as ``lambda image: image.aji``.

        Cellpose averages like this; StarDist's ``matching_dataset`` pools by default. Undefined values are excluded;
        the mean is NaN if none is left.
        """
        defined = [number for number in map(value, self.images) if not np.isnan(number)]
        return ImageMean(value=float(np.mean(defined)) if defined else np.nan, num_images=len(defined))


def matching_score(
    reference: LabelImage | Sequence[LabelImage],
    prediction: LabelImage | Sequence[LabelImage],
    *,
    thresholds: Sequence[int | float] = THRESHOLDS,
) -> MatchingScore:
    """Score one label image, or a list of frames (pooled), at each of the IoU thresholds.

    Raises ValueError if a threshold is not in [0.5, 1]; if a frame is not two-dimensional, is not of an integer type,
    or has negative ids; if sizes or numbers of frames differ.
    """
    return matching_score_from(contingency_tables(reference, prediction), thresholds=thresholds)


def matching_score_from(
    tables: Iterable[ContingencyTable], *, thresholds: Sequence[int | float] = THRESHOLDS
) -> MatchingScore:
    """Return `matching_score` from contingency tables, one per frame."""
    _check(thresholds)
    counts = [_count(table, thresholds) for table in tables]
    nothing = _Counts(np.zeros(len(thresholds), np.int64), np.zeros(len(thresholds)), 0, 0, 0, 0)
    sums: list[Any] = [sum(column) for column in zip(nothing, *counts, strict=True)]
    total = _Counts(*sums)
    return _score(total, thresholds, images=tuple(_score(image, thresholds) for image in counts))


def find_matches(table: ContingencyTable, threshold: int | float) -> Int64[np.ndarray, " matches"]:
    """Return the indices of the matching pairs in the table, each cell in at most one of them.

    A ValueError if the threshold is not in [0.5, 1]: below, matching is an assignment problem.
    """
    _check([threshold])
    pairs = np.flatnonzero(table.ious >= threshold)
    for cells in (table.reference_index, table.predicted_index):
        _, first = np.unique(cells[pairs], return_index=True)
        pairs = pairs[np.sort(first)]
    return pairs


def _check(thresholds: Sequence[int | float]) -> None:
    if not thresholds or not all(0.5 <= threshold <= 1 for threshold in thresholds):
        raise ValueError(f"thresholds: expected IoUs from 0.5 to 1, got {list(thresholds)}")


class _Counts(NamedTuple):
    """Quantities that are summed over frames."""

    num_matched: Int64[np.ndarray, " thresholds"]
    matched_iou: Float64[np.ndarray, " thresholds"]
    aji_intersection: int
    aji_union: int
    num_reference: int
    num_predicted: int


def _count(table: ContingencyTable, thresholds: Sequence[int | float]) -> _Counts:
    ious = table.ious
    matches = [find_matches(table, threshold) for threshold in thresholds]
    intersection, union = _aggregated_jaccard(table)
    return _Counts(
        num_matched=np.array([len(pairs) for pairs in matches]),
        matched_iou=np.array([ious[pairs].sum() for pairs in matches]),
        aji_intersection=intersection,
        aji_union=union,
        num_reference=table.num_reference,
        num_predicted=table.num_predicted,
    )


def _aggregated_jaccard(table: ContingencyTable) -> tuple[int, int]:
    """Return numerator and denominator; ties of the IoU are broken by the first predicted cell."""
    # Sort the pairs by reference cell, then by descending IoU, and take the first of each reference cell.
    order = np.lexsort((-table.ious, table.reference_index))
    cells, first = np.unique(table.reference_index[order], return_index=True)
    best = order[first]
    unmatched_area = table.reference_areas.sum() - table.reference_areas[cells].sum()
    is_assigned = np.zeros(table.num_predicted, np.bool_)
    is_assigned[table.predicted_index[best]] = True
    union = table.unions[best].sum() + unmatched_area + table.predicted_areas[~is_assigned].sum()
    return int(table.intersections[best].sum()), int(union)


def _score(
    total: _Counts, thresholds: Sequence[int | float], *, images: tuple[MatchingScore, ...] = ()
) -> MatchingScore:
    at = tuple(
        _threshold_score(float(threshold), int(matched), float(iou), total.num_reference, total.num_predicted)
        for threshold, matched, iou in zip(thresholds, total.num_matched, total.matched_iou, strict=True)
    )
    count_error = total.num_predicted - total.num_reference
    return MatchingScore(
        at=at,
        mean_average_precision=float(np.mean([score.average_precision for score in at])),
        aji=_divide(total.aji_intersection, total.aji_union),
        count_error=count_error,
        relative_count_error=_divide(abs(count_error), total.num_reference),
        num_reference=total.num_reference,
        num_predicted=total.num_predicted,
        images=images,
    )


def _threshold_score(
    threshold: float, matched: int, matched_iou: float, num_reference: int, num_predicted: int
) -> ThresholdScore:
    return ThresholdScore(
        threshold=threshold,
        average_precision=_divide(matched, num_reference + num_predicted - matched),
        precision=_divide(matched, num_predicted),
        recall=_divide(matched, num_reference),
        f1=_divide(2 * matched, num_reference + num_predicted),
        panoptic_quality=_divide(2 * matched_iou, num_reference + num_predicted),
        mean_matched_iou=_divide(matched_iou, matched),
        num_matched=matched,
        num_missed=num_reference - matched,
        num_spurious=num_predicted - matched,
    )


def _divide(dividend: int | float, divisor: int | float) -> float:
    return dividend / divisor if divisor else np.nan
