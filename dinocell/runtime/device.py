"""Memory of a GPU or of the machine within a job's limits, precision of matrix products, and throughput."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import torch

_log = logging.getLogger(__name__)


def available_bytes(device: torch.device, *, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still allocate on a device; None if the system does not report it.

    On the CPU it is the kernel's estimate, or what the limits of the control groups (containers, SLURM) leave if that
    is less. File caches count as available, because the kernel frees them on demand.
    ``root`` is the folder of ``proc`` and ``sys``.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    limits = [*_machine_bytes(root), *_group_bytes(root)]
    return max(0, min(limits)) if limits else None


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory: on CUDA of tensors since the last reset, else of this process since it started."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    from resource import RUSAGE_SELF, getrusage  # not on Windows

    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine_bytes(root: Path) -> Iterator[int]:
    if (kilobytes := _statistic(root / "proc" / "meminfo", "MemAvailable:")) is not None:
        yield 1024 * kilobytes


def _group_bytes(root: Path) -> Iterator[int]:
    """Yield what each control group (version 2 or 1) above this process leaves."""
    mount = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names, cached = mount, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            top, cached = mount / "memory", "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the host's, and the group itself is mounted at the top.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            limit, used = (next(iter(_lines(folder / name)), "") for name in names)
            if limit.isdigit() and used.isdigit():  # a limit may be ``max``
                yield int(limit) - int(used) + (_statistic(folder / "memory.stat", cached) or 0)


def _statistic(path: Path, name: str) -> int | None:
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[0] == name), None)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:  # not Linux, or no such group
        return []


Precision = Literal["auto", "float32", "bfloat16"]


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Return whether matrix products run in bfloat16; ``auto``: on GPUs that support it.

    These are NVIDIA's since Ampere (compute capability 8.0); older ones emulate it, slower than float32. x86 CPUs
    without instructions for it (AVX512-BF16, AMX) compute in float32 in any case, which is faster; this is logged once.
    """
    if precision == "bfloat16" and device.type == "cpu":
        return not _emulates_bfloat16()
    if precision != "auto":
        return precision == "bfloat16"
    return device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    )


@cache
def _emulates_bfloat16(root: Path = Path("/")) -> bool:
    """Return whether the CPU is known to lack bfloat16: x86, on Linux."""
    flags = {flag for line in _lines(root / "proc" / "cpuinfo") if line.startswith("flags") for flag in line.split()}
    emulates = bool(flags) and flags.isdisjoint({"avx512_bf16", "amx_bf16"})
    if emulates:
        _log.warning("bfloat16: this CPU has no instructions for it; using float32, which is faster here")
    return emulates


Item = TypeVar("Item")

# Dense bf16 (V100: fp16) matrix operations in 1e12 per second, from NVIDIA's data sheets.
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
    """Measures a training loop; see `metrics`.

    ``flop_per_step`` are the operations of this rank in a step by the formula, without recomputation.
    """

    def __init__(self, device: torch.device, flop_per_step: float) -> None:
        self._device, self._flop = device, flop_per_step
        self._peak = peak_flop_per_s(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._waited = 0.0
        self._steps = 0
        self._since: float | None = None

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and measure the time spent waiting for them."""
        start = time.monotonic()
        for item in items:
            self._waited += time.monotonic() - start
            yield item
            start = time.monotonic()

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Return the numbers since the last call; the first call, after the warm-up, only the memory.

        ``speed/data_wait_share``
            Share of the time spent waiting for the next batch.
        ``speed/tflops``, ``speed/mfu``
            Operations per second by the formula, and as a share of the device's peak in bfloat16 where it is known.
        ``memory/gb``, ``memory/peak_gb``
            CUDA: allocated now, and peak since the last call. CPU: peak of the process, from the system.
        """
        now = time.monotonic()
        metrics = {"memory/peak_gb": peak_bytes(self._device) / 1e9}
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            metrics["memory/gb"] = torch.cuda.memory_allocated(self._device) / 1e9
        if self._since is not None and now > self._since and self._steps:
            seconds = now - self._since
            metrics["speed/data_wait_share"] = min(1.0, self._waited / seconds)
            rate = self._flop * self._steps / seconds
            metrics["speed/tflops"] = rate / 1e12
            if self._peak is not None:
                metrics["speed/mfu"] = rate / self._peak
        self._since, self._waited, self._steps = now, 0.0, 0
        return metrics


def peak_flop_per_s(name: str) -> float | None:
    """Return the peak of a GPU by its name (the longest match in the table), None if it is not in the table."""
    words = set(name.replace("-", " ").split())
    matches = [model for model in _PEAK_TFLOPS if words.issuperset(model.split())]
    return 1e12 * _PEAK_TFLOPS[max(matches, key=len)] if matches else None
