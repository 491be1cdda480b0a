"""Launching without a cluster: the script that would be handed in, processes on this machine, mistakes in one line."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dinocell.cli import main
from dinocell.commands.launch import _folder_of, _minutes
from dinocell.errors import ConfigError, DinocellError
from dinocell.launch.local import run_here
from dinocell.launch.slurm import Job, SlurmSettings, _belongs_to_job, exported, fill_in, script, set_export_hook
from dinocell.launch.status import JobState, last_step, launches, log_of
from dinocell.runtime.run import MetricsFile


def test_the_script_says_what_was_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = [
        "launch",
        "--nodes",
        "4",
        "--gpus-per-node",
        "8",
        "--cpus-per-task",
        "6",
        "--mem",
        "480G",
        "--time",
        "1-2:30:00",
    ]
    line += ["--partition", "gpu", "--account", "a", "--qos", "q", "--constraint", "a100", "--exclude", "n7"]
    line += [
        "--dependency",
        "afterok:5",
        "--comment",
        "why not",
        "--sbatch",
        "reservation=r",
        "--setup",
        "module load x",
    ]
    line += ["--env", "KEY=a b", "--container-image", "img.sqsh", "--signal-before", "200", "--dry-run"]
    assert (
        main([*line, "--folder", str(tmp_path / "f"), "--", "pretrain", "debug", "output=o", "data.shards=[a b]"]) == 0
    )
    said = capsys.readouterr().out
    for wanted in (
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=6", "--mem=480G", "--time=1590",
        "--partition=gpu", "--account=a", "--qos=q", "--constraint=a100", "--exclude=n7", "--dependency=afterok:5",
        "--comment='why not'", "--reservation=r", "--signal=USR2@200", "--requeue",
    ):  # fmt: skip
        assert f"#SBATCH {wanted}\n" in said, wanted
    assert "export KEY='a b'\nmodule load x\n" in said
    assert "--container-image=img.sqsh" in said
    assert "dinocell pretrain debug output=o 'data.shards=[a b]'" in said
    assert not (tmp_path / "f").exists()


def test_the_end_of_the_script_tells_what_requeued(tmp_path: Path) -> None:
    """The shell itself decides: run it with each exit code and a stand-in for scontrol."""
    said = script(["info"], SlurmSettings(max_requeues=3), tmp_path)
    after = said[said.index("code=$?") : said.index("# which runs")].replace("sleep 60", "")
    for code, restarts, requeued in ((0, 0, False), (1, 0, False), (2, 0, False), (130, 0, False), (143, 0, False),
                                       (137, 0, True), (139, 2, True), (137, 3, False)):  # fmt: skip
        shell = (
            f"scontrol() {{ echo CALLED $@; }}\nSLURM_JOB_ID=7\nSLURM_RESTART_COUNT={restarts}\n(exit {code})\n{after}"
        )
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert ("CALLED requeue 7" in done.stdout) is requeued, (code, restarts, done)
        array = f"SLURM_ARRAY_JOB_ID=5\nSLURM_ARRAY_TASK_ID=2\n{shell}"
        done = subprocess.run(["bash", "-c", array], capture_output=True, text=True, check=False)
        assert ("CALLED requeue 5_2" in done.stdout) is requeued


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(3, 0, True), (143, 2, True), (0, 0, True), (3, 3, False)])
def test_the_script_puts_back_what_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, restarts: int, requeued: bool
) -> None:
    """In a container there is no scontrol: the job leaves a mark for the script around it, which is used up."""
    folder = tmp_path / "a folder's name"
    folder.mkdir()
    job = Job(main=lambda _: 0, arguments=(), folder=folder, max_requeues=9)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    job._requeue("SIGTERM")  # not asked for: SLURM does it by itself, or means it
    assert not list(folder.iterdir())
    job._requeue("SIGUSR2")
    assert [path.name for path in folder.iterdir()] == ["requeue-7"]
    monkeypatch.undo()
    said = script(["info"], SlurmSettings(max_requeues=3), folder)
    after = said[said.index("code=$?") : said.index("# which runs")].replace("sleep 60", "")
    shell = f"scontrol() {{ echo CALLED $@; }}\nSLURM_JOB_ID=7\nSLURM_RESTART_COUNT={restarts}\n(exit {code})\n{after}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("CALLED requeue 7" in done.stdout) is requeued
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("1:30", 90), ("1:30:00", 90), ("0:00:30", 1), ("2-0:00:00", 2880)]
)
def test_time_limits(text: str, minutes: int) -> None:
    assert _minutes(text) == minutes


def test_a_time_limit_that_is_none() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="got 'soon'"):
        _minutes("soon")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "expected a command after --"),
        (["--nodes", "0", "--", "info", "x"], "--nodes: expected at least 1, got 0"),
        (["--array", "0", "--", "info", "x"], "--array: expected at least 1, got 0"),
        (["--env", "A", "--", "info", "x"], "--env: expected KEY=VALUE, got 'A'"),
        (["--on-export", "knn", "--", "info", "x"], "--on-export: expected {checkpoint} somewhere"),
        (["--cluster", "local", "--then", "info y", "--", "info", "x"], "--then: applies to SLURM"),
        (["--cluster", "local", "--mem", "9G", "--", "info", "x"], "--mem: applies to SLURM"),
        (["--cluster", "local", "--nodes", "2", "--", "info", "x"], "--nodes: applies to SLURM"),
        (["--dry-run", "--on-export", "knn", "--", "info", "x"], "--on-export: expected {checkpoint} somewhere"),
        (["--cluster", "local", "--processes", "0", "--", "info", "x"], "--processes: expected at least 1, got 0"),
        (["--cluster", "local", "--processes", "-1", "--", "info", "x"], "--processes: expected at least 1, got -1"),
        (
            ["--time", "2", "--", "info", "x"],
            "--signal-before: expected at least 1 and less than the time limit of 120",
        ),
        (["--signal-before", "0", "--", "info", "x"], "--signal-before: expected at least 1"),
        (["--max-requeues", "-1", "--", "info", "x"], "--max-requeues: expected at least 0, got -1"),
        (["status", "nowhere"], "nowhere: nothing was launched into this folder"),
        (["--", "pretrain", "debgu", "data.shards=[s]"], "did you mean 'debug'"),
        (["--", "pretrain", "debug", "data.shards=[s]", "stepz=4"], "did you mean 'steps'"),
        (["--", "finetune", "generalist", "data.sets=[sets/{task}]", "epochs=x"], "expected an integer"),
        (["--", "demo", "sede=1"], "did you mean 'seed'"),
        (["--then", "finetune debgu", "--", "info", "x"], "no recipe 'debgu'"),
        (["--on-export", "pretrain {checkpoint}", "--", "info", "x"], "no recipe '{checkpoint}'"),
        (["--cluster", "local", "--", "pretrain", "debug"], "required, but not set: data.shards"),
    ],
)
def test_mistakes_are_one_line(line: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *line]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "line", [["cancel", "4"], ["--", "segment", "a.tif", "--modell", "m"], ["--then", "x", "--", "info", "x"]]
)
def test_words_that_are_no_command_are_not_submitted(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["launch", *line])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_only_the_job_can_know_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variable of the job, in a setting or in a recipe, and the files of a container."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text("data:\n  shards: ['${oc.env:OF_THE_JOB}']\n")
    assert main(["launch", "--dry-run", "--", "pretrain", str(recipe), "output=o"]) == 0
    assert main(["launch", "--dry-run", "--", "pretrain", "debug", "data.shards=['${oc.env:OF_THE_JOB}']"]) == 0
    inside = ["--container-image", "img.sqsh", "--", "pretrain", "/inside/own.yaml", "output=o"]
    assert main(["launch", "--dry-run", *inside]) == 0
    assert "/inside/own.yaml" in capsys.readouterr().out


def test_without_slurm_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "--folder", str(tmp_path / "f"), "--", "info", "x"]) == 2
    assert "sbatch: not found; submit from a node of the cluster, or use --cluster local" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_here_share_a_run(shard_set: Path, tmp_path: Path) -> None:
    command = ["pretrain", "debug", f"data.shards=[{shard_set}]", "steps=3", "batch_size=4", "log_every=1"]
    command += ["views.global_size=32", "views.local_size=16", "compute.workers=0", "heads.num_prototypes=64"]
    command += ["online_eval.every=0", "model.variant=nano"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main([*command, f"output={alone}"]) == 0
    line = [sys.executable, "-m", "dinocell", "launch", "--cluster", "local", "--processes", "2", "--"]
    done = subprocess.run([*line, *command, f"output={shared}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line)["loss/total"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        for output in (alone, shared)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)
    assert "2 processes, ddp" in done.stdout
    assert "training_3" in next((shared / "launch").rglob("rank_1.log")).read_text()


def test_where_a_killed_start_met_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, process numbers come again; a rank that is early would look for the dead main one."""
    place = tmp_path / "rendezvous" / f"local-{os.getpid()}"
    place.parent.mkdir()
    place.write_text("127.0.0.1 1\n")
    there = []

    class Started(subprocess.Popen[bytes]):
        def __init__(self, *_args: object, **_options: object) -> None:
            there.append(place.exists())
            super().__init__([sys.executable, "-c", ""])

    monkeypatch.setattr(subprocess, "Popen", Started)
    assert run_here(["info", "x"], 2, tmp_path) == 0
    assert there == [False, False]


