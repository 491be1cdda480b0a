"""Training states: what is saved comes back, on other numbers of ranks too; damage costs one state, not the run."""

import errno
import os
import random
import shutil
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from dinocell.errors import DinocellError
from dinocell.runtime import checkpoint
from dinocell.runtime.checkpoint import Checkpointer, random_states, set_random_states
from dinocell.runtime.distributed import gather, max_over_ranks, start, stop, sum_over_ranks
from helpers.ranks import fork_ranks


def test_what_is_saved_is_what_there_was_when_save_was_called(tmp_path: Path) -> None:
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


def test_a_state_is_whole_once_it_is_written_not_when_the_next_one_is(tmp_path: Path) -> None:
    """Killed before the next save, a run would go on from the state before: twice the steps would be lost."""
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    for step in (1, 2):
        checkpointer.save(step, {"x": torch.full((3,), float(step))}, {})
        wait_for(tmp_path / f"step_{step:08d}" / "state.json")
    found = {"x": torch.empty(3)}
    restored = Checkpointer(tmp_path).restore(found)
    assert restored is not None
    assert restored.step == 2
    checkpointer.close()


def test_filters_of_warnings_in_the_training_do_not_reach_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of the process, not of a thread: torch leaves a block of its own while a state is being written."""
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


def test_the_newest_stay_and_every_mth(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=2, keep_every=4, is_async=False)
    for step in range(1, 8):
        checkpointer.save(step, {"x": torch.ones(2)}, {})
    assert [path.name for path in checkpointer.steps()] == [f"step_{step:08d}" for step in (4, 6, 7)]


@pytest.mark.parametrize("harm", ["cut short", "no description", "no mapping", "no step", "no tensors"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = Checkpointer(tmp_path, is_async=False)
    for step in (1, 2):
        checkpointer.save(step, {"x": torch.full((5000,), float(step))}, {})
    newest = tmp_path / "step_00000002"
    said = {"no description": "{", "no mapping": "null", "no step": '{"ranks": 1}'}
    if harm in said:
        (newest / "state.json").write_text(said[harm])
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


def test_if_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    Checkpointer(tmp_path, is_async=False).save(1, {"x": torch.ones(3)}, {})
    shutil.rmtree(tmp_path / "step_00000001" / ".metadata", ignore_errors=True)
    (tmp_path / "step_00000001" / ".metadata").unlink(missing_ok=True)
    with pytest.raises(DinocellError, match="every checkpoint is damaged"):
        Checkpointer(tmp_path).restore({"x": torch.empty(3)})


def test_a_copy_that_somebody_kept_is_left_alone(tmp_path: Path) -> None:
    """It is not taken for a checkpoint of this run, and does not end the run when old ones are dropped."""
    checkpointer = Checkpointer(tmp_path, keep_last=1, is_async=False)
    checkpointer.save(1, {"x": torch.ones(2)}, {})
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001_good")
    checkpointer.save(2, {"x": torch.ones(2)}, {})
    assert [path.name for path in checkpointer.steps()] == ["step_00000002"]
    assert (tmp_path / "step_00000001_good" / "state.json").exists()


def test_what_a_killed_start_left_half_written_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".step_00000017"  # where a run was told to stop: the next start does not save there again
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


@pytest.mark.parametrize(("first", "then"), [(False, True), (True, False)])
def test_a_run_of_the_cpu_goes_on_on_cuda_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, then: bool
) -> None:
    """There are more random states where there is CUDA, and a state without them is not a damaged one."""

    def states(*, with_cuda: bool) -> dict[str, torch.Tensor]:
        return random_states() | ({"cuda": torch.zeros(16, dtype=torch.uint8)} if with_cuda else {})

    came_back: list[list[str]] = []
    monkeypatch.setattr(checkpoint, "set_random_states", lambda found: came_back.append(list(found)))
    monkeypatch.setattr(checkpoint, "random_states", lambda: states(with_cuda=first))
    Checkpointer(tmp_path, is_async=False).save(1, {"x": torch.ones(2)}, {})
    monkeypatch.setattr(checkpoint, "random_states", lambda: states(with_cuda=then))
    found = {"x": torch.empty(2)}
    restored = Checkpointer(tmp_path).restore(found)
    assert restored is not None
    assert torch.equal(found["x"], torch.ones(2))
    assert came_back == [list(random_states())]


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "new").restore({}) is None


def test_random_states_come_back() -> None:
    states = random_states()
    first = (torch.rand(2).tolist(), np.random.rand(), random.gauss(0, 1), np.random.standard_normal())
    set_random_states(states)
    assert (torch.rand(2).tolist(), np.random.rand(), random.gauss(0, 1), np.random.standard_normal()) == first


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
    stop()


@pytest.mark.slow
def test_a_state_of_two_ranks_goes_on_on_two_and_on_three(tmp_path: Path) -> None:
    for ranks, resumes in ((2, False), (2, True), (3, True)):
        arguments = (ranks, str(tmp_path), str(tmp_path / f"meet_{ranks}_{resumes}"), resumes)
        fork_ranks(_train, arguments, ranks)
    whole = torch.load(tmp_path / "weight_2_False.pt")
    assert torch.equal(torch.load(tmp_path / "weight_2_True.pt"), whole)
    torch.testing.assert_close(torch.load(tmp_path / "weight_3_True.pt"), whole)
