"""Error images of the worst segmentations: false cells red, missed cells blue, outlines of correct cells green."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer, Real, UInt8
from skimage.segmentation import find_boundaries

from dinocell.eval.metrics.matching import find_matches
from dinocell.eval.metrics.overlaps import ContingencyTable
from dinocell.eval.metrics.summary import ImageScores, Scores
from dinocell.images.image import as_image, percentile_range, to_uint8
from dinocell.labelled.dataset import LabelledImage

FALSE, MISSED, CORRECT = (235, 40, 40), (50, 110, 255), (90, 210, 90)

_PERCENTILES = (0.5, 99.8)
_OPACITY = 0.4
# A report with six images stays below a few MB.
_MAX_SIDE_PX = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorImage:
    """An image that a method segmented badly, with its errors drawn by `draw_errors`."""

    dataset: str
    image: str
    method: str
    scores: Scores
    image_rgb: UInt8[np.ndarray, "3 h w"]


class WorstImages:
    """The ``max_images`` images of the lowest F1 so far, the lowest first, without perfect and empty ones."""

    def __init__(self, max_images: int) -> None:
        self.errors: list[ErrorImage] = []
        self._max_images = max_images

    def add(
        self, row: ImageScores, image: LabelledImage, labels: Integer[np.ndarray, "h w"], table: ContingencyTable
    ) -> None:
        """Add an image if it is among the worst; only then it is drawn."""
        score = row.scores.f1
        is_full = len(self.errors) >= self._max_images
        if math.isnan(score) or score == 1 or (is_full and not (self.errors and score < self.errors[-1].scores.f1)):
            return
        plane = as_image(np.asarray(image.pixels)).plane()
        drawn = draw_errors(plane, np.asarray(image.labels), labels, table)
        error = ErrorImage(dataset=row.dataset, image=row.image, method=row.method, scores=row.scores, image_rgb=drawn)
        self.errors = sorted([*self.errors, error], key=lambda error: error.scores.f1)[: self._max_images]


def draw_errors(
    image: Real[np.ndarray, "h w"],
    reference: Integer[np.ndarray, "h w"],
    predicted: Integer[np.ndarray, "h w"],
    table: ContingencyTable,
) -> UInt8[np.ndarray, "3 rows columns"]:
    """Draw the cells that are not matched at an IoU of 0.5 over the image; false and missed cells may overlap.

    Parameters
    ----------
    table
        Contingency table of the two label images.

    Returns
    -------
    RGB. Images with a side of more than 1,000 px are subsampled.
    """
    pairs = find_matches(table, 0.5)
    correct_ids = table.predicted_ids[table.predicted_index[pairs]]
    matched_ids = table.reference_ids[table.reference_index[pairs]]
    step = -(-max(image.shape) // _MAX_SIDE_PX)
    image, reference, predicted = (
        np.ascontiguousarray(plane[::step, ::step]) for plane in (image, reference, predicted)
    )
    low, high = percentile_range(image, *_PERCENTILES)
    rgb = np.repeat(to_uint8(image, low, high)[None], 3, axis=0)
    is_correct = np.isin(predicted, correct_ids)
    is_false = (predicted != 0) & ~is_correct
    is_missed = (reference != 0) & ~np.isin(reference, matched_ids)
    for mask, colour in ((is_false, FALSE), (is_missed, MISSED)):
        _tint(rgb, mask, colour)
    for labels, mask, colour in (
        (predicted, is_correct, CORRECT),
        (predicted, is_false, FALSE),
        (reference, is_missed, MISSED),
    ):
        edges = find_boundaries(np.where(mask, labels, 0), mode="inner")  # type: ignore[no-untyped-call]
        rgb[:, edges] = np.array(colour, np.uint8)[:, None]
    return rgb


def _tint(rgb: UInt8[np.ndarray, "3 h w"], mask: Bool[np.ndarray, "h w"], colour: tuple[int, int, int]) -> None:
    """Blend a colour into the pixels of a mask, in place."""
    tinted = (1 - _OPACITY) * rgb[:, mask] + _OPACITY * np.array(colour, np.float32)[:, None]
    rgb[:, mask] = tinted.round().astype(np.uint8)
