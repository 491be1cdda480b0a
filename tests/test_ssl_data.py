"""The training stream: every batch with the plans and masks of its samples, on any rank, from any worker."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import loader
from dinocell.runtime.distributed import World
from dinocell.ssl.config import DataConfig, ModelConfig, PretrainConfig, ViewsConfig
from dinocell.ssl.data import open_shards
from dinocell.ssl.masking import draw_masks
from dinocell.ssl.view_plan import intensity_ranges, plan_views

VIEWS = ViewsConfig(global_size=24, local_size=16, num_local=2, policy="bag")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_the_plans_and_masks_of_their_samples(shard_set: Path, workers: int) -> None:
    """Masks are distributed over the samples of all ranks, by their positions in the stream."""
    config = PretrainConfig(
        output=Path("none"),
        data=DataConfig(shards=(str(shard_set),)),
        seed=5,
        steps=3,
        batch_size=8,
        views=VIEWS,
        model=ModelConfig(patch_size=4),
    )
    ranges = intensity_ranges([read_manifest(shard_set)])
    for rank in range(2):
        batches = list(loader(open_shards(config, World(rank=rank, size=2), position=8), workers=workers))
        assert len(batches) == 2
        for step, batch in enumerate(batches):
            own = slice(4 * rank, 4 * rank + 4)
            masks = draw_masks(range(8 + 8 * step, 16 + 8 * step), (6, 6), config.masking, seed=5, own=own)
            for ours, expected in zip(batch.masks, masks, strict=True):
                assert torch.equal(ours, expected)
            assert len(batch.plans) == len(batch.tiles) == 4
            for index, plan in enumerate(batch.plans):
                expected = plan_views(batch.tiles.infos[index], batch.tiles.origins[index], VIEWS, ranges, seed=5)
                np.testing.assert_array_equal(plan.boxes, expected.boxes)
                np.testing.assert_array_equal(plan.factor, expected.factor)
                assert batch.tiles.channels[index] == plan.channels()
                assert len(plan.channels()) == 1, "other channels are not decoded"
