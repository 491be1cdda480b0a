"""Whose a run folder is: what is run there and from where; no run with other settings gets in, and no second process.

::

    config.yaml        the resolved configuration, every key written out
    environment.json   {"starts": [...]}: version, commit, packages, command line, machine of each start
    log.txt            locked by the process that writes to the folder
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from dinocell.configs.load import read_stored, to_dict, to_yaml
from dinocell.configs.schema import diff_configs
from dinocell.errors import ConfigError, DinocellError
from dinocell.runtime.files import write_atomically

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
        differing = diff_configs(read_stored(type(config), config_file), to_dict(config), ignore)
        if differing:
            raise ConfigError(
                f"run folder {folder} holds a run with other settings ({'; '.join(differing)}); "
                "use another output folder, or the same settings"
            )


# --- environment ---------------------------------------------------------------------------------------------------
#
# What a run was started with: version, commit, packages, command line, machine.

PACKAGES = (
    "torch",
    "numpy",
    "omegaconf",
    "safetensors",
    "huggingface_hub",
    "jaxtyping",
    "rich",
    "tensorboard",
    "pillow",
    "fvcore",
    "xformers",
)


def environment() -> dict[str, Any]:
    """Return a JSON-able description of this process and machine.

    Versions come from package metadata, so nothing heavy is imported; CUDA devices are listed only
    if torch is imported already. ``git`` is null unless DINOCell runs from a checkout.
    """
    from dinocell._version import __version__

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "dinocell": __version__,
        "git": git_state(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "argv": list(sys.argv),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "cuda_devices": _cuda_devices(),
    }


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Return ``commit``, and ``dirty`` if files under ``dinocell/`` differ from it; None without a checkout."""
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    changes = _git(checkout, "status", "--porcelain", "--", "dinocell")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):  # no git here, no commit yet, or a checkout of another user
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cuda_devices() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
