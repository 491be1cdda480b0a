"""Locks between processes; the system lets go of them when a process ends, also by kill -9."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Keep other processes from what is done in a folder, and say whether that worked.

    False: another process has it, and ``wait`` is off. Where there are no such locks (some disks of clusters, Windows)
    the folder is taken for ours.

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
        yield _lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
