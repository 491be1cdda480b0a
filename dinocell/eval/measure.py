"""What mending needs to know of each label: how wide it is, and how high the map stands in it."""

from dataclasses import dataclass

import numpy as np

from dinocell.data_shards.distance import distance_to_boundary
from dinocell.eval.compiled import compiled

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