@pytest.mark.slow
@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_happens_to_one_process_happens_to_all(number: signal.Signals, shard_set: Path, tmp_path: Path) -> None:
    """A process that is killed takes the others along; Ctrl-C reaches all, and they save together."""
    output = tmp_path / "run"
    command = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={output}", "steps=4000", "batch_size=4"]
    command += ["views.global_size=32", "views.local_size=16", "compute.workers=0", "heads.num_prototypes=64"]
    command += ["model.variant=nano"]
    line = [sys.executable, "-m", "dinocell", "launch", "--cluster", "local", "--processes", "2", "--", *command]
    launched = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and not (output / "metrics.jsonl").exists():
        time.sleep(0.1)
    if number == signal.SIGKILL:
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    else:
        launched.send_signal(number)
    said, _ = launched.communicate(timeout=60)
    assert launched.returncode == (137 if number == signal.SIGKILL else 130), said
    states = list((output / "checkpoints").glob("step_*"))
    assert len(states) == (0 if number == signal.SIGKILL else 1)


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("ignored", [True, False])
def test_processes_here_ignore_ctrl_c_only_where_it_was_ignored_before(
    ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = []

    class Started(subprocess.Popen[bytes]):
        def __init__(self, *_args: object, **_options: object) -> None:
            handlers.append({number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)})
            super().__init__([sys.executable, "-c", ""])

    monkeypatch.setattr(subprocess, "Popen", Started)
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    assert run_here(["info", "x"], 1, tmp_path) == 0
    assert (handlers[0][signal.SIGINT] is signal.SIG_IGN) == ignored
    assert callable(handlers[0][signal.SIGTERM])
    assert signal.getsignal(signal.SIGINT) is before


