"""What a segmenter predicts: distance maps, or flows with a cell probability. One `Target` object for each kind.

A target encodes labels as maps, activates and initialises the decoder's output, and has a loss and a class of
postprocessing parameters. `dinocell.eval.segmentation.pipeline` is the way back, from maps to labels.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Integer
from skimage.measure import label
from torch import Tensor

from dinocell.errors import DinocellError
from dinocell.labelled.distance import labels_to_distance
from dinocell.labelled.flows import labels_to_flows

TargetName = Literal["distance", "flows"]

# A typical mean of distance maps: the untrained decoder starts from it instead of from 0.5 everywhere.
_MEAN_DISTANCE = 0.1
# Cellpose (Stringer et al. 2021, Methods) trains on flows times 5 and halves their mean squared error, so that they
# weigh about as much as the cross entropy of the cell probability. Our flows are not scaled: 0.5 * 5^2.
_FLOW_WEIGHT = 12.5


# --- postprocessing parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Postprocessing(ABC):
    """How maps become labels. Fields are named as in `dinocell.finetune.preprocess.SegmenterSettings`."""

    target: ClassVar[TargetName]
    thresholds: ClassVar[tuple[str, str]]
    """The two fields that a threshold search varies first, and that a user may set for one call."""

    min_area_px: int = 0

    @abstractmethod
    def plain(self) -> "Postprocessing":
        """Return the same thresholds without any refinement of the labels."""

    def with_thresholds(self, **values: int | float | None) -> "Postprocessing":
        """Return the parameters with other thresholds; None keeps a threshold.

        Raises
        ------
        DinocellError
            If a threshold belongs to the other target, or is out of its range.
        """
        changes: dict[str, Any] = {name: float(value) for name, value in values.items() if value is not None}
        for name in changes.keys() - set(self.thresholds):
            raise DinocellError(
                f"{name}: not a threshold of this segmenter, which has {' and '.join(self.thresholds)}; remove it"
            )
        return replace(self, **changes)

    def __str__(self) -> str:
        """Return the parameters in words."""
        minimum = f", cells below {self.min_area_px} px dropped" if self.min_area_px else ""
        return f"{self._words()}{minimum}"

    @abstractmethod
    def _words(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class DistancePostprocessing(Postprocessing):
    """Parameters of `dinocell.eval.segmentation.watershed.distance_to_labels`; the thresholds are SAMCell's."""

    target = "distance"
    thresholds = ("cells_max", "cell_fill")

    cells_max: float = 0.47
    cell_fill: float = 0.09
    merge_px: float | None = 3.0
    restore_border: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.cell_fill <= self.cells_max < 1:
            raise DinocellError(
                f"expected 0 <= cell_fill <= cells_max < 1, got cell_fill {self.cell_fill}, cells_max {self.cells_max}"
            )

    def plain(self) -> "Postprocessing":
        """Return the watershed alone, as in SAMCell."""
        return replace(self, merge_px=None, restore_border=False, min_area_px=0)

    def _words(self) -> str:
        merging = "nothing merged" if self.merge_px is None else f"fragments up to {self.merge_px:g} px apart merged"
        boundaries = "refined" if self.restore_border else "not refined"
        return f"cells_max {self.cells_max:.3g}, cell_fill {self.cell_fill:.3g}, {merging}, boundaries {boundaries}"


@dataclass(frozen=True, kw_only=True)
class FlowPostprocessing(Postprocessing):
    """Parameters of `dinocell.eval.segmentation.flows.flows_to_labels`; the defaults are Cellpose's."""

    target = "flows"
    thresholds = ("probability", "flow_error")

    probability: float = 0.5
    flow_error: float = 0.4

    def __post_init__(self) -> None:
        if not (0 <= self.probability < 1 and self.flow_error > 0):
            raise DinocellError(
                f"expected 0 <= probability < 1 and flow_error > 0 (4 keeps nearly all cells), "
                f"got probability {self.probability}, flow_error {self.flow_error}"
            )

    def plain(self) -> "Postprocessing":
        """Return parameters that drop no cell."""
        return replace(self, flow_error=math.inf, min_area_px=0)

    def _words(self) -> str:
        return f"probability {self.probability:.3g}, flow error up to {self.flow_error:.3g}"


# --- targets --------------------------------------------------------------------------------------------------------


