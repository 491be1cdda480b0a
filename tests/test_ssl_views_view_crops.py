"""Crops one by one: what a plain version gives."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import stream
from dinocell.ssl.view_plan import ViewsConfig, channel_levels, plan_views, scales_of
from dinocell.ssl.views import crop_by_crop

SMALL = ViewsConfig(global_size=24, local_size=16, num_local=3)


def test_a_crop_is_what_a_plain_version_gives(shard_set: Path) -> None:
    batch = next(iter(stream(shard_set, batch_size=1)))
    levels = channel_levels([read_manifest(shard_set)], SMALL)[0]
    plan = plan_views(batch.infos[0], batch.origins[0], SMALL, seed=7)
    made = crop_by_crop(batch, [plan], [scales_of(batch.infos[0], levels, plan)], SMALL)
    crops = [view for kind in made for view in kind]
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
        np.testing.assert_allclose(crops[view][0, 0].numpy(), crop, rtol=1e-4, atol=1e-5)
