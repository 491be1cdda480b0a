"""Read shard sets as an endless stream of batches, to be left and entered again at any batch, by any number of ranks.

The stream is a sequence of samples, the same for everybody (``order.py``). A step of the training takes the next
``batch_size x world_size`` of them, rank by rank; within a rank, loader workers take steps in turns. Where to go on is
one number, ``Batch.next_position``, and stays right when the number of ranks changes.

Batches run across the end of an epoch, so every rank always has as many, all of the same size.
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
from dinocell.data_shards.sample import RawSample, SampleError, SampleInfo, decode_sample
from dinocell.data_shards.shard_set import ShardCache, ShardSet
from dinocell.errors import ShardError
from dinocell.images.storage import local_path

# --- batch ---------------------------------------------------------------------------------------------------------
#
# A batch of tiles in one block of memory, whatever their sizes and types.

# Tiles begin at multiples of a cache line.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from; what is drawn for it at random derives from these numbers and the seed alone."""

    epoch: int
    data_set: int
    sample: int


@runtime_checkable
class SamplePlan(Protocol):
    """What will be done with a sample."""

    def channels(self) -> Sequence[int]:
        """Return the indices of the channels that are needed."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Decoded tiles of a rank's next samples.

    Attributes
    ----------
    infos, origins, channels
        What each sample is, where it comes from, and which of its channels are here.
    step_positions, own
        Positions in the stream of this step's samples, over all ranks, and which of them are in this batch.
    next_position
        The stream's position after this step of all ranks: what a checkpoint has to keep.
    damaged
        One line a sample that could not be read and was replaced by another.
    plans
        The plan of each sample, see `SampleStream`; empty without a planner.
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

    def tile(self, number: int) -> torch.Tensor:
        """Return the tile of a sample, (c h w), a view of the batch's one block of memory."""
        info, start = self.infos[number], self.starts[number]
        shape = (len(self.channels[number]), info.height, info.width)
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
    """Return where each tile begins in the batch's memory, and how many bytes that has."""
    starts, end = [], 0
    for info, chosen in zip(infos, channels, strict=True):
        starts.append(end)
        size = len(chosen) * info.height * info.width * np.dtype(info.dtype).itemsize
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return tuple(starts), end


_TORCH_TYPES = {
    name: getattr(torch, name)
    for name in (
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "float32",
        "float64",
    )
}


__all__ = ["Batch", "Origin", "PlanSample", "SamplePlan", "SampleStream", "ShardSet", "loader", "stream"]

_log = logging.getLogger(__name__)

# A damaged sample is replaced by one of the next positions, which mostly lie in other shards.
_REPLACEMENTS = 8
_CACHE_GB = 50.0


PlanSample = Callable[[SampleInfo, Origin], SamplePlan]

Item = TypeVar("Item")


