"""Training states: what is saved comes back, on other numbers of ranks too; damage costs one state, not the run."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from dinocell.errors import DinocellError
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.distributed import gather, max_over_ranks, start, stop, sum_over_ranks
from dinocell.runtime.random_states import random_states, set_random_states


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


def test_the_newest_stay_and_every_mth(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=2, keep_every=4, is_async=False)
    for step in range(1, 8):
        checkpointer.save(step, {"x": torch.ones(2)}, {})
    assert [path.name for path in checkpointer.steps()] == [f"step_{step:08d}" for step in (4, 6, 7)]


@pytest.mark.parametrize("harm", ["cut short", "no description", "no tensors"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = Checkpointer(tmp_path, is_async=False)
    for step in (1, 2):
        checkpointer.save(step, {"x": torch.full((5000,), float(step))}, {})
    newest = tmp_path / "step_00000002"
    if harm == "no description":
        (newest / "state.json").write_text("{")
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
    checkpointer.close()
    weight = model[0].weight.full_tensor()
    rows = gather(torch.full((2, 3), float(rank)))
    assert rows[:, 0].tolist() == [float(r) for r in range(ranks) for _ in range(2)]
    assert sum_over_ranks(torch.ones(1)).item() == ranks
    assert max_over_ranks(torch.tensor(float(rank))).item() == ranks - 1
    if world.is_main or rank == 0:
        torch.save(weight, Path(folder) / f"weight_{ranks}_{resumes}.pt")
    stop()


def test_a_state_of_two_ranks_goes_on_on_two_and_on_three(tmp_path: Path) -> None:
    for ranks, resumes in ((2, False), (2, True), (3, True)):
        mp.spawn(_train, (ranks, str(tmp_path), str(tmp_path / f"meet_{ranks}_{resumes}"), resumes), nprocs=ranks)
    whole = torch.load(tmp_path / "weight_2_False.pt")
    assert torch.equal(torch.load(tmp_path / "weight_2_True.pt"), whole)
    torch.testing.assert_close(torch.load(tmp_path / "weight_3_True.pt"), whole)
