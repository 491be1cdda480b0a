"""A run folder: its configuration and environment, and a lock that keeps a second process out.

::

    config.yaml        the resolved configuration with every key
    environment.json   {"starts": [...]}: version, commit, packages, command line and machine of each start
    log.txt            locked by the process that writes to the folder
"""

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from dinocell.configs.load import read_stored, to_dict, to_yaml
from dinocell.configs.schema import diff_configs
from dinocell.errors import ConfigError, DinocellError
from dinocell.runtime.files import write_atomically

_log = logging.getLogger(__name__)

# SLURM requeues a job while it still ends the processes of the previous start (KillWait: 30 s).
_PATIENCE_S, _POLL_S = 60.0, 0.5


def claim(folder: Path, config: object, ignore: Collection[str], *, patience_s: float = _PATIENCE_S) -> TextIO:
    """Make a run folder, or check that it has the same configuration; write its configuration and environment.

    Returns ``log.txt``, open for appending; until it is closed or this process ends, no other process can claim the
    folder. ``ignore`` lists dotted keys or sections of the configuration that may differ; ``patience_s`` is how long to
    wait for another process that uses the folder.

    Raises
    ------
    ConfigError
        If it holds a run with another configuration.
    DinocellError
        If another process uses it, or its ``environment.json`` is damaged.
    OSError
        If it is a file, or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_same(folder, config, ignore)
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log.txt").open("a", encoding="utf-8"))
        _lock(log, folder, patience_s)
        _describe(folder, config)
        stack.pop_all()
    return log


def _lock(file: TextIO, folder: Path, patience_s: float) -> None:
    """Lock a file: two processes would overwrite each other's numbers and checkpoints."""
    end = time.monotonic() + patience_s
    has_warned = False
    while True:
        try:
            # lockf locks for the process, not the open file: loader workers that outlive a killed run do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end:
                problem = "in use by another process; wait for it, or stop it"
                raise DinocellError(f"run folder {folder}: {problem}") from None
        except OSError as error:
            _log.warning("%s: cannot be locked (%s): start this run only once at a time", file.name, error.strerror)
            return
        if not has_warned:
            _log.warning("%s: in use by another process; waiting up to %g s for it", folder, patience_s)
            has_warned = True
        time.sleep(min(_POLL_S, patience_s))


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
    """Raise :class:`ConfigError` if a folder holds a run with another configuration; it names what differs."""
    stored = folder / "config.yaml"
    if stored.exists() and (differing := diff_configs(read_stored(type(config), stored), to_dict(config), ignore)):
        raise ConfigError(
            f"run folder {folder} holds a run with other settings ({'; '.join(differing)}); "
            "use another output folder, or the same settings"
        )


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

    Versions are read from package metadata, without imports; CUDA devices are listed only if torch is imported already.
    ``git`` is null unless DINOCell runs from a checkout.
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
    """Return ``commit`` and ``dirty``, whether files under ``dinocell/`` differ from it; None without a checkout."""
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
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or another user's checkout
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def _cuda_devices() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
