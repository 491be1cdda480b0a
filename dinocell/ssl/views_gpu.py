"""Views of all tiles at once: a few large operations on the planes that they need, which keeps a GPU busy."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from dinocell.data_shards.read import Batch
from dinocell.ssl.view_plan import LEAST_DIFFERENCE, Scales, ViewPlan, ViewsConfig


def all_tiles_at_once(
    batch: Batch, plans: Sequence[ViewPlan], scales: Sequence[Scales], config: ViewsConfig
) -> list[Float[Tensor, "v b k s s"]]:
    """Return the crops of all tiles, the global and the local views, turned but not yet standardised.

    Regions are cut to the size of the largest box; what lies outside a box gets no weight. Each is resampled by a
    matrix for rows and one for columns, which also reverse it, and mixed last: that is linear, too.
    """
    device, alike = batch.storage.device, _alike(batch)
    tiles = [_stacked_tiles(batch, members) for members in alike]
    order = np.argsort([number for members in alike for number in members])
    made = []
    for views, size in config.kinds:
        parts = []
        for members, some in zip(alike, tiles, strict=True):
            channels = [list(batch.channels[n]) for n in members]
            planes = _needed_planes([plans[n] for n in members], [scales[n] for n in members], channels, views, config)
            parts.append(_resampled(some, planes, size, device).unflatten(0, (len(views), len(members))))
        made.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)[:, _on(device, order)])
    return made


def _alike(batch: Batch) -> list[list[int]]:
    """Return the numbers of the tiles of one size, one type and one number of channels."""
    groups: dict[tuple[int, int, str, int], list[int]] = {}
    for number, info in enumerate(batch.infos):
        groups.setdefault((info.height, info.width, info.dtype, len(batch.channels[number])), []).append(number)
    return list(groups.values())


def _stacked_tiles(batch: Batch, members: Sequence[int]) -> Float[Tensor, "b c h w"]:
    """Return tiles of one size and type in float32; stacked as bytes, which every type is."""
    first = batch.tile(members[0])
    length = first.numel() * first.element_size()
    rows = torch.stack([batch.storage[batch.starts[n] : batch.starts[n] + length] for n in members])
    return rows.view(first.dtype).view(len(members), *first.shape).float()


class _Planes(NamedTuple):
    """The ``p`` planes (a channel of a tile) that ``v`` views of ``b`` tiles need, and what is done to each.

    They belong to ``v b`` crops, view after view.
    """

    crop: np.ndarray  # (p) ascending
    channel: np.ndarray  # (p) the channel's place in the tile
    boxes: np.ndarray  # (p 4)
    factor: np.ndarray  # (p)
    offset: np.ndarray  # (p)
    contrast: np.ndarray  # (p)
    protein: np.ndarray  # (p) contrast over the maximum; negative: none
    weight: np.ndarray  # (p k)
    mirrored: np.ndarray  # (v b)
    turned: np.ndarray  # (v b)


def _needed_planes(
    plans: Sequence[ViewPlan],
    scales: Sequence[Scales],
    channels: Sequence[list[int]],
    views: range,
    config: ViewsConfig,
) -> _Planes:
    """Return the planes of tiles of which ``channels`` are here."""

    def of_crops(arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Return what the plans say, (v b ...) in one row."""
        chosen: np.ndarray = np.stack([each[views.start : views.stop] for each in arrays], axis=1)
        return chosen.reshape(-1, *chosen.shape[2:])

    mixing = of_crops(plan.mixing[:, :, own] for plan, own in zip(plans, channels, strict=True))
    crop, channel = np.nonzero((mixing != 0).any(axis=1))
    protein = np.full(len(crop), -1, np.float32)
    if config.policy == "stack" and config.protein_channel in config.channels:
        is_protein = mixing[crop, config.channels.index(config.protein_channel), channel] != 0
        protein = np.where(is_protein, of_crops(plan.protein for plan in plans)[crop], protein)
    return _Planes(
        crop=crop,
        channel=channel,
        boxes=of_crops(plan.boxes for plan in plans)[crop],
        factor=of_crops(scale.factor[:, own] for scale, own in zip(scales, channels, strict=True))[crop, channel],
        offset=of_crops(scale.offset[:, own] for scale, own in zip(scales, channels, strict=True))[crop, channel],
        contrast=of_crops(plan.contrast[:, own] for plan, own in zip(plans, channels, strict=True))[crop, channel],
        protein=protein,
        weight=mixing[crop, :, channel],
        mirrored=of_crops(plan.mirrored for plan in plans),
        turned=of_crops(plan.turned for plan in plans),
    )


