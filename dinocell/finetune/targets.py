"""What a segmenter predicts: distance maps, or flows with a cell probability. One `Target` object for each kind.

A target encodes labels as maps, activates and initialises the decoder's output, and has a loss and a class of
postprocessing parameters. `dinocell.eval.segmentation.pipeline` is the way back, from maps to labels. Distance maps
are part of labelled sets (`dinocell.labelled.distance`); flows are computed here.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int32, Int64, Integer
from skimage.measure import label
from skimage.segmentation import relabel_sequential
from torch import Tensor

from dinocell.errors import DinocellError
from dinocell.labelled.distance import check_labels, labels_to_distance
from dinocell.runtime.jit import compiled, inlined

TargetName = Literal["distance", "flows"]
_Labels = Integer[np.ndarray, "h w"]
_Maps = Float[Tensor, "b k h w"]

# A typical mean of distance maps: the untrained decoder starts from it instead of from 0.5 everywhere.
_MEAN_DISTANCE = 0.1
# Cellpose (Stringer et al. 2021, Methods) trains on flows times 5 and halves their mean squared error, so that they
# weigh about as much as the cross entropy of the cell probability. Our flows are not scaled: 0.5 * 5^2.
_FLOW_WEIGHT = 12.5


@dataclass(frozen=True, kw_only=True)
class Postprocessing(ABC):
    """How maps become labels. Fields are named as in `dinocell.finetune.preprocess.SegmenterSettings`."""

    target: ClassVar[TargetName]
    thresholds: ClassVar[tuple[str, str]]
    """The two fields that a threshold search varies first, and that a user may set for one call."""

    min_area_px: int = 0

    def _check(self, is_valid: bool, expected: str) -> None:
        if not is_valid:
            got = ", ".join(f"{name} {getattr(self, name)}" for name in self.thresholds)
            raise DinocellError(f"expected {expected}, got {got}")

    @abstractmethod
    def plain(self) -> "Postprocessing":
        """Return the same thresholds without any refinement of the labels."""

    def with_thresholds(self, **values: int | float | None) -> "Postprocessing":
        """Return the parameters with other thresholds; None keeps a threshold.

        DinocellError if a threshold belongs to the other target, or is out of its range.
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
        self._check(0 <= self.cell_fill <= self.cells_max < 1, "0 <= cell_fill <= cells_max < 1")

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
        is_valid = 0 <= self.probability < 1 and self.flow_error > 0
        self._check(is_valid, "0 <= probability < 1 and flow_error > 0 (4 keeps nearly all cells)")

    def plain(self) -> "Postprocessing":
        """Return parameters that drop no cell."""
        return replace(self, flow_error=math.inf, min_area_px=0)

    def _words(self) -> str:
        return f"probability {self.probability:.3g}, flow error up to {self.flow_error:.3g}"


class Target(ABC):
    """One kind of map."""

    name: TargetName
    num_maps: int  # the channels of the decoder's output
    error: str  # what the loss measures, in words
    initial_logit: float = 0.0  # bias of the untrained decoder's output
    postprocessing: type[Postprocessing]

    @abstractmethod
    def encode(self, labels: _Labels, visible: tuple[slice, slice]) -> Float32[np.ndarray, "k rows columns"]:
        """Return the maps of the ``visible`` part of a label image, computed from cells that extend beyond it."""

    @abstractmethod
    def activate(self, logits: _Maps) -> _Maps:
        """Turn the decoder's output into maps."""

    @abstractmethod
    def loss(
        self, maps: _Maps, targets: _Maps, *, foreground_weight: float = 0.0, gradient_weight: float = 0.0
    ) -> Float[Tensor, ""]:
        """Return the loss; see `dinocell.finetune.config.LossConfig` for the weights."""


