"""From an image to labelled cells: the network's maps, and how those of each target become labels.

::

    model = DINOCell.from_pretrained("segmenter.pt")
    labels = DINOCellPipeline(model).run(image)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float32, Int32, Shaped

from dinocell.errors import DinocellError, require
from dinocell.eval.segmentation.flows import find_masks, flows_to_labels, keep
from dinocell.eval.segmentation.refine import Refinement, refine_labels
from dinocell.eval.segmentation.tiling import predict
from dinocell.eval.segmentation.watershed import cut, distance_to_labels, flood
from dinocell.finetune.model import DINOCell
from dinocell.finetune.preprocess import prepare, resize
from dinocell.finetune.targets import DistancePostprocessing, Postprocessing, TargetName
from dinocell.images.image import as_image
from dinocell.runtime.distributed import find_device

Axes = Mapping[str, Sequence[Any]]
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


class Segmentation(NamedTuple):
    """Labels, ids from 1 without gaps, and the maps that they come from: a distance map (h w), or flows (3 h w)."""

    labels: Int32[np.ndarray, "h w"]
    maps: Float32[np.ndarray, "h w"] | Float32[np.ndarray, "3 h w"]


class DINOCellPipeline:
    """Segment images with a segmenter.

    Parameters
    ----------
    model
        A `dinocell.DINOCell`; moved to ``device`` and set to eval mode.
    device
        None: CUDA if available, else the CPU.
    crop_size
        Side of the tiles in pixels; None: that of the training crops.
    cells_max, cell_fill
        Distance models: thresholds of peaks and masks; None: those stored in the model.
    probability, flow_error
        Flow models: minimum cell probability, maximum flow error; None: those stored in the model.
    stride
        Distance between tiles, at most seven eighths of ``crop_size``; None: three quarters (SAMCell's 192 of 256).
    batch_size
        Tiles per batch.

    Raises
    ------
    DinocellError
        If a threshold or the stride is out of range, a threshold is of the other kind of model, or there is no such
        device.
    """

    def __init__(
        self,
        model: DINOCell,
        device: str | torch.device | None = None,
        crop_size: int | None = None,
        cells_max: int | float | None = None,
        cell_fill: int | float | None = None,
        *,
        probability: int | float | None = None,
        flow_error: int | float | None = None,
        stride: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self.device = find_device(str(device or "auto"))
        self.model = model.to(self.device).eval()
        settings = model.settings
        self.crop_size = settings.window_px if crop_size is None else crop_size
        overlap = self.crop_size // 8
        self.stride, self.batch_size = self.crop_size - 2 * overlap if stride is None else stride, batch_size
        largest = self.crop_size - overlap
        tiles = f"this model's tiles of {self.crop_size} px"
        require(1 <= self.stride <= largest, f"stride: expected 1 to {largest} px for {tiles}, got {stride}")
        self.parameters = settings.postprocessing.with_thresholds(
            cells_max=cells_max, cell_fill=cell_fill, probability=probability, flow_error=flow_error
        )

    @overload
    def run(
        self,
        image: Shaped[np.ndarray, "..."],
        return_dist_map: Literal[False] = False,
        cells_max: int | float | None = None,
        cell_fill: int | float | None = None,
        *,
        channel: int | None = None,
        pixel_size_um: int | float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray: ...

    @overload
    def run(
        self,
        image: Shaped[np.ndarray, "..."],
        return_dist_map: Literal[True],
        cells_max: int | float | None = None,
        cell_fill: int | float | None = None,
        *,
        channel: int | None = None,
        pixel_size_um: int | float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Segmentation: ...

    def run(
        self,
        image: Shaped[np.ndarray, "..."],
        return_dist_map: bool = False,
        cells_max: int | float | None = None,
        cell_fill: int | float | None = None,
        *,
        channel: int | None = None,
        pixel_size_um: int | float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Int32[np.ndarray, "h w"] | Segmentation:
        """Return the cells of an image, int32 (h w), and with ``return_dist_map`` the maps too.

        The maps of a `Segmentation` are the distance map (h w), or for target ``flows`` the flows and the cell
        probability (3 h w).

        Parameters
        ----------
        image
            (h w), (c h w) or (h w c), of any real type; RGB with or without alpha.
        cells_max, cell_fill
            For this call only; an error for flow models.
        channel
            Channel to segment; None: the mean of all, each scaled to its own range first.
        pixel_size_um
            Of the image. If the model stores the pixel size of its training, the image is scaled to that, and the
            labels back.
        progress
            Called after each batch with the number of finished tiles and their total.

        Raises
        ------
        ImageError
            If the image is empty, of another shape, or not finite, or its pixel size differs too much from that of the
            training.
        DinocellError
            If thresholds or the pixel size are out of range, or thresholds are of the other kind of model.
        """
        parameters = self.parameters.with_thresholds(cells_max=cells_max, cell_fill=cell_fill)
        maps = self.maps(image, channel=channel, pixel_size_um=pixel_size_um, progress=progress)
        labels = decode(maps, parameters)
        return Segmentation(labels, maps) if return_dist_map else labels

    def maps(
        self,
        image: Shaped[np.ndarray, "..."],
        *,
        channel: int | None = None,
        pixel_size_um: int | float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float32[np.ndarray, "h w"] | Float32[np.ndarray, "3 h w"]:
        """Return the distance map of an image, or its flows and cell probability (3 h w); parameters as for `run`."""
        prepared = prepare(image, self.model.settings, channel=channel, pixel_size_um=pixel_size_um)
        maps = predict(
            prepared[None],
            self.model,
            window=self.crop_size,
            overlap=self.crop_size // 8,
            stride=self.stride,
            batch_size=self.batch_size,
            device=self.device,
            progress=progress,
        )
        np.clip(maps[-1], 0, 1, out=maps[-1])  # rounding of the blending; the last map of flows is the cell probability
        height, width = as_image(image).pixels.shape[1:]
        if maps.shape[1:] != (height, width):
            maps = np.stack([resize(plane, (height, width)) for plane in maps])
        return maps if self.model.target == "flows" else maps[0]

    def distance(
        self,
        image: Shaped[np.ndarray, "..."],
        *,
        channel: int | None = None,
        pixel_size_um: int | float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float32[np.ndarray, "h w"]:
        """Return the distance map of an image; parameters as for `run`. A DinocellError for flow models, see `maps`."""
        if self.model.target != "distance":
            raise DinocellError(f"this segmenter was trained for {self.model.target}, it has no distance map; use maps")
        return self.maps(image, channel=channel, pixel_size_um=pixel_size_um, progress=progress)

    def cells(
        self, maps: Float32[np.ndarray, "h w"] | Float32[np.ndarray, "3 h w"], **thresholds: int | float | None
    ) -> Int32[np.ndarray, "h w"]:
        """Return the labels of the maps that `maps` returned; thresholds that are given replace the pipeline's."""
        return decode(maps, self.parameters.with_thresholds(**thresholds))


def decode(maps: Float32[np.ndarray, "*maps h w"], parameters: Postprocessing) -> Int32[np.ndarray, "h w"]:
    """Return the labels of a segmenter's maps; a distance map is (h w), flows are (3 h w)."""
    return DECODERS[parameters.target].to_labels(maps, **asdict(parameters))


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Postprocessing of one target's maps, with one set of parameters or over the grid of a threshold search."""

    to_labels: Callable[..., Int32[np.ndarray, "h w"]]  # of maps and the parameters by name
    axes: Callable[[Any], Axes]  # the default grid around parameters
    training_axes: Axes = field(default_factory=dict)  # what the search at the end of fine-tuning varies besides
    # Of maps, axes, one value of the first axis, and the parameters that the grid does not vary: yields the labels of
    # all grid points with this value, in every pixel equal to those of `to_labels`.
    decode_grid: Callable[..., Decoded]


def _distance_axes(parameters: DistancePostprocessing) -> Axes:
    return {
        "cells_max": threshold_values("cells_max", *CELLS_MAX_RANGE, STEPS),
        "cell_fill": threshold_values("cell_fill", *CELL_FILL_RANGE, STEPS),
        "merge_px": (parameters.merge_px,),
        # Refined boundaries are right on blurred maps, and wrong where peaks are low for another reason.
        "restore_border": (True, False),
    }


def decode_distance_grid(
    distance: Float32[np.ndarray, "h w"], axes: Axes, cells_max: float, refinement: Refinement
) -> Decoded:
    """Flood a distance map once, at the lowest fill threshold, and cut and refine it at all others."""
    fills = [(row, fill) for row, fill in enumerate(axes["cell_fill"]) if fill <= cells_max]
    if not fills:
        return
    flooded = flood(distance, cells_max=cells_max, lowest_fill=min(fill for _, fill in fills))
    for row, fill in fills:
        plain = cut(flooded, fill)
        for column, merge_px in enumerate(axes["merge_px"]):
            for place, restored in enumerate(axes["restore_border"]):
                way = replace(refinement, merge_px=merge_px, restore_border=restored)
                yield (row, column, place), refine_labels(plain, flooded.distance, cell_fill=fill, refinement=way)


def _decode_flow_grid(
    flows: Float32[np.ndarray, "3 h w"], axes: Axes, probability: float, parameters: Postprocessing
) -> Decoded:
    """Follow the flows once; the flow error then only selects among the cells found."""
    masks = find_masks(flows, probability=probability)
    for index, flow_error in enumerate(axes["flow_error"]):
        yield (index,), keep(masks, flow_error=flow_error, min_area_px=parameters.min_area_px)


DECODERS: dict[TargetName, Decoder] = {
    "distance": Decoder(
        to_labels=distance_to_labels,
        axes=_distance_axes,
        # Merging the fragments of a cell helps curved cells on sharp maps, and joins neighbours on blurred ones.
        training_axes={"merge_px": (None, 1.5, 3.0, 5.0)},
        decode_grid=lambda maps, axes, cells_max, parameters: decode_distance_grid(
            maps, axes, cells_max, Refinement(min_area_px=parameters.min_area_px)
        ),
    ),
    "flows": Decoder(
        to_labels=flows_to_labels,
        axes=lambda _: {"probability": PROBABILITIES, "flow_error": FLOW_ERRORS},
        decode_grid=_decode_flow_grid,
    ),
}


def threshold_values(name: str, low: int | float, high: int | float, steps: int) -> tuple[float, ...]:
    """Return evenly spaced values of a threshold; a DinocellError if the range is not within [0, 1), or has no step."""
    expected = "expected 0 <= minimum <= maximum < 1 and at least 1 step"
    require(0 <= low <= high < 1 and steps >= 1, f"{name}: {expected}, got {low}, {high}, {steps}")
    return tuple(np.linspace(low, high, steps if high > low else 1).round(9).tolist())
