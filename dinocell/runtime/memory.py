"""How much memory there is to be had, of a GPU or of the machine within a job's limits, and how much was taken."""

import sys
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch


def available_bytes(device: torch.device, *, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process could still take on a device; None where the system does not say.

    On the CPU that is what the kernel calls available, or what the limits of the control groups leave (containers,
    SLURM), whichever is less. What the caches of files hold counts as available, as the kernel gives it up.

    Parameters
    ----------
    device
        CUDA or the CPU.
    root
        Where ``proc`` and ``sys`` lie.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    rooms = [*_of_machine(root), *_of_groups(root)]
    return max(0, min(rooms)) if rooms else None


def peak_bytes(device: torch.device) -> int:
    """Return the most that was taken: on CUDA by tensors since the last reset, else by this process in its life."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _of_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc" / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _of_groups(root: Path) -> Iterator[int]:
    """Yield what each control group above this process leaves, of version 2 or 1."""
    mounted = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names, cached = mounted, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            top, cached = mounted / "memory", "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be that of the host, and the group itself is what is mounted.
        folder = top / path.lstrip("/")
        for each in (folder, *folder.parents):
            if not each.is_relative_to(top):
                break
            limit, used = (_number(each / name) for name in names)
            if limit is not None and used is not None:
                yield limit - used + _statistic(each / "memory.stat", cached)


def _statistic(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[0] == name), 0)


def _number(path: Path) -> int | None:
    """Return the number that a file holds; None if there is no such file, or it says ``max``."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:  # not Linux, or no such group
        return []
