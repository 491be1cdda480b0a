"""Jobs on a real SLURM of two nodes: what runs, what comes back by itself, and that nothing is lost or done twice.

One cluster for all; without SLURM on this machine the tests are skipped, visibly.
"""

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dinocell import cli
from dinocell.cli import main
from dinocell.configs.load import to_yaml
from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.files import MultichannelSource
from dinocell.images.write import write_tiff
from dinocell.ssl.config import ComputeConfig, PretrainConfig
from dinocell.ssl.train import pretrain
from helpers.pretraining import small_pretraining


def _load_cluster() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm_cluster", Path(__file__).with_name("slurm_cluster.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slurm = _load_cluster()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.missing()), reason=f"no SLURM here: {slurm.missing()}"),
]

STEPS = 16
_NUMBER = re.compile(r"submitted (\d+)")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as folder:
        yield folder


def config_of(shard_set: Path, output: Path, **changes: object) -> PretrainConfig:
    base = small_pretraining(
        shard_set,
        output,
        steps=STEPS,
        image_every=1000,
        export_every=1000,
        checkpoint_every=1000,
        compute=ComputeConfig(workers=0, parallel="fsdp", timeout_s=60.0),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 4000, (3, 32, 32)).astype(np.uint16)
        write_tiff(folder / "images" / f"f{number:02d}.ome.tif", pixels, channel_names=("a", "b", "c"))
    settings = ShardSettings(tiles=TileSettings(size=0, min_size=16, min_contrast=0))
    build(MultichannelSource(input=str(folder / "images")), folder / "set", settings=settings, workers=1)
    return folder / "set"


@pytest.fixture(scope="module")
def wanted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of the uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    pretrain(config_of(shards, output))
    return losses(output)


def losses(output: Path) -> list[float]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    said = [json.loads(line) for line in lines if line.endswith("}") and "loss/total" in line]
    assert [row["step"] for row in said] == list(range(1, len(said) + 1))
    return [row["loss/total"] for row in said]


def launch(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["launch", *arguments]) == 0, capsys.readouterr().err
    found = _NUMBER.search(capsys.readouterr().out)
    assert found is not None
    return found[1]


def until(condition: Callable[[], bool], limit_s: float = 90.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)


def logs(output: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(output.rglob("*_log.out")))


@dataclass(kw_only=True)
class TwoNodes:
    """A pretraining run of a test on the cluster, and what it is to give: the losses of one process alone."""

    shards: Path
    wanted: list[float]
    output: Path
    capsys: pytest.CaptureFixture[str]
    settings: tuple[str, ...] = ()

    def start(self, *options: str, nodes: int = 2, checkpoint_every: int = 1000) -> str:
        """Submit the run, and return the job's number."""
        config = config_of(self.shards, self.output, checkpoint_every=checkpoint_every)
        recipe = self.output.with_suffix(".yaml")
        recipe.write_text("# test\n" + to_yaml(config))
        line = ["--nodes", str(nodes), "--cpus-per-task", "1", "--env", "OMP_NUM_THREADS=1", *self.settings, *options]
        return launch([*line, "--", "pretrain", str(recipe), f"output={self.output}"], self.capsys)

    def wait_for_step(self, step: int) -> None:
        until(lambda: len(losses(self.output)) >= step)

    def check_done(self, job: str, *, restarts: int = 0) -> None:
        """Wait for the job, and see that it came back so often, lost nothing and did nothing twice."""
        assert slurm.wait_for(job, ("COMPLETED", "FAILED"), 180) == "COMPLETED", logs(self.output)
        assert slurm.job_field(job, "Restarts") == str(restarts)
        np.testing.assert_allclose(losses(self.output), self.wanted, rtol=2e-4)


