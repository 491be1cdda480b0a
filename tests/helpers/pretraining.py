"""A pretraining of seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dinocell.runtime.schedules import Freeze, Schedule
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    ModelConfig,
    PretrainConfig,
    Schedules,
    ViewsConfig,
)


def small_pretraining(shards: Path, output: Path, **changes: Any) -> PretrainConfig:
    """Return a recipe of ViT-nano on small views, without drop path, that logs every step."""
    base = PretrainConfig(
        output=output,
        data=DataConfig(shards=(str(shards),)),
        batch_size=4,
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        model=ModelConfig(variant="nano", layer_scale=0.3, drop_path=0.0),
        heads=HeadsConfig(num_prototypes=64, hidden=32, bottleneck=16),
        schedules=Schedules(learning_rate=Schedule(peak=0.01, end=1e-4, warmup=1), last_layer=Freeze(freeze=1)),
        log_every=1,
        compute=ComputeConfig(workers=0),
    )
    return replace(base, **changes)
