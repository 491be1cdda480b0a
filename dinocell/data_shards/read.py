"""Read shard sets as an endless stream of batches that resumes at any batch, with any number of ranks.

The stream is one sequence of samples (``order.py``). A training step consumes the next ``batch_size x world_size`` of
them, rank by rank; within a rank, loader workers take turns by step. To resume, one number is enough:
``Batch.next_position``. It stays valid if the number of ranks changes.

Batches cross the end of an epoch, so every rank has the same number of batches, all of the same size.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dinocell.data_shards.order import Mixture
from dinocell.data_shards.sample import NUMBER_TYPES, RawSample, SampleError, SampleInfo, decode_sample
from dinocell.data_shards.shard_set import ShardCache, ShardSet
from dinocell.errors import ShardError
from dinocell.images.storage import local_path

# In a batch, tiles start at multiples of a cache line.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Origin:
    """The identity of a sample; random numbers for it derive from these numbers and the seed alone."""

    epoch: int
    data_set: int
    sample: int


@runtime_checkable
class SamplePlan(Protocol):
    """How to process a sample."""

    def channels(self) -> Sequence[int]:
        """Return the indices of the channels that are needed."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Decoded tiles of a rank's next samples, of any sizes and types, in one block of memory.

    Attributes
    ----------
    infos, origins, channels
        Metadata and identity of each sample, and which of its channels were decoded.
    step_positions, own
        Positions in the stream of this step's samples on all ranks, and which of them are in this batch.
    next_position
        The stream's position after this step of all ranks; a checkpoint stores it.
    damaged
        One line per sample that could not be read and was replaced by another.
    plans
        Of each sample, see `SampleStream`; empty without a planner.
    """

    infos: tuple[SampleInfo, ...]
    origins: tuple[Origin, ...]
    channels: tuple[tuple[int, ...], ...]
    step_positions: range
    own: slice
    next_position: int
    damaged: tuple[str, ...]
    storage: torch.Tensor
    starts: tuple[int, ...]
    plans: tuple[SamplePlan, ...] = ()

    def __len__(self) -> int:
        return len(self.infos)

    def tile(self, index: int) -> torch.Tensor:
        """Return the tile of a sample, (c h w), a view of the batch's memory."""
        info, start = self.infos[index], self.starts[index]
        shape = (len(self.channels[index]), info.height, info.width)
        dtype = _TORCH_TYPES[info.dtype]
        end = start + int(np.prod(shape)) * dtype.itemsize
        return self.storage[start:end].view(dtype).view(shape)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; PyTorch's loader calls this."""
        return replace(self, storage=self.storage.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tiles on a device, in one copy."""
        return replace(self, storage=self.storage.to(device, non_blocking=non_blocking))


def layout(infos: Sequence[SampleInfo], channels: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
    """Return the first byte of each tile in the batch's memory, and its total size in bytes."""
    starts, end = [], 0
    for info, chosen in zip(infos, channels, strict=True):
        starts.append(end)
        size = len(chosen) * info.height * info.width * np.dtype(info.dtype).itemsize
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return tuple(starts), end


_TORCH_TYPES = {name: getattr(torch, name) for name in NUMBER_TYPES}

_log = logging.getLogger(__name__)

# A damaged sample is replaced by one of the next positions, which are mostly in other shards.
_REPLACEMENTS = 8
_CACHE_GB = 50.0


PlanSample = Callable[[SampleInfo, Origin], SamplePlan]

Item = TypeVar("Item")


@dataclass(kw_only=True, eq=False, repr=False)
class SampleStream(IterableDataset[Batch]):
    """The stream of one rank; see ``stream``. In a loader's workers, each iterates over its share of the steps.

    Attributes
    ----------
    plan_sample
        Decides how to process a sample before it is decoded: ``Batch.plans``. Only the channels needed for that are
        decoded. It must be picklable for workers, and so must its results. None: all channels, no plans.
    """

    sets: tuple[ShardSet, ...]
    mixture: Mixture
    batch_size: int
    position: int
    stop: int | None
    rank: int
    world_size: int
    plan_sample: PlanSample | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples of all sets: an epoch, if there is one set."""
        return sum(shard_set.manifest.num_samples for shard_set in self.sets)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        step, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step_size = self.batch_size * self.world_size
        while True:
            start = self.position + step * step_size
            if self.stop is not None and start >= self.stop:
                return
            positions = range(start, start + step_size if self.stop is None else min(start + step_size, self.stop))
            own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            if positions[own]:
                yield self._batch(positions, own, next_position=start + step_size)
            step += stride

    def _batch(self, positions: range, own: slice, *, next_position: int) -> Batch:
        damaged: list[str] = []
        reads = [self._read(position, 0, damaged) for position in positions[own]]
        while True:
            samples = [read.sample for read in reads]
            plans, channels = self._planned(reads)
            starts, size = layout([sample.info for sample in samples], channels)
            storage = torch.empty(size, dtype=torch.uint8)
            batch = Batch(
                infos=tuple(sample.info for sample in samples),
                origins=tuple(read.origin for read in reads),
                channels=tuple(channels),
                step_positions=positions,
                own=own,
                next_position=next_position,
                damaged=tuple(damaged),
                storage=storage,
                starts=starts,
                plans=tuple(plans),
            )
            failed = self._decode(batch, samples, damaged)
            if failed is None:
                return batch
            # The replacement may have another size, so the layout of the batch is computed again.
            reads[failed] = self._read(positions[own][failed], reads[failed].tries, damaged)

    def _decode(self, batch: Batch, samples: Sequence[RawSample], damaged: list[str]) -> int | None:
        """Decode into the batch's memory; return the index of the first sample that fails, or None."""
        for index, sample in enumerate(samples):
            try:
                decode_sample(sample, batch.channels[index], out=batch.tile(index).numpy())
            except SampleError as error:
                self._report(damaged, batch.origins[index], error)
                return index
        return None

    def _planned(self, reads: Sequence["_Read"]) -> tuple[list[SamplePlan], list[tuple[int, ...]]]:
        """Return the plan of each sample, if there is a planner, and the channels to decode."""
        if self.plan_sample is None:
            return [], [tuple(range(len(read.sample.info.channels))) for read in reads]
        plans = [self.plan_sample(read.sample.info, read.origin) for read in reads]
        return plans, [tuple(plan.channels()) for plan in plans]

    def _read(self, position: int, tries: int, damaged: list[str]) -> "_Read":
        """Read the sample of a position, or of one of the next positions if it is damaged."""
        while tries < _REPLACEMENTS:
            set_index, set_position = self.mixture(position + tries)
            place = self.sets[set_index].order(set_position)
            origin = Origin(place.epoch, set_index, place.sample)
            tries += 1
            try:
                return _Read(self.sets[set_index].read(set_position, place), origin, tries)
            except SampleError as error:
                self._report(damaged, origin, error)
        raise ShardError(f"{_REPLACEMENTS} samples in a row cannot be read; the last: {damaged[-1]}")

    def _report(self, damaged: list[str], origin: Origin, error: SampleError) -> None:
        line = f"{self.sets[origin.data_set].location}: sample {origin.sample}: {error}"
        _log.warning("%s; replaced by another sample", line)
        damaged.append(line)


class _Read(NamedTuple):
    """An encoded sample, its identity, and the number of positions tried for it."""

    sample: RawSample
    origin: Origin
    tries: int


def stream(
    sets: str | Path | Sequence[str | Path],
    *,
    batch_size: int,
    weights: Sequence[int | float] | None = None,
    seed: int = 0,
    position: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    block_shards: int = 16,
    cache: str | Path | None = None,
    cache_gb: int | float = _CACHE_GB,
) -> SampleStream:
    """Open shard sets as the stream of one rank.

    Parameters
    ----------
    weights
        Relative frequency of each set; None: its number of samples.
    seed, position
        With the same seed, a stream from ``Batch.next_position`` continues the previous one, on any number of ranks.
    stop
        End at this position, with a smaller last batch if needed; None never ends. ``stop=num_samples`` is one pass
        over one set.
    block_shards
        Number of shards whose samples are shuffled together.
    cache, cache_gb
        For remote sets: a local folder for copies of shards, and its maximum size.

    Raises
    ------
    ShardError
        If a set is missing or damaged, or the cache is too small.
    """
    locations = [sets] if isinstance(sets, str | Path) else list(sets)
    numbers = f"rank {rank} of {world_size}, batch_size {batch_size}, position {position}"
    remote = [location for location in locations if local_path(location) is None]
    for is_wrong, problem in (
        (not 0 <= rank < world_size or batch_size < 1 or position < 0, f"{numbers}: out of range"),
        (not locations, "no shard set given"),
        (remote and cache is None, f"{', '.join(map(str, remote))}: a remote set needs a cache, a local folder"),
        (weights and len(weights) != len(locations), f"expected {len(locations)} weights, one per set, got {weights}"),
    ):
        if is_wrong:
            raise ShardError(problem)
    copies = None if cache is None else ShardCache(cache, max_bytes=int(cache_gb * 1e9))
    opened = [
        ShardSet(location, seed=seed + index, shuffle=shuffle, block_shards=block_shards, cache=copies)
        for index, location in enumerate(locations)
    ]
    if weights is None:
        weights = [shard_set.manifest.num_samples for shard_set in opened]
    return SampleStream(
        sets=tuple(opened),
        mixture=Mixture(weights, seed=seed),
        batch_size=batch_size,
        position=position,
        stop=stop,
        rank=rank,
        world_size=world_size,
    )


def loader(
    stream: IterableDataset[Item], *, workers: int, pin_memory: bool = False, prefetch: int = 2
) -> DataLoader[Item]:
    """Return a loader with ``workers`` decoding processes (0: none); batches are in the stream's order."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
    )
