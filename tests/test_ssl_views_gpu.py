"""All tiles at once: the same crops as one by one, resampled as by torch's interpolation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinocell.data_shards.build import build
from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import Batch, SampleStream, stream
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.images.write import write_tiff
from dinocell.ssl.config import TargetChannels, ViewsConfig
from dinocell.ssl.view_plan import intensity_ranges, plan_views
from dinocell.ssl.views import crop_by_crop
from dinocell.ssl.views_gpu import all_tiles_at_once, resampling_matrix

SMALL = ViewsConfig(global_size=24, local_size=16, num_local=3)
STACK = replace(SMALL, policy="stack", channels=("ER", "DNA", "x"), protein_channel="ER", protein_contrast=0.5)

TILES = ShardSettings(tiles=TileSettings(size=32, min_size=16, min_contrast=0))


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
    start = 11
    forwards = np.array([False])
    matrix = resampling_matrix(
        np.array([start]), np.array([length]), 120, size, torch.device("cpu"), backwards=forwards
    )
    want = F.interpolate(line[..., start : start + length], (1, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(matrix[0] @ line[0, 0, 0], want[0, 0, 0], rtol=1e-4, atol=1e-5)