@pytest.fixture
def run(
    cluster: Path, shards: Path, wanted: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> TwoNodes:
    return TwoNodes(shards=shards, wanted=wanted, output=tmp_path / "run", capsys=capsys)


@pytest.fixture
def slow_run(run: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    """Return a run whose steps last, so that something can happen in between."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(cli, "main", importlib.import_module("slurm_main").slow_main)
    return replace(run, settings=("--env", f"PYTHONPATH={Path(__file__).parent}"))


def test_two_nodes_share_a_run_and_its_words_are_found(run: TwoNodes, capsys: pytest.CaptureFixture[str]) -> None:
    job, output = run.start("--on-export", "info {checkpoint}"), run.output
    run.check_done(job)
    assert (output / "eval" / f"training_{STEPS}" / "teacher_checkpoint.pth").exists()
    assert main(["launch", "status", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"{job}  COMPLETED  n[1-2]" in said
    assert f"step {STEPS}" in said
    assert main(["launch", "logs", str(output)]) == 0
    assert "2 processes, fsdp" in capsys.readouterr().out
    assert main(["launch", "logs", str(output), "--follow", "--rank", "1"]) == 0
    record = json.loads(next(output.glob("launch/*/launch.json")).read_text())
    assert record["jobs"] == [job]
    assert (next(output.glob("launch/*")) / "run.yaml").exists()
    # The probe that the export submitted.
    probe = next(output.rglob("probes/**/launch.json"))
    number = json.loads(probe.read_text())["jobs"][0]
    assert slurm.wait_for(number, ("COMPLETED", "FAILED")) == "COMPLETED", logs(output)
    assert "ViT" in next(probe.parent.glob("*_log.out")).read_text()
    # It has finished: started again it says so and does nothing.
    run.check_done(run.start())


def test_before_its_time_limit_a_run_saves_and_comes_back(slow_run: TwoNodes) -> None:
    """SLURM's warning signal, sent as it sends it: to every task of the step. No step is taken twice."""
    job = slow_run.start()
    slow_run.wait_for_step(5)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    slow_run.check_done(job, restarts=1)
    said = logs(slow_run.output)
    assert "is requeued (SIGUSR2)" in said
    stopped = re.search(r"resuming after step (\d+)", said)
    assert stopped is not None
    assert f"step {int(stopped[1])}/{STEPS}" in said
    assert said.count(f"step {int(stopped[1])}/{STEPS} ") == 1  # not taken again


def test_a_job_that_is_requeued_goes_on(slow_run: TwoNodes) -> None:
    """As the administrator's, or a more important job's: SIGTERM, little time, SIGKILL."""
    job = slow_run.start(checkpoint_every=2)
    slow_run.wait_for_step(6)
    subprocess.run(["scontrol", "requeue", job], check=True)
    slow_run.check_done(job, restarts=1)
    assert "resuming after step" in logs(slow_run.output)


def test_a_killed_process_takes_the_others_along_and_the_job_comes_back(slow_run: TwoNodes) -> None:
    job = slow_run.start(checkpoint_every=2)
    slow_run.wait_for_step(6)
    kill_a_rank(job)
    slow_run.check_done(job, restarts=1)


def kill_a_rank(job: str) -> None:
    """Kill -9 the second task's Python."""
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}".encode() in variables and b"SLURM_PROCID=1" in variables and b"_submit" in words:
            os.kill(int(entry.name), signal.SIGKILL)
            return
    raise AssertionError("the task is not running")


def test_a_lost_node_brings_the_job_back(slow_run: TwoNodes) -> None:
    job = slow_run.start(nodes=1, checkpoint_every=2)
    slow_run.wait_for_step(6)
    node = slurm.job_field(job, "NodeList")
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"], check=True)
    try:
        slow_run.check_done(job, restarts=1)
    finally:  # it may have come back by itself
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False, capture_output=True)


def test_what_two_nodes_saved_one_goes_on_with(slow_run: TwoNodes) -> None:
    job = slow_run.start()
    slow_run.wait_for_step(5)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    # It was told to end, not warned: it saves, and does not come back.
    assert slurm.wait_for(job, ("FAILED", "COMPLETED", "CANCELLED")) == "FAILED"
    done = len(losses(slow_run.output))
    assert 5 <= done < STEPS
    slow_run.check_done(slow_run.start(nodes=1))
    assert f"resuming after step {done}" in logs(slow_run.output)


def test_an_array_builds_a_set_and_the_last_job_merges_it(
    cluster: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = shards.parent / "images", tmp_path / "set"
    line = ["shards", "build", "--source", "multichannel", "--input", str(images), "--output", str(output)]
    line += ["--tile-size", "0", "--min-structure", "0", "--workers", "1", "--slice", "{task}/{tasks}"]
    line += ["--min-size", "16"]
    folder = tmp_path / "launch"
    launch(["--array", "2", "--then", f"shards merge {output}", "--folder", str(folder), "--", *line], capsys)
    after = json.loads((folder / "then" / "launch.json").read_text())["jobs"][0]
    assert slurm.wait_for(after, ("COMPLETED", "FAILED", "CANCELLED"), 120) == "COMPLETED", logs(folder)
    assert json.loads((output / "manifest.json").read_text())["num_samples"] == 20
    assert main(["shards", "verify", str(output)]) == 0


def test_an_error_of_the_command_does_not_come_back(
    cluster: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "launch"
    job = launch(["--folder", str(folder), "--", "pretrain", "debug", "data.shards=[nowhere]"], capsys)
    assert slurm.wait_for(job, ("COMPLETED", "FAILED")) == "FAILED"
    assert slurm.job_field(job, "Restarts") == "0"
    assert "nowhere" in logs(folder)
    assert main(["launch", "status", str(folder)]) == 0
    assert "    dinocell: nowhere: no shard set" in capsys.readouterr().out


def test_a_job_that_cannot_start_says_why(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = launch(["--nodes", "4", "--folder", str(tmp_path), "--", "info", "x"], capsys)
    try:
        until(lambda: slurm.job_field(job, "Reason") == "PartitionNodeLimit")
        assert main(["launch", "status", str(tmp_path)]) == 0
        assert f"{job}  PENDING (PartitionNodeLimit)  dinocell info x" in capsys.readouterr().out
    finally:
        subprocess.run(["scancel", job], check=True)


def test_a_request_that_slurm_refuses_is_one_line(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--partition", "nonesuch", "--folder", str(tmp_path), "--", "info", "x"]) == 2
    assert "sbatch rejected the job: " in capsys.readouterr().err
    assert main(["launch", "status", str(tmp_path / "empty")]) == 2
    assert "nothing was launched" in capsys.readouterr().err
