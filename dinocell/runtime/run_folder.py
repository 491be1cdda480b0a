"""Whose a run folder is: what is run there and from where; no run with other settings gets in, and no second process.

::

    config.yaml        the resolved configuration, every key written out
    environment.json   {"starts": [...]}: version, commit, packages, command line, machine of each start
    log.txt            locked by the process that writes to the folder
"""

import errno
import fcntl
import json
import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

from dinocell.configs.differences import diff_configs
from dinocell.configs.load import read_mapping, to_dict, to_yaml
from dinocell.errors import ConfigError, DinocellError
from dinocell.runtime.atomic import write_atomically
from dinocell.runtime.environment import environment

_log = logging.getLogger(__name__)

# A cluster starts a job again while it still ends the processes of the start before (SLURM's KillWait: 30 s).
_PATIENCE_S, _POLL_S = 60.0, 0.5


def claim(folder: Path, config: object, ignore: Collection[str], *, patience_s: float = _PATIENCE_S) -> TextIO:
    """Make a run folder, or check that it is of the same configuration; write what is run and where.

    Returns ``log.txt``, to be appended to; until it is closed, or this process ends, no other process gets in.

    Parameters
    ----------
    ignore
        Dotted keys or sections of the configuration that may differ.
    patience_s
        How long to wait for the end of another process that is at work in it.

    Raises
    ------
    ConfigError
        If it holds a run with another configuration.
    DinocellError
        If it is a file, another process is at work in it, or its ``environment.json`` is not one.
    OSError
        If it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise DinocellError(f"run folder {folder}: is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    check_same(folder, config, ignore)
    log = _open_locked(folder / "log.txt", patience_s)
    try:
        _describe(folder, config)
    except BaseException:
        log.close()
        raise
    return log


def _open_locked(path: Path, patience_s: float) -> TextIO:
    """Open for appending and lock: two processes would throw away each other's numbers and half-written states."""
    file = path.open("a", encoding="utf-8")
    end: float | None = None
    while not _lock(file):
        if end is None:
            end = time.monotonic() + patience_s
            _log.warning("%s: another process is at work in it; waiting %g s for its end", path.parent, patience_s)
        if time.monotonic() >= end:
            file.close()
            raise DinocellError(
                f"run folder {path.parent}: another process is at work in it; wait for its end, or stop it"
            )
        time.sleep(min(_POLL_S, patience_s))
    return file


def _lock(file: TextIO) -> bool:
    """Say whether the lock is ours now; where the disk knows none, say so, and take it for ours."""
    try:
        # Of the process, not of the open file: loader workers that outlive a killed run must not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        _log.warning("%s: cannot be locked (%s): do not start this run twice at once", file.name, error.strerror)
    return True


def _describe(folder: Path, config: object) -> None:
    write_atomically(folder / "config.yaml", to_yaml(config))
    environment_file = folder / "environment.json"
    starts: list[Any] = []
    if environment_file.exists():
        try:
            starts = list(json.loads(environment_file.read_text(encoding="utf-8"))["starts"])
        except (ValueError, KeyError, TypeError) as error:
            raise DinocellError(f'{environment_file}: expected {{"starts": [...]}}; move it away') from error
    write_atomically(environment_file, json.dumps({"starts": [*starts, environment()]}, indent=2) + "\n")


def check_same(folder: Path, config: object, ignore: Collection[str]) -> None:
    """Refuse a folder that holds a run with another configuration.

    Raises
    ------
    ConfigError
        If it does; it names what differs.
    """
    config_file = folder / "config.yaml"
    if config_file.exists():
        differing = diff_configs(read_mapping(config_file), to_dict(config), ignore)
        if differing:
            raise ConfigError(
                f"run folder {folder} holds a run with other settings ({'; '.join(differing)}); "
                "use another output folder, or the same settings"
            )
