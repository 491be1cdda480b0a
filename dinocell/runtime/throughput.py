"""Where the time of a training goes: waiting for data, and how much of what the device could compute is computed."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from dinocell.runtime.memory import peak_bytes

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
