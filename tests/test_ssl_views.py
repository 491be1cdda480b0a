"""Views: crops with noise and blur, standardised, whatever batch they come in."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import Batch, stream
from dinocell.ssl.view_plan import PlanViews, ViewsConfig, channel_levels, plan_views, scales_of
from dinocell.ssl.views import crop_by_crop, make_views

SMALL = ViewsConfig(global_size=24, local_size=16, num_local=3)
STACK = replace(SMALL, policy="stack", channels=("ER", "DNA", "x"), protein_channel="ER", protein_contrast=0.5)


def batch_of(folder: Path, size: int = 6) -> Batch:
    return next(iter(stream(folder, batch_size=size)))


def test_views_are_crops_standardised_each(shard_set: Path) -> None:
    batch = batch_of(shard_set, 3)
    (levels,) = channel_levels([read_manifest(shard_set)], SMALL)
    plans = [plan_views(i, o, SMALL, seed=7) for i, o in zip(batch.infos, batch.origins, strict=True)]
    scales = [scales_of(info, levels, plan) for info, plan in zip(batch.infos, plans, strict=True)]
    views = make_views(batch, SMALL, [levels], seed=7, device=torch.device("cpu"))
    for got, crops in zip(views, crop_by_crop(batch, plans, scales, SMALL), strict=True):
        raw = crops.numpy().astype(np.float64)
        want = (raw - raw.mean((3, 4), keepdims=True)) / (raw.std((3, 4), keepdims=True) + 1e-5)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-4)


def test_blur_and_noise_come_before_standardising_where_they_were_drawn(shard_set: Path) -> None:
    config = replace(SMALL, blur=0.5, noise=0.5)
    batch = batch_of(shard_set, 6)
    (levels,) = channel_levels([read_manifest(shard_set)], config)
    plans = [plan_views(i, o, config, seed=1) for i, o in zip(batch.infos, batch.origins, strict=True)]
    scales = [scales_of(info, levels, plan) for info, plan in zip(batch.infos, plans, strict=True)]
    made = make_views(batch, config, [levels], seed=1, device=torch.device("cpu")).global_views
    for view in range(2):
        for number, plan in enumerate(plans):
            want = crop_by_crop(batch, plans, scales, config)[0][view, number, 0].numpy()
            if plan.blur_sigma_px[view] > 0:
                sigma = float(plan.blur_sigma_px[view])
                want = ndimage.gaussian_filter(want, sigma, mode="mirror", radius=max(1, math.ceil(3 * sigma)))
            if plan.noise_sigma[view] > 0:
                noise = torch.randn((1, 24, 24), generator=torch.Generator().manual_seed(plan.noise_seed + view))
                want = want + plan.noise_sigma[view] * noise[0].numpy()
            want = (want - want.mean()) / (want.std() + 1e-5)
            np.testing.assert_allclose(made[view, number, 0].numpy(), want, rtol=1e-3, atol=1e-3)
    drawn = [plan.blur_sigma_px[view] > 0 and plan.noise_sigma[view] > 0 for plan in plans for view in range(2)]
    assert any(drawn)
    assert not all(drawn)


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_views_of_the_cpu(shard_set: Path) -> None:
    batch = batch_of(shard_set)
    levels = channel_levels([read_manifest(shard_set)], SMALL)
    one, other = (make_views(batch, SMALL, levels, seed=0, device=torch.device(name)) for name in ("cpu", "cuda"))
    torch.testing.assert_close(other.global_views.cpu(), one.global_views, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.local_views.cpu(), one.local_views, rtol=1e-3, atol=1e-3)
