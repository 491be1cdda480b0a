"""Segment labelled images and score them: what fine-tuning calls on its validation images, and `dinocell evaluate`."""

from collections.abc import Sequence

import numpy as np

from dinocell.data_shards.labelled import LabelledImage
from dinocell.eval.ctc import ctc_score
from dinocell.eval.flow_thresholds import search_flows
from dinocell.eval.matching import matching_score
from dinocell.eval.mending import Mending
from dinocell.eval.pipeline import DINOCellPipeline
from dinocell.eval.rules import FOUND, rules_of
from dinocell.eval.thresholds import search
from dinocell.finetune.model import DINOCell
from dinocell.finetune.validation import Scored

# Merging pieces of a cell helps bent cells on sharp maps and joins neighbours on blurred ones; restored borders are
# right on blurred maps and wrong where peaks are low for another reason: let the images say.
_MERGES = (None, 1.5, 3.0, 5.0)
_BORDERS = (True, False)


def score_segmenter(
    model: DINOCell,
    images: Sequence[LabelledImage],
    find_thresholds: bool,
    *,
    crop_size: int | None = None,
    stride: int | None = None,
) -> Scored:
    """Return SEG, DET, OP_CSB and F1 over all images pooled.

    With ``find_thresholds`` the point that scores best on a grid of 20 x 20 thresholds, four ways of merging and two of
    drawing borders (of target ``flows``: 9 x 9 thresholds) is scored and returned as settings, unless those of the
    model score as well. The model stays as it is, and sees every image once.

    ``crop_size`` and ``stride`` are those of the windows, see `DINOCellPipeline`.
    """
    device = next(model.parameters()).device
    pipeline = DINOCellPipeline(model, device, crop_size, stride=stride)
    maps = [pipeline.maps(np.asarray(image.pixels), pixel_size_um=image.pixel_size_um) for image in images]
    references = [np.ascontiguousarray(image.labels, dtype=np.int32) for image in images]
    settings: dict[str, float | bool | None] = {}
    labels = [pipeline.cells(each) for each in maps]
    if find_thresholds and any(reference.any() for reference in references):
        found = (
            search_flows(maps, references, min_area_px=model.settings.min_area_px)
            if model.target == "flows"
            else search(
                maps,
                references,
                merge_px=_MERGES,
                restore_border=_BORDERS,
                mending=Mending(min_area_px=model.settings.min_area_px),
            )
        )
        if not ctc_score(references, labels).op_csb >= found.best_score:
            settings = found.best._asdict()
            rule = rules_of(pipeline, found)[FOUND]
            labels = [rule.labels(each) for each in maps]
    ctc, matching = ctc_score(references, labels), matching_score(references, labels)
    metrics = {"score/seg": ctc.seg, "score/det": ctc.det, "score/op_csb": ctc.op_csb}
    metrics["score/f1_at_0.5"] = matching.at[0].f1
    return Scored({name: float(value) for name, value in metrics.items()}, settings)
