"""Read shard sets as an endless stream of batches, to be left and entered again at any batch, by any number of ranks.

The stream is a sequence of samples, the same for everybody (``order.py``). A step of the training takes the next
``batch_size x world_size`` of them, rank by rank; within a rank, loader workers take steps in turns. Where to go on is
one number, ``Batch.next_position``, and stays right when the number of ranks changes.

Batches run across the end of an epoch, so every rank always has as many, all of the same size.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dinocell.data_shards.cache import ShardCache, check_room
from dinocell.data_shards.locations import local_path
from dinocell.data_shards.manifest import Shard, beside, read_index, read_manifest
from dinocell.data_shards.order import EpochOrder, Mixture, Place
from dinocell.data_shards.sample import RawSample, SampleError, SampleInfo, decode_sample, parse_sample
from dinocell.errors import ShardError

_log = logging.getLogger(__name__)

# Tiles begin at multiples of a cache line.
_ALIGNMENT = 64
# A damaged sample is replaced by one of the next positions, which mostly lie in other shards.
_REPLACEMENTS = 8
_OPEN_SHARDS = 64
_CACHE_GB = 50.0

# From what is known about a sample, and the numbers that its randomness comes from: the channels that will be needed.
Choose = Callable[[SampleInfo, "Origin"], Sequence[int] | None]


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from; what is drawn for it at random derives from these numbers and the seed alone."""

    epoch: int
    data_set: int
    sample: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Decoded tiles of a rank's next samples.

    Attributes
    ----------
    infos, origins, channels
        What each sample is, where it comes from, and which of its channels are here.
    next_position
        The stream's position after this step of all ranks: what a checkpoint has to keep.
    damaged
        One line a sample that could not be read and was replaced by another.
    """

    infos: tuple[SampleInfo, ...]
    origins: tuple[Origin, ...]
    channels: tuple[tuple[int, ...], ...]
    next_position: int
    damaged: tuple[str, ...]
    storage: torch.Tensor
    starts: tuple[int, ...]

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
        return _with_storage(self, self.storage.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tiles on a device, in one copy."""
        return _with_storage(self, self.storage.to(device, non_blocking=non_blocking))


