"""A bounded folder of copies of remote shards, shared by all processes of a machine.

A copy is named by the sha256 of the shard and renamed into place only when its bytes have that hash, so a copy that is
there in its full length is right. One process downloads a shard, the others that want it wait for it.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinocell.data_shards.downloads import download
from dinocell.data_shards.manifest import Shard
from dinocell.errors import ImageError, ShardError

_log = logging.getLogger(__name__)

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
                        digest = download(address, target, num_bytes=shard.num_bytes)
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
