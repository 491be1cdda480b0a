"""The rows of an evaluation's tables: one method on one image, or on several images pooled, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from dinocell.eval.metrics.bootstrap import Interval, ctc_intervals, matching_intervals
from dinocell.eval.metrics.ctc import ctc_score_from
from dinocell.eval.metrics.ctc_files import OfficialScores
from dinocell.eval.metrics.matching import matching_score_from
from dinocell.eval.metrics.overlaps import ContingencyTable

# With fewer images, an interval over images is unreliable; cells are resampled instead.
_ENOUGH_IMAGES = 12


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
