"""Pictures of what went wrong: false cells red, missed cells blue, the others' outlines green; of the worst images."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer, Real, UInt8
from skimage.segmentation import find_boundaries

from dinocell.eval.metrics.matching import find_matches
from dinocell.eval.metrics.overlaps import ContingencyTable
from dinocell.eval.metrics.summary import ImageScores, Scores
from dinocell.images.image import percentile_range, picture_of, to_uint8
from dinocell.labelled.dataset import LabelledImage

FALSE, MISSED, RIGHT = (235, 40, 40), (50, 110, 255), (90, 210, 90)

_PERCENTILES = (0.5, 99.8)
_OPACITY = 0.4
# A report of six pictures stays a few MB.
_LARGEST_PX = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorImage:
    """A picture of an image on which a method did badly, see `draw_errors`."""

    dataset: str
    image: str
    method: str
    scores: Scores
    picture: UInt8[np.ndarray, "3 h w"]


class WorstImages:
    """The mistakes on the ``number`` images of the lowest F1 so far, the lowest first.

    Images without a mistake, or without a cell, are never among them.
    """

    def __init__(self, number: int) -> None:
        self.mistakes: list[ErrorImage] = []
        self._number = number

    def add(
        self, row: ImageScores, image: LabelledImage, labels: Integer[np.ndarray, "h w"], table: ContingencyTable
    ) -> None:
        """Take an image in if it belongs here: only then its picture is drawn."""
        score = row.scores.f1
        is_worse = len(self.mistakes) < self._number or (self._number > 0 and score < self.mistakes[-1].scores.f1)
        if math.isnan(score) or score == 1 or not is_worse:
            return
        plane = picture_of(np.asarray(image.pixels)).plane()
        picture = draw_errors(plane, np.asarray(image.labels), labels, table)
        mistakes = ErrorImage(
            dataset=row.dataset, image=row.image, method=row.method, scores=row.scores, picture=picture
        )
        self.mistakes = sorted([*self.mistakes, mistakes], key=lambda each: each.scores.f1)[: self._number]


def draw_errors(
    image: Real[np.ndarray, "h w"],
    reference: Integer[np.ndarray, "h w"],
    predicted: Integer[np.ndarray, "h w"],
    table: ContingencyTable,
) -> UInt8[np.ndarray, "3 rows columns"]:
    """Draw the cells that are not matched at an IoU of 0.5 over the image; where a false cell meets a missed one, both.

    Parameters
    ----------
    table
        Overlaps of the two label images.

    Returns
    -------
    RGB. Images of more than 1,000 px a side are thinned to every second (third...) pixel.
    """
    pairs = find_matches(table, 0.5)
    right_ids = table.predicted_ids[table.predicted_index[pairs]]
    matched_ids = table.reference_ids[table.reference_index[pairs]]
    step = -(-max(image.shape) // _LARGEST_PX)
    image, reference, predicted = (
        np.ascontiguousarray(plane[::step, ::step]) for plane in (image, reference, predicted)
    )
    low, high = percentile_range(image, *_PERCENTILES)
    picture = np.repeat(to_uint8(image, low, high)[None], 3, axis=0)
    is_right = np.isin(predicted, right_ids)
    is_false = (predicted != 0) & ~is_right
    is_missed = (reference != 0) & ~np.isin(reference, matched_ids)
    for mask, colour in ((is_false, FALSE), (is_missed, MISSED)):
        _tint(picture, mask, colour)
    for labels, mask, colour in (
        (predicted, is_right, RIGHT),
        (predicted, is_false, FALSE),
        (reference, is_missed, MISSED),
    ):
        edges = find_boundaries(np.where(mask, labels, 0), mode="inner")  # type: ignore[no-untyped-call]
        picture[:, edges] = np.array(colour, np.uint8)[:, None]
    return picture


def _tint(picture: UInt8[np.ndarray, "3 h w"], mask: Bool[np.ndarray, "h w"], colour: tuple[int, int, int]) -> None:
    """Lay a colour over the pixels of a mask, in place."""
    tinted = (1 - _OPACITY) * picture[:, mask] + _OPACITY * np.array(colour, np.float32)[:, None]
    picture[:, mask] = tinted.round().astype(np.uint8)