class SampleStream(IterableDataset[Batch]):
    """The stream of one rank, see ``stream``; loader workers that iterate over it take its steps in turns.

    Attributes
    ----------
    plan_sample
        Plans what will be done with a sample before it is decoded (``Batch.plans``); other channels than those that
        the plan needs are not decoded. Picklable for workers, as are its plans. None: all channels, no plans.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        mixture: Mixture,
        *,
        batch_size: int,
        position: int,
        stop: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.sets, self.mixture = tuple(sets), mixture
        self.batch_size, self.position, self.stop = batch_size, position, stop
        self.rank, self.world_size = rank, world_size
        self.plan_sample: PlanSample | None = None

    @property
    def num_samples(self) -> int:
        """Samples of all sets: an epoch, if there is one set."""
        return sum(each.manifest.num_samples for each in self.sets)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        step, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step_size = self.batch_size * self.world_size
        while True:
            start = self.position + step * step_size
            if self.stop is not None and start >= self.stop:
                return
            everyone = range(start, start + step_size if self.stop is None else min(start + step_size, self.stop))
            own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            if everyone[own]:
                yield self._batch(everyone, own, next_position=start + step_size)
            step += stride

    def _batch(self, everyone: range, own: slice, *, next_position: int) -> Batch:
        positions = everyone[own]
        damaged: list[str] = []
        read = [self._read(position, 0, damaged) for position in positions]
        while True:
            samples = [each.sample for each in read]
            plans, channels = self._planned(read)
            starts, size = layout([sample.info for sample in samples], channels)
            storage = torch.empty(size, dtype=torch.uint8)
            batch = Batch(
                infos=tuple(sample.info for sample in samples),
                origins=tuple(each.origin for each in read),
                channels=tuple(channels),
                step_positions=everyone,
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
            # A replacement may have another size, so the batch is laid out anew.
            read[failed] = self._read(positions[failed], read[failed].tries, damaged)

    def _decode(self, batch: Batch, samples: Sequence[RawSample], damaged: list[str]) -> int | None:
        """Decode into the batch's memory; return the number of the first sample that cannot be, or None."""
        for number, sample in enumerate(samples):
            try:
                decode_sample(sample, batch.channels[number], out=batch.tile(number).numpy())
            except SampleError as error:
                self._report(damaged, batch.origins[number], error)
                return number
        return None

    def _planned(self, read: Sequence["_Read"]) -> tuple[list[SamplePlan], list[tuple[int, ...]]]:
        """Return the plan of each sample, if there is a planner, and the channels to decode."""
        if self.plan_sample is None:
            return [], [tuple(range(len(each.sample.info.channels))) for each in read]
        plans = [self.plan_sample(each.sample.info, each.origin) for each in read]
        return plans, [tuple(plan.channels()) for plan in plans]

    def _read(self, position: int, tries: int, damaged: list[str]) -> "_Read":
        """Read the sample of a position, or, if it is damaged, that of one of the next positions."""
        while tries < _REPLACEMENTS:
            number, within = self.mixture(position + tries)
            place = self.sets[number].order(within)
            origin = Origin(place.epoch, number, place.sample)
            tries += 1
            try:
                return _Read(self.sets[number].read(within, place), origin, tries)
            except SampleError as error:
                self._report(damaged, origin, error)
        raise ShardError(f"{_REPLACEMENTS} samples in a row cannot be read; the last: {damaged[-1]}")

    def _report(self, damaged: list[str], origin: Origin, error: SampleError) -> None:
        line = f"{self.sets[origin.data_set].location}: sample {origin.sample}: {error}"
        _log.warning("%s; replaced by another sample", line)
        damaged.append(line)


class _Read(NamedTuple):
    """A sample as read, where it comes from, and how many positions were tried for it."""

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
    sets
        Folders or addresses of shard sets.
    batch_size
        Samples a batch, of this rank.
    weights
        How often each set is to come; None: as often as it has samples.
    seed, position
        With the same seed, going on at ``Batch.next_position`` gives what would have come, on any number of ranks.
    stop
        End at this position, with a smaller last batch if need be; None goes on for ever. One pass over one set is
        ``stop=num_samples``.
    block_shards
        Shards that are mixed with one another at a time.
    cache, cache_gb
        For remote sets: a folder on this disk for copies of shards, and its bound.

    Raises
    ------
    ShardError
        If a set is missing or damaged, or the cache is too small.
    """
    locations = [sets] if isinstance(sets, str | Path) else list(sets)
    if not locations:
        raise ShardError("no shard set given")
    if not 0 <= rank < world_size or batch_size < 1 or position < 0:
        raise ValueError(f"rank {rank} of {world_size}, batch_size {batch_size}, position {position}: out of range")
    remote = [location for location in locations if local_path(location) is None]
    if remote and cache is None:
        raise ShardError(f"{remote[0]}: a remote set needs a cache: a folder on this machine's disk")
    copies = None if cache is None else ShardCache(cache, max_bytes=int(cache_gb * 1e9))
    opened = [
        ShardSet(location, seed=seed + number, shuffle=shuffle, block_shards=block_shards, cache=copies)
        for number, location in enumerate(locations)
    ]
    if weights is None:
        weights = [each.manifest.num_samples for each in opened]
    if len(weights) != len(opened):
        raise ShardError(f"expected {len(opened)} weights, one a set, got {len(weights)}")
    return SampleStream(
        opened,
        Mixture(weights, seed=seed),
        batch_size=batch_size,
        position=position,
        stop=stop,
        rank=rank,
        world_size=world_size,
    )


def loader(
    stream: IterableDataset[Item], *, workers: int, pin_memory: bool = False, prefetch: int = 2
) -> DataLoader[Item]:
    """Return a loader whose ``workers`` processes (0: none) decode ahead; batches come in the stream's order."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=False,
    )
