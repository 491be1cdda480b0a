"""Being told to stop, and where ranks find one another."""

import signal
import time

import pytest
import torch

from dinocell.errors import DinocellError
from dinocell.runtime import distributed, preemption
from dinocell.runtime.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_asks_to_stop_and_says_which(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed()
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("default_sigint")
def test_the_second_ctrl_c_ends_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("default_sigint")
def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.agreed()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_other_signals_stop_a_run_that_inherited_them_as_ignored(number: signal.Signals) -> None:
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
            assert stop.agreed()
            assert stop.reason == number.name
    finally:
        signal.signal(number, previous)


def test_the_end_of_a_slurm_job_counts_less_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    with StopRequest(margin_s=30.0) as stop:
        assert not stop.agreed()
        monkeypatch.setattr(preemption.time, "time", lambda: 2**40)
        assert stop.agreed()
        assert stop.reason == "time limit"


def test_the_launcher_is_called_after_the_save() -> None:
    called: list[str] = []
    preemption.on_stop(called.append)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR2)
        assert stop.agreed()
        stop.finish()
    assert called == ["SIGUSR2"]
    preemption.on_stop(None)
    stop.finish()
    assert called == ["SIGUSR2"]


def test_being_ended_counts_more_than_a_warning() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR2)
        assert stop.reason == "SIGTERM"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0, 1)),
        (
            {
                "SLURM_PROCID": "9",
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
            },
            (9, 16, 1, 8),
        ),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),
    ],
)
def test_ranks_come_from_torchrun_or_slurm(variables: dict[str, str], expected: tuple[int, ...]) -> None:
    assert distributed._from_environment(variables) == expected


def test_ranks_that_are_no_numbers_are_named() -> None:
    with pytest.raises(DinocellError, match="RANK='a'"):
        distributed._from_environment({"RANK": "a", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("device", ["gpu", "xpu", "cuda:", "", "cpu:1", "CUDA"])
def test_a_device_that_is_none_of_ours_is_named(device: str) -> None:
    with pytest.raises(DinocellError, match=f"expected auto, cpu, cuda or cuda:N, got '{device}'"):
        distributed.start(device)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DinocellError, match=r"cuda:2 .* 2 cuda"):
        distributed.start("cuda:2")


def test_many_processes_need_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DinocellError, match="MASTER_ADDR"):
        distributed.start("cpu")
