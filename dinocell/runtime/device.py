"""How much memory there is to be had, of a GPU or of the machine within a job's limits, and how much was taken."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

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
    from resource import RUSAGE_SELF, getrusage  # Unix only: segmenting must load without it

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


# --- precision -----------------------------------------------------------------------------------------------------
#
# In which numbers matrix products are computed.

Precision = Literal["auto", "float32", "bfloat16"]


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Say whether matrix products run in bfloat16; ``auto`` means on GPUs that have it.

    Those are NVIDIA's from Ampere on (compute capability 8.0); older ones imitate it, slower than float32.
    """
    if precision != "auto":
        return precision == "bfloat16"
    return device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    )


# --- throughput ----------------------------------------------------------------------------------------------------
#
# Where the time of a training goes: waiting for data, and how much of what the device could compute is computed.

Item = TypeVar("Item")

# Dense bf16 (V100: fp16) matrix operations a second, from NVIDIA's data sheets; the longest name that fits counts.
_PEAK_TFLOPS = {
    "V100": 125.0,
    "A10": 125.0,
    "A30": 165.0,
    "A40": 150.0,
    "A100": 312.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H200": 989.0,
    "B200": 2250.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.0,
    "RTX A6000": 155.0,
}


class Throughput:
    """Measures a loop between two looks at it; see `metrics`.

    Parameters
    ----------
    device
        Whose peak counts.
    flop_per_step
        Operations that this rank's share of a step needs by the formula, recomputation not counted.
    """

    def __init__(self, device: torch.device, flop_per_step: float) -> None:
        self._device, self._flop = device, flop_per_step
        self._peak = peak_flop_per_s(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._waited = 0.0
        self._steps = 0
        self._since: float | None = None

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and count the time in which they were waited for."""
        iterator = iter(items)
        while True:
            start = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.monotonic() - start
            yield item

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Return the numbers since the last call; of the first steps, which warm up, only the memory.

        ``speed/data_wait_share``
            Share of the time in which the loop waited for the next batch.
        ``speed/tflops``, ``speed/mfu``
            Operations a second, by the formula, and as a share of the device's peak in bfloat16, where that is known.
        ``memory/gb``, ``memory/peak_gb``
            CUDA: allocated now, and at most since the last call; CPU: at most in the process's life, by the system.
        """
        now = time.monotonic()
        found = _memory(self._device)
        if self._since is not None and now > self._since and self._steps:
            seconds = now - self._since
            found["speed/data_wait_share"] = min(1.0, self._waited / seconds)
            rate = self._flop * self._steps / seconds
            found["speed/tflops"] = rate / 1e12
            if self._peak is not None:
                found["speed/mfu"] = rate / self._peak
        self._since, self._waited, self._steps = now, 0.0, 0
        return found


def peak_flop_per_s(name: str) -> float | None:
    """Return the peak of a GPU by its name, None if it is not in the table."""
    fitting = [known for known in _PEAK_TFLOPS if all(word in name.replace("-", " ").split() for word in known.split())]
    return 1e12 * _PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def _memory(device: torch.device) -> dict[str, float]:
    peak = peak_bytes(device) / 1e9
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory/gb": torch.cuda.memory_allocated(device) / 1e9, "memory/peak_gb": peak}
    return {"memory/peak_gb": peak}