def test_numbers_are_put_into_the_command_and_other_braces_left() -> None:
    assert fill_in(["--slice", "{task}/{tasks}", "{plate}/{well}.tif"], 2, 8) == [
        "--slice",
        "2/8",
        "{plate}/{well}.tif",
    ]


def test_a_launch_lies_in_the_run_folder() -> None:
    assert _folder_of(["pretrain", "debug", "output=runs/a"]).parent == Path("runs/a/launch").absolute()
    assert _folder_of(["pretrain", "debug", "output=runs/{task}"]).parent == Path("launches").absolute()
    assert _folder_of(["segment", "x.tif", "--output", "o"]).parent == Path("launches").absolute()


def test_only_the_clusters_own_address_is_left_to_a_new_job() -> None:
    assert _belongs_to_job("SLURM_JOB_ID")
    assert _belongs_to_job("RANK")
    assert not _belongs_to_job("SLURM_CONF")
    assert not _belongs_to_job("PATH")


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="--gpus-per-node: expected at least 1, got 0"):
        SlurmSettings(gpus_per_node=0)
    assert SlurmSettings(nodes=3, gpus_per_node=8).parameters(Path())["ntasks_per_node"] == 8


def test_what_was_said_last(tmp_path: Path) -> None:
    assert last_step(tmp_path) == ""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "loss/total": 1.5}\n{"step": 3, "probe/x": 1}\n{"step": 4, "lo'
    )
    assert last_step(tmp_path) == "step 3  loss/total 1.5"
    metrics = MetricsFile(tmp_path / "metrics.jsonl", resume_step=3)
    metrics.write(4, {"loss/total": math.nan, "loss/dino": math.inf, "loss/ibot": 2.0})
    metrics.close()
    assert last_step(tmp_path) == "step 4  loss/total nan  loss/dino inf  loss/ibot 2"
    with pytest.raises(DinocellError, match="nothing was launched"):
        launches(tmp_path)
    (tmp_path / "launch" / "a").mkdir(parents=True)
    (tmp_path / "launch" / "a" / "launch.json").write_text("{}")
    with pytest.raises(DinocellError, match="no log of rank 0"):
        log_of(tmp_path)


def test_a_state_says_why_it_waits_and_what_failed(tmp_path: Path) -> None:
    waiting = JobState(job="4", state="PENDING", reason="PartitionNodeLimit", restarts="2", line="dinocell info x")
    assert str(waiting) == "4  PENDING (PartitionNodeLimit)  2 restarts  dinocell info x"
    running = JobState(job="5", state="RUNNING", nodes="n[1-2]", restarts="0", line="dinocell info x")
    assert str(running) == "5  RUNNING  n[1-2]  dinocell info x"
    (tmp_path / "6_0_log.out").write_text("step 1/4  loss/total 2\ndinocell: nowhere: no shard set\nsrun: error: n2\n")
    (tmp_path / "61_0_log.out").write_text("dinocell: of another job\n")
    assert JobState(job="6", state="FAILED", folder=tmp_path).error == "dinocell: nowhere: no shard set"
    assert JobState(job="6", state="RUNNING", folder=tmp_path).error == ""
    (tmp_path / "7_1_log.out").write_text("Traceback (most recent call last):\n  x\nKeyError: 'a'\nsrun: error: n1\n")
    assert JobState(job="7", state="FAILED", folder=tmp_path).error == "KeyError: 'a'"


def test_the_export_hook_is_called_while_it_is_set(tmp_path: Path) -> None:
    seen: list[Path] = []
    set_export_hook(seen.append)
    exported(tmp_path)
    set_export_hook(None)
    exported(tmp_path)
    assert seen == [tmp_path]
