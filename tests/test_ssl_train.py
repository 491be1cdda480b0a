"""The pretraining run: repeatable, watched, exported, and deaf to what is not finite."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinocell.cli import main
from dinocell.errors import ConfigError, DinocellError
from dinocell.models.weights import load_backbone, read_weights
from dinocell.runtime.preemption import RunStopped
from dinocell.runtime.schedules import Freeze, Schedule
from dinocell.ssl import train
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
)
from dinocell.ssl.schedules import Schedules
from dinocell.ssl.train import dry_run, pretrain
from dinocell.ssl.view_plan import ViewsConfig


def config_of(shard_set: Path, output: Path, **changes: Any) -> PretrainConfig:
    base = PretrainConfig(
        output=output,
        data=DataConfig(shards=(str(shard_set),)),
        steps=10,
        batch_size=4,
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        model=ModelConfig(variant="tiny", layer_scale=0.1, drop_path=0.1),
        heads=HeadsConfig(num_prototypes=64, hidden=32, bottleneck=16),
        schedules=Schedules(learning_rate=Schedule(peak=0.01, end=1e-4, warmup=0.2), last_layer=Freeze(hold=1)),
        log_every=1,
        picture_every=5,
        export_every=6,
        compute=ComputeConfig(workers=0),
    )
    return replace(base, **changes)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss/total"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_numbers_pictures_and_teachers(shard_set: Path, tmp_path: Path) -> None:
    exported = []
    last = pretrain(config_of(shard_set, tmp_path / "run"), on_export=exported.append)
    assert [path.parent.name for path in exported] == ["training_6", "training_10"]
    assert last == tmp_path / "run" / "eval" / "training_10" / "teacher_checkpoint.pth"
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    wanted = {"loss/total", "loss/dino_global", "loss/ibot", "loss/koleo", "gradient_norm/backbone"}
    wanted |= {"targets/entropy", "cls/effective_rank", "schedule/learning_rate", "health/skipped_steps"}
    assert wanted <= set(first)
    # Uniform targets and predictions at the start: the cross-entropy is that of 64 equal prototypes.
    assert first["loss/dino_global"] == pytest.approx(np.log(64), abs=0.1)
    assert (tmp_path / "run" / "config.yaml").exists()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_same_recipe_gives_the_same_run_whatever_the_workers(shard_set: Path, tmp_path: Path) -> None:
    pretrain(config_of(shard_set, tmp_path / "one"))
    pretrain(config_of(shard_set, tmp_path / "two", compute=ComputeConfig(workers=2)))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    one, two = (read_weights(tmp_path / n / "eval/training_10/teacher_checkpoint.pth").tensors for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    pretrain(config_of(shard_set, tmp_path / "other", seed=1))
    assert losses(tmp_path / "other") != losses(tmp_path / "one")


def test_the_teacher_file_holds_the_teacher(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []

    class Spy(train.StudentTeacher):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            models.append(self)

    monkeypatch.setattr(train, "StudentTeacher", Spy)
    path = pretrain(config_of(shard_set, tmp_path / "run"))
    vit = load_backbone(path)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(vit(images).cls, models[0].teacher["backbone"].eval()(images).cls, rtol=0, atol=0)
    weights = read_weights(path)
    assert set(weights.heads) == {"dino_head", "ibot_head"}
    assert weights.card.input.channel_policy == "consistency"
    assert weights.card.input.convention == "standardised"
    assert "10 steps of 4" in weights.card.derived_from[-1]
    student = models[0].student["backbone"].state_dict()
    assert any(not torch.equal(student[name], tensor) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": LossConfig(centring="softmax")},
        {"heads": HeadsConfig(num_prototypes=64, hidden=32, bottleneck=16, shared=True, weight_norm=True)},
        {"views": ViewsConfig(global_size=32, local_size=16, num_local=0, policy="average")},
        {"views": ViewsConfig(global_size=32, local_size=16, num_local=2, policy="bag", blur=0.5, noise=0.5)},
        {"views": ViewsConfig(global_size=32, local_size=16, num_local=2, policy="stack", channels=("DNA", "ER", "x"))},
        {"compute": ComputeConfig(workers=0, dtype="bfloat16")},
    ],
)
def test_every_setting_trains(shard_set: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    path = pretrain(config_of(shard_set, tmp_path / "run", steps=2, **changes))
    assert all(np.isfinite(losses(tmp_path / "run")))
    channels = 3 if changes.get("views", ViewsConfig()).policy == "stack" else 1
    assert read_weights(path).config.in_channels == channels


def test_a_step_that_is_not_finite_changes_no_weight(shard_set: Path, tmp_path: Path) -> None:
    config = config_of(shard_set, tmp_path / "run", optim=OptimConfig(max_bad_steps=2))
    samples, model, trainer = train._prepare(config, torch.device("cpu"))
    levels = train.channel_levels([each.manifest for each in samples.sets], config.views)
    batch = next(iter(samples))
    views = train.make_views(batch, config.views, levels, seed=0, device=torch.device("cpu"))
    trainer.step(0, batch, views, watch=False)
    before = {name: parameter.clone() for name, parameter in model.student.named_parameters()}
    views.global_views[0, 0, 0, 3, 3] = float("nan")
    metrics = trainer.step(1, batch, views, watch=True)
    assert int(metrics["health/skipped_steps"]) == 1
    assert "cls/std" not in metrics
    for name, parameter in model.student.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert all(parameter.isfinite().all() for parameter in model.teacher.parameters())
    with pytest.raises(DinocellError, match="2 steps in a row had a loss or gradient that is not finite"):
        trainer.step(2, batch, views, watch=True)
    views.global_views[0, 0, 0, 3, 3] = 0.0
    trainer.step(3, batch, views, watch=True)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.student.named_parameters())


def test_from_weights_the_backbone_rests_at_first(shard_set: Path, tmp_path: Path) -> None:
    start = pretrain(config_of(shard_set, tmp_path / "start", steps=2))
    model = ModelConfig(variant="tiny", weights=str(start), drop_path=0.0, start_freeze=Freeze(hold=3, warmup=2))
    config = config_of(shard_set, tmp_path / "run", model=model)
    samples, both, trainer = train._prepare(config, torch.device("cpu"))
    levels = train.channel_levels([each.manifest for each in samples.sets], config.views)
    want = load_backbone(start).state_dict()
    moved = []
    for number, batch in zip(range(6), samples, strict=False):
        views = train.make_views(batch, config.views, levels, seed=0, device=torch.device("cpu"))
        trainer.step(number, batch, views, watch=False)
        now = both.student["backbone"].state_dict()
        moved.append(any(not torch.equal(now[name], tensor) for name, tensor in want.items()))
    # Held for three steps; the fourth begins the rise, at 0.
    assert moved == [False, False, False, False, True, True]
    pretrain(replace(config, steps=5))
    line = read_weights(tmp_path / "run" / "eval" / "training_5" / "teacher_checkpoint.pth").card.derived_from
    assert len(line) >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": ViewsConfig(policy="stack", channels=("x",), global_size=32, local_size=16)}, "has none of x"),
        ({"compute": ComputeConfig(device="cuda")}, "cuda was asked for"),
        ({"data": DataConfig(shards=())}, "no shard set given"),
        ({"data": DataConfig(shards=("nowhere",))}, "nowhere: no shard set"),
        ({"model": ModelConfig(variant="tiny", weights="missing.pth")}, "missing.pth"),
    ],
)
def test_mistakes_are_one_line_before_the_first_step(
    shard_set: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if message == "cuda was asked for" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(DinocellError, match=message):
        pretrain(config_of(shard_set, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_impossible_settings_are_refused(shard_set: Path, tmp_path: Path) -> None:
    for changes in ({"steps": 0}, {"batch_size": 0}, {"views": ViewsConfig(global_size=30)}):
        with pytest.raises((ConfigError, ValueError), match="expected"):
            config_of(shard_set, tmp_path, **changes)


def test_a_dry_run_says_what_would_be_and_writes_nothing(shard_set: Path, tmp_path: Path) -> None:
    text = dry_run(config_of(shard_set, tmp_path / "run", steps=1000))
    assert "60 tiles, 1,000 steps of 4: 66.7 epochs" in text
    assert "nothing was written" in text
    assert not (tmp_path / "run").exists()


def test_the_command_trains_the_debug_recipe(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={tmp_path / 'run'}", "steps=2", "batch_size=2"]
    line += ["views.global_size=32", "views.local_size=16", "compute.workers=0", "heads.num_prototypes=64"]
    assert main([*line, "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    assert main(line) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("training_2/teacher_checkpoint.pth")


def test_a_gram_weight_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"schedules\.gram_weight: expected 0"):
        config_of(tmp_path, tmp_path / "run", schedules=Schedules(gram_weight=Schedule(peak=1.0)))


@pytest.mark.parametrize("centring", ["sinkhorn", "softmax"])
def test_a_run_that_was_stopped_goes_on_to_the_same_losses_bit_for_bit(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, centring: str
) -> None:
    options: dict[str, Any] = {"losses": LossConfig(centring=centring), "checkpoint_every": 3}
    pretrain(config_of(shard_set, tmp_path / "whole", **options))
    step = train._Trainer.step

    def told_to_stop_in_the_fifth(self: train._Trainer, number: int, *rest: Any, **more: Any) -> dict[str, Any]:
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, *rest, **more)

    parts = config_of(shard_set, tmp_path / "parts", **options)
    with monkeypatch.context() as patch:
        patch.setattr(train._Trainer, "step", told_to_stop_in_the_fifth)
        with pytest.raises(RunStopped, match=r"stopped after step 5 \(SIGTERM\)"):
            pretrain(parts)
    assert len(losses(tmp_path / "parts")) == 5
    teacher = pretrain(parts)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ends = [read_weights(tmp_path / n / "eval/training_10/teacher_checkpoint.pth").tensors for n in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    before = teacher.stat().st_mtime_ns
    assert pretrain(parts) == teacher  # it has finished
    assert teacher.stat().st_mtime_ns == before


def test_after_a_hard_fault_the_steps_since_the_last_state_are_taken_again(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(shard_set, tmp_path / "run", checkpoint_every=3)
    step = train._Trainer.step

    def dies_in_the_eighth(self: train._Trainer, number: int, *rest: Any, **more: Any) -> dict[str, Any]:
        if number == 7:
            raise MemoryError
        return step(self, number, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train._Trainer, "step", dies_in_the_eighth)
        with pytest.raises(MemoryError):
            pretrain(config)
    pretrain(config)
    assert "goes on after step 6" in (tmp_path / "run" / "log.txt").read_text()
    pretrain(config_of(shard_set, tmp_path / "whole", checkpoint_every=3))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
