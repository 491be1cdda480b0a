"""The Cell Tracking Challenge's scores of a segmentation: SEG, DET and their mean, OP_CSB.

Definitions: https://celltrackingchallenge.net/evaluation-methodology; SEG in Maska et al. 2014 (Bioinformatics
30:1609), DET as the detection part of the graph measure of Matula et al. 2015 (PLoS ONE 10:e0144959). A reference cell
is matched by the predicted cell that covers more than half of it. So it has at most one match, and a predicted cell may
match several.

- SEG: mean over reference cells of the intersection over union with the match, 0 without one.
- DET: 1 - min(cost, cost of an empty prediction) / cost of an empty prediction, where cost is 5 for each split that a
  predicted cell needs (k - 1 if it matches k), 10 for each reference cell without a match, 1 for each predicted one.
- OP_CSB: the mean of SEG and DET.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from dinocell.eval.metrics.overlaps import ContingencyTable, LabelImage, contingency_tables

# The challenge's weights of a split, a missing and an extra vertex (Matula et al. 2015).
SPLIT_COST, MISSED_COST, SPURIOUS_COST = 5, 10, 1


@dataclass(frozen=True, kw_only=True)
class ImageMeans:
    """Unweighted mean of the scores of single images."""

    seg: float
    det: float
    op_csb: float
    num_images: int
    """Images with a reference cell; the scores of the others are undefined and excluded."""


@dataclass(frozen=True, kw_only=True)
class CTCScore:
    """Scores in [0, 1], higher is better, and the counts they are computed from.

    All cells of all frames have equal weight (pooled, as in the challenge); the mean of single images is
    ``mean_over_images``. Without a reference cell the three scores are undefined: NaN.

    OP_CSB penalises merging less than missing (5 against 10 per cell): one prediction that covers the whole image has a
    DET near 0.5. Read the counts too.

    Attributes
    ----------
    num_splits
        Splits needed to separate merged cells (the challenge's NS): k - 1 for a predicted cell that matches k.
    num_missed, num_spurious
        False negatives and false positives: reference cells, and predicted cells, without a match.
    images
        One score per frame, each without ``images``.
    """

    seg: float
    det: float
    op_csb: float
    num_splits: int
    num_missed: int
    num_spurious: int
    num_reference: int
    num_predicted: int
    images: tuple["CTCScore", ...] = ()

    @property
    def mean_over_images(self) -> ImageMeans:
        """The unweighted mean of ``images``; NaN if no image has a reference cell."""
        defined = [image for image in self.images if image.num_reference]
        if not defined:
            return ImageMeans(seg=np.nan, det=np.nan, op_csb=np.nan, num_images=0)
        seg, det, op_csb = np.mean([(image.seg, image.det, image.op_csb) for image in defined], axis=0).tolist()
        return ImageMeans(seg=seg, det=det, op_csb=op_csb, num_images=len(defined))


def ctc_score(reference: LabelImage | Sequence[LabelImage], prediction: LabelImage | Sequence[LabelImage]) -> CTCScore:
    """Score one label image, or a list of frames (pooled).

    0 is background, every other id one cell; the ids of the two sides need not agree. An id in two places is one cell.

    Raises
    ------
    ValueError
        If a frame is not two-dimensional, is not of an integer type, or has negative ids; if sizes or numbers of
        frames differ.
    """
    return ctc_score_from(contingency_tables(reference, prediction))


def ctc_score_from(tables: Iterable[ContingencyTable]) -> CTCScore:
    """Return `ctc_score` from contingency tables, one per frame."""
    counts = [count(table) for table in tables]
    total = Counts(*(sum(column) for column in zip(Counts(), *counts, strict=True)))
    return _score(total, images=tuple(map(_score, counts)))


def is_matched(table: ContingencyTable) -> Bool[np.ndarray, " k"]:
    """Return which overlapping pairs are matches: more than half of the reference cell, in integer arithmetic."""
    return np.asarray(2 * table.intersections > table.reference_areas[table.reference_index])


def seg_and_det(
    jaccard: Float64[np.ndarray, " n"], cost: Float64[np.ndarray, " n"], num_reference: Float64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Return SEG and DET from sums over cells; NaN where there is no reference cell."""
    num_cells = np.where(num_reference > 0, num_reference, np.nan)
    cost_of_nothing = MISSED_COST * num_cells
    return jaccard / num_cells, 1 - np.minimum(cost, cost_of_nothing) / cost_of_nothing


class Counts(NamedTuple):
    """Quantities that are summed over frames; numbers, or arrays of them."""

    jaccard: float = 0.0
    num_splits: int = 0
    num_missed: int = 0
    num_spurious: int = 0
    num_reference: int = 0
    num_predicted: int = 0

    @property
    def cost(self) -> Any:
        """The cost of DET."""
        return SPLIT_COST * self.num_splits + MISSED_COST * self.num_missed + SPURIOUS_COST * self.num_spurious


def count(table: ContingencyTable) -> Counts:
    """Return the counts of one frame."""
    matched = is_matched(table)
    num_matched = int(matched.sum())
    num_matching = len(np.unique(table.predicted_index[matched]))
    return Counts(
        jaccard=float(table.ious[matched].sum()),
        num_splits=num_matched - num_matching,
        num_missed=table.num_reference - num_matched,
        num_spurious=table.num_predicted - num_matching,
        num_reference=table.num_reference,
        num_predicted=table.num_predicted,
    )


def _score(counts: Counts, *, images: tuple[CTCScore, ...] = ()) -> CTCScore:
    sums = np.array([[counts.jaccard], [counts.cost], [counts.num_reference]], np.float64)
    seg, det = (float(score[0]) for score in seg_and_det(*sums))
    numbers = {name: value for name, value in counts._asdict().items() if name != "jaccard"}
    return CTCScore(seg=seg, det=det, op_csb=(seg + det) / 2, images=images, **numbers)
