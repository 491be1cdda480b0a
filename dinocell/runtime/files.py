"""Write files atomically, and lock folders between processes."""

import csv
import logging
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; it is renamed to ``path`` if the block succeeds, else removed."""
    temporary = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:  # the content must reach the disk before the name does
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds either the old or the new content."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_table(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file, the header first, as `write_atomically` does."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a folder against other processes, and yield whether that succeeded.

    It fails if another process holds the lock and ``wait`` is off. File systems without locks (some clusters, with a
    warning; Windows) count as locked. The system releases the lock when the process ends, also by kill -9; no lock
    file is left in the folder.

    Raises OSError if the folder cannot be opened.
    """
    if sys.platform == "win32":
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            is_locked = False
        except OSError as error:
            _log.warning("%s: cannot be locked (%s): run one process at a time in it", folder, error.strerror)
        yield is_locked
    finally:
        os.close(descriptor)