def _resampled(
    tiles: Float[Tensor, "b c h w"], planes: _Planes, size: int, device: torch.device
) -> Float[Tensor, "vb k s s"]:
    """Return the crops, turned but not yet standardised."""
    num_tiles, _, height, width = tiles.shape
    num_crops, num_outputs = len(planes.turned), planes.weight.shape[1]
    if not len(planes.crop):
        return tiles.new_zeros(num_crops, num_outputs, size, size)
    numbers = [planes.crop % num_tiles, planes.channel, *planes.boxes.T]
    owner, channel, top, left, rows, columns = _on(device, np.stack(numbers).astype(np.int64))
    factor, offset, contrast = _on(device, np.stack([planes.factor, planes.offset, planes.contrast]))[..., None, None]

    # Outside its box a region repeats the tile's last row or column: it must be a number, and counts for nothing.
    row, column = (torch.arange(int(longest), device=device) for longest in planes.boxes[:, 2:].max(axis=0))
    from_row, from_column = (top[:, None] + row).clamp_(max=height - 1), (left[:, None] + column).clamp_(max=width - 1)
    unit = tiles[owner[:, None, None], channel[:, None, None], from_row[:, :, None], from_column[:, None, :]]
    in_row, in_column = (row < rows[:, None]).float(), (column < columns[:, None]).float()
    torch.addcmul(offset, unit, factor, out=unit).clamp_(0, 1)
    sums = torch.bmm(unit, in_column[:, :, None])[:, :, 0]
    mean = ((sums * in_row).sum(1) / (rows * columns))[:, None, None]
    torch.addcmul(mean * (1 - contrast), unit, contrast, out=unit).clamp_(0, 1)
    special = np.flatnonzero(planes.protein >= 0)
    if len(special):
        which, contrasts = _on(device, special), _on(device, planes.protein[special])
        some = unit[which]
        largest = (some * in_row[which][:, :, None] * in_column[which][:, None, :]).amax((1, 2))
        unit[which] = (some * (contrasts / largest.clamp_min(LEAST_DIFFERENCE))[:, None, None]).clamp_(0, 1)

    mirrored, turned = planes.mirrored[planes.crop], planes.turned[planes.crop]
    lengths = planes.boxes[:, 2], planes.boxes[:, 3]
    # A turn by one right angle is to reverse the columns, then to exchange them with the rows; and so on.
    backwards = mirrored ^ (turned >= 2), (turned == 1) | (turned == 2)
    by_row, by_column = (
        resampling_matrix(np.zeros_like(length), length, len(index), size, device, backwards=back)
        for length, index, back in zip(lengths, (row, column), backwards, strict=True)
    )
    crops = torch.bmm(torch.bmm(by_row, unit), by_column.transpose(1, 2))

    # A crop's planes lie one after the other, at most m of them: to be gathered, not scattered, whose sums are in no
    # fixed order on a GPU.
    counts = np.bincount(planes.crop, minlength=num_crops)
    place = np.arange(len(planes.crop)) - (np.cumsum(counts) - counts)[planes.crop]
    index = np.zeros((num_crops, counts.max()), np.int64)
    weight = np.zeros((num_crops, num_outputs, counts.max()), np.float32)
    index[planes.crop, place], weight[planes.crop, :, place] = np.arange(len(planes.crop)), planes.weight
    mixed = torch.einsum("nkm,nmst->nkst", _on(device, weight), crops[_on(device, index)])
    exchanged = _on(device, planes.turned % 2 == 1)[:, None, None, None]
    return torch.where(exchanged, mixed.transpose(2, 3), mixed)


def resampling_matrix(
    starts: Shaped[np.ndarray, " b"],
    lengths: Shaped[np.ndarray, " b"],
    side: int,
    size: int,
    device: torch.device,
    *,
    backwards: Bool[np.ndarray, " b"] | None = None,
) -> Float[Tensor, "b s h"]:
    """Return the weights that scale ``lengths`` pixels from ``starts`` on, of ``side``, to ``size``.

    Antialiased bilinear, as ``torch.nn.functional.interpolate`` has it: a triangle as wide as two output pixels (at
    least two input pixels), cut off at the crop's ends, with weights that add up to 1. Output pixels may come out
    ``backwards``.
    """
    start, length = _on(device, np.stack([starts, lengths]).astype(np.float32))[:, :, None, None]
    scale = length / size
    place = torch.arange(size, device=device, dtype=torch.float32)[:, None]
    if backwards is not None:
        place = torch.where(_on(device, backwards)[:, None, None], size - 1 - place, place)
    centre = (place + 0.5) * scale
    position = torch.arange(side, device=device, dtype=torch.float32) - start
    weights: Tensor = (1 - (position + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weights = weights * ((position >= 0) & (position < length))
    return weights / weights.sum(-1, keepdim=True)


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    """Return an array on the device, without waiting for the device."""
    return torch.from_numpy(values).to(device, non_blocking=True)
