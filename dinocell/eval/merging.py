"""Merge the pieces of one cell: several peaks above the threshold need not be several cells.

Two rules, each for what the other cannot see.

- A long or bent cell is wide in several places, and the map has a peak in each. Between them it falls to the width of
  the waist, while between two cells it falls to their common border, that is to about one pixel. So pixels are
  compared: the map's saddle times the cell's radius.
- Noise makes peaks of its own beside a true one. They rise next to nothing above the saddle.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinocell.eval.measure import CellMeasures

_Array = np.ndarray


def merged_ids(
    labels: _Array, distance: _Array, measures: CellMeasures, *, merge_px: int | float, merge_depth: int | float
) -> _Array:
    """Return for every label the smallest label of the cell that it belongs to, as one array from old id to new.

    Two labels that share a border (4-connected) are one cell if its saddle, the highest value on both of its sides,
    times the smaller of their full radii is more than ``merge_px``; or if the lower of their peaks is less than
    ``merge_depth`` above the saddle. All borders are judged as the flood left them, whatever else merges.
    """
    num_labels = len(measures.peak) - 1
    first, second, saddle = _highest_contacts(labels, distance, num_labels)
    full_radius = measures.full_radius_px
    half_width_px = saddle * np.minimum(full_radius[first], full_radius[second])
    rise = np.minimum(measures.peak[first], measures.peak[second]) - saddle
    same = (half_width_px > merge_px) | (rise < merge_depth)
    size = num_labels + 1
    graph = coo_array((np.ones(same.sum(), np.int8), (first[same], second[same])), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    _, smallest = np.unique(group, return_index=True)
    ids: _Array = smallest[group].astype(np.int32)
    return ids


def _highest_contacts(labels: _Array, distance: _Array, num_labels: int) -> tuple[_Array, _Array, _Array]:
    """Return each pair of neighbouring labels once, the smaller first, with the saddle between them."""
    stride = num_labels + 1
    pairs, heights = [], []
    for one, other in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        meet = (labels[one] != labels[other]) & (labels[one] != 0) & (labels[other] != 0)
        left, right = labels[one][meet], labels[other][meet]
        pairs.append(np.minimum(left, right).astype(np.int64) * stride + np.maximum(left, right))
        heights.append(np.minimum(distance[one][meet], distance[other][meet]))
    pair, height = np.concatenate(pairs), np.concatenate(heights)
    order = np.argsort(pair, kind="stable")
    pair = pair[order]
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    saddle = np.maximum.reduceat(height[order], starts) if starts.size else height
    return *np.divmod(pair[starts], stride), saddle
