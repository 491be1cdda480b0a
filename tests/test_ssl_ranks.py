"""Several ranks share a step: the same losses as one process, whatever their number and however the model lies on them.

Real processes: of torchrun, as a user would start them, and forked ones with the variables that it sets.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocell.configs.load import to_yaml
from dinocell.models.weights import read_weights
from dinocell.runtime.schedules import Schedule
from dinocell.ssl.config import (
    ComputeConfig,
    GramConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    ReconstructionConfig,
    Schedules,
)
from dinocell.ssl.train import pretrain
from helpers.pretraining import small_pretraining
from helpers.ranks import run_ranks

STEPS = 4
# Processes on each machine, and machines.
RANKS = {"ddp": (2, 1), "fsdp": (3, 1), "hsdp": (2, 2)}


def config_of(shard_set: Path, output: Path, **compute: object) -> PretrainConfig:
    return small_pretraining(
        shard_set,
        output,
        steps=STEPS,
        batch_size=12,
        image_every=4,
        export_every=100,
        checkpoint_every=2,
        compute=ComputeConfig(workers=0, **compute),  # type: ignore[arg-type]
    )


def torchrun(config: PretrainConfig, ranks: int) -> None:
    """Run the command in ``ranks`` processes."""
    line = ["--standalone", f"--nproc-per-node={ranks}", "-m", "dinocell", "pretrain", str(recipe(config))]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *line],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def recipe(config: PretrainConfig) -> Path:
    path = config.output.with_suffix(".yaml")
    path.write_text("# test\n" + to_yaml(config))
    return path


def numbers(output: Path, name: str) -> list[float]:
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [said[name] for said in lines if "loss/total" in said]  # not those of the probes


def teacher(output: Path) -> dict[str, torch.Tensor]:
    return read_weights(output / "eval" / f"training_{STEPS}" / "teacher_checkpoint.pth").tensors


@pytest.fixture(scope="module")
def alone(built_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    pretrain(config_of(built_once, output))
    return output


@pytest.fixture(scope="module")
def shared(built_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what gives the run of several processes by the way that they share the model."""
    folder = tmp_path_factory.mktemp("shared")

    def run(parallel: str) -> Path:
        output = folder / parallel
        if not output.exists():
            ranks, machines = RANKS[parallel]
            config = config_of(built_once, output, parallel=parallel)
            if parallel == "ddp":
                torchrun(config, ranks)
            else:
                run_ranks(["pretrain", str(recipe(config))], ranks, machines=machines)
        return output

    return run


@pytest.mark.slow
@pytest.mark.parametrize("parallel", RANKS)
def test_ranks_give_the_losses_of_one_process(shared: Callable[[str], Path], alone: Path, parallel: str) -> None:
    output = shared(parallel)
    for name in ("loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo", "gradient_norm/backbone"):
        np.testing.assert_allclose(numbers(output, name), numbers(alone, name), rtol=1e-4, err_msg=name)
    ours, wanted = teacher(output), teacher(alone)
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=2e-4, msg=name)
    said = (output / "log.txt").read_text()
    assert f"{math.prod(RANKS[parallel])} processes, {parallel}" in said


@pytest.mark.slow
def test_ranks_accumulate_and_renew_their_gram_teacher_as_one_process_does(shard_set: Path, tmp_path: Path) -> None:
    """Two parts a step, a Gram teacher that is taken twice: what FSDP2 gathers for it must not be in the way."""
    changes = {
        "optim": OptimConfig(accumulate=2),
        "gram": GramConfig(refresh_every=2, max_refreshes=1),
        "schedules": Schedules(
            learning_rate=Schedule(peak=0.01),
            gram_weight=Schedule(peak=1.0, hold=1),
            teacher_momentum=Schedule(peak=0.5),
        ),
    }
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(replace(config_of(shard_set, one), **changes))
    run_ranks(["pretrain", str(recipe(replace(config_of(shard_set, two, parallel="ddp"), **changes)))], 2)
    for name in ("loss/dino_global", "loss/ibot", "loss/koleo", "loss/gram"):
        np.testing.assert_allclose(numbers(two, name), numbers(one, name), rtol=1e-3, atol=1e-6, err_msg=name)
    assert numbers(two, "loss/gram")[-1] > 0


@pytest.mark.slow
def test_a_state_of_three_ranks_is_taken_up_by_one(
    built_once: Path, shared: Callable[[str], Path], tmp_path: Path, alone: Path
) -> None:
    output = Path(shutil.copytree(shared("fsdp"), tmp_path / "run"))
    (output / "config.yaml").write_text(to_yaml(config_of(built_once, output, parallel="fsdp")))
    # As if it had died after the state of step 2.
    for path in (output / "checkpoints").glob(f"step_*{STEPS}"):
        path.rename(tmp_path / "gone")
    for path in (output / "eval").iterdir():
        path.rename(tmp_path / "gone_too")
    pretrain(config_of(built_once, output))
    assert "resuming after step 2" in (output / "log.txt").read_text()
    assert numbers(output, "step") == [1, 2, 3, 4]
    np.testing.assert_allclose(numbers(output, "loss/total"), numbers(alone, "loss/total"), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_reconstruct_as_one_process_does(shard_set: Path, tmp_path: Path, parallel: str) -> None:
    losses = LossConfig(reconstruction=ReconstructionConfig(weight=1.0, target="other", hidden_dim=32))
    one = replace(config_of(shard_set, tmp_path / "one"), losses=losses)
    two = replace(config_of(shard_set, tmp_path / "two", parallel=parallel), losses=losses)
    pretrain(one)
    torchrun(two, 2)
    for name in ("loss/reconstruction", "loss/ibot", "gradient_norm/reconstruction_head", "gradient_norm/backbone"):
        np.testing.assert_allclose(numbers(two.output, name), numbers(one.output, name), rtol=1e-4, err_msg=name)
