"""From maps to labels, for each target of `dinocell.finetune.targets`: decoding, and the grid of a threshold search."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int32

from dinocell.errors import DinocellError
from dinocell.eval.segmentation.flows import find_masks, flows_to_labels, keep
from dinocell.eval.segmentation.refine import Refinement, refine_labels
from dinocell.eval.segmentation.watershed import cut, distance_to_labels, flood
from dinocell.finetune.targets import Postprocessing, TargetName

Axes = Mapping[str, Sequence[float | bool | None]]
"""Values of each postprocessing parameter that a search varies. The costly part of decoding depends on the first."""
Decoded = Iterator[tuple[tuple[int, ...], Int32[np.ndarray, "h w"]]]
"""Labels of grid points: indices along all axes but the first, and the labels. Impossible points are skipped."""

# SAMCell's grid: 20 x 20 points.
CELLS_MAX_RANGE = (0.1, 0.9)
CELL_FILL_RANGE = (0.05, 0.5)
STEPS = 20
# Probabilities around a half; flow errors from one that only keeps clean cells to one that keeps nearly all.
PROBABILITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FLOW_ERRORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 4.0)


class Decoder(ABC):
    """Postprocessing of one target's maps."""

    training_axes: ClassVar[Axes] = {}
    """What the search at the end of a fine-tuning run varies besides `axes`."""

    @abstractmethod
    def decode(self, maps: Float32[np.ndarray, "*maps h w"], parameters: Postprocessing) -> Int32[np.ndarray, "h w"]:
        """Return the labels of maps; a distance map is (h w), flows are (3 h w)."""

    @abstractmethod
    def axes(self, parameters: Postprocessing) -> Axes:
        """Return the default grid of a threshold search around the parameters."""

    @abstractmethod
    def decode_grid(
        self, maps: Float32[np.ndarray, "*maps h w"], axes: Axes, first: float, parameters: Postprocessing
    ) -> Decoded:
        """Yield the labels of all grid points with one value of the first axis, in every pixel equal to `decode`'s."""


class _DistanceDecoder(Decoder):
    # Merging the fragments of a cell helps curved cells on sharp maps, and joins neighbours on blurred ones.
    training_axes: ClassVar[Axes] = {"merge_px": (None, 1.5, 3.0, 5.0)}

    def decode(self, maps: Float32[np.ndarray, "*maps h w"], parameters: Postprocessing) -> Int32[np.ndarray, "h w"]:
        return distance_to_labels(maps, **asdict(parameters))

    def axes(self, parameters: Any) -> Axes:
        return {
            "cells_max": threshold_values("cells_max", *CELLS_MAX_RANGE, STEPS),
            "cell_fill": threshold_values("cell_fill", *CELL_FILL_RANGE, STEPS),
            "merge_px": (parameters.merge_px,),
            # Refined boundaries are right on blurred maps, and wrong where peaks are low for another reason.
            "restore_border": (True, False),
        }

    def decode_grid(
        self, maps: Float32[np.ndarray, "*maps h w"], axes: Axes, first: float, parameters: Postprocessing
    ) -> Decoded:
        yield from decode_distance_grid(maps, axes, first, Refinement(min_area_px=parameters.min_area_px))


def decode_distance_grid(
    distance: Float32[np.ndarray, "h w"], axes: Axes, cells_max: float, refinement: Refinement
) -> Decoded:
    """Flood a distance map once, at the lowest fill threshold, and cut and refine it at all others."""
    fills = [(row, fill) for row, fill in enumerate(_floats(axes["cell_fill"])) if fill <= cells_max]
    if not fills:
        return
    flooded = flood(distance, cells_max=cells_max, lowest_fill=min(fill for _, fill in fills))
    for row, fill in fills:
        plain = cut(flooded, fill)
        for column, merge_px in enumerate(axes["merge_px"]):
            for place, restored in enumerate(axes["restore_border"]):
                way = replace(refinement, merge_px=merge_px, restore_border=bool(restored))
                yield (row, column, place), refine_labels(plain, flooded.distance, cell_fill=fill, refinement=way)


class _FlowDecoder(Decoder):
    def decode(self, maps: Float32[np.ndarray, "*maps h w"], parameters: Postprocessing) -> Int32[np.ndarray, "h w"]:
        return flows_to_labels(maps, **asdict(parameters))

    def axes(self, parameters: Postprocessing) -> Axes:  # noqa: ARG002
        return {"probability": PROBABILITIES, "flow_error": FLOW_ERRORS}

    def decode_grid(
        self, maps: Float32[np.ndarray, "*maps h w"], axes: Axes, first: float, parameters: Postprocessing
    ) -> Decoded:
        # The flows are followed once per probability; the flow error then only selects among the cells found.
        masks = find_masks(maps, probability=first)
        for index, flow_error in enumerate(_floats(axes["flow_error"])):
            yield (index,), keep(masks, flow_error=flow_error, min_area_px=parameters.min_area_px)


def _floats(values: Sequence[float | bool | None]) -> list[float]:
    return [float(value) for value in np.array(values, np.float64)]


DECODERS: dict[TargetName, Decoder] = {"distance": _DistanceDecoder(), "flows": _FlowDecoder()}


def decode(maps: Float32[np.ndarray, "*maps h w"], parameters: Postprocessing) -> Int32[np.ndarray, "h w"]:
    """Return the labels of a segmenter's maps."""
    return DECODERS[parameters.target].decode(maps, parameters)


def threshold_values(name: str, low: int | float, high: int | float, steps: int) -> tuple[float, ...]:
    """Return evenly spaced values of a threshold.

    Raises
    ------
    DinocellError
        If the range is not within [0, 1), or there is no step.
    """
    if not 0 <= low <= high < 1 or steps < 1:
        raise DinocellError(
            f"{name}: expected 0 <= minimum <= maximum < 1 and at least 1 step, got {low}, {high}, {steps}"
        )
    return tuple(np.linspace(low, high, steps if high > low else 1).round(9).tolist())
