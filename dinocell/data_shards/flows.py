"""Labels to flows: the other target that fine-tuning can learn (Cellpose: Stringer et al. 2021, Nature Methods 18).

Heat starts at the middle of each cell and spreads inside it; a pixel's flow is the direction in which it is warmer.
Following the flows from every pixel of a cell leads to its middle, see `dinocell.eval.flows`.
"""

import numpy as np
from jaxtyping import Float32, Integer

from dinocell.data_shards.heat import write_flows


def labels_to_flows(labels: Integer[np.ndarray, "h w"]) -> Float32[np.ndarray, "3 h w"]:
    """Return for each pixel of a cell a unit vector along rows and columns, and whether there is a cell (0 or 1).

    The source is the cell's pixel nearest to the median of its rows and columns; each of ``2 * (rows + columns)`` of
    its box iterations adds 1 to the source and replaces every value by the mean of its 3 x 3 neighbours in the cell,
    with 0 outside. Flows are the central differences of ``log(1 + heat)``, brought to length 1; 0 where they vanish,
    and in pieces of a cell that do not touch the source's. Each cell's flows follow from its own pixels alone.

    Raises
    ------
    ValueError
        If an id is negative.
    """
    if labels.size and labels.dtype.kind == "i" and labels.min() < 0:
        raise ValueError(f"labels: expected ids of at least 0 (0 is background), got {labels.min()}")
    flows = np.zeros((3, *labels.shape), np.float32)
    if labels.any():
        numbers = labels.astype(np.int32) if labels.max() <= labels.size else _renumbered(labels)
        write_flows(np.ascontiguousarray(numbers), int(numbers.max()), flows)
    return flows


def _renumbered(labels: np.ndarray) -> np.ndarray:
    """Give cells numbers from 1 without gaps: the kernel makes an entry for every id up to the largest."""
    ids, numbers = np.unique(labels, return_inverse=True)
    return (numbers.reshape(labels.shape) + int(ids[0] != 0)).astype(np.int32)