class _Distance(Target):
    """One map in [0, 1]: the distance to the cell's boundary, 1 in the middle of a cell."""

    name = "distance"
    num_maps = 1
    error = "mean squared error of distance maps"
    initial_logit = math.log(_MEAN_DISTANCE / (1 - _MEAN_DISTANCE))
    postprocessing = DistancePostprocessing

    def encode(self, labels: _Labels, visible: tuple[slice, slice]) -> Float32[np.ndarray, "k rows columns"]:
        return np.ascontiguousarray(labels_to_distance(labels)[visible])[None]

    def activate(self, logits: _Maps) -> _Maps:
        return logits.sigmoid()

    def loss(
        self, maps: _Maps, targets: _Maps, *, foreground_weight: float = 0.0, gradient_weight: float = 0.0
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

    def encode(self, labels: _Labels, visible: tuple[slice, slice]) -> Float32[np.ndarray, "k rows columns"]:
        # A cell and its mirror image beyond the image's border have one id but a centre each. Cells outside the
        # visible part cost time and are not needed.
        parts = np.asarray(label(labels, connectivity=2), dtype=np.int32)  # type: ignore[no-untyped-call]
        is_seen = np.zeros(int(parts.max(initial=0)) + 1, bool)
        is_seen[parts[visible]] = True
        flows = labels_to_flows(np.where(is_seen[parts], parts, 0))
        return np.ascontiguousarray(flows[:, *visible])

    def activate(self, logits: _Maps) -> _Maps:
        # In float32: under autocast a probability above 0.998 would round to 1, whose cross entropy has no gradient.
        return torch.cat((logits[:, :2].float(), logits[:, 2:].float().sigmoid()), dim=1)

    def loss(self, maps: _Maps, targets: _Maps, **_: float) -> Float[Tensor, ""]:
        """Return 12.5 times the mean squared error of the flows plus the cross entropy of the cell probability."""
        flows = _FLOW_WEIGHT * F.mse_loss(maps[:, :2], targets[:, :2])
        return flows + F.binary_cross_entropy(maps[:, 2], targets[:, 2])


TARGETS: dict[TargetName, Target] = {target.name: target for target in (_Distance(), _Flows())}


def labels_to_flows(labels: _Labels) -> Float32[np.ndarray, "3 h w"]:
    """Return each pixel's flow as a unit vector along rows and columns, and whether it is in a cell (0 or 1).

    Heat diffuses inside each cell from a source in its middle; a pixel's flow is the direction of the heat gradient
    (Cellpose: Stringer et al. 2021, Nature Methods 18). Following the flows from any pixel of a cell leads to its
    middle, see `dinocell.eval.segmentation.flows`. ValueError as in `labels_to_distance`.

    The source is the cell's pixel nearest to the median of its rows and columns. Each of ``2 * (rows + columns)``
    iterations, of its bounding box, adds 1 to the source and replaces every value by the mean of its 3 x 3 neighbours,
    with 0 outside the cell. Flows are the central differences of ``log(1 + heat)``, normalised to length 1; 0 where
    they vanish, and in pieces of a cell that are not connected to the source. They depend on the cell's own pixels
    only.
    """
    check_labels(labels)
    flows = np.zeros((3, *labels.shape), np.float32)
    if labels.any():
        if labels.max() > labels.size:  # consecutive ids: the kernel has one entry per id up to the maximum
            labels = relabel_sequential(labels)[0]  # type: ignore[no-untyped-call]
        _write_flows(np.ascontiguousarray(labels, np.int32), int(labels.max()), flows)
    return flows


@compiled
def _write_flows(labels: Int32[np.ndarray, "h w"], num_cells: int, flows: Float32[np.ndarray, "3 h w"]) -> None:
    """Fill ``flows``, zeros at first, with the result of `labels_to_flows`; ids are at most ``num_cells``."""
    boxes = _boxes(labels, num_cells)
    largest = 0
    for cell in range(num_cells):
        largest = max(largest, (boxes[cell, 1] - boxes[cell, 0] + 3) * (boxes[cell, 3] - boxes[cell, 2] + 3))
    # Two buffers that all cells weight.
    weight_buffer, heat_buffer = np.empty(largest), np.empty(largest)
    for cell in range(num_cells):
        first_row, last_row, first_column, last_column = boxes[cell]
        if last_row < 0:  # no pixel has this id
            continue
        # The bounding box with a margin of one pixel, so that every pixel of the cell has all of its neighbours.
        rows, columns = last_row - first_row + 3, last_column - first_column + 3
        weight = weight_buffer[: rows * columns].reshape((rows, columns))
        heat = heat_buffer[: rows * columns].reshape((rows, columns))
        weight[:] = 0
        heat[:] = 0
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if labels[first_row + row - 1, first_column + column - 1] == cell + 1:
                    weight[row, column] = 1 / 9
        _diffuse(heat, weight)
        # The logarithm makes the differences visible far from the source, where heat is tiny.
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if weight[row, column] > 0:
                    heat[row, column] = math.log1p(heat[row, column])
        for row in range(1, rows - 1):
            for column in range(1, columns - 1):
                if weight[row, column] > 0:
                    down = heat[row + 1, column] - heat[row - 1, column]
                    right = heat[row, column + 1] - heat[row, column - 1]
                    length = math.hypot(down, right)
                    if length > 0:
                        flows[0, first_row + row - 1, first_column + column - 1] = down / length
                        flows[1, first_row + row - 1, first_column + column - 1] = right / length
                    flows[2, first_row + row - 1, first_column + column - 1] = 1


@inlined
def _boxes(labels: Int32[np.ndarray, "h w"], num_cells: int) -> Int64[np.ndarray, "cells 4"]:
    """Return the first and last row, and the first and last column, of each cell."""
    boxes = np.empty((num_cells, 4), np.int64)
    boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3] = labels.shape[0], -1, labels.shape[1], -1
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            if labels[row, column] > 0:
                box = boxes[labels[row, column] - 1]
                box[0], box[1] = min(box[0], row), row
                box[2], box[3] = min(box[2], column), max(box[3], column)
    return boxes