class SampleStream(IterableDataset[Batch]):
    """The stream of one rank; see ``stream``. Iterating it in a loader's workers shares its steps out among them."""

    def __init__(
        self,
        sets: Sequence["ShardSet"],
        mixture: Mixture,
        *,
        batch_size: int,
        position: int,
        stop: int | None,
        rank: int,
        world_size: int,
        choose: Choose | None,
    ) -> None:
        self.sets, self.mixture = tuple(sets), mixture
        self.batch_size, self.position, self.stop = batch_size, position, stop
        self.rank, self.world_size = rank, world_size
        self._choose = choose

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
            first = start + self.rank * self.batch_size
            end = first + self.batch_size
            if self.stop is not None:
                end = min(end, self.stop)
            if first < end:
                yield self._batch(range(first, end), next_position=start + step_size)
            step += stride

    def _batch(self, positions: range, *, next_position: int) -> Batch:
        damaged: list[str] = []
        read = [self._read(position, 0, damaged) for position in positions]
        while True:
            samples = [each.sample for each in read]
            channels = [self._channels(each.sample.info, each.origin) for each in read]
            starts, size = _layout([sample.info for sample in samples], channels)
            storage = torch.empty(size, dtype=torch.uint8)
            batch = Batch(
                infos=tuple(sample.info for sample in samples),
                origins=tuple(each.origin for each in read),
                channels=tuple(channels),
                next_position=next_position,
                damaged=tuple(damaged),
                storage=storage,
                starts=starts,
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

    def _channels(self, info: SampleInfo, origin: Origin) -> tuple[int, ...]:
        chosen = self._choose(info, origin) if self._choose is not None else None
        return tuple(range(len(info.channels))) if chosen is None else tuple(chosen)

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


class ShardSet:
    """An open shard set: its manifest, its order, and its samples by their number."""

    def __init__(
        self, location: str | Path, *, seed: int, shuffle: bool, block_shards: int, cache: ShardCache | None
    ) -> None:
        self.location = str(location)
        self.manifest = read_manifest(location)
        self._cache = None if local_path(location) is not None else cache
        sizes = [shard.num_samples for shard in self.manifest.shards]
        self.order = EpochOrder(sizes, seed=seed, shuffle=shuffle, block_shards=block_shards)
        if self._cache is not None:
            check_room(self._cache, self.manifest.shards, block_shards)
        else:
            self._check_shards()
        self._again = {"seed": seed, "shuffle": shuffle, "block_shards": block_shards, "cache": cache}
        self._index = read_index(location, self.manifest)
        self._files: dict[int, int] = {}
        self._fetched: tuple[int, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader's worker opens the files again; NumPy would send it the whole index.
        return _reopen, (self.location, self._again)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def read(self, position: int, place: Place) -> RawSample:
        """Read a sample without decoding it; ``position`` is that of the set's own order.

        Raises
        ------
        SampleError
            If its bytes are damaged or cannot be read.
        ShardError
            If its shard cannot be downloaded.
        """
        if self._cache is not None:
            self._fetch_ahead(position)
        start, size = (int(number) for number in self._index[place.sample])
        shard = self.manifest.shards[place.shard]
        try:
            content = os.pread(self._open(place.shard), size, start)
        except OSError as error:
            raise SampleError(f"{shard.file}: cannot be read ({error.strerror or error})") from error
        if len(content) != size:
            raise SampleError(f"{shard.file}: cut short")
        try:
            return parse_sample(memoryview(content))
        except SampleError as error:
            raise SampleError(f"{shard.file}: {error}") from error

    def _open(self, number: int) -> int:
        if number in self._files:
            return self._files[number]
        if len(self._files) >= _OPEN_SHARDS:
            os.close(self._files.pop(next(iter(self._files))))  # the one that was opened first
        self._files[number] = self._open_anew(self.manifest.shards[number])
        return self._files[number]

    def _open_anew(self, shard: Shard) -> int:
        address = beside(self.location, shard.file)
        if self._cache is None:
            return os.open(str(local_path(address)), os.O_RDONLY | os.O_CLOEXEC)
        while True:
            try:
                return os.open(self._cache.fetch(address, shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process made room of it in this very moment
                continue

    def _fetch_ahead(self, position: int) -> None:
        """Begin to download the next block when the first sample of a block is read."""
        block = self.order.block_of(position)
        if block == self._fetched:
            return
        self._fetched = block
        # Close what belongs to earlier blocks, or deleted copies would keep their room on the disk.
        while self._files:
            os.close(self._files.popitem()[1])
        ahead = self.order.shards_of(block[0], block[1] + 1)
        threading.Thread(target=self._fetch_all, args=(ahead,), daemon=True).start()

    def _fetch_all(self, numbers: Sequence[int]) -> None:
        assert self._cache is not None
        for number in numbers:
            shard = self.manifest.shards[number]
            try:
                self._cache.fetch(beside(self.location, shard.file), shard)
            except ShardError as error:  # the reader itself will try again, and fail where it is needed
                _log.warning("%s", error)
                return

    def _check_shards(self) -> None:
        wrong = []
        for shard in self.manifest.shards:
            path = local_path(beside(self.location, shard.file))
            assert path is not None
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                wrong.append(f"{shard.file} is missing")
            else:
                if size != shard.num_bytes:
                    wrong.append(f"{shard.file} has {size} bytes instead of {shard.num_bytes}")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ShardError(f"{self.location}: {'; '.join(wrong[:3])}{more}; copy or build the set again")


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
    choose: Choose | None = None,
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
    choose
        Says which channels of a sample are needed; the others are not decoded. It must be picklable for workers.
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
        choose=choose,
    )


def loader(stream: SampleStream, *, workers: int, pin_memory: bool = False, prefetch: int = 2) -> DataLoader[Batch]:
    """Return a loader whose ``workers`` processes (0: none) decode ahead; batches come in the stream's order."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=False,
    )


def _reopen(location: str, settings: dict[str, Any]) -> ShardSet:
    return ShardSet(location, **settings)


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


def _layout(infos: Sequence[SampleInfo], channels: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
    """Return where each tile begins in the batch's memory, and how many bytes that has."""
    starts, end = [], 0
    for info, chosen in zip(infos, channels, strict=True):
        starts.append(end)
        size = len(chosen) * info.height * info.width * np.dtype(info.dtype).itemsize
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return tuple(starts), end


def _with_storage(batch: Batch, storage: torch.Tensor) -> Batch:
    return replace(batch, storage=storage)
