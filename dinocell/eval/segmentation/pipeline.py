"""From an image to labelled cells in one call.

::

    model = DINOCell.from_pretrained("segmenter.pt")
    labels = DINOCellPipeline(model).run(image)
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float32, Int32, Shaped

from dinocell.errors import DinocellError, ImageError
from dinocell.eval.segmentation.flows import check_flow_thresholds, flows_to_labels
from dinocell.eval.segmentation.tiling import predict
from dinocell.eval.segmentation.watershed import checked_thresholds, distance_to_labels
from dinocell.finetune.model import DINOCell
from dinocell.finetune.preprocess import prepare
from dinocell.images.image import as_image
from dinocell.runtime.distributed import find_device

# Pixel sizes that differ by less are taken as equal: resampling would cost more than it gains.
_SAME_SCALE = 0.02
# A larger ratio is a wrong unit rather than a magnification, and might need more memory than there is.
_MAX_RESAMPLING = 16


class Segmentation(NamedTuple):
    """The cells of an image, ids from 1 without gaps, and the distance map."""

    labels: Int32[np.ndarray, "h w"]
    distance: Float32[np.ndarray, "h w"]


class FlowSegmentation(NamedTuple):
    """The cells of an image and the maps of a flow model: flow along rows, along columns, and cell probability."""

    labels: Int32[np.ndarray, "h w"]
    flows: Float32[np.ndarray, "3 h w"]


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
        if not 1 <= self.stride <= largest:
            raise DinocellError(
                f"stride: expected 1 to {largest} px for this model's tiles of {self.crop_size} px, got {stride}"
            )
        self._refuse(cells_max=cells_max, cell_fill=cell_fill, probability=probability, flow_error=flow_error)
        self.cells_max, self.cell_fill = checked_thresholds(
            settings.cells_max if cells_max is None else cells_max,
            settings.cell_fill if cell_fill is None else cell_fill,
        )
        self.probability = settings.probability if probability is None else float(probability)
        self.flow_error = settings.flow_error if flow_error is None else float(flow_error)
        check_flow_thresholds(self.probability, self.flow_error)

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
    ) -> Segmentation | FlowSegmentation: ...

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
    ) -> Int32[np.ndarray, "h w"] | Segmentation | FlowSegmentation:
        """Return the cells of an image, int32 (h w), and with ``return_dist_map`` the maps too.

        Distance models return a `Segmentation` with the distance map (h w), flow models a `FlowSegmentation` with flows
        and cell probability (3 h w).

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
        self._refuse(cells_max=cells_max, cell_fill=cell_fill)  # before the network's long work
        maps = self.maps(image, channel=channel, pixel_size_um=pixel_size_um, progress=progress)
        labels = self.cells(maps, cells_max=cells_max, cell_fill=cell_fill)
        if not return_dist_map:
            return labels
        return Segmentation(labels, maps) if self.model.target == "distance" else FlowSegmentation(labels, maps)

    def maps(
        self,
        image: Shaped[np.ndarray, "..."],
        *,
        channel: int | None = None,
        pixel_size_um: int | float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float32[np.ndarray, "h w"] | Float32[np.ndarray, "3 h w"]:
        """Return the distance map of an image, or its flows and cell probability; parameters as for `run`."""
        plane = as_image(image).plane(channel)
        scale = self._scale(pixel_size_um)
        prepared = prepare(_scaled(plane, scale), self.model.settings)
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
        if scale != 1:
            maps = np.stack([_resized(plane_map, plane.shape) for plane_map in maps])
        return maps if self.model.target == "flows" else maps[0]

    def distance(
        self,
        image: Shaped[np.ndarray, "..."],
        *,
        channel: int | None = None,
        pixel_size_um: int | float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float32[np.ndarray, "h w"]:
        """Return the distance map of an image; parameters as for `run`.

        Raises
        ------
        DinocellError
            If it is a flow model: see `maps`.
        """
        if self.model.target != "distance":
            raise DinocellError(f"this segmenter was trained for {self.model.target}, it has no distance map; use maps")
        return self.maps(image, channel=channel, pixel_size_um=pixel_size_um, progress=progress)

    def cells(
        self,
        maps: Float32[np.ndarray, "h w"] | Float32[np.ndarray, "3 h w"],
        *,
        cells_max: int | float | None = None,
        cell_fill: int | float | None = None,
        probability: int | float | None = None,
        flow_error: int | float | None = None,
    ) -> Int32[np.ndarray, "h w"]:
        """Return the cells of the maps from `maps`; thresholds default to the model's."""
        settings = self.model.settings
        self._refuse(cells_max=cells_max, cell_fill=cell_fill, probability=probability, flow_error=flow_error)
        if self.model.target == "flows":
            return flows_to_labels(
                maps,
                probability=self.probability if probability is None else probability,
                flow_error=self.flow_error if flow_error is None else flow_error,
                min_area_px=settings.min_area_px,
            )
        return distance_to_labels(
            maps,
            cells_max=self.cells_max if cells_max is None else cells_max,
            cell_fill=self.cell_fill if cell_fill is None else cell_fill,
            merge_px=settings.merge_px,
            restore_border=settings.restore_border,
            min_area_px=settings.min_area_px,
        )

    def _refuse(self, **thresholds: int | float | None) -> None:
        """Refuse thresholds of the other kind of model, which would be ignored."""
        ours = ("cells_max", "cell_fill") if self.model.target == "distance" else ("probability", "flow_error")
        for name, value in thresholds.items():
            if value is not None and name not in ours:
                raise DinocellError(
                    f"{name}: this segmenter is one of target {self.model.target}, whose thresholds are "
                    f"{' and '.join(ours)}"
                )

    def _scale(self, pixel_size_um: int | float | None) -> float:
        if pixel_size_um is not None and not 0 < pixel_size_um < math.inf:
            raise DinocellError(f"pixel_size_um: expected more than 0, got {pixel_size_um}")
        trained = self.model.settings.pixel_size_um
        if pixel_size_um is None or trained is None:
            return 1.0
        scale = float(pixel_size_um) / trained
        if not 1 / _MAX_RESAMPLING <= scale <= _MAX_RESAMPLING:
            raise ImageError(
                f"pixels of {pixel_size_um:g} um, but the segmenter was trained on {trained:g} um: is the size in "
                "another unit? Set it with pixel_size_um (--pixel-size)"
            )
        return 1.0 if abs(scale - 1) < _SAME_SCALE else scale


def _scaled(plane: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1:
        return plane
    height, width = (max(1, round(side * scale)) for side in plane.shape)
    return _resized(plane.astype(np.float32), (height, width))


def _resized(plane: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    import cv2

    method = cv2.INTER_AREA if size[0] < plane.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(plane, (size[1], size[0]), interpolation=method))
