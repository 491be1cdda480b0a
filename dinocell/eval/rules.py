"""The rules by which an evaluation makes cells of a segmenter's maps: its own, a plain one, and what a search found."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Integer

from dinocell.eval.flow_thresholds import FlowThresholds
from dinocell.eval.flows import flows_to_labels
from dinocell.eval.grid_search import GridSearch
from dinocell.eval.pipeline import DINOCellPipeline
from dinocell.eval.thresholds import Thresholds
from dinocell.eval.watershed import distance_to_labels

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
