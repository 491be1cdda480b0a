"""Levels: the percentiles of a data set's channels, and what views make of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import stream
from dinocell.errors import ConfigError
from dinocell.ssl.view_plan import ViewsConfig, channel_levels, plan_views, scales_of

CONFIG = ViewsConfig(num_local=1, black="1", white="99")


def test_black_becomes_0_and_white_the_gain_of_a_view(shard_set: Path) -> None:
    manifest, batch = read_manifest(shard_set), next(iter(stream(shard_set, batch_size=1)))
    (levels,) = channel_levels([manifest], CONFIG)
    plan = plan_views(batch.infos[0], batch.origins[0], CONFIG, seed=0)
    scales = scales_of(batch.infos[0], levels, plan)
    for channel, name in enumerate(batch.infos[0].channels):
        percentiles = manifest.channels[name].percentiles
        assert levels[name] == (percentiles["1"], percentiles["99"])
        for value, wanted in (("1", np.zeros(3)), ("99", plan.gain[:, channel])):
            scaled = percentiles[value] * scales.factor[:, channel] + scales.offset[:, channel]
            np.testing.assert_allclose(scaled, wanted, atol=1e-4)


def test_unknown_percentiles_are_named(shard_set: Path) -> None:
    with pytest.raises(ConfigError, match=r"views.black, views.white: expected two of the percentiles 0.1, 1, 5"):
        channel_levels([read_manifest(shard_set)], replace(CONFIG, white="98"))
