"""An open shard set: raw samples by their number, from this disk or through a cache of remote shards."""

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinocell.data_shards.cache import ShardCache, check_room
from dinocell.data_shards.locations import local_path
from dinocell.data_shards.manifest import Shard, beside, check_files, read_index, read_manifest
from dinocell.data_shards.order import EpochOrder, Place
from dinocell.data_shards.sample import RawSample, SampleError, parse_sample
from dinocell.errors import ShardError

_log = logging.getLogger(__name__)

_OPEN_SHARDS = 64


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
            check_files(location, self.manifest)
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
        if start + size > shard.num_bytes:
            raise SampleError(f"{shard.file}: the index is damaged (bytes {start} to {start + size})")
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


def _reopen(location: str, settings: dict[str, Any]) -> ShardSet:
    return ShardSet(location, **settings)
