"""What raw values are 0 and 1, by data set and channel, and what a view makes of that."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.sample import SampleInfo
from dinocell.errors import ConfigError
from dinocell.ssl.view_plan import ViewPlan, ViewsConfig

# Values of 0 to 1 that differ by less are the same: a real crop's deviation is a thousand times larger.
LEAST_DIFFERENCE = 1e-5
# By data set and channel name: the raw values that are 0 and 1.
Levels = Sequence[Mapping[str, tuple[float, float]]]


def channel_levels(manifests: Sequence[Manifest], config: ViewsConfig) -> list[dict[str, tuple[float, float]]]:
    """Take the values that become 0 and 1 from the statistics of each data set.

    Where both percentiles are one value, the least and the largest stand in for them.

    Raises
    ------
    ConfigError
        If a manifest does not hold these percentiles.
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


class Scales(NamedTuple):
    """What raw values are multiplied by and what is then added, by view and channel: levels and gain in one."""

    factor: np.ndarray  # (n c)
    offset: np.ndarray  # (n c)


def scales_of(info: SampleInfo, levels: Mapping[str, tuple[float, float]], plan: ViewPlan) -> Scales:
    """Return the scales of a tile's views."""
    low, high = np.array([levels[name] for name in info.channels], np.float32).T
    factor = plan.gain / (high - low)
    return Scales(factor, -low * factor)
