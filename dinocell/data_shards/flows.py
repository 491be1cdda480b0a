"""Labels to flows: the other target that fine-tuning can learn (Cellpose: Stringer et al. 2021, Nature Methods 18).

Heat starts at the middle of each cell and spreads inside it; a pixel's flow is the direction in which it is warmer.
Following the flows from every pixel of a cell leads to its middle, see `dinocell.eval.flows`.
"""

import cv2
import numpy as np
from jaxtyping import Float32, Integer
from scipy import ndimage


def labels_to_flows(labels: Integer[np.ndarray, "h w"]) -> Float32[np.ndarray, "3 h w"]:
    """Return for each pixel of a cell a unit vector along rows and columns, and whether there is a cell (0 or 1).

    The source is the cell's pixel nearest to the median of its rows and columns; each of ``2 * (rows + columns)`` of
    its box iterations adds 1 to the source and replaces every value by the mean of its 3 x 3 neighbours in the cell,
    with 0 outside. Flows are the central differences of ``log(1 + heat)``, brought to length 1; 0 where they vanish.
    Each cell's flows follow from its own pixels alone.

    Raises
    ------
    ValueError
        If an id is negative.
    """
    if labels.size and labels.dtype.kind == "i" and labels.min() < 0:
        raise ValueError(f"labels: expected ids of at least 0 (0 is background), got {labels.min()}")
    flows = np.zeros((3, *labels.shape), np.float32)
    if not labels.any():
        return flows
    numbers = labels.astype(np.int32) if labels.max() <= labels.size else _renumbered(labels)
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        if box is None:
            continue
        mask = np.pad(numbers[box] == number, 1)
        rows, columns = _directions(mask)
        inner = mask[1:-1, 1:-1]
        for plane, values in zip(flows, (rows, columns, mask), strict=True):
            plane[box][inner] = values[1:-1, 1:-1][inner]
    return flows


def _renumbered(labels: np.ndarray) -> np.ndarray:
    """Give cells numbers from 1 without gaps: `find_objects` makes an entry for every id up to the largest."""
    ids, numbers = np.unique(labels, return_inverse=True)
    return (numbers.reshape(labels.shape) + int(ids[0] != 0)).astype(np.int32)


def _directions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places = np.argwhere(mask)
    middle = places[((places - np.median(places, axis=0)) ** 2).sum(1).argmin()]
    source = int(middle[0]), int(middle[1])
    inside = mask.astype(np.float64)
    heat, spread = np.zeros(mask.shape, np.float64), np.empty(mask.shape, np.float64)
    for _ in range(2 * (mask.shape[0] - 2 + mask.shape[1] - 2)):
        heat[source] += 1
        cv2.blur(heat, (3, 3), spread, borderType=cv2.BORDER_CONSTANT)
        np.multiply(spread, inside, heat)
    heat = np.log1p(heat)
    rows, columns = np.zeros_like(heat), np.zeros_like(heat)
    rows[1:-1] = heat[2:] - heat[:-2]
    columns[:, 1:-1] = heat[:, 2:] - heat[:, :-2]
    length = np.hypot(rows, columns)
    length[length == 0] = 1
    return rows / length, columns / length
