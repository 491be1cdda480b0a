"""What a run was started with: version, commit, packages, command line, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    from dinocell import __version__

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
