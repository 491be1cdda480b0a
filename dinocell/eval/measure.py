"""What mending needs to know of each label: how wide it is, and how high the map stands in it."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dinocell.data_shards.distance import distance_to_boundary
from dinocell.runtime.compiled import compiled

_Array = np.ndarray


@dataclass(frozen=True, eq=False)
class CellMeasures:
    """One entry a label; entry 0 is the background's and 0.

    Attributes
    ----------
    radius_px
        Of the largest disc inside the label, to half a pixel.
    middle
        The map's value at that disc's centre.
    peak
        The map's highest value in the label.
    """

    radius_px: _Array
    middle: _Array
    peak: _Array

    @property
    def full_radius_px(self) -> _Array:
        """The radius at which the map would be 1: it falls by 1 / this with every pixel towards the cell's boundary."""
        radius_px: _Array = self.radius_px / np.maximum(self.middle, np.float32(1e-3))
        return radius_px


def measure_cells(labels: _Array, distance: _Array, num_labels: int) -> CellMeasures:
    """Measure labels 1 to ``num_labels``; those that are missing have 0 everywhere.

    A label that fills the whole image has no boundary: it is given half the image's longer side as its radius.
    """
    depth = distance_to_boundary(labels)
    if np.isinf(depth[0, 0]):
        depth.fill(max(depth.shape) / 2)
    return CellMeasures(*_measure(labels, distance, depth, num_labels))


def measure_some(labels: _Array, distance: _Array, which: _Array) -> CellMeasures:
    """Measure the labels where ``which``, one entry a label, is True; the others have 0 everywhere.

    The same numbers as `measure_cells`: the pixel nearest to a label's inside lies in its bounding box or beside it.
    """
    boxes = ndimage.find_objects(labels, max_label=len(which) - 1)
    wanted = [(label, boxes[label - 1]) for label in np.flatnonzero(which).tolist() if label and boxes[label - 1]]
    if sum((rows.stop - rows.start) * (columns.stop - columns.start) for _, (rows, columns) in wanted) > labels.size:
        return measure_cells(np.where(which[labels], labels, 0), distance, len(which) - 1)
    found = CellMeasures(*(np.zeros(len(which), np.float32) for _ in range(3)))
    for label, box in wanted:
        wider = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
        own = np.ascontiguousarray(labels[wider] == label, np.int32)
        depth = distance_to_boundary(own)
        if np.isinf(depth[0, 0]):
            depth.fill(max(labels.shape) / 2)
        radius, middle, peak = _measure(own, distance[wider], depth, 1)
        found.radius_px[label], found.middle[label], found.peak[label] = radius[1], middle[1], peak[1]
    return found


@compiled
def _measure(labels: _Array, distance: _Array, depth: _Array, num_labels: int) -> tuple[_Array, _Array, _Array]:
    radius = np.zeros(num_labels + 1, np.float32)
    middle = np.zeros(num_labels + 1, np.float32)
    peak = np.zeros(num_labels + 1, np.float32)
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            label = labels[row, column]
            if label > 0:
                value, deep = distance[row, column], depth[row, column]
                peak[label] = max(peak[label], value)
                if deep > radius[label] or (deep == radius[label] and value > middle[label]):
                    radius[label], middle[label] = deep, value
    return radius, middle, peak
