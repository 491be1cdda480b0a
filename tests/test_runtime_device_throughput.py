"""Rates of a loop: waiting is waiting, and peaks are found by name."""

import time

import pytest
import torch

from dinocell.runtime.device import Throughput, peak_flop_per_s


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_the_peak_is_found_by_name(name: str, tflops: float) -> None:
    assert peak_flop_per_s(name) == tflops * 1e12


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flop_per_s("Some GPU 9000") is None


def test_the_share_of_waiting_and_the_rate() -> None:
    throughput = Throughput(torch.device("cpu"), 3e9)
    assert set(throughput.metrics()) == {"memory/peak_gb"}  # nothing to compare with yet

    def slow() -> object:
        for item in range(4):
            time.sleep(0.03)
            yield item

    start = time.monotonic()
    seen = []
    for item in throughput.waiting(slow()):
        seen.append(item)
        time.sleep(0.01)
        throughput.step()
    found, seconds = throughput.metrics(), time.monotonic() - start
    assert seen == [0, 1, 2, 3]
    assert 0.5 < found["speed/data_wait_share"] < 0.95
    assert found["speed/tflops"] == pytest.approx(4 * 3e9 / seconds / 1e12, rel=0.2)
    assert "speed/mfu" not in found
