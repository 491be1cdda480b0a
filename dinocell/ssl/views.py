"""The views of a batch of tiles: crops of their channels with photometry, scaled to one size, standardised.

Two ways to the same pixels: ``crop_by_crop`` cuts each region out before it is worked on, which is fastest on a CPU;
``all_tiles_at_once`` works on the needed planes of all tiles together, which keeps a GPU busy. Each tests the other.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.read import Batch
from dinocell.data_shards.sample import SampleInfo
from dinocell.errors import ConfigError
from dinocell.ssl.view_plan import PlanViews, ViewPlan, ViewsConfig

# Blank crops become 0, not amplified rounding errors; a real crop's deviation is a thousand times larger.
_LEAST_DEVIATION = 1e-5
# By data set and channel name: the raw values that are 0 and 1.
Levels = Sequence[Mapping[str, tuple[float, float]]]


class Views(NamedTuple):
    """Views of ``b`` tiles, one channel or those of the policy ``stack``; standardised by crop and channel."""

    global_views: Float[Tensor, "v b c s s"]
    local_views: Float[Tensor, "w b c t t"]


def channel_levels(manifests: Sequence[Manifest], config: ViewsConfig) -> list[dict[str, tuple[float, float]]]:
    """Take the values that become 0 and 1 from the statistics of each data set.

    Raises
    ------
    ConfigError
        If a manifest does not hold these percentiles, or a channel has one value only.
    """
    levels: list[dict[str, tuple[float, float]]] = []
    for manifest in manifests:
        found = {}
        for name, known in manifest.channels.items():
            if not {config.black, config.white} <= known.percentiles.keys():
                raise ConfigError(
                    f"views.black, views.white: expected two of the percentiles {', '.join(known.percentiles)}, "
                    f"got {config.black} and {config.white}"
                )
            low, high = known.percentiles[config.black], known.percentiles[config.white]
            found[name] = (low, high) if high > low else (known.minimum, max(known.maximum, known.minimum + 1))
        levels.append(found)
    return levels


def make_views(batch: Batch, config: ViewsConfig, levels: Levels, *, seed: int, device: torch.device) -> Views:
    """Turn decoded tiles into standardised views on ``device``.

    Parameters
    ----------
    batch
        From the reader; it may lack channels that no view of a sample needs, and bring its plans (`PlanViews`).
    levels
        From ``channel_levels``.
    seed
        Of the whole run; the rest of the randomness follows from where each sample comes from.
    """
    plans = _plans(batch, PlanViews(config, seed))
    scales = [
        _scales(info, levels[origin.data_set], plan)
        for info, origin, plan in zip(batch.infos, batch.origins, plans, strict=True)
    ]
    make = all_tiles_at_once if device.type == "cuda" else crop_by_crop
    views = make(batch.to(device, non_blocking=True), plans, scales, config)
    return Views(torch.stack(views[: config.num_global]), _stacked(views[config.num_global :], batch, config, device))


def _plans(batch: Batch, plan: PlanViews) -> list[ViewPlan]:
    """Return the plans that the reader made in its workers, or make them here."""
    if batch.chosen_by == plan:
        return [each for each in batch.chosen if isinstance(each, ViewPlan)]
    return [plan(info, origin) for info, origin in zip(batch.infos, batch.origins, strict=True)]


def _stacked(views: list[Tensor], batch: Batch, config: ViewsConfig, device: torch.device) -> Tensor:
    if views:
        return torch.stack(views)
    return torch.empty(0, len(batch), config.in_channels, config.local_size, config.local_size, device=device)


class Scales(NamedTuple):
    """What raw values are multiplied by and what is then added, by view and channel: levels and gain in one."""

    factor: np.ndarray  # (n c)
    offset: np.ndarray  # (n c)


def _scales(info: SampleInfo, levels: Mapping[str, tuple[float, float]], plan: ViewPlan) -> Scales:
    low, high = np.array([levels[name] for name in info.channels], np.float32).T
    factor = plan.gain / (high - low)
    return Scales(factor, -low * factor)


def crop_by_crop(
    batch: Batch, plans: Sequence[ViewPlan], scales: Sequence[Scales], config: ViewsConfig
) -> list[Float[Tensor, "b k s s"]]:
    """Return the views, one tensor a view, by cutting each region out of its tile."""
    views: list[list[Tensor]] = [[] for _ in range(config.num_views)]
    for number, (plan, scale) in enumerate(zip(plans, scales, strict=True)):
        tile, place = batch.tile(number), _places(batch.channels[number])
        for view, size in enumerate(_sizes(config)):
            top, left, height, width = plan.boxes[view].tolist()
            needed = np.flatnonzero((plan.mixing[view] != 0).any(axis=0))
            region = tile[[place[c] for c in needed.tolist()], top : top + height, left : left + width]
            unit = _unit(region.float(), scale.factor[view, needed], scale.offset[view, needed])
            mean = unit.mean((1, 2), keepdim=True)
            unit = _contrasted(unit, mean, plan.contrast[view, needed])
            mixing = torch.from_numpy(plan.mixing[view][:, needed])
            mixed = unit if mixing.shape == (1, 1) else torch.einsum("kc,chw->khw", mixing, unit)
            mixed = _protein_contrast(mixed, float(plan.protein[view]), config)
            crop = F.interpolate(mixed[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
            views[view].append(_turned(crop, bool(plan.mirrored[view]), int(plan.turned[view])))
    return [_finish(torch.stack(crops), plans, view) for view, crops in enumerate(views)]


def all_tiles_at_once(
    batch: Batch, plans: Sequence[ViewPlan], scales: Sequence[Scales], config: ViewsConfig
) -> list[Float[Tensor, "b k s s"]]:
    """Return the views, one tensor a view, with a few large operations on the planes of all tiles and views of a size.

    Regions are cut to the size of the largest box; what lies outside a box gets no weight. Each is resampled by a
    matrix for rows and one for columns, which also reverse it, and mixed last: that is linear, too.
    """
    device = batch.storage.device
    sizes = np.array(_sizes(config))
    groups = [np.flatnonzero(sizes == size) for size in dict.fromkeys(sizes.tolist())]
    parts: list[list[tuple[list[int], Tensor]]] = [[] for _ in groups]
    for members in _alike(batch):
        tiles = _stacked_tiles(batch, members)
        places = list(batch.channels[members[0]])
        for group, views in enumerate(groups):
            planes = _needed_planes([plans[n] for n in members], [scales[n] for n in members], places, views, config)
            crops = _resampled(tiles, planes, int(sizes[views[0]]), device)
            parts[group].append((members, crops.unflatten(0, (len(views), len(members)))))
    made: list[Tensor] = [torch.empty(0)] * config.num_views
    for views, found in zip(groups, parts, strict=True):
        crops = torch.cat([crops for _, crops in found], dim=1)
        if len(found) > 1:
            order = np.argsort([number for members, _ in found for number in members])
            crops = crops[:, _on(device, order)]
        for view, some in zip(views.tolist(), crops, strict=True):
            made[view] = _finish(some, plans, view)
    return made


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
    plans: Sequence[ViewPlan], scales: Sequence[Scales], places: list[int], views: np.ndarray, config: ViewsConfig
) -> _Planes:
    def of_crops(arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Return what the plans say, (v b ...) in one row."""
        chosen: np.ndarray = np.stack([each[views] for each in arrays], axis=1)
        return chosen.reshape(-1, *chosen.shape[2:])

    mixing = of_crops(plan.mixing for plan in plans)[:, :, places]
    crop, channel = np.nonzero((mixing != 0).any(axis=1))
    of_plane = (crop, np.asarray(places)[channel])
    protein = np.full(len(crop), -1, np.float32)
    if config.policy == "stack" and config.protein_channel in config.channels:
        is_protein = mixing[crop, config.channels.index(config.protein_channel), channel] != 0
        protein = np.where(is_protein, of_crops(plan.protein for plan in plans)[crop], protein)
    return _Planes(
        crop=crop,
        channel=channel,
        boxes=of_crops(plan.boxes for plan in plans)[crop],
        factor=of_crops(scale.factor for scale in scales)[of_plane],
        offset=of_crops(scale.offset for scale in scales)[of_plane],
        contrast=of_crops(plan.contrast for plan in plans)[of_plane],
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
        unit[which] = (some * (contrasts / largest.clamp_min(_LEAST_DEVIATION))[:, None, None]).clamp_(0, 1)

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


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    """Return an array on the device, without waiting for the device."""
    return torch.from_numpy(values).to(device, non_blocking=True)


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


def _sizes(config: ViewsConfig) -> list[int]:
    return [config.global_size] * config.num_global + [config.local_size] * config.num_local


def _places(channels: Sequence[int]) -> dict[int, int]:
    """Return where in the decoded tile a channel of the sample lies."""
    return {channel: place for place, channel in enumerate(channels)}


def _alike(batch: Batch) -> Iterator[list[int]]:
    """Return the numbers of the tiles of one size and one choice of channels."""
    groups: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    for number, info in enumerate(batch.infos):
        groups.setdefault((info.height, info.width, batch.channels[number]), []).append(number)
    yield from groups.values()


def _unit(region: Tensor, factor: np.ndarray, offset: np.ndarray) -> Tensor:
    scale, shift = (torch.from_numpy(values)[:, None, None] for values in (factor, offset))
    return region.mul_(scale).add_(shift).clamp_(0, 1)


def _contrasted(unit: Tensor, mean: Tensor, contrast: np.ndarray) -> Tensor:
    factor = torch.from_numpy(contrast)[:, None, None]
    return unit.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _protein_contrast(mixed: Tensor, factor: float, config: ViewsConfig) -> Tensor:
    if config.policy != "stack" or factor < 0 or config.protein_channel not in config.channels:
        return mixed
    protein = mixed[config.channels.index(config.protein_channel)]
    protein.mul_(factor / protein.max().clamp_min(_LEAST_DEVIATION)).clamp_(0, 1)
    return mixed


def _turned(crop: Float[Tensor, "k s s"], mirrored: bool, quarter_turns: int) -> Float[Tensor, "k s s"]:
    if mirrored:
        crop = crop.flip(-2)
    return torch.rot90(crop, quarter_turns, (-2, -1)) if quarter_turns else crop


def _finish(crops: Float[Tensor, "b k s s"], plans: Sequence[ViewPlan], view: int) -> Float[Tensor, "b k s s"]:
    """Blur and add noise where it was drawn, then standardise each crop and channel."""
    for number, plan in enumerate(plans):
        if plan.blur_sigma_px[view] > 0:
            crops[number] = _blurred(crops[number], float(plan.blur_sigma_px[view]))
        if plan.noise_sigma[view] > 0:
            generator = torch.Generator().manual_seed(plan.noise_seed + view)
            noise = torch.randn(crops[number].shape, generator=generator).to(crops.device, non_blocking=True)
            crops[number] += float(plan.noise_sigma[view]) * noise
    mean = crops.mean((2, 3), keepdim=True)
    centred = crops - mean
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    return centred / (deviation + _LEAST_DEVIATION)


def _blurred(crop: Float[Tensor, "k s s"], sigma: float) -> Float[Tensor, "k s s"]:
    """Blur by a Gaussian cut off at three deviations, mirrored at the borders."""
    radius = min(max(1, math.ceil(3 * sigma)), crop.shape[-1] - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=crop.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(crop.dtype)
    padded = F.pad(crop[:, None], (radius,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return blurred[:, 0]
