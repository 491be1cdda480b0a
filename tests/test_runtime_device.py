"""Available and peak memory, precision, throughput."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocell.runtime import device
from dinocell.runtime.device import Precision, Throughput, available_bytes, peak_bytes, peak_flop_per_s, uses_bfloat16

CPU = torch.device("cpu")
GB = 10**9


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def machine(root: Path, available_kb: int, groups: str) -> None:
    write(root, {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable:   {available_kb} kB\nSwapFree: 1 kB"})
    write(root, {"proc/self/cgroup": groups})


def test_without_limits_the_kernels_estimate_is_available(tmp_path: Path) -> None:
    machine(tmp_path, 5_000_000, "0::/user.slice")
    write(tmp_path, {"sys/fs/cgroup/user.slice/memory.max": "max", "sys/fs/cgroup/user.slice/memory.current": 7})
    assert available_bytes(CPU, root=tmp_path) == 5_000_000 * 1024


@pytest.mark.parametrize("where", ["job/step", "job", "."])
def test_the_tightest_group_limits_memory_and_file_caches_are_available(tmp_path: Path, where: str) -> None:
    machine(tmp_path, 50_000_000, "0::/job/step")
    group = f"sys/fs/cgroup/{where}"
    write(tmp_path, {f"{group}/memory.max": 8 * GB, f"{group}/memory.current": 3 * GB})
    write(tmp_path, {f"{group}/memory.stat": f"anon {2 * GB}\ninactive_file {GB}\nactive_file 5"})
    assert available_bytes(CPU, root=tmp_path) == 6 * GB


def test_groups_of_version_1_limit_memory(tmp_path: Path) -> None:
    machine(tmp_path, 50_000_000, "11:cpu,cpuacct:/x\n4:memory:/slurm/job_7")
    group = "sys/fs/cgroup/memory/slurm/job_7"
    write(tmp_path, {f"{group}/memory.limit_in_bytes": 4 * GB, f"{group}/memory.usage_in_bytes": GB})
    write(tmp_path, {f"{group}/memory.stat": f"total_inactive_file {GB // 2}"})
    assert available_bytes(CPU, root=tmp_path) == 3 * GB + GB // 2


def test_a_full_group_leaves_no_memory(tmp_path: Path) -> None:
    machine(tmp_path, 50_000_000, "0::/")
    write(tmp_path, {"sys/fs/cgroup/memory.max": GB, "sys/fs/cgroup/memory.current": 2 * GB})
    assert available_bytes(CPU, root=tmp_path) == 0


def test_an_unknown_system_gives_none(tmp_path: Path) -> None:
    assert available_bytes(CPU, root=tmp_path) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_this_machine_has_less_than_its_whole_memory() -> None:
    whole = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    found = available_bytes(CPU)
    assert found is not None
    assert 0 < found <= whole


def test_the_peak_does_not_fall_when_memory_is_freed() -> None:
    before = peak_bytes(torch.device("cpu"))
    taken = np.ones(before // 8 + 10**6)  # more than this process has ever had
    assert peak_bytes(torch.device("cpu")) >= taken.nbytes
    del taken
    assert peak_bytes(torch.device("cpu")) >= before


@pytest.mark.parametrize(
    ("precision", "on_cpu", "on_turing", "on_ampere"),
    [("auto", False, False, True), ("float32", False, False, False), ("bfloat16", True, True, True)],
)
def test_auto_is_bfloat16_on_gpus_that_support_it(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, on_cpu: bool, on_turing: bool, on_ampere: bool
) -> None:
    monkeypatch.setattr(device, "_emulates_bfloat16", lambda: False)
    assert uses_bfloat16(precision, torch.device("cpu")) == on_cpu
    monkeypatch.setattr(device, "_emulates_bfloat16", lambda: True)
    assert not uses_bfloat16(precision, torch.device("cpu"))
    for capability, expected in (((7, 5), on_turing), ((8, 0), on_ampere), ((9, 0), on_ampere)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, found=capability: found)
        assert uses_bfloat16(precision, torch.device("cuda", 0)) == expected


@pytest.mark.parametrize(
    ("cpuinfo", "emulates"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f\nbugs\t\t: none", True),
        ("flags\t\t: fpu avx512f avx512_bf16", False),
        ("flags\t\t: fpu amx_bf16 amx_tile", False),
        ("Features\t: fp asimd", False),  # ARM
    ],
)
def test_x86_without_bfloat16_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cpuinfo: str, emulates: bool
) -> None:
    write(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert [device._emulates_bfloat16(tmp_path) for _ in range(3)] == [emulates] * 3
    assert caplog.text.count("using float32") == emulates
    assert not device._emulates_bfloat16(tmp_path / "macos")


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
def test_the_peak_of_a_gpu_is_found_by_its_name(name: str, tflops: float) -> None:
    assert peak_flop_per_s(name) == tflops * 1e12


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flop_per_s("Some GPU 9000") is None


def test_the_share_of_waiting_and_the_rate_are_measured() -> None:
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
