"""A picture of the views that a recipe makes: every crop with its channel, before anything is trained on them."""

from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dinocell.data_shards.images import write_png
from dinocell.data_shards.preview import caption, side_by_side
from dinocell.data_shards.sample import SampleInfo
from dinocell.runtime.distributed import World
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.pictures import grey
from dinocell.ssl.prepare import open_shards
from dinocell.ssl.view_levels import channel_levels
from dinocell.ssl.view_plan import ViewPlan, ViewsConfig, plan_views
from dinocell.ssl.views import make_views


def preview_views(config: PretrainConfig, output: Path, *, num_samples: int = 8) -> None:
    """Write a PNG with the views of the first samples of the run, a row each.

    Above each crop stands its channel, or ``mean``; for the policy ``stack`` the channels lie below one another. From
    -2.5 deviations (black) to 2.5 (white).

    Raises
    ------
    DinocellError
        If the shards do not fit the recipe, or the picture cannot be written.
    """
    samples = open_shards(config, World())
    levels = channel_levels([each.manifest for each in samples.sets], config.views)
    rows: list[np.ndarray] = []
    for batch in islice(samples, -(-num_samples // samples.batch_size)):
        views = make_views(batch, config.views, levels, seed=config.seed, device=torch.device("cpu"))
        for number in range(min(len(batch), num_samples - len(rows) // 2)):
            info = batch.infos[number]
            plan = plan_views(info, batch.origins[number], config.views, seed=config.seed)
            crops = [view[number] for kind in views for view in kind]
            names = [_channel(plan, view, info, config.views) for view in range(len(crops))]
            columns = [_column(name, crop) for name, crop in zip(names, crops, strict=True)]
            height = max(len(column) for column in columns)
            row = side_by_side([np.pad(column, ((0, height - len(column)), (0, 0))) for column in columns])
            rows += [caption(info.field, [row])[:, : row.shape[1]], row]
    width = max(row.shape[1] for row in rows)
    write_png(output, np.concatenate([np.pad(row, ((0, 4), (0, width - row.shape[1]))) for row in rows]))


def _column(name: str, crop: torch.Tensor) -> np.ndarray:
    planes = [grey(channel) for channel in crop]
    return np.concatenate([caption(name, planes[:1])[:, : planes[0].shape[1]], *planes])


def _channel(plan: ViewPlan, view: int, info: SampleInfo, config: ViewsConfig) -> str:
    if config.policy == "stack":
        return "all"
    used = np.flatnonzero(plan.mixing[view][0])
    return info.channels[int(used[0])] if len(used) == 1 else "mean"
