"""Locks between processes; the system lets go of them when a process ends, also by kill -9."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
