"""Files that are never half written."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; it is renamed to ``path`` if the block ends well, else removed."""
    temporary = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:  # the content reaches the disk before the name does
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds the old or the new content, never a part of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- locks ---------------------------------------------------------------------------------------------------------
#
# Locks between processes; the system lets go of them when a process ends, also by kill -9.

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Keep other processes from what is done in a folder, and say whether that worked.

    False: another process has it, and ``wait`` is off. Where there are no such locks (some disks of clusters, which is
    said; Windows) the folder is taken for ours.

    Raises
    ------
    OSError
        If the folder cannot be opened.
    """
    if sys.platform == "win32":
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_ours = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            is_ours = False
        except OSError as error:
            _log.warning("%s: cannot be locked (%s): let no two processes write to it at once", folder, error.strerror)
        yield is_ours
    finally:
        os.close(descriptor)
