"""The benchmarks of short runs: the product's training, and results that are complete or absent."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dinocell.models.weights import read_weights
from dinocell.runtime.schedules import Schedule
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    ModelConfig,
    PretrainConfig,
    Schedules,
    ViewsConfig,
)
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.train import pretrain


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import _short_runs
    finally:
        sys.path.remove(folder)
    return _short_runs


@pytest.fixture
def config(shard_set: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        output=tmp_path / "run",
        data=DataConfig(shards=(str(shard_set),)),
        steps=4,
        batch_size=4,
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        model=ModelConfig(variant="nano", layer_scale=0.1, drop_path=0.1),
        heads=HeadsConfig(num_prototypes=32, hidden=32, bottleneck=16),
        schedules=Schedules(learning_rate=Schedule(peak=0.01), teacher_momentum=Schedule(peak=0.5)),
        compute=ComputeConfig(workers=0),
    )


def test_training_gives_the_teacher_of_the_product(runs: ModuleType, config: PretrainConfig) -> None:
    wanted = read_weights(pretrain(config)).tensors
    seen = []

    def look(seconds: float, steps: int, model: StudentTeacher) -> None:
        seen.append((seconds, steps))
        assert isinstance(model, StudentTeacher)

    trained = runs.train(config, marks=(0.0, 0.0, 1e9), at_mark=look)
    found = trained.teacher.state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert seen == [(0.0, 1), (0.0, 2)]
    assert trained.cpu_seconds > 0
    start = runs.random_backbone(config).state_dict()
    assert any(not torch.equal(start[name], found[name]) for name in found)


def test_what_is_stored_is_not_measured_again(runs: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "arm-seed0.json"
    assert runs.stored(path, lambda: {"knn": 0.5}) == {"knn": 0.5}
    assert runs.stored(path, lambda: pytest.fail("measured again")) == {"knn": 0.5}
    runs.stored(path.with_name("arm-seed10.json"), lambda: {"knn": 0.7})
    runs.stored(path.with_name("arm-seed2.json"), lambda: {"knn": 0.6})
    runs.stored(path.with_name("arm_other-seed1.json"), lambda: {"knn": 0.1})
    assert runs.stored_by_seed(path.parent, "arm") == [{"knn": 0.5}, {"knn": 0.6}, {"knn": 0.7}]


def test_a_measurement_that_fails_leaves_no_result(runs: ModuleType, tmp_path: Path) -> None:
    def fails() -> dict[str, float]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        runs.stored(tmp_path / "arm-seed0.json", fails)
    assert not list(tmp_path.glob("*.json"))


def test_a_range_is_written_where_there_are_several_seeds(runs: ModuleType) -> None:
    assert runs.mean_and_range([0.5, 0.75, 1.0]) == "0.750 (0.500 to 1.000)"
    assert runs.mean_and_range([0.5]) == "0.500"
    assert runs.mean_and_range([]) == ""
