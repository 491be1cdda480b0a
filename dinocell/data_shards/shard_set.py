"""An open shard set: raw samples by index, from a local disk or through a cache of remote shards."""

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dinocell.data_shards.manifest import Shard, check_files, file_address, read_index, read_manifest
from dinocell.data_shards.order import EpochOrder, Place
from dinocell.data_shards.sample import RawSample, SampleError, parse_sample
from dinocell.errors import ImageError, ShardError
from dinocell.images.storage import copy_remote, local_path

_log = logging.getLogger(__name__)

_MAX_OPEN_SHARDS = 64


class ShardSet:
    """An open shard set: its manifest, its order, and its samples."""

    def __init__(
        self, location: str | Path, *, seed: int, shuffle: bool, block_shards: int, cache: "ShardCache | None"
    ) -> None:
        self.location = str(location)
        self.manifest = read_manifest(location)
        self._cache = None if local_path(location) is not None else cache
        sizes = [shard.num_samples for shard in self.manifest.shards]
        self.order = EpochOrder(sizes, seed=seed, shuffle=shuffle, block_shards=block_shards)
        if self._cache is not None:
            check_cache_size(self._cache, self.manifest.shards, block_shards)
        else:
            check_files(location, self.manifest)
        self._settings: dict[str, Any] = {
            "seed": seed,
            "shuffle": shuffle,
            "block_shards": block_shards,
            "cache": cache,
        }
        self._index = read_index(location, self.manifest)
        self._files: dict[int, int] = {}  # file descriptors by shard
        self._prefetched: tuple[int, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader's worker opens the files again; pickling would send it the whole index.
        return partial(ShardSet, self.location, **self._settings), ()

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def read(self, position: int, place: Place) -> RawSample:
        """Read a sample without decoding it; ``position`` is that of the set's own order.

        Raise SampleError if its bytes are damaged or cannot be read; ShardError if its shard cannot be downloaded.
        """
        if self._cache is not None:
            self._prefetch(position)
        start, size = (int(value) for value in self._index[place.sample])
        shard = self.manifest.shards[place.shard]
        is_inside = start + size <= shard.num_bytes  # or the index is damaged
        try:
            content = os.pread(self._open(place.shard), size, start) if is_inside else b""
            return parse_sample(memoryview(content))
        except (OSError, SampleError) as error:
            raise SampleError(f"{shard.file}, bytes {start} to {start + size}: {error}") from error

    def _open(self, index: int) -> int:
        if index not in self._files:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))  # the one that was opened first
            self._files[index] = self._open_file(self.manifest.shards[index])
        return self._files[index]

    def _open_file(self, shard: Shard) -> int:
        address = file_address(self.location, shard.file)
        if self._cache is None:
            return os.open(str(local_path(address)), os.O_RDONLY | os.O_CLOEXEC)
        while True:
            try:
                return os.open(self._cache.fetch(address, shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process has just deleted the copy to free space
                continue

    def _prefetch(self, position: int) -> None:
        """Start to download the next block when the first sample of a block is read."""
        block = self.order.block_of(position)
        if block == self._prefetched:
            return
        self._prefetched = block
        # Close the files of earlier blocks: open files of deleted copies would still use disk space.
        while self._files:
            os.close(self._files.popitem()[1])
        next_shards = self.order.shards_of(block[0], block[1] + 1)
        threading.Thread(target=self._fetch_all, args=(next_shards,), daemon=True).start()

    def _fetch_all(self, indices: Sequence[int]) -> None:
        assert self._cache is not None
        for index in indices:
            shard = self.manifest.shards[index]
            try:
                self._cache.fetch(file_address(self.location, shard.file), shard)
            except ShardError as error:  # the reader will try again, and raise
                _log.warning("%s", error)
                return


# --- local cache of remote shards -----------------------------------------------------------------------------------
#
# A folder of limited size with copies of remote shards, shared by all processes of a machine.
#
# A copy is named by the sha256 of the shard and renamed into place only when its bytes have that hash, so a copy of the
# right length is valid. One process downloads a shard, the others that need it wait.

# Attempts to download one shard, and the wait before the second; it doubles: 1 + 2 + ... + 64 s, about two minutes.
_ATTEMPTS = 8
_FIRST_WAIT_S = 1.0


class ShardCache:
    """Copies of remote shards in ``folder``, at most ``max_bytes`` in total; the least recently used are deleted."""

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes

    def fetch(self, address: str, shard: Shard) -> Path:
        """Return a local copy of a shard; download it if needed, or raise ShardError if that fails repeatedly."""
        copy = self.folder / f"{shard.sha256}.tar"
        try:
            if self._touch(copy, shard):
                return copy
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(f"{shard.sha256}.lock"):
                if not self._touch(copy, shard):
                    self._download(address, shard, copy)
        except OSError as error:
            raise ShardError(f"{self.folder}: the cache cannot be written ({error.strerror or error})") from error
        return copy

    def _touch(self, copy: Path, shard: Shard) -> bool:
        """Return whether a complete copy exists, and mark it as used."""
        try:
            os.utime(copy)
        except FileNotFoundError:
            return False
        return _file_size(copy) == shard.num_bytes

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by kill -9
            yield

    def _reserve(self, shard: Shard) -> Path:
        """Free space for a shard by deleting copies, and reserve it with an empty file of the shard's size."""
        with self._lock("room.lock"):
            used = shard.num_bytes
            for part in self.folder.glob("*.part"):
                if part.stem == shard.sha256 or self._is_abandoned(part):
                    part.unlink(missing_ok=True)
                else:
                    used += _file_size(part)
            copies = sorted((copy.stat().st_mtime, copy.stat().st_size, copy) for copy in self.folder.glob("*.tar"))
            used += sum(size for _, size, _ in copies)
            for _, size, copy in copies:
                if used <= self.max_bytes:
                    break
                copy.unlink()  # processes that have it open can still read it
                used -= size
            part = self.folder / f"{shard.sha256}.part"
            with part.open("wb") as file:
                file.truncate(shard.num_bytes)
        return part

    def _is_abandoned(self, part: Path) -> bool:
        """Return whether the process that downloaded to this file was killed: then nobody holds its lock."""
        with (self.folder / f"{part.stem}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _download(self, address: str, shard: Shard, copy: Path) -> None:
        part = self._reserve(shard)
        waits_s = [_FIRST_WAIT_S * 2**attempt for attempt in range(_ATTEMPTS - 1)]
        try:
            for wait_s in (*waits_s, 0.0):
                try:
                    with part.open("r+b") as target:
                        digest = copy_remote(address, target, num_bytes=shard.num_bytes)
                        target.truncate()
                    if digest == shard.sha256:
                        part.replace(copy)
                        return
                    reason = "its content differs from the manifest"
                except ImageError as error:
                    reason = str(error)
                if wait_s:
                    _log.warning("%s: %s; trying again in %.0f s", address, reason, wait_s)
                    time.sleep(wait_s)
        finally:
            part.unlink(missing_ok=True)
        raise ShardError(f"{address}: download failed {_ATTEMPTS} times; the last: {reason}")


def _file_size(path: Path) -> int:
    """Return a file's size; 0 if another process has just renamed or removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def check_cache_size(cache: ShardCache, shards: tuple[Shard, ...], block_shards: int) -> None:
    """Raise ShardError unless cache and disk hold three blocks: the current, the next, and one of slower processes."""
    needed = min(sum(shard.num_bytes for shard in shards), 3 * block_shards * max(shard.num_bytes for shard in shards))
    existing = next(folder for folder in (cache.folder, *cache.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + sum(map(_file_size, cache.folder.glob("*.tar")))
    for available, what in ((cache.max_bytes, "cache size"), (free, "free disk space")):
        if available < needed:
            raise ShardError(
                f"{cache.folder}: {what} {available / 1e9:.1f} GB; three blocks of shards need {needed / 1e9:.1f} GB, "
                "use a larger cache or smaller blocks"
            )
