"""Pictures of what the training sees."""

import numpy as np
from jaxtyping import UInt8

from dinocell.ssl.views import Views

_SHOWN_TILES = 4
_GAP_PX = 2


def draw_views(views: Views) -> UInt8[np.ndarray, "h w"]:
    """Draw the views of the first tiles, a row each: global crops, then local ones; a channel below the other.

    Values from -2.5 to 2.5 deviations go from black to white.
    """
    rows = []
    for tile in range(min(_SHOWN_TILES, views.global_views.shape[1])):
        crops = [view[tile] for kind in views for view in kind]
        for channel in range(crops[0].shape[0]):
            planes = [_grey(crop[channel].float().cpu().numpy()) for crop in crops]
            height = max(len(plane) for plane in planes)
            padded = [np.pad(plane, ((0, height + _GAP_PX - len(plane)), (0, _GAP_PX))) for plane in planes]
            rows.append(np.concatenate(padded, axis=1))
    return np.concatenate(rows)


def _grey(plane: np.ndarray) -> np.ndarray:
    grey: np.ndarray = (np.clip(plane / 5 + 0.5, 0, 1) * 255).astype(np.uint8)
    return grey
