"""What memory is left: the machine's, or what its control groups leave."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocell.runtime.device import available_bytes, peak_bytes

CPU = torch.device("cpu")
GB = 10**9


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def machine(root: Path, available_kb: int, groups: str) -> None:
    write(root, {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable:   {available_kb} kB\nSwapFree: 1 kB"})
    write(root, {"proc/self/cgroup": groups})


def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    machine(tmp_path, 5_000_000, "0::/user.slice")
    write(tmp_path, {"sys/fs/cgroup/user.slice/memory.max": "max", "sys/fs/cgroup/user.slice/memory.current": 7})
    assert available_bytes(CPU, root=tmp_path) == 5_000_000 * 1024


@pytest.mark.parametrize("where", ["job/step", "job", "."])
def test_the_tightest_group_counts_and_file_caches_do_not(tmp_path: Path, where: str) -> None:
    machine(tmp_path, 50_000_000, "0::/job/step")
    group = f"sys/fs/cgroup/{where}"
    write(tmp_path, {f"{group}/memory.max": 8 * GB, f"{group}/memory.current": 3 * GB})
    write(tmp_path, {f"{group}/memory.stat": f"anon {2 * GB}\ninactive_file {GB}\nactive_file 5"})
    assert available_bytes(CPU, root=tmp_path) == 6 * GB


def test_groups_of_version_1_count_too(tmp_path: Path) -> None:
    machine(tmp_path, 50_000_000, "11:cpu,cpuacct:/x\n4:memory:/slurm/job_7")
    group = "sys/fs/cgroup/memory/slurm/job_7"
    write(tmp_path, {f"{group}/memory.limit_in_bytes": 4 * GB, f"{group}/memory.usage_in_bytes": GB})
    write(tmp_path, {f"{group}/memory.stat": f"total_inactive_file {GB // 2}"})
    assert available_bytes(CPU, root=tmp_path) == 3 * GB + GB // 2


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    machine(tmp_path, 50_000_000, "0::/")
    write(tmp_path, {"sys/fs/cgroup/memory.max": GB, "sys/fs/cgroup/memory.current": 2 * GB})
    assert available_bytes(CPU, root=tmp_path) == 0


def test_a_system_that_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    assert available_bytes(CPU, root=tmp_path) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_this_machine_has_less_than_its_whole_memory() -> None:
    whole = resource.getpagesize() * int(Path("/proc/meminfo").read_text().split()[1]) * 1024 // resource.getpagesize()
    found = available_bytes(CPU)
    assert found is not None
    assert 0 < found <= whole


def test_the_peak_does_not_fall_when_memory_is_given_back() -> None:
    before = peak_bytes(torch.device("cpu"))
    taken = np.ones(before // 8 + 10**6)  # more than this process has ever had
    assert peak_bytes(torch.device("cpu")) >= taken.nbytes
    del taken
    assert peak_bytes(torch.device("cpu")) >= before
