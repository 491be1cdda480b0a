"""``dinocell pretrain`` refuses invalid input before the first step, in one line; resuming and exporting."""

import json
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dinocell.cli import main
from dinocell.configs.load import find_recipe, load_config, text_override
from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.field import Field, FieldFile
from dinocell.images.write import write_tiff
from dinocell.models.weights import read_weights
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.preemption import RunStopped
from dinocell.ssl import prepare
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.train import pretrain

SMALL = ("views.global_size=32", "views.local_size=16", "heads.num_prototypes=64", "model.variant=nano", "steps=1")
SMALL += ("compute.workers=0", "online_eval.every=0")


@pytest.fixture
def refused(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return the error of the command, which must be one line; nothing may have been written."""

    def run(*settings: str, shards: Path | None = None) -> str:
        output = tmp_path / "run"
        line = ["pretrain", "debug", f"data.shards=[{shards or shard_set}]", f"output={output}", *SMALL, *settings]
        for more in ([], ["--dry-run"]):
            capsys.readouterr()
            assert main([*line, *more]) == 2
            said = capsys.readouterr()
            assert said.err.count("\n") == 1, said.err
            assert said.out == ""
            assert not output.exists()
        return said.err

    return run


@dataclass(frozen=True)
class OneChannel:
    """A field of one channel."""

    file: Path

    def fields(self) -> Any:
        yield Field(id="f", files=(FieldFile(path=str(self.file), channels=("DNA",)),))


@pytest.mark.parametrize("policy", ["consistency", "bag"])
def test_fewer_channels_than_the_policy_needs(
    refused: Callable[..., str], tmp_path: Path, draw: Callable[[int], Any], policy: str
) -> None:
    write_tiff(tmp_path / "f.tif", draw(0)[0], pixel_size_um=0.65)
    settings = ShardSettings(tiles=TileSettings(size=32, min_size=16, min_contrast=0))
    build(OneChannel(tmp_path / "f.tif"), tmp_path / "grey", settings=settings, workers=1)
    said = refused(f"views.policy={policy}", shards=tmp_path / "grey")
    assert f"views.policy: {policy}" in said
    assert f"{tmp_path / 'grey'} has DNA" in said


def test_no_channel_of_the_stack_in_the_set(refused: Callable[..., str], shard_set: Path) -> None:
    said = refused("views.policy=stack", "views.channels=[Golgi]")
    assert f"views.channels: {shard_set} has none of Golgi; it has DNA, ER, AGP" in said


def test_a_channel_that_no_set_has_is_reported(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be intended, for weights of more channels, or a typing error: the model would never see it."""
    line = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={tmp_path / 'run'}", *SMALL, "--dry-run"]
    assert main([*line, "views.policy=stack", "views.channels=[DNA,Agp]"]) == 0
    assert "views.channels: no set has Agp" in capsys.readouterr().out
    assert main([*line, "views.policy=stack", "views.channels=[DNA,AGP]"]) == 0
    assert "no set has" not in capsys.readouterr().out


def test_no_set_and_a_folder_without_one(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "shards: expected the folder or address of at least one shard set" in refused("data.shards=[]")
    (tmp_path / "nothing").mkdir()
    said = refused(shards=tmp_path / "nothing")
    assert f"{tmp_path / 'nothing'}: no shard set" in said
    assert "'dinocell shards build' makes one" in said


def test_an_empty_set(refused: Callable[..., str], shard_set: Path) -> None:
    manifest = json.loads((shard_set / "manifest.json").read_text())
    manifest |= {"num_samples": 0, "shards": [], "shapes": {}, "channels": {}}
    (shard_set / "manifest.json").write_text(json.dumps(manifest))
    said = refused()
    assert str(shard_set) in said
    assert "the set is empty, rejected.jsonl" in said


@pytest.mark.parametrize(("name", "size"), [("global_size", 40), ("local_size", 48)])
def test_tiles_smaller_than_a_crop(refused: Callable[..., str], shard_set: Path, name: str, size: int) -> None:
    said = refused(f"views.{name}={size}")
    assert f"views.{name}: crops have {size} px, and the tiles of {shard_set} have at most 32 px" in said


@pytest.mark.parametrize("name", ["global_size", "local_size"])
def test_a_patch_that_does_not_divide_a_crop(refused: Callable[..., str], name: str) -> None:
    assert f"views.{name}: expected a multiple of patch_size 8, got 20" in refused(f"views.{name}=20")


@pytest.mark.parametrize("too_much", ["batch_size=512", "heads.num_prototypes=1048576"])
def test_a_batch_or_prototypes_too_large_for_the_memory(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, too_much: str
) -> None:
    monkeypatch.setattr(prepare, "available_bytes", lambda _: 10**9)
    said = refused(too_much)
    assert "compute.device: a step needs about" in said
    assert "cpu has 1.0 GB left per process: raise optim.accumulate from 1" in said


def test_a_batch_that_its_parts_do_not_divide(refused: Callable[..., str]) -> None:
    said = refused("batch_size=6", "optim.accumulate=4")
    assert "optim.accumulate: expected a divisor of batch_size 6, got 4" in said


def test_the_folder_of_another_recipe(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={tmp_path / 'run'}", *SMALL, "batch_size=2"]
    assert main(line) == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main([*line, "optim.clip=1.0"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "optim.clip: 3.0 -> 1.0" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_evaluation_and_cache_may_differ_when_a_run_is_resumed(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a run whose evaluation set was moved could not be resumed."""
    line = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={tmp_path / 'run'}", *SMALL, "batch_size=2"]
    assert main([*line, "online_eval.every=1", "online_eval.tiles=4"]) == 0
    (tmp_path / "run" / "eval" / "training_1" / "teacher_checkpoint.pth").unlink()
    assert main([*line, f"data.cache={tmp_path / 'node'}", "data.cache_gb=1"]) == 0
    assert "resuming after step 1" in capsys.readouterr().out


def test_an_interrupted_run_saves_its_checkpoint_once(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the minutes before a time limit, a checkpoint that is written twice may not be finished."""
    saved = []
    save = Checkpointer.save

    def counted(self: Checkpointer, step: int, *states: Any) -> None:
        saved.append(step)
        save(self, step, *states)

    monkeypatch.setattr(Checkpointer, "save", counted)
    line = [
        *SMALL,
        "output=" + str(tmp_path / "run"),
        "steps=9",
        "export_every=2",
        "checkpoint_every=2",
        "batch_size=2",
    ]
    config = load_config(
        PretrainConfig, find_recipe("pretrain", "debug"), [text_override("data.shards", [shard_set]), *line]
    )
    with pytest.raises(RunStopped):
        pretrain(config, on_export=lambda _: signal.raise_signal(signal.SIGTERM))
    assert saved == [2]


def test_a_teacher_that_was_removed_is_written_again(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={tmp_path / 'run'}", *SMALL, "batch_size=2"]
    assert main(line) == 0
    teacher = tmp_path / "run" / "eval" / "training_1" / "teacher_checkpoint.pth"
    before = read_weights(teacher)
    teacher.unlink()
    assert main(line) == 0
    assert f"teacher: {teacher}\n" in capsys.readouterr().out
    again = read_weights(teacher)
    assert again.card == before.card
    torch.testing.assert_close(again.tensors, before.tensors, rtol=0, atol=0)


def test_a_teacher_that_cannot_be_written_is_one_line(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval").write_text("a file")
    line = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={tmp_path / 'run'}", *SMALL, "batch_size=2"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "teacher_checkpoint.pth: cannot be written (Not a directory)" in said
    assert said.count("\n") == 1


def test_a_dry_run_measures_time_and_memory(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={tmp_path / 'run'}", *SMALL, "--dry-run"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert re.search(r"measured memory: \d+\.\d GB at the peak\nmeasured time: \d+\.\d\d s per step on cpu", said)
