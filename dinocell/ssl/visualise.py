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
from dinocell.ssl.heads import ReconstructionHead
from dinocell.ssl.losses import to_patches
from dinocell.ssl.masking import PatchMasks
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
def draw_features(
    teacher: VisionTransformer, views: Views, initial: VisionTransformer | None = None
) -> dict[str, UInt8[np.ndarray, "h w *rgb"]]:
    """Draw the teacher's features of the first tiles, one column each.

    ``patch_pca``: the first two global views of each tile, and below each the first three principal components of its
    patch features as colours, then those of the network ``initial``; each network has one basis for all views and
    tiles, so equal colours in its rows mean similar features.
    ``cls_attention``: the first view, and the attention of the CLS token in the last block, mean over heads, from 0
    (black) to the maximum (white).
    """
    shown = [view[:_SHOWN_TILES] for view in views.global_views[:2]]
    grid, size = teacher.grid(shown[0]), shown[0].shape[-1]
    colours = []
    for network in (teacher,) if initial is None else (teacher, initial):
        patches = torch.stack([network(view).patches.float() for view in shown])
        colours.append(principal_colours(patches.flatten(0, 2)).unflatten(0, patches.shape[:3]))
    rows = []
    for index, view in enumerate(shown):
        rows.append(_row([np.repeat(to_grey(image[0])[..., None], 3, axis=2) for image in view]))
        tiles = [(network[index].unflatten(1, grid) * 255).byte() for network in colours]
        rows += [_row([_enlarged(tile, size) for tile in of_network]) for of_network in tiles]
    attention = teacher.cls_attention(shown[0]).float().mean(1)
    attention = attention / attention.amax((1, 2), keepdim=True).clamp_min(1e-12)
    images = _row([to_grey(image[0]) for image in shown[0]])
    attended = _row([_enlarged((tile * 255).byte(), size) for tile in attention])
    return {"patch_pca": np.concatenate(rows), "cls_attention": np.concatenate((images, attended))}


@torch.no_grad()
def draw_reconstruction(
    student: VisionTransformer,
    head: ReconstructionHead,
    views: Views,
    masks: PatchMasks,
    *,
    patch_normalised: bool = False,
) -> dict[str, UInt8[np.ndarray, "h w"]]:
    """Draw ``reconstruction``, the first masked crops, one column each; {} if no crop has a mask.

    From top to bottom: the crop; without its masked patches (grey); the target with predictions in place of the masked
    patches; the target. ``patch_normalised`` predictions get the mean and the standard deviation of the target.
    """
    shown = masks.masks.flatten(1).any(1).nonzero()[:_SHOWN_TILES, 0]
    if not len(shown):
        return {}
    size, masked = student.config.patch_size, masks.masks[shown]
    images = views.global_views.flatten(0, 1)[shown]
    targets = images if views.target_views is None else views.target_views.flatten(0, 1)[shown]
    patches = to_patches(targets.float(), size)
    predicted = head(student(images, masked.flatten(1)).patches.flatten(0, 1)).float().view_as(patches)
    if patch_normalised:
        predicted = predicted * patches.std((2, 3), correction=0, keepdim=True) + patches.mean((2, 3), keepdim=True)
    merged = torch.where(masked.flatten()[:, None, None], predicted[:, 0], patches[:, 0])
    merged = merged.unflatten(0, masked.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    is_masked = masked.repeat_interleave(size, 1).repeat_interleave(size, 2)
    rows = (images[:, 0], images[:, 0].masked_fill(is_masked, 0), merged, targets[:, 0])
    return {"reconstruction": np.concatenate([_row([to_grey(plane) for plane in row]) for row in rows])}


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

    Raises DinocellError if the shards do not fit the recipe, or the image cannot be written.
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