class Target(ABC):
    """One kind of map.

    Attributes
    ----------
    num_maps
        Number of maps, the channels of the decoder's output.
    error
        What the loss measures, in words.
    initial_logit
        Bias of the untrained decoder's output.
    postprocessing
        The class of its postprocessing parameters.
    """

    name: TargetName
    num_maps: int
    error: str
    initial_logit: float = 0.0
    postprocessing: type[Postprocessing]

    @abstractmethod
    def encode(
        self, labels: Integer[np.ndarray, "h w"], visible: tuple[slice, slice]
    ) -> Float32[np.ndarray, "k rows columns"]:
        """Return the maps of the ``visible`` part of a label image, computed from cells that extend beyond it."""

    @abstractmethod
    def activate(self, logits: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
        """Turn the decoder's output into maps."""

    @abstractmethod
    def loss(
        self,
        maps: Float[Tensor, "b k h w"],
        targets: Float[Tensor, "b k h w"],
        *,
        foreground_weight: float = 0.0,
        gradient_weight: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return the loss; see `dinocell.finetune.config.LossConfig` for the weights."""


class _Distance(Target):
    """One map in [0, 1]: the distance to the cell's boundary, 1 in the middle of a cell."""

    name = "distance"
    num_maps = 1
    error = "mean squared error of distance maps"
    initial_logit = math.log(_MEAN_DISTANCE / (1 - _MEAN_DISTANCE))
    postprocessing = DistancePostprocessing

    def encode(
        self, labels: Integer[np.ndarray, "h w"], visible: tuple[slice, slice]
    ) -> Float32[np.ndarray, "k rows columns"]:
        return np.ascontiguousarray(labels_to_distance(labels)[visible])[None]

    def activate(self, logits: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
        return logits.sigmoid()

    def loss(
        self,
        maps: Float[Tensor, "b k h w"],
        targets: Float[Tensor, "b k h w"],
        *,
        foreground_weight: float = 0.0,
        gradient_weight: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return the mean squared error, with optional weights of the foreground and of neighbour differences."""
        squared = (maps - targets).square()
        if foreground_weight:
            weight = 1 + foreground_weight * (targets > 0)
            squared = squared * (weight / weight.mean())
        loss = squared.mean()
        if gradient_weight:
            differences = [torch.diff(maps - targets, dim=axis).square().mean() for axis in (-1, -2)]
            loss = loss + gradient_weight * torch.stack(differences).sum()
        return loss


class _Flows(Target):
    """Three maps: the flow to the cell's centre along rows and along columns, and the cell probability."""

    name = "flows"
    num_maps = 3
    error = "error of flows and cell probability"
    postprocessing = FlowPostprocessing

    def encode(
        self, labels: Integer[np.ndarray, "h w"], visible: tuple[slice, slice]
    ) -> Float32[np.ndarray, "k rows columns"]:
        # A cell and its mirror image beyond the image's border have one id but a centre each. Cells outside the
        # visible part cost time and are not needed.
        parts = np.asarray(label(labels, connectivity=2), dtype=np.int32)  # type: ignore[no-untyped-call]
        is_seen = np.zeros(int(parts.max(initial=0)) + 1, bool)
        is_seen[parts[visible]] = True
        flows = labels_to_flows(np.where(is_seen[parts], parts, 0))
        return np.ascontiguousarray(flows[:, *visible])

    def activate(self, logits: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
        # In float32: under autocast a probability above 0.998 would round to 1, whose cross entropy has no gradient.
        return torch.cat((logits[:, :2].float(), logits[:, 2:].float().sigmoid()), dim=1)

    def loss(
        self,
        maps: Float[Tensor, "b k h w"],
        targets: Float[Tensor, "b k h w"],
        *,
        foreground_weight: float = 0.0,  # noqa: ARG002
        gradient_weight: float = 0.0,  # noqa: ARG002
    ) -> Float[Tensor, ""]:
        """Return 12.5 times the mean squared error of the flows plus the cross entropy of the cell probability."""
        flows = _FLOW_WEIGHT * F.mse_loss(maps[:, :2], targets[:, :2])
        return flows + F.binary_cross_entropy(maps[:, 2], targets[:, 2])


TARGETS: dict[TargetName, Target] = {target.name: target for target in (_Distance(), _Flows())}
