"""Give each cell the border back that the fill threshold cut off.

A distance map falls from 1 to 0 over a cell's radius R, so ``distance > cell_fill`` leaves out a ring of cell_fill x R
pixels. On a perfect map growing each label by that much undoes it. A network's map is smoother than a perfect one: at
the cell's boundary it does not reach 0, and a small cell's contour at ``cell_fill`` may lie on the ring's outer side.
For a ramp of slope 1 / R that is smoothed by a Gaussian of sigma s, the value at e pixels inside the boundary is

    (s / R) ramp(e / s),    ramp(z) = z Phi(z) + phi(z)    (Phi, phi: the normal distribution and its density)

and the peak of a round cell falls from 1 by sqrt(pi / 2) s / R, of a long one by sqrt(2 / pi) s / R (the mean distance
from the centre, or from the middle line). The second gives s, the first where the contour lies.
"""

import math

import numpy as np
from scipy.special import ndtr

from dinocell.eval.measure import CellMeasures
from dinocell.runtime.compiled import compiled

_Array = np.ndarray

# Between the two shapes above, 1.25 and 0.80: by trial on the real masks of nuclei and of elongated cells.
_PEAK_LOSS = 1.1
# Cells of fewer pixels across are too coarse to tell blur by.
_SMALLEST_RADIUS_PX = 3
# The boundary runs half a pixel outside the centres of the outermost pixels, which are 1 from the background's.
_BOUNDARY_PX = 0.5

_STEEP = np.linspace(-6, 6, 2401)
_RAMP = _STEEP * ndtr(_STEEP) + np.exp(-(_STEEP**2) / 2) / math.sqrt(2 * math.pi)


def restore_borders(
    labels: _Array, distance: _Array, measures: CellMeasures, *, cell_fill: int | float, blur_px: int | float | None
) -> _Array:
    """Move each label's border from where the map crosses ``cell_fill`` to where the cell ends.

    Outwards into free background only, Euclidean; where two labels could take a pixel the nearer one does, of two as
    near the one with the smaller id. Inwards, where the blur has pushed the contour out of the cell, by a higher cut of
    the map, though never above half of the label's peak.

    Parameters
    ----------
    blur_px
        Sigma of the smoothing that the map has undergone; 0 is a perfect map; None estimates it from the peaks.
    """
    blur = estimate_blur_px(measures, cell_fill) if blur_px is None else blur_px
    radius = measures.radius_px.astype(np.float64) / (1 - cell_fill)
    # The full radius and the ring's width depend on each other; on a perfect map the start is the solution.
    for _ in range(3):
        ring = _contour_px(cell_fill * radius, blur)
        radius = measures.radius_px + np.maximum(ring, 0)
    ring = _contour_px(cell_fill * radius, blur)
    exists = measures.radius_px > 0
    inwards = exists & (ring < _BOUNDARY_PX) & (blur > 0)
    if inwards.any():
        level = np.zeros(len(ring), np.float32)
        boundary_value = blur * np.interp(_BOUNDARY_PX / blur, _STEEP, _RAMP)
        level[inwards] = np.minimum(boundary_value / radius[inwards], measures.peak[inwards] / 2)
        labels = np.where(distance > level[labels], labels, 0)
    growth = np.where(inwards, 0, np.maximum(ring, 0))
    # Rounding must not decide whether a ring of exactly two pixels is two pixels wide.
    grown: _Array = _grow(labels, np.floor(growth**2 + 1e-4).astype(np.int64))
    return grown


def estimate_blur_px(measures: CellMeasures, cell_fill: int | float) -> float:
    """Return how far the map is smoothed, as the sigma in pixels that lowers the median cell's peak as much."""
    wide = measures.radius_px > _SMALLEST_RADIUS_PX
    if not wide.any():
        return 0.0
    missing = np.maximum(1 - measures.middle[wide], 0)
    return float(np.median(missing * measures.radius_px[wide] / (1 - cell_fill)) / _PEAK_LOSS)


def _contour_px(height_px: _Array, blur_px: int | float) -> _Array:
    """Return how far inside the boundary a smoothed ramp of slope 1 has this height."""
    if blur_px == 0:
        return height_px
    scaled = height_px / blur_px
    # Beyond the table the smoothing no longer shows.
    inside: _Array = blur_px * np.where(scaled < _RAMP[-1], np.interp(scaled, _RAMP, _STEEP), scaled)
    return inside


@compiled
def _grow(labels: _Array, squared_reach: _Array) -> _Array:
    """Give each free pixel to the nearest label within that label's reach.

    The pixel of a label that is nearest to a free one has no neighbour of its own label on that side, left or right and
    above or below: from a straight edge only a line of pixels has to be looked at, not a disc.
    """
    height, width = labels.shape
    grown = labels.copy()
    nearest = np.full(labels.shape, np.iinfo(np.int32).max, np.int32)
    for row in range(height):
        for column in range(width):
            label = labels[row, column]
            reach = squared_reach[label]
            if label == 0 or reach == 0:
                continue
            up = row > 0 and labels[row - 1, column] != label
            down = row < height - 1 and labels[row + 1, column] != label
            left = column > 0 and labels[row, column - 1] != label
            right = column < width - 1 and labels[row, column + 1] != label
            if not (up or down or left or right):
                continue
            side = int(math.sqrt(reach))
            for target_row in range(max(row - side * up, 0), min(row + side * down, height - 1) + 1):
                for target_column in range(max(column - side * left, 0), min(column + side * right, width - 1) + 1):
                    squared = (target_row - row) ** 2 + (target_column - column) ** 2
                    if labels[target_row, target_column] != 0 or squared > reach:
                        continue
                    best = nearest[target_row, target_column]
                    if squared < best or (squared == best and label < grown[target_row, target_column]):
                        nearest[target_row, target_column] = squared
                        grown[target_row, target_column] = label
    return grown
