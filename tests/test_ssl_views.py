"""Views: crops as a plain version makes them, one by one or all at once, with noise and blur, standardised."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from dinocell.data_shards.build import build
from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import Batch, SampleStream, stream
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.images.write import write_tiff
from dinocell.ssl.config import TargetChannels, ViewsConfig
from dinocell.ssl.view_plan import ViewPlan, intensity_ranges, plan_views
from dinocell.ssl.views import Views, all_tiles_at_once, crop_by_crop, make_views, resampling_matrix

SMALL = ViewsConfig(global_size=24, local_size=16, num_local=3)
STACK = replace(SMALL, policy="stack", channels=("ER", "DNA", "x"), protein_channel="ER", protein_contrast=0.5)
TILES = ShardSettings(tiles=TileSettings(size=32, min_size=16, min_contrast=0))


def batch_of(folder: Path, size: int = 6) -> Batch:
    return next(iter(stream(folder, batch_size=size)))


def plans_of(batch: Batch, config: ViewsConfig, folder: Path, *, seed: int = 0) -> list[ViewPlan]:
    ranges = intensity_ranges([read_manifest(folder)])
    return [plan_views(i, o, config, ranges, seed=seed) for i, o in zip(batch.infos, batch.origins, strict=True)]


def views_of(batch: Batch, config: ViewsConfig, folder: Path, device: str = "cpu") -> Views:
    return make_views(batch, plans_of(batch, config, folder), config, device=torch.device(device))


def test_a_crop_is_that_of_a_plain_version(shard_set: Path) -> None:
    batch = batch_of(shard_set, 1)
    (plan,) = plans_of(batch, SMALL, shard_set, seed=7)
    crops = [view for kind in crop_by_crop(batch, [plan], SMALL) for view in kind]
    raw = batch.tile(0).numpy().astype(np.float64)
    for view in range(5):
        top, left, height, width = plan.boxes[view]
        mixed = np.zeros((height, width))
        for channel in range(3):
            unit = raw[channel, top : top + height, left : left + width]
            unit = np.clip(unit * plan.factor[view, channel] + plan.offset[view, channel], 0, 1)
            unit = np.clip((unit - unit.mean()) * plan.contrast[view, channel] + unit.mean(), 0, 1)
            mixed += plan.mixing[view, 0, channel] * unit
        size = 24 if view < 2 else 16
        crop = F.interpolate(torch.from_numpy(mixed)[None, None], (size, size), mode="bilinear", antialias=True)
        crop = crop[0, 0].numpy()
        crop = np.rot90(crop[::-1] if plan.mirrored[view] else crop, plan.turned[view])
        np.testing.assert_allclose(crops[view][0, 0].numpy(), crop, rtol=1e-4, atol=1e-5)


def test_each_view_is_a_standardised_crop(shard_set: Path) -> None:
    batch = batch_of(shard_set, 3)
    plans = plans_of(batch, SMALL, shard_set)
    for views, crops in zip(views_of(batch, SMALL, shard_set)[:2], crop_by_crop(batch, plans, SMALL), strict=True):
        raw = crops.numpy().astype(np.float64)
        want = (raw - raw.mean((3, 4), keepdims=True)) / (raw.std((3, 4), keepdims=True) + 1e-5)
        np.testing.assert_allclose(views.numpy(), want, rtol=1e-3, atol=1e-4)


def test_blur_and_noise_are_added_before_standardising_where_planned(shard_set: Path) -> None:
    config = replace(SMALL, blur=0.5, noise=0.5)
    batch = batch_of(shard_set, 6)
    plans = plans_of(batch, config, shard_set, seed=1)
    made = make_views(batch, plans, config, device=torch.device("cpu")).global_views
    for view in range(2):
        for index, plan in enumerate(plans):
            want = crop_by_crop(batch, plans, config)[0][view, index, 0].numpy()
            if plan.blur_sigma_px[view] > 0:
                sigma = float(plan.blur_sigma_px[view])
                want = ndimage.gaussian_filter(want, sigma, mode="mirror", radius=max(1, math.ceil(3 * sigma)))
            if plan.noise_sigma[view] > 0:
                noise = torch.randn((1, 24, 24), generator=torch.Generator().manual_seed(plan.noise_seed + view))
                want = want + plan.noise_sigma[view] * noise[0].numpy()
            want = (want - want.mean()) / (want.std() + 1e-5)
            np.testing.assert_allclose(made[view, index, 0].numpy(), want, rtol=1e-3, atol=1e-3)
    both = [plan.blur_sigma_px[view] > 0 and plan.noise_sigma[view] > 0 for plan in plans for view in range(2)]
    assert any(both)
    assert not all(both)


def test_views_are_standardised_and_blank_crops_are_zero(shard_set: Path) -> None:
    batch = batch_of(shard_set, 4)
    batch.tile(2).view(torch.int16).fill_(700)
    for config in (SMALL, STACK):
        views = views_of(batch, config, shard_set)
        for crops in views[:2]:
            assert torch.isfinite(crops).all()
            assert crops[:, 2].abs().max() < 0.01
            lively = crops[:, [0, 1, 3], :1]
            torch.testing.assert_close(lively.mean((-1, -2)), torch.zeros(lively.shape[:3]), atol=1e-4, rtol=0)
            assert lively.std((-1, -2), unbiased=False).max() <= 1.001
    assert views.global_views.shape == (2, 4, 3, 24, 24)
    assert views.local_views.shape == (3, 4, 3, 16, 16)
    assert not views.global_views[:, :, 2].any()  # channel x, which no tile has


def test_views_do_not_depend_on_the_batch_that_they_are_in(shard_set: Path) -> None:
    whole = views_of(batch_of(shard_set, 6), SMALL, shard_set)
    for index, batch in enumerate(stream(shard_set, batch_size=1, stop=6)):
        view = views_of(batch, SMALL, shard_set)
        torch.testing.assert_close(view.global_views[:, 0], whole.global_views[:, index], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(view.local_views[:, 0], whole.local_views[:, index], rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_views_of_the_cpu(shard_set: Path) -> None:
    batch = batch_of(shard_set)
    one, other = (views_of(batch, SMALL, shard_set, device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(other.global_views.cpu(), one.global_views, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.local_views.cpu(), one.local_views, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("targets", ["other", "mean"])
def test_targets_are_the_same_crops_of_other_channels(shard_set: Path, targets: TargetChannels) -> None:
    config = replace(SMALL, brightness=0.0, contrast=0.0, global_mean_probability=(0.0, 0.0))
    batch, ranges = batch_of(shard_set), intensity_ranges([read_manifest(shard_set)])
    samples = list(zip(batch.infos, batch.origins, strict=True))
    plans = [plan_views(info, origin, config, ranges, seed=3, targets=targets) for info, origin in samples]
    views = make_views(batch, plans, config, device=torch.device("cpu"))
    plain = make_views(batch, plans_of(batch, config, shard_set, seed=3), config, device=torch.device("cpu"))
    torch.testing.assert_close(views[:2], plain[:2], rtol=0, atol=0)
    assert plain.target_views is None
    assert views.target_views is not None
    for view in range(2):
        # Plans whose views show what the targets show.
        shown = [
            replace(_without_targets(plan, config), mixing=plan.mixing[[config.num_views + view] * config.num_views])
            for plan in plans
        ]
        same = make_views(batch, shown, config, device=torch.device("cpu"))
        torch.testing.assert_close(views.target_views[view], same.global_views[view], rtol=1e-4, atol=1e-4)
    # The loader decodes the channels of the targets, too.
    samples_of_stream = stream(shard_set, batch_size=6)
    samples_of_stream.plan_sample = partial(plan_views, config=config, ranges=ranges, seed=3, targets=targets)
    few = next(iter(samples_of_stream))
    found = make_views(few, plans, config, device=torch.device("cpu")).target_views
    torch.testing.assert_close(found, views.target_views, rtol=0, atol=0)


def _without_targets(plan: ViewPlan, config: ViewsConfig) -> ViewPlan:
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return replace(plan, **{name: each[: config.num_views] for name, each in values.items() if name != "noise_seed"})


def both_ways(
    batch: Batch, config: ViewsConfig, folder: Path, targets: TargetChannels = "same"
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    ranges = intensity_ranges([read_manifest(folder)])
    samples = zip(batch.infos, batch.origins, strict=True)
    plans = [plan_views(info, origin, config, ranges, seed=1, targets=targets) for info, origin in samples]
    return crop_by_crop(batch, plans, config), all_tiles_at_once(batch, plans, config)


def planned_stream(folder: Path, config: ViewsConfig, batch_size: int) -> SampleStream:
    """Return a stream that decodes only the channels that the views need."""
    samples = stream(folder, batch_size=batch_size)
    ranges = intensity_ranges([read_manifest(folder)])
    samples.plan_sample = partial(plan_views, config=config, ranges=ranges, seed=1)
    return samples


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, policy="average"),
        replace(SMALL, policy="bag"),
        replace(SMALL, aspect=(0.5, 2.0)),
        STACK,
    ],
)
def test_both_implementations_give_the_same_crops(shard_set: Path, config: ViewsConfig) -> None:
    ours, theirs = both_ways(next(iter(stream(shard_set, batch_size=6))), config, shard_set)
    assert [len(each) for each in ours] == [len(each) for each in theirs] == [2, 3]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", ["other", "mean"])
def test_both_implementations_give_the_same_targets(shard_set: Path, targets: TargetChannels) -> None:
    ours, theirs = both_ways(next(iter(stream(shard_set, batch_size=6))), SMALL, shard_set, targets)
    assert [len(each) for each in ours] == [len(each) for each in theirs] == [2, 3, 2]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_tiles_with_only_the_channels_needed_give_the_same_crops(shard_set: Path) -> None:
    config = replace(SMALL, policy="bag")
    few = next(iter(planned_stream(shard_set, config, 5)))
    assert all(len(channels) == 1 for channels in few.channels)
    wanted, _ = both_ways(next(iter(stream(shard_set, batch_size=5))), config, shard_set)
    for crops in both_ways(few, config, shard_set):
        for one, other in zip(crops, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_tiles_with_a_missing_channel_are_viewed_through_the_others(fields: Callable[..., Any], tmp_path: Path) -> None:
    build(fields(4, missing_from=2), tmp_path / "set", settings=TILES, workers=1)
    batch = next(iter(stream(tmp_path / "set", batch_size=24)))
    assert {len(info.channels) for info in batch.infos} == {2, 3}
    for config in (SMALL, replace(STACK, channels=("ER", "AGP"))):
        ours, theirs = both_ways(batch, config, tmp_path / "set")
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    bag = replace(SMALL, policy="bag")
    few = next(iter(planned_stream(tmp_path / "set", bag, 24)))
    assert {(len(info.channels), chosen) for info, chosen in zip(few.infos, few.channels, strict=True)} >= {
        (2, (0,)),
        (3, (0,)),
    }
    for one, other in zip(*both_ways(few, bag, tmp_path / "set"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_batch_may_have_tiles_of_two_types(
    fields: Callable[..., Any], draw: Callable[[int], np.ndarray], tmp_path: Path
) -> None:
    source = fields(2)
    build(source, tmp_path / "a", settings=TILES, workers=1)
    for number in range(2):
        for name, plane in zip(("DNA", "ER", "AGP"), draw(number), strict=True):
            write_tiff(tmp_path / "input" / f"f{number:03d}_{name}.tif", (plane // 16).astype(np.uint8))
    build(source, tmp_path / "b", settings=TILES, workers=1)
    batch = next(iter(stream([tmp_path / "a", tmp_path / "b"], batch_size=12)))
    assert {info.dtype for info in batch.infos} == {"uint8", "uint16"}
    ranges = intensity_ranges([read_manifest(tmp_path / name) for name in "ab"])
    plans = [plan_views(i, o, SMALL, ranges, seed=1) for i, o in zip(batch.infos, batch.origins, strict=True)]
    ours, theirs = (make(batch, plans, SMALL) for make in (crop_by_crop, all_tiles_at_once))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "size"), [(64, 16), (50, 50), (10, 32), (1, 5), (97, 24), (3, 7)])
def test_resampling_is_that_of_interpolate(length: int, size: int) -> None:
    line = torch.randn(1, 1, 1, 120, dtype=torch.float32)
    matrix = resampling_matrix(np.array([length]), 120, size, torch.device("cpu"), backwards=np.array([False]))
    want = F.interpolate(line[..., :length], (1, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(matrix[0] @ line[0, 0, 0], want[0, 0, 0], rtol=1e-4, atol=1e-5)
