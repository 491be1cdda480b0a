"""From an image to labelled cells in one call.

::

    model = DINOCell.from_pretrained("segmenter.pt")
    labels = DINOCellPipeline(model).run(image)
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float32, Int32, Shaped

from dinocell.errors import DinocellError
from dinocell.eval.segmentation.targets import decode
from dinocell.eval.segmentation.tiling import predict
from dinocell.finetune.model import DINOCell
from dinocell.finetune.preprocess import prepare, resize
from dinocell.images.image import as_image
from dinocell.runtime.distributed import find_device


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
        if not 1 <= self.stride <= largest:
            raise DinocellError(
                f"stride: expected 1 to {largest} px for this model's tiles of {self.crop_size} px, got {stride}"
            )
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
        """Return the labels of the maps that `maps` returned; thresholds that are given replace the pipeline's."""
        parameters = self.parameters.with_thresholds(
            cells_max=cells_max, cell_fill=cell_fill, probability=probability, flow_error=flow_error
        )
        return decode(maps, parameters)
