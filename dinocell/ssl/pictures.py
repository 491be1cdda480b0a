"""Pictures of what the training sees, and of what the teacher makes of it."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dinocell.models.vit import VisionTransformer
from dinocell.ssl.views import Views

_SHOWN_TILES = 4
_GAP_PX = 2


def draw_views(views: Views, tiles: int = _SHOWN_TILES) -> UInt8[np.ndarray, "h w"]:
    """Draw the views of the first tiles, a row each: global crops, then local ones; a channel below the other.

    Values from -2.5 to 2.5 deviations go from black to white.
    """
    rows = []
    for tile in range(min(tiles, views.global_views.shape[1])):
        crops = [view[tile] for kind in views for view in kind]
        for channel in range(crops[0].shape[0]):
            planes = [grey(crop[channel]) for crop in crops]
            height = max(len(plane) for plane in planes)
            padded = [np.pad(plane, ((0, height + _GAP_PX - len(plane)), (0, _GAP_PX))) for plane in planes]
            rows.append(np.concatenate(padded, axis=1))
    return np.concatenate(rows)


@torch.no_grad()
def draw_features(teacher: VisionTransformer, views: Views) -> dict[str, UInt8[np.ndarray, "h w *rgb"]]:
    """Draw what a teacher makes of the first tiles, a column each.

    ``patch_pca``: the first two global views of each tile, and below each its patch features' three main components as
    colours, one basis for all, so that what is alike has one colour, in every view and tile. ``cls_attention``: the
    first view, and where the CLS token of the last block looks, mean over heads, from none (black) to most (white).
    """
    shown = [view[:_SHOWN_TILES] for view in views.global_views[:2]]
    patches = torch.stack([teacher(view).patches.float() for view in shown])
    grid = teacher.grid(shown[0])
    colours = principal_colours(patches.flatten(0, 2)).unflatten(0, patches.shape[:3])
    size = shown[0].shape[-1]
    rows = []
    for view, of_view in zip(shown, colours, strict=True):
        rows.append(_row([np.repeat(grey(image[0])[..., None], 3, axis=2) for image in view]))
        rows.append(_row([_enlarged((each.unflatten(0, grid) * 255).byte(), size) for each in of_view]))
    attention = teacher.cls_attention(shown[0]).float().mean(1)
    attention = attention / attention.amax((1, 2), keepdim=True).clamp_min(1e-12)
    seen = _row([grey(image[0]) for image in shown[0]])
    looked = _row([_enlarged((each * 255).byte(), size) for each in attention])
    return {"patch_pca": np.concatenate(rows), "cls_attention": np.concatenate((seen, looked))}


def principal_colours(features: Float[Tensor, "n d"]) -> Float[Tensor, "n 3"]:
    """Return the three main components of features, each stretched from its 1st to its 99th percentile to [0, 1]."""
    centred = features.float() - features.float().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    components = centred @ vectors[:, -3:].flip(1)
    low, high = (torch.quantile(components[:100_000], q, dim=0) for q in (0.01, 0.99))
    return torch.clamp((components - low) / (high - low).clamp_min(1e-12), 0, 1)


def _row(pictures: list[np.ndarray]) -> np.ndarray:
    padding = ((0, _GAP_PX), (0, _GAP_PX))
    return np.concatenate([np.pad(each, (*padding, (0, 0))[: each.ndim]) for each in pictures], axis=1)


def _enlarged(small: Tensor, size: int) -> np.ndarray:
    factor = size // small.shape[0]
    enlarged: np.ndarray = small.cpu().numpy().repeat(factor, axis=0).repeat(factor, axis=1)
    return enlarged


def grey(plane: Tensor) -> np.ndarray:
    """Draw a standardised channel, from -2.5 deviations (0) to 2.5 (255)."""
    drawn: np.ndarray = (np.clip(plane.float().cpu().numpy() / 5 + 0.5, 0, 1) * 255).astype(np.uint8)
    return drawn
