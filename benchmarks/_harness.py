"""What every benchmark shares: alternated timing, and a result file that says on what it was measured."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def alternate(sides: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time the sides in turns (A B C, A B C, ...), so that a drifting machine treats them alike; seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, call in sides.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(slower: Sequence[float], faster: Sequence[float]) -> str:
    """Return how many times faster the second is: median of the rounds' ratios, and their range."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def write_result(name: str, text: str, packages: Sequence[str]) -> Path:
    """Write ``results/NAME.md``: the text, then hardware, versions and date."""
    path = RESULTS / f"{name}.md"
    path.write_text(f"{text.rstrip()}\n\n{measured_on(packages)}\n")
    return path


def measured_on(packages: Sequence[str]) -> str:
    """Return one sentence with date, hardware and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    threads = f"{torch.get_num_threads()} threads"
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"Measured {stamp} on {device} ({threads}), Python {platform.python_version()}, {versions}."


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