@inlined
def _diffuse(heat: Float64[np.ndarray, "h w"], weight: Float64[np.ndarray, "h w"]) -> None:
    """Iterate: add 1 to the source, then replace every value by the mean of its 3 x 3 neighbours.

    ``weight`` is 1 / 9 in the cell, 0 elsewhere. Opposite neighbours are added first, which makes the heat of a
    symmetrical cell symmetrical to the last bit.
    """
    source_row, source_column = _source(weight)
    top = bottom = source_row  # only the rows that heat has reached are computed
    # Sums of three neighbours in a row: in the row above, the current row, and the row below.
    above, here, below = np.empty(weight.shape[1]), np.empty(weight.shape[1]), np.empty(weight.shape[1])
    for _ in range(2 * (weight.shape[0] - 2 + weight.shape[1] - 2)):
        heat[source_row, source_column] += 1
        top, bottom = max(top - 1, 1), min(bottom + 1, weight.shape[0] - 2)
        above[:] = 0
        _add_three(heat[top], here)
        for row in range(top, bottom + 1):
            _add_three(heat[row + 1], below)
            for column in range(1, weight.shape[1] - 1):
                heat[row, column] = ((above[column] + below[column]) + here[column]) * weight[row, column]
            above, here, below = here, below, above
        if not heat[top].any():
            top += 1
        if not heat[bottom].any():
            bottom -= 1


@inlined
def _add_three(heat: Float64[np.ndarray, " w"], sums: Float64[np.ndarray, " w"]) -> None:
    for column in range(1, len(heat) - 1):
        sums[column] = (heat[column - 1] + heat[column + 1]) + heat[column]


@inlined
def _source(weight: Float64[np.ndarray, "h w"]) -> tuple[int, int]:
    """Return the cell's pixel nearest to the median of its rows and columns; the first of equally near ones."""
    pixels = np.argwhere(weight)
    middle_row, middle_column = np.median(pixels[:, 0]), np.median(pixels[:, 1])
    minimum, nearest = math.inf, 0
    for index in range(len(pixels)):
        distance = (pixels[index, 0] - middle_row) ** 2 + (pixels[index, 1] - middle_column) ** 2
        if distance < minimum:
            minimum, nearest = distance, index
    return pixels[nearest, 0], pixels[nearest, 1]
