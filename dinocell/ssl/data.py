"""The training data: shards as a stream of planned batches, i.e. tiles with the plans of their views and masks.

Plans and masks are drawn in the loader's workers, plans before a tile is decoded: channels that no view needs are not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch.utils.data import IterableDataset

from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.read import Batch, SampleStream, stream
from dinocell.errors import ConfigError
from dinocell.runtime.distributed import World
from dinocell.ssl.config import PretrainConfig, ViewsConfig
from dinocell.ssl.masking import PatchMasks, draw_masks
from dinocell.ssl.view_plan import ViewPlan, intensity_ranges, plan_views


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedBatch:
    """Tiles, the views planned for each of them, and the masks of their global views."""

    tiles: Batch
    plans: tuple[ViewPlan, ...]
    masks: PatchMasks

    def pin_memory(self) -> "PlannedBatch":
        """Return the batch in page-locked memory; PyTorch's loader calls this."""
        return replace(self, tiles=self.tiles.pin_memory(), masks=self.masks.pin_memory())


class PlannedStream(IterableDataset[PlannedBatch]):
    """The batches of a stream of samples with plans and masks, as the recipe configures them."""

    def __init__(self, samples: SampleStream, config: PretrainConfig) -> None:
        self.samples = samples
        ranges = intensity_ranges([shard_set.manifest for shard_set in samples.sets])
        samples.plan_sample = partial(
            plan_views, config=config.views, ranges=ranges, seed=config.seed, targets=config.target_channels
        )
        self._draw_masks = partial(
            draw_masks, grid=config.mask_grid, config=config.masking, seed=config.seed, views=config.views.num_global
        )

    def __iter__(self) -> Iterator[PlannedBatch]:
        for batch in self.samples:
            masks = self._draw_masks(batch.step_positions, own=batch.own)
            yield PlannedBatch(tiles=batch, plans=cast("tuple[ViewPlan, ...]", batch.plans), masks=masks)


def open_shards(config: PretrainConfig, world: World, *, position: int = 0) -> PlannedStream:
    """Open the training shards as this rank's stream; a batch is one accumulated part of the rank's share of a step.

    Raises DinocellError if a set is missing or damaged, lacks the channels that the views need, or the ranks do not
    divide the batch.
    """
    data, parts = config.data, world.size * config.optim.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size: {config.batch_size} is not divisible by {world.size} processes times "
            f"{config.optim.accumulate} accumulated parts"
        )
    samples = stream(
        data.shards,
        batch_size=config.batch_size // parts,
        position=position,
        weights=data.weights,
        seed=config.seed,
        stop=config.steps * config.batch_size,
        rank=world.rank,
        world_size=world.size,
        block_shards=data.block_shards,
        cache=data.cache,
        cache_gb=data.cache_gb,
    )
    for shard_set in samples.sets:
        _check_set(config.views, shard_set.location, shard_set.manifest)
    return PlannedStream(samples, config)


def _check_set(views: ViewsConfig, location: str, manifest: Manifest) -> None:
    """Refuse a set without the channels of the views, or without a tile as large as a crop: all would be upsampled."""
    names = ", ".join(manifest.channels)
    conflicts = [
        (
            views.policy == "stack" and not set(views.channels) & set(manifest.channels),
            f"views.channels: {location} has none of {', '.join(views.channels)}; it has {names}",
        ),
        (
            views.policy in ("consistency", "bag") and len(manifest.channels) < 2,
            f"views.policy: {views.policy} needs at least two channels, {location} has {names}; "
            "use views.policy=average",
        ),
    ]
    largest = max((min(map(int, shape.rsplit(maxsplit=1)[0].split(" x ")[1:])) for shape in manifest.shapes), default=0)
    for name, (some, size) in zip(("global_size", "local_size"), views.kinds, strict=True):
        conflicts.append(
            (
                0 < largest < size and len(some) > 0,
                f"views.{name}: crops have {size} px, and the tiles of {location} have at most {largest} px; "
                f"lower views.{name}, or build the set with larger tiles",
            )
        )
    for is_wrong, message in conflicts:
        if is_wrong:
            raise ConfigError(message)
