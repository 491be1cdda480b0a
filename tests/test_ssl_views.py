"""Views: two ways to the same pixels, each what a plain version would give."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import Batch, stream
from dinocell.errors import ConfigError
from dinocell.ssl.view_plan import PlanViews, ViewsConfig, plan_views
from dinocell.ssl.views import (
    _scales,
    all_tiles_at_once,
    channel_levels,
    crop_by_crop,
    make_views,
    resampling_matrix,
)

SMALL = ViewsConfig(global_size=24, local_size=16, num_local=3)
STACK = replace(SMALL, policy="stack", channels=("ER", "DNA", "x"), protein_channel="ER", protein_contrast=0.5)


def batch_of(folder: Path, size: int = 6) -> Batch:
    return next(iter(stream(folder, batch_size=size)))


def both_ways(batch: Batch, config: ViewsConfig, folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    levels = channel_levels([read_manifest(folder)], config)
    plans = [plan_views(i, o, config, seed=1) for i, o in zip(batch.infos, batch.origins, strict=True)]
    scales = [_scales(info, levels[0], plan) for info, plan in zip(batch.infos, plans, strict=True)]
    return crop_by_crop(batch, plans, scales, config), all_tiles_at_once(batch, plans, scales, config)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, policy="average"),
        replace(SMALL, policy="bag"),
        replace(SMALL, blur=0.5, noise=0.5, aspect=(0.5, 2.0)),
        STACK,
    ],
)
def test_both_ways_give_the_same_views(shard_set: Path, config: ViewsConfig) -> None:
    ours, theirs = both_ways(batch_of(shard_set), config, shard_set)
    assert len(ours) == len(theirs) == 5
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_a_view_is_what_a_plain_version_gives(shard_set: Path) -> None:
    batch = batch_of(shard_set, 1)
    levels = channel_levels([read_manifest(shard_set)], SMALL)[0]
    plan = plan_views(batch.infos[0], batch.origins[0], SMALL, seed=7)
    views = make_views(batch, SMALL, [levels], seed=7, device=torch.device("cpu"))
    raw = batch.tile(0).numpy().astype(np.float64)
    for view in range(5):
        top, left, height, width = plan.boxes[view]
        mixed = np.zeros((height, width))
        for channel, name in enumerate(batch.infos[0].channels):
            low, high = levels[name]
            unit = (raw[channel, top : top + height, left : left + width] - low) / (high - low)
            unit = np.clip(unit * plan.gain[view, channel], 0, 1)
            unit = np.clip((unit - unit.mean()) * plan.contrast[view, channel] + unit.mean(), 0, 1)
            mixed += plan.mixing[view, 0, channel] * unit
        size = 24 if view < 2 else 16
        crop = F.interpolate(torch.from_numpy(mixed)[None, None], (size, size), mode="bilinear", antialias=True)
        crop = crop[0, 0].numpy()
        crop = np.rot90(crop[::-1] if plan.mirrored[view] else crop, plan.turned[view])
        want = (crop - crop.mean()) / (crop.std() + 1e-5)
        got = views.global_views[view, 0, 0] if view < 2 else views.local_views[view - 2, 0, 0]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("length", "size"), [(64, 16), (50, 50), (10, 32), (1, 5), (97, 24), (3, 7)])
def test_resampling_is_that_of_interpolate(length: int, size: int) -> None:
    line = torch.randn(1, 1, 1, 120, dtype=torch.float32)
    start = 11
    matrix = resampling_matrix(np.array([start]), np.array([length]), 120, size, torch.device("cpu"))
    want = F.interpolate(line[..., start : start + length], (1, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(matrix[0] @ line[0, 0, 0], want[0, 0, 0], rtol=1e-4, atol=1e-5)


def test_views_are_standardised_and_blank_crops_are_zero(shard_set: Path) -> None:
    batch = batch_of(shard_set, 4)
    batch.tile(2).view(torch.int16).fill_(700)
    for config in (SMALL, STACK):
        levels = channel_levels([read_manifest(shard_set)], config)
        views = make_views(batch, config, levels, seed=0, device=torch.device("cpu"))
        for crops in views:
            assert torch.isfinite(crops).all()
            assert crops[:, 2].abs().max() < 0.01
            lively = crops[:, [0, 1, 3], :1]
            torch.testing.assert_close(lively.mean((-1, -2)), torch.zeros(lively.shape[:3]), atol=1e-4, rtol=0)
            assert lively.std((-1, -2), unbiased=False).max() <= 1.001
    assert views.global_views.shape == (2, 4, 3, 24, 24)
    assert views.local_views.shape == (3, 4, 3, 16, 16)
    assert not views.global_views[:, :, 2].any()  # channel x, which no tile has


def test_views_do_not_depend_on_the_batch_they_come_in(shard_set: Path) -> None:
    levels = channel_levels([read_manifest(shard_set)], SMALL)
    together = batch_of(shard_set, 6)
    alone = list(stream(shard_set, batch_size=1, stop=6))
    whole = make_views(together, SMALL, levels, seed=0, device=torch.device("cpu"))
    for number, batch in enumerate(alone):
        view = make_views(batch, SMALL, levels, seed=0, device=torch.device("cpu"))
        torch.testing.assert_close(view.global_views[:, 0], whole.global_views[:, number], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(view.local_views[:, 0], whole.local_views[:, number], rtol=1e-5, atol=1e-5)


CHOSEN = replace(SMALL, policy="bag")


def test_tiles_with_only_the_channels_needed_give_the_same_views(shard_set: Path) -> None:
    levels = channel_levels([read_manifest(shard_set)], CHOSEN)
    few = next(iter(stream(shard_set, batch_size=5, choose=PlanViews(CHOSEN, 0))))
    assert all(len(channels) == 1 for channels in few.channels)
    all_channels = batch_of(shard_set, 5)
    one, other = (make_views(b, CHOSEN, levels, seed=0, device=torch.device("cpu")) for b in (few, all_channels))
    torch.testing.assert_close(one.global_views, other.global_views)
    plans = [plan_views(i, o, CHOSEN, seed=0) for i, o in zip(few.infos, few.origins, strict=True)]
    scales = [_scales(info, levels[0], plan) for info, plan in zip(few.infos, plans, strict=True)]
    at_once = all_tiles_at_once(few, plans, scales, CHOSEN)
    torch.testing.assert_close(torch.stack(at_once[:2]), one.global_views, rtol=1e-4, atol=2e-5)


def test_plans_come_with_the_batch_and_others_are_not_taken(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, device = channel_levels([read_manifest(shard_set)], SMALL), torch.device("cpu")
    planned = next(iter(stream(shard_set, batch_size=4, choose=PlanViews(replace(SMALL, policy="average"), 3))))
    config = replace(SMALL, policy="average")
    for other, seed in ((config, 4), (SMALL, 3)):
        wanted = make_views(batch_of(shard_set, 4), other, levels, seed=seed, device=device)
        torch.testing.assert_close(make_views(planned, other, levels, seed=seed, device=device), wanted)
    wanted = make_views(batch_of(shard_set, 4), config, levels, seed=3, device=device)
    monkeypatch.setattr("dinocell.ssl.view_plan.plan_views", None)
    torch.testing.assert_close(make_views(planned, config, levels, seed=3, device=device), wanted)


def test_tiles_with_a_missing_channel_are_viewed_through_the_others(fields: Callable[..., Any], tmp_path: Path) -> None:
    from dinocell.data_shards.shard import ShardSettings
    from dinocell.data_shards.tiles import TileSettings
    from dinocell.data_shards.write import build

    settings = ShardSettings(tiles=TileSettings(size=32, min_size=16, min_structure=0))
    build(fields(4, missing_from=2), tmp_path / "set", settings=settings, workers=1)
    batch = batch_of(tmp_path / "set", 24)
    assert {len(info.channels) for info in batch.infos} == {2, 3}
    for config in (SMALL, replace(STACK, channels=("ER", "AGP"))):
        ours, theirs = both_ways(batch, config, tmp_path / "set")
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_unknown_percentiles_are_named(shard_set: Path) -> None:
    with pytest.raises(ConfigError, match=r"views.black, views.white: expected two of the percentiles 0.1, 1, 5"):
        channel_levels([read_manifest(shard_set)], replace(SMALL, white="98"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_views_of_the_cpu(shard_set: Path) -> None:
    batch = batch_of(shard_set)
    levels = channel_levels([read_manifest(shard_set)], SMALL)
    one, other = (make_views(batch, SMALL, levels, seed=0, device=torch.device(name)) for name in ("cpu", "cuda"))
    torch.testing.assert_close(other.global_views.cpu(), one.global_views, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.local_views.cpu(), one.local_views, rtol=1e-3, atol=1e-3)
