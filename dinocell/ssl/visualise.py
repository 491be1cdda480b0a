"""Images of the training views, and of the teacher's features."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dinocell.data_shards.inspect import caption, side_by_side
from dinocell.data_shards.sample import SampleInfo
from dinocell.images.write import write_png
from dinocell.models.vit import VisionTransformer
from dinocell.runtime.distributed import World
from dinocell.ssl.config import PretrainConfig, ViewsConfig
from dinocell.ssl.data import open_shards
from dinocell.ssl.view_plan import ViewPlan
from dinocell.ssl.views import Views, make_views

_SHOWN_TILES = 4
_GAP_PX = 2


def draw_views(views: Views) -> UInt8[np.ndarray, "h w"]:
    """Draw the views of the first tiles, one row each: global crops, then local ones; channels below each other.

    Values from -2.5 to 2.5 standard deviations are drawn from black to white.
    """
    rows = []
    for tile in range(min(_SHOWN_TILES, views.global_views.shape[1])):
        crops = [view[tile] for kind in views[:2] for view in kind]
        for channel in range(crops[0].shape[0]):
            planes = [to_grey(crop[channel]) for crop in crops]
            height = max(len(plane) for plane in planes)
            padded = [np.pad(plane, ((0, height + _GAP_PX - len(plane)), (0, _GAP_PX))) for plane in planes]
            rows.append(np.concatenate(padded, axis=1))
    return np.concatenate(rows)


@torch.no_grad()
def draw_features(teacher: VisionTransformer, views: Views) -> dict[str, UInt8[np.ndarray, "h w *rgb"]]:
    """Draw the teacher's features of the first tiles, one column each.

    ``patch_pca``: the first two global views of each tile, and below each the first three principal components of its
    patch features as colours; one basis for all, so equal colours mean similar features in every view and tile.
    ``cls_attention``: the first view, and the attention of the CLS token in the last block, mean over heads, from 0
    (black) to the maximum (white).
    """
    shown = [view[:_SHOWN_TILES] for view in views.global_views[:2]]
    patches = torch.stack([teacher(view).patches.float() for view in shown])
    grid = teacher.grid(shown[0])
    colours = principal_colours(patches.flatten(0, 2)).unflatten(0, patches.shape[:3])
    size = shown[0].shape[-1]
    rows = []
    for view, view_colours in zip(shown, colours, strict=True):
        rows.append(_row([np.repeat(to_grey(image[0])[..., None], 3, axis=2) for image in view]))
        rows.append(_row([_enlarged((tile.unflatten(0, grid) * 255).byte(), size) for tile in view_colours]))
    attention = teacher.cls_attention(shown[0]).float().mean(1)
    attention = attention / attention.amax((1, 2), keepdim=True).clamp_min(1e-12)
    images = _row([to_grey(image[0]) for image in shown[0]])
    attended = _row([_enlarged((tile * 255).byte(), size) for tile in attention])
    return {"patch_pca": np.concatenate(rows), "cls_attention": np.concatenate((images, attended))}


def principal_colours(features: Float[Tensor, "n d"]) -> Float[Tensor, "n 3"]:
    """Return the first three principal components, each scaled from its 1st to its 99th percentile to [0, 1]."""
    centred = features.float() - features.float().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    components = centred @ vectors[:, -3:].flip(1)
    low, high = (torch.quantile(components[:100_000], q, dim=0) for q in (0.01, 0.99))
    return torch.clamp((components - low) / (high - low).clamp_min(1e-12), 0, 1)


def _row(images: Sequence[UInt8[np.ndarray, "s s *rgb"]]) -> UInt8[np.ndarray, "h w *rgb"]:
    padding = ((0, _GAP_PX), (0, _GAP_PX))
    return np.concatenate([np.pad(image, (*padding, (0, 0))[: image.ndim]) for image in images], axis=1)


def _enlarged(small: UInt8[Tensor, "h w *rgb"], size: int) -> UInt8[np.ndarray, "s s *rgb"]:
    factor = size // small.shape[0]
    return small.cpu().numpy().repeat(factor, axis=0).repeat(factor, axis=1)


def to_grey(plane: Float[Tensor, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Draw a standardised channel, from -2.5 standard deviations (0) to 2.5 (255)."""
    return (np.clip(plane.float().cpu().numpy() / 5 + 0.5, 0, 1) * 255).astype(np.uint8)


def preview_views(config: PretrainConfig, output: Path, *, num_samples: int = 8) -> None:
    """Write a PNG with the views of the first samples of a run, one row each, before anything is trained on them.

    The caption of each crop is its channel, or ``mean``; for the policy ``stack`` channels are below each other. From
    -2.5 standard deviations (black) to 2.5 (white).

    Raises
    ------
    DinocellError
        If the shards do not fit the recipe, or the image cannot be written.
    """
    stream = open_shards(config, World())
    rows: list[UInt8[np.ndarray, "h w"]] = []
    for batch in islice(stream, -(-num_samples // stream.samples.batch_size)):
        views = make_views(batch.tiles, batch.plans, config.views, device=torch.device("cpu"))
        for index, (info, plan) in enumerate(zip(batch.tiles.infos, batch.plans, strict=True)):
            if len(rows) == 2 * num_samples:
                break
            crops = [view[index] for kind in views[:2] for view in kind]
            names = [_channel(plan, view, info, config.views) for view in range(len(crops))]
            columns = [_column(name, crop) for name, crop in zip(names, crops, strict=True)]
            height = max(len(column) for column in columns)
            row = side_by_side([np.pad(column, ((0, height - len(column)), (0, 0))) for column in columns])
            rows += [caption(info.field, [row])[:, : row.shape[1]], row]
    width = max(row.shape[1] for row in rows)
    write_png(output, np.concatenate([np.pad(row, ((0, 4), (0, width - row.shape[1]))) for row in rows]))


def _column(name: str, crop: Float[Tensor, "c s s"]) -> UInt8[np.ndarray, "h w"]:
    planes = [to_grey(channel) for channel in crop]
    return np.concatenate([caption(name, planes[:1])[:, : planes[0].shape[1]], *planes])


def _channel(plan: ViewPlan, view: int, info: SampleInfo, config: ViewsConfig) -> str:
    if config.policy == "stack":
        return "all"
    used = np.flatnonzero(plan.mixing[view][0])
    return info.channels[int(used[0])] if len(used) == 1 else "mean"
