"""Segment labelled images and score them: what fine-tuning calls on its validation images, and `dinocell evaluate`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Integer

from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.metrics.matching import matching_score
from dinocell.eval.segmentation.flows import flows_to_labels
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.eval.segmentation.refine import Refinement
from dinocell.eval.segmentation.watershed import distance_to_labels
from dinocell.eval.threshold_search import FlowThresholds, GridSearch, Thresholds, search, search_flows
from dinocell.finetune.model import DINOCell
from dinocell.finetune.validation import Scored
from dinocell.labelled.dataset import LabelledImage

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
                refinement=Refinement(min_area_px=model.settings.min_area_px),
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


# --- rules ---------------------------------------------------------------------------------------------------------
#
# The rules by which an evaluation makes cells of a segmenter's maps: its own, a plain one, and what a search found.

OURS, PLAIN, FOUND = "DINOCell", "DINOCell, plain rule", "DINOCell, thresholds found here"


FoundThresholds = GridSearch[Thresholds] | GridSearch[FlowThresholds]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How cells are cut from a map."""

    cells_max: float
    cell_fill: float
    merge_px: float | None
    min_area_px: int
    restore_border: bool

    @property
    def description(self) -> str:
        """The rule in words."""
        merged = f"pieces up to {self.merge_px:g} px apart merged" if self.merge_px is not None else "nothing merged"
        border = "borders restored" if self.restore_border else "borders as cut"
        smallest = f", cells below {self.min_area_px} px dropped" if self.min_area_px else ""
        return f"cells_max {self.cells_max:.3g}, cell_fill {self.cell_fill:.3g}, {merged}, {border}{smallest}"

    def labels(self, distance: Float32[np.ndarray, "h w"]) -> Integer[np.ndarray, "h w"]:
        """Return the cells."""
        return distance_to_labels(
            distance,
            cells_max=self.cells_max,
            cell_fill=self.cell_fill,
            merge_px=self.merge_px,
            min_area_px=self.min_area_px,
            restore_border=self.restore_border,
        )


@dataclass(frozen=True, kw_only=True)
class FlowRule:
    """How cells are made of flows."""

    probability: float
    flow_error: float
    min_area_px: int

    @property
    def description(self) -> str:
        """The rule in words."""
        smallest = f", cells below {self.min_area_px} px dropped" if self.min_area_px else ""
        return f"probability {self.probability:.3g}, flow error up to {self.flow_error:.3g}{smallest}"

    def labels(self, flows: Float32[np.ndarray, "3 h w"]) -> Integer[np.ndarray, "h w"]:
        """Return the cells."""
        return flows_to_labels(
            flows, probability=self.probability, flow_error=self.flow_error, min_area_px=self.min_area_px
        )


def rules_of(pipeline: DINOCellPipeline, found: FoundThresholds | None) -> Mapping[str, Rule] | Mapping[str, FlowRule]:
    """Return the rules by which a segmenter is scored, by the name of the method; ``found`` adds one."""
    best = None if found is None else found.best
    if pipeline.model.settings.target == "flows":
        probability, min_area_px = pipeline.probability, pipeline.model.settings.min_area_px
        of_flows = {
            OURS: FlowRule(probability=probability, flow_error=pipeline.flow_error, min_area_px=min_area_px),
            PLAIN: FlowRule(probability=probability, flow_error=math.inf, min_area_px=0),
        }
        if isinstance(best, FlowThresholds):
            of_flows[FOUND] = FlowRule(**best._asdict(), min_area_px=min_area_px)
        return of_flows
    settings, peak, fill = pipeline.model.settings, pipeline.cells_max, pipeline.cell_fill
    min_area_px = settings.min_area_px
    rules = {
        OURS: Rule(
            cells_max=peak,
            cell_fill=fill,
            merge_px=settings.merge_px,
            min_area_px=min_area_px,
            restore_border=settings.restore_border,
        ),
        PLAIN: Rule(cells_max=peak, cell_fill=fill, merge_px=None, min_area_px=0, restore_border=False),
    }
    if isinstance(best, Thresholds):
        rules[FOUND] = Rule(**best._asdict(), min_area_px=min_area_px)
    return rules
