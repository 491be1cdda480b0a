"""An open shard set: raw samples by their number, from this disk or through a cache of remote shards."""

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinocell.data_shards.manifest import Shard, beside, check_files, read_index, read_manifest
from dinocell.data_shards.order import EpochOrder, Place
from dinocell.data_shards.sample import RawSample, SampleError, parse_sample
from dinocell.errors import ImageError, ShardError
from dinocell.images.storage import copy_remote, local_path

# --- cache ---------------------------------------------------------------------------------------------------------
#
# A bounded folder of copies of remote shards, shared by all processes of a machine.
#
# A copy is named by the sha256 of the shard and renamed into place only when its bytes have that hash, so a copy that
# is
# there in its full length is right. One process downloads a shard, the others that want it wait for it.

# Tries to download one shard, and the wait before the second; it doubles: 1 + 2 + ... + 64 s, about two minutes.
_TRIES = 8
_FIRST_WAIT_S = 1.0


class ShardCache:
    """Copies of remote shards in ``folder``, together at most ``max_bytes``; the least recently used go first."""

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes

    def fetch(self, address: str, shard: Shard) -> Path:
        """Return a local copy of a shard, downloading it if need be.

        Raises
        ------
        ShardError
            If it cannot be downloaded, or has other content than the manifest says.
        """
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
        """Return whether the copy is there, and mark it as used; one that was cut short since is none."""
        try:
            os.utime(copy)
            return copy.stat().st_size == shard.num_bytes
        except FileNotFoundError:
            return False

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by kill -9
            yield

    def _reserve(self, shard: Shard) -> Path:
        """Make room for a shard, by deleting copies, and take it with an empty file of the shard's size."""
        with self._lock("room.lock"):
            held = shard.num_bytes
            for part in self.folder.glob("*.part"):
                if part.stem == shard.sha256 or self._is_leftover(part):
                    part.unlink(missing_ok=True)
                else:
                    held += _size(part)
            copies = sorted((copy.stat().st_mtime, copy.stat().st_size, copy) for copy in self.folder.glob("*.tar"))
            held += sum(size for _, size, _ in copies)
            for _, size, copy in copies:
                if held <= self.max_bytes:
                    break
                copy.unlink()  # who has it open can go on reading it
                held -= size
            part = self.folder / f"{shard.sha256}.part"
            with part.open("wb") as file:
                file.truncate(shard.num_bytes)
        return part

    def _is_leftover(self, part: Path) -> bool:
        """Whether nobody is downloading to this file: its process was killed."""
        with (self.folder / f"{part.stem}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _download(self, address: str, shard: Shard, copy: Path) -> None:
        wait, reason = _FIRST_WAIT_S, ""
        part = self._reserve(shard)
        try:
            for attempt in range(_TRIES):
                if attempt:
                    _log.warning("%s: %s; trying again in %.0f s", address, reason, wait)
                    time.sleep(wait)
                    wait *= 2
                try:
                    with part.open("r+b") as target:
                        digest = copy_remote(address, target, num_bytes=shard.num_bytes)
                        target.truncate()
                except ImageError as error:
                    reason = str(error)
                    continue
                if digest == shard.sha256:
                    part.replace(copy)
                    return
                reason = "its content differs from what the manifest says"
        finally:
            part.unlink(missing_ok=True)
        raise ShardError(f"{address}: not downloaded in {_TRIES} tries; the last: {reason}")


def _size(path: Path) -> int:
    """Return a file's size; 0 if another process has just renamed or removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def check_room(cache: ShardCache, shards: tuple[Shard, ...], block_shards: int) -> None:
    """Check that the cache holds the block that is being read, the next one, and one that slower processes still read.

    Raises
    ------
    ShardError
        If it does not, or the disk is smaller than that.
    """
    needed = min(sum(shard.num_bytes for shard in shards), 3 * block_shards * max(shard.num_bytes for shard in shards))
    if cache.max_bytes < needed:
        raise ShardError(
            f"{cache.folder}: a cache of {cache.max_bytes / 1e9:.1f} GB is less than three blocks of shards "
            f"({needed / 1e9:.1f} GB); make it larger or the blocks smaller"
        )
    existing = next(folder for folder in (cache.folder, *cache.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + sum(map(_size, cache.folder.glob("*.tar")))
    if free < needed:
        raise ShardError(f"{cache.folder}: {free / 1e9:.1f} GB free, the cache needs at least {needed / 1e9:.1f} GB")


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
