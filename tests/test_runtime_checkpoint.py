"""Checkpoints are restored exactly, also on other numbers of ranks; a damaged one costs one checkpoint, not the run."""

import errno
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from dinocell.errors import DinocellError
from dinocell.runtime import checkpoint
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.distributed import gather, max_over_ranks, start, sum_over_ranks
from helpers.ranks import fork_ranks


def test_a_checkpoint_holds_the_values_at_the_time_of_the_call(tmp_path: Path) -> None:
    values = torch.arange(200_000.0)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, {"a": {"b": values}}, {"epoch": 7})
    values.zero_()
    checkpointer.close()
    found = {"a": {"b": torch.empty(200_000)}}
    restored = Checkpointer(tmp_path).restore(found)
    assert restored is not None
    assert (restored.step, restored.values) == (3, {"epoch": 7})
    assert torch.equal(found["a"]["b"], torch.arange(200_000.0))


def wait_for(path: Path, limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def test_a_checkpoint_is_complete_once_written_not_at_the_next_save(tmp_path: Path) -> None:
    """Otherwise a run that is killed before the next save would resume from the previous checkpoint."""
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    for step in (1, 2):
        checkpointer.save(step, {"x": torch.full((3,), float(step))}, {})
        wait_for(tmp_path / f"step_{step:08d}" / "state.json")
    found = {"x": torch.empty(3)}
    restored = Checkpointer(tmp_path).restore(found)
    assert restored is not None
    assert restored.step == 2
    checkpointer.close()


def test_warning_filters_of_the_training_do_not_affect_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters belong to the process: torch leaves a block of its own while a checkpoint is being written."""
    begun, may_go_on = threading.Event(), threading.Event()
    write = checkpoint.save_state

    def slowly(*arguments: object, **options: object) -> object:
        begun.set()
        assert may_go_on.wait(30)
        return write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_state", slowly)
    checkpointer = Checkpointer(tmp_path)
    with warnings.catch_warnings():
        checkpointer.save(1, {"x": torch.ones(2)}, {})
        assert begun.wait(30)
    may_go_on.set()
    checkpointer.close()
    assert len(checkpointer.steps()) == 1


def test_the_newest_and_every_mth_checkpoint_are_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=2, keep_every=4, is_async=False)
    for step in range(1, 8):
        checkpointer.save(step, {"x": torch.ones(2)}, {})
    assert [path.name for path in checkpointer.steps()] == [f"step_{step:08d}" for step in (4, 6, 7)]


@pytest.mark.parametrize("harm", ["cut short", "no description", "no mapping", "no step", "no tensors"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = Checkpointer(tmp_path, is_async=False)
    for step in (1, 2):
        checkpointer.save(step, {"x": torch.full((5000,), float(step))}, {})
    newest = tmp_path / "step_00000002"
    descriptions = {"no description": "{", "no mapping": "null", "no step": '{"ranks": 1}'}
    if harm in descriptions:
        (newest / "state.json").write_text(descriptions[harm])
    for file in newest.glob("*.distcp"):
        if harm == "cut short":
            file.write_bytes(file.read_bytes()[:100])
        elif harm == "no tensors":
            file.unlink()
    found = {"x": torch.empty(5000)}
    restored = checkpointer.restore(found)
    assert restored is not None
    assert restored.step == 1
    assert torch.equal(found["x"], torch.ones(5000))
    assert "step_00000002: damaged" in caplog.text


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    Checkpointer(tmp_path, is_async=False).save(1, {"x": torch.ones(3)}, {})
    shutil.rmtree(tmp_path / "step_00000001" / ".metadata", ignore_errors=True)
    (tmp_path / "step_00000001" / ".metadata").unlink(missing_ok=True)
    with pytest.raises(DinocellError, match=str(tmp_path)):
        Checkpointer(tmp_path).restore({"x": torch.empty(3)})


def test_a_copy_under_another_name_is_ignored(tmp_path: Path) -> None:
    """It is not taken for a checkpoint of this run, and does not end the run when old ones are dropped."""
    checkpointer = Checkpointer(tmp_path, keep_last=1, is_async=False)
    checkpointer.save(1, {"x": torch.ones(2)}, {})
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001_good")
    checkpointer.save(2, {"x": torch.ones(2)}, {})
    assert [path.name for path in checkpointer.steps()] == ["step_00000002"]
    assert (tmp_path / "step_00000001_good" / "state.json").exists()


def test_an_unfinished_checkpoint_of_a_killed_start_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".step_00000017"  # a resumed run may never save this step again
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    Checkpointer(tmp_path, is_async=False).save(20, {"x": torch.ones(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("where", ["tensors", "description"])
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_async: bool, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "tensors":
        monkeypatch.setattr(FileSystemWriter, "write_data", full)
    else:
        monkeypatch.setattr(checkpoint, "write_atomically", full)
    checkpointer = Checkpointer(tmp_path, is_async=is_async)
    with pytest.raises(DinocellError, match=r"step_00000003: cannot be written \(No space left on device\)$"):  # noqa: PT012
        checkpointer.save(3, {"x": torch.ones(2)}, {})
        checkpointer.wait()
    assert not checkpointer.steps()
    checkpointer.close()


def test_a_checkpoint_with_random_states_of_an_earlier_version_is_restored(tmp_path: Path) -> None:
    checkpointer, folder = Checkpointer(tmp_path), tmp_path / "step_00000001"
    state = {"tensors": {"x": torch.ones(2)}, "random": {"rank_0": {"torch": torch.get_rng_state()}}}
    checkpoint.save_state(state, checkpoint_id=folder, no_dist=True)
    (folder / "state.json").write_text('{"step": 1, "ranks": 1, "random": ["torch"], "values": {}}')
    tensors = {"x": torch.empty(2)}
    restored = checkpointer.restore(tensors)
    assert restored is not None
    assert torch.equal(tensors["x"], torch.ones(2))


def test_restoring_without_a_checkpoint_gives_none(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "new").restore({}) is None


def _train(rank: int, ranks: int, folder: str, meet: str, resumes: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    world = start("cpu")
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 12))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpointer = Checkpointer(Path(folder) / "checkpoints")
    first = 0
    if resumes:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        restored = checkpointer.restore(state)
        assert restored is not None
        first = restored.step
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(first + 1, 5):
        loss = model(torch.full((4, 12), float(step))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 2 and not resumes:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            checkpointer.save(step, state, {})
            wait_for(Path(folder) / "checkpoints" / "step_00000002" / "state.json")
    checkpointer.close()
    weight = model[0].weight.full_tensor()
    rows = gather(torch.full((2, 3), float(rank)))
    assert rows[:, 0].tolist() == [float(r) for r in range(ranks) for _ in range(2)]
    assert sum_over_ranks(torch.ones(1)).item() == ranks
    assert max_over_ranks(torch.tensor(float(rank))).item() == ranks - 1
    if world.is_main or rank == 0:
        torch.save(weight, Path(folder) / f"weight_{ranks}_{resumes}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_resumes_on_two_and_on_three(tmp_path: Path) -> None:
    for ranks, resumes in ((2, False), (2, True), (3, True)):
        arguments = (ranks, str(tmp_path), str(tmp_path / f"meet_{ranks}_{resumes}"), resumes)
        fork_ranks(_train, arguments, ranks)
    whole = torch.load(tmp_path / "weight_2_False.pt")
    assert torch.equal(torch.load(tmp_path / "weight_2_True.pt"), whole)
    torch.testing.assert_close(torch.load(tmp_path / "weight_3_True.pt"), whole)
