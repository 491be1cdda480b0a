"""The pretraining run: repeatable, resumable, monitored, exported, robust to non-finite steps."""

import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinocell.cli import main
from dinocell.configs.load import to_yaml
from dinocell.errors import ConfigError, DinocellError
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import load_backbone, read_weights
from dinocell.runtime.distributed import World
from dinocell.runtime.preemption import RunStopped
from dinocell.runtime.schedules import Freeze, Schedule
from dinocell.ssl import prepare
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    GramConfig,
    HeadsConfig,
    LossConfig,
    MaskingConfig,
    ModelConfig,
    OnlineEvalConfig,
    OptimConfig,
    PretrainConfig,
    ReconstructionConfig,
    Schedules,
    ViewsConfig,
)
from dinocell.ssl.data import PlannedBatch, PlannedStream, open_shards
from dinocell.ssl.heads import ReconstructionHead
from dinocell.ssl.losses import to_patches
from dinocell.ssl.masking import PatchMasks
from dinocell.ssl.train import dry_run, pretrain
from dinocell.ssl.trainer import Trainer
from dinocell.ssl.views import Views, make_views
from dinocell.ssl.visualise import draw_features, draw_reconstruction, principal_colours
from helpers.pretraining import small_pretraining


def config_of(shard_set: Path, output: Path, **changes: Any) -> PretrainConfig:
    base = small_pretraining(
        shard_set,
        output,
        steps=10,
        model=ModelConfig(variant="nano", layer_scale=0.1, drop_path=0.1),
        schedules=Schedules(learning_rate=Schedule(peak=0.01, end=1e-4, warmup=0.2), last_layer=Freeze(freeze=1)),
        image_every=5,
        export_every=6,
    )
    return replace(base, **changes)


def prepared(config: PretrainConfig) -> tuple[PlannedStream, prepare.StudentTeacher, Trainer]:
    stream, model = open_shards(config, World()), prepare.build_model(config, World())
    return stream, model, Trainer(config, model, World())


def inputs(batch: PlannedBatch, config: PretrainConfig, device: str = "cpu") -> tuple[Views, PatchMasks]:
    """Return the views and masks that a step trains on."""
    target = torch.device(device)
    return make_views(batch.tiles, batch.plans, config.views, device=target), batch.masks.to(target)


def losses(output: Path) -> list[float]:
    """Return the loss of every step; the command adds lines of what it measures of the teacher."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/total"] for line in lines if "loss/total" in line]


def test_a_run_writes_metrics_images_and_teachers(shard_set: Path, tmp_path: Path) -> None:
    exported = []
    last = pretrain(config_of(shard_set, tmp_path / "run"), on_export=exported.append)
    assert [path.parent.name for path in exported] == ["training_6", "training_10"]
    assert last == tmp_path / "run" / "eval" / "training_10" / "teacher_checkpoint.pth"
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    wanted = {"loss/total", "loss/dino_global", "loss/ibot", "loss/koleo", "gradient_norm/backbone"}
    wanted |= {"targets/entropy", "cls/effective_rank", "schedule/learning_rate", "health/skipped_steps"}
    assert wanted <= set(first)
    # Uniform targets and predictions at the start: the cross-entropy is that of 64 equal prototypes.
    # Of iBOT half, for half of the crops have no mask and count all the same.
    for name, share in (("dino_global", 1.0), ("dino_local", 1.0), ("ibot", 0.5)):
        assert first[f"loss/{name}"] == pytest.approx(share * np.log(64), abs=0.1), name
    assert (tmp_path / "run" / "config.yaml").exists()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.slow
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

    class Spy(prepare.StudentTeacher):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            models.append(self)

    monkeypatch.setattr(prepare, "StudentTeacher", Spy)
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
        {"losses": LossConfig(reconstruction=ReconstructionConfig(weight=1.0, target="mean", patch_normalised=True))},
    ],
)
def test_every_setting_trains(
    shard_set: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinocell.runtime.device._emulates_bfloat16", lambda: False)
    path = pretrain(config_of(shard_set, tmp_path / "run", steps=2, **changes))
    assert all(np.isfinite(losses(tmp_path / "run")))
    channels = 3 if changes.get("views", ViewsConfig()).policy == "stack" else 1
    assert read_weights(path).config.in_channels == channels


def test_reconstruction_is_logged_and_leaves_the_teacher_file_as_it_is(shard_set: Path, tmp_path: Path) -> None:
    reconstruction = ReconstructionConfig(weight=1.0, target="other", hidden_dim=64)
    config = config_of(shard_set, tmp_path / "run", losses=LossConfig(reconstruction=reconstruction))
    path = pretrain(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss/reconstruction"] for line in lines if "loss/total" in line]
    assert found[0] == pytest.approx(0.5, abs=0.25)  # the mean is predicted; half of the crops are masked
    assert np.isfinite(found).all()
    assert "gradient_norm/reconstruction_head" in lines[0]
    plain = pretrain(config_of(shard_set, tmp_path / "plain"))
    assert "loss/reconstruction" not in (tmp_path / "plain" / "metrics.jsonl").read_text()
    ours, theirs = read_weights(path), read_weights(plain)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert ours.heads.keys() == theirs.heads.keys()


def test_a_step_that_is_not_finite_changes_no_weight(shard_set: Path, tmp_path: Path) -> None:
    config = config_of(shard_set, tmp_path / "run", optim=OptimConfig(max_nonfinite_steps=2))
    stream, model, trainer = prepared(config)
    views, masks = inputs(next(iter(stream)), config)
    trainer.step(0, [(views, masks)], measure=False)
    before = {name: parameter.clone() for name, parameter in model.student.named_parameters()}
    views.global_views[0, 0, 0, 3, 3] = float("nan")
    metrics = trainer.step(1, [(views, masks)], measure=True)
    assert int(metrics["health/skipped_steps"]) == 1
    assert "cls/std" not in metrics
    for name, parameter in model.student.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert all(parameter.isfinite().all() for parameter in model.teacher.parameters())
    with pytest.raises(DinocellError, match="2 steps in a row"):
        trainer.step(2, [(views, masks)], measure=True)
    views.global_views[0, 0, 0, 3, 3] = 0.0
    trainer.step(3, [(views, masks)], measure=True)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.student.named_parameters())


def test_from_weights_the_backbone_is_frozen_at_first(shard_set: Path, tmp_path: Path) -> None:
    start = pretrain(config_of(shard_set, tmp_path / "start", steps=2))
    model = ModelConfig(variant="nano", weights=str(start), drop_path=0.0)
    schedules = Schedules(learning_rate=Schedule(peak=0.01), backbone=Freeze(freeze=3, warmup=2))
    config = config_of(shard_set, tmp_path / "run", model=model, schedules=schedules)
    stream, both, trainer = prepared(config)
    want = load_backbone(start).state_dict()
    moved = []
    for step, batch in zip(range(6), stream, strict=False):
        trainer.step(step, [inputs(batch, config)], measure=False)
        now = both.student["backbone"].state_dict()
        moved.append(any(not torch.equal(now[name], tensor) for name, tensor in want.items()))
    # Held for three steps; the fourth begins the rise, at 0.
    assert moved == [False, False, False, False, True, True]
    pretrain(replace(config, steps=5))
    line = read_weights(tmp_path / "run" / "eval" / "training_5" / "teacher_checkpoint.pth").card.derived_from
    assert len(line) >= 2


def test_pretrained_weights_are_frozen_at_first_random_ones_only_by_the_recipe() -> None:
    assert Schedules().backbone_freeze(from_weights=False) == Freeze()
    assert Schedules().backbone_freeze(from_weights=True).freeze > 0
    own = Schedules(backbone=Freeze(freeze=7))
    assert own.backbone_freeze(from_weights=True) == own.backbone_freeze(from_weights=False) == Freeze(freeze=7)
    assert Schedules(backbone=Freeze()).backbone_freeze(from_weights=True) == Freeze()


@pytest.mark.slow
def test_a_start_from_a_good_teacher_does_it_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 steps of what benchmarks/start_from_weights.py measures over 200: new heads at a high rate do harm there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import start_from_weights as benchmark

    sets = benchmark.make_sets(tmp_path, train=30, known=60, asked=120)
    start = benchmark.teach(tmp_path / "start.pth", steps=40, seed=0)
    before = benchmark.answers(start, sets)
    assert before.float().mean() > 0.5, "a teacher that knows nothing cannot be harmed"
    teacher = pretrain(benchmark.recipe(sets["train"], tmp_path / "run", steps=40, seed=0, start=start))
    assert any(
        not torch.equal(tensor, read_weights(start).tensors[name])
        for name, tensor in read_weights(teacher).tensors.items()
    )
    after = benchmark.answers(teacher, sets)
    noise = max(benchmark.standard_error(before, after), 1 / len(before))
    assert after.float().mean() >= before.float().mean() - 3 * noise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": ViewsConfig(policy="stack", channels=("x",), global_size=32, local_size=16)}, "views.channels"),
        ({"compute": ComputeConfig(device="cuda")}, "compute.device: cuda"),
        ({"compute": ComputeConfig(device="cpu", attention="varlen")}, "varlen"),
        ({"data": DataConfig(shards=("nowhere",))}, "nowhere: no shard set"),
        ({"model": ModelConfig(variant="nano", weights="missing.pth")}, "missing.pth"),
    ],
)
def test_user_errors_are_one_line_before_the_first_step(
    shard_set: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if message == "compute.device: cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(DinocellError, match=message):
        pretrain(config_of(shard_set, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_missing_kernel_is_one_line_before_the_first_step(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # what Python keeps for a package that is not there
    config = config_of(shard_set, tmp_path / "run", compute=ComputeConfig(device="cpu", attention="xformers"))
    with pytest.raises(ConfigError, match=r"compute\.attention: xformers"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def test_impossible_settings_are_refused(shard_set: Path, tmp_path: Path) -> None:
    for changes in ({"seed": -1}, {"steps": 0}, {"batch_size": 0}, {"views": ViewsConfig(global_size=30)}):
        with pytest.raises((ConfigError, ValueError), match="expected"):
            config_of(shard_set, tmp_path, **changes)


def test_a_dry_run_summarises_the_run_and_writes_nothing(shard_set: Path, tmp_path: Path) -> None:
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


def test_out_of_memory_is_one_line_that_names_the_settings_to_change(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(Trainer, "step", full)
    with pytest.raises(DinocellError, match=r"not enough memory on cpu \(CUDA .*\): raise optim.accumulate from 1"):
        pretrain(config_of(shard_set, tmp_path / "run"))


def test_the_gram_teacher_is_copied_when_its_weight_begins_and_at_each_refresh(shard_set: Path, tmp_path: Path) -> None:
    schedules = Schedules(
        learning_rate=Schedule(peak=0.01), gram_weight=Schedule(peak=1.0, hold=2), teacher_momentum=Schedule(peak=0.5)
    )
    config = config_of(
        shard_set, tmp_path / "run", schedules=schedules, gram=GramConfig(refresh_every=3, max_refreshes=1)
    )
    stream, model, trainer = prepared(config)
    teachers, grams, values = [], [], []
    for step, batch in zip(range(7), stream, strict=False):
        teachers.append(model.teacher["backbone"].norm.weight.clone())
        values.append(float(trainer.step(step, [inputs(batch, config)], measure=True)["loss/gram"]))
        grams.append(model.gram["backbone"].norm.weight.clone())
    # Steps 2 and 5 begin with a new one; the student differs from it, so there is a loss.
    assert all(torch.equal(grams[step], teachers[2]) for step in (2, 3, 4))
    assert all(torch.equal(grams[step], teachers[5]) for step in (5, 6))
    assert not torch.equal(teachers[2], teachers[5])
    assert values[:2] == [0.0, 0.0]
    assert min(values[2:]) > 0


def test_accumulated_parts_give_the_gradient_of_the_whole(shard_set: Path, tmp_path: Path) -> None:
    """With what looks across a batch left out: Sinkhorn's balance and KoLeo's neighbours."""
    norms, weights = [], []
    for parts in (1, 2):
        config = config_of(
            shard_set,
            tmp_path / "run",
            optim=OptimConfig(accumulate=parts),
            masking=MaskingConfig(samples_per_group=2),
            losses=LossConfig(centring="softmax", koleo_weight=0.0, centre_momentum=1.0),
            model=ModelConfig(variant="nano", layer_scale=0.1, drop_path=0.0),
        )
        stream, model, trainer = prepared(config)
        batches = iter(stream)
        for step in range(3):
            made = [inputs(next(batches), config) for _ in range(parts)]
            metrics = trainer.step(step, made, measure=True)
        norms.append([float(metrics["gradient_norm/backbone"]), float(metrics["loss/total"])])
        weights.append(torch.cat([each.detach().flatten() for each in model.student.parameters()]))
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("what", ["activations", "blocks"])
def test_recomputation_does_not_change_a_step(
    shard_set: Path, tmp_path: Path, what: Literal["activations", "blocks"]
) -> None:
    for name, compute in (("kept", ComputeConfig(workers=0)), ("anew", ComputeConfig(workers=0, recompute=what))):
        pretrain(config_of(shard_set, tmp_path / name, steps=3, compute=compute))
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "anew"), rel=1e-5)
    teachers = [read_weights(tmp_path / n / "eval/training_3/teacher_checkpoint.pth").tensors for n in ("kept", "anew")]
    for name, tensor in teachers[0].items():
        torch.testing.assert_close(teachers[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("centring", ["sinkhorn", "softmax"])
def test_an_interrupted_run_resumes_to_the_same_losses_bit_for_bit(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, centring: str
) -> None:
    options: dict[str, Any] = {"losses": LossConfig(centring=centring), "checkpoint_every": 3}
    pretrain(config_of(shard_set, tmp_path / "whole", **options))
    step = Trainer.step

    def told_to_stop_in_the_fifth(self: Trainer, number: int, *rest: Any, **more: Any) -> dict[str, Any]:
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, *rest, **more)

    parts = config_of(shard_set, tmp_path / "parts", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", told_to_stop_in_the_fifth)
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


@pytest.mark.slow
def test_after_a_crash_the_steps_since_the_last_checkpoint_are_repeated(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(shard_set, tmp_path / "run", checkpoint_every=3)
    step = Trainer.step

    def dies_in_the_eighth(self: Trainer, number: int, *rest: Any, **more: Any) -> dict[str, Any]:
        if number == 7:
            raise MemoryError
        return step(self, number, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dies_in_the_eighth)
        with pytest.raises(MemoryError):
            pretrain(config)
    pretrain(config)
    assert "resuming after step 6" in (tmp_path / "run" / "log.txt").read_text()
    pretrain(config_of(shard_set, tmp_path / "whole", checkpoint_every=3))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_teacher_is_drawn_and_evaluated_during_training(shard_set: Path, tmp_path: Path) -> None:
    seen = []

    def online_eval(teacher: VisionTransformer) -> dict[str, float]:
        seen.append(teacher.training)
        return {"probe/answer": 42.0}

    config = config_of(shard_set, tmp_path / "run", online_eval=OnlineEvalConfig(every=4), log_every=3)
    pretrain(config, online_eval=online_eval)
    assert seen == [False] * 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "probe/answer" in line] == [4, 8, 10]
    last = lines[-2] if "loss/total" in lines[-2] else lines[-1]
    assert {"speed/data_wait_share", "speed/tflops", "memory/peak_gb"} <= last.keys()


def test_images_of_features_have_one_colour_for_one_feature() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(variant_config("tiny", patch_size=8, in_channels=1)).eval()
    blank = torch.zeros(2, 2, 1, 32, 32)
    blank[:, 1] = torch.randn(1, 1, 32, 32)
    drawn = draw_features(vit, Views(blank, torch.zeros(0, 2, 1, 16, 16)))
    assert drawn["patch_pca"].shape == (4 * 34, 2 * 34, 3)
    assert drawn["cls_attention"].shape == (2 * 34, 2 * 34)
    # The second view is like the first, so its colours are as well.
    np.testing.assert_array_equal(drawn["patch_pca"][34:66], drawn["patch_pca"][102:134])
    with_initial = draw_features(vit, Views(blank, torch.zeros(0, 2, 1, 16, 16)), vit)["patch_pca"]
    assert with_initial.shape == (6 * 34, 2 * 34, 3)
    np.testing.assert_array_equal(with_initial[34:66], with_initial[68:100])
    features = torch.randn(50, 8)
    colours = principal_colours(torch.cat((features, features)))
    assert torch.equal(colours[:50], colours[50:])
    assert colours.min() == 0
    assert colours.max() == 1


@pytest.mark.parametrize("patch_normalised", [False, True])
def test_an_exact_prediction_is_drawn_as_the_target(patch_normalised: bool) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(variant_config("nano", patch_size=8, in_channels=1)).eval()
    views = Views(torch.randn(2, 3, 1, 32, 32), torch.zeros(0, 3, 1, 16, 16), torch.randn(2, 3, 1, 32, 32))
    masks = torch.zeros(6, 4, 4, dtype=torch.bool)
    masks[[1, 4], 2, 1] = True
    target = to_patches(views.target_views.flatten(0, 1)[[1, 4]], 8)

    class Exact(ReconstructionHead):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            assert len(tokens) == len(target)
            patches = target
            if patch_normalised:
                std, mean = torch.std_mean(target, (2, 3), correction=0, keepdim=True)
                patches = (target - mean) / std
            return patches.flatten(1)

    head = Exact(vit.config.width, 64)
    weights = torch.ones(2)
    drawn = draw_reconstruction(
        vit, head, views, PatchMasks(masks, masks.flatten().nonzero()[:, 0], weights), patch_normalised=patch_normalised
    )["reconstruction"]
    assert drawn.shape == (4 * 34, 2 * 34)
    crop, seen, merged, wanted = (drawn[34 * row : 34 * row + 32, :32].astype(int) for row in range(4))
    assert abs(merged - wanted).max() <= 1
    assert set(np.unique(np.argwhere(crop != seen) // 8, axis=0).ravel()) == {1, 2}
    assert (seen[16:24, 8:16] == 127).all()
    nothing = PatchMasks(torch.zeros_like(masks), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert draw_reconstruction(vit, head, views, nothing) == {}


def test_the_initial_backbone_is_that_of_the_run_and_takes_no_random_numbers(shard_set: Path, tmp_path: Path) -> None:
    config = config_of(shard_set, tmp_path / "run", seed=3)
    model = prepare.build_model(config, World())
    state = torch.get_rng_state()
    found = prepare.initial_backbone(config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found.state_dict(), model.teacher["backbone"].state_dict(), rtol=0, atol=0)


def test_cls_attention_is_that_of_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(variant_config("tiny", patch_size=8, in_channels=1)).eval()
    vit.init_weights(layer_scale=1.0)
    images = torch.randn(2, 1, 24, 16)
    wanted: list[torch.Tensor] = []

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        wanted.append(weights)
        return weights @ value

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain)
    vit(images)
    found = vit.cls_attention(images)
    torch.testing.assert_close(found.flatten(2), wanted[vit.config.depth - 1][:, :, 0, vit.config.num_prefix :])


def test_an_evaluation_uses_an_attention_kernel_for_any_type(shard_set: Path, tmp_path: Path) -> None:
    kernels = []

    def online_eval(teacher: VisionTransformer) -> dict[str, float]:
        kernels.append((teacher.kernel, {block.attn.kernel for block in teacher.blocks}))
        return {}

    compute = ComputeConfig(workers=0, attention="dense")
    config = config_of(shard_set, tmp_path / "run", steps=3, compute=compute, online_eval=OnlineEvalConfig(every=1))
    pretrain(config, online_eval=online_eval)
    assert kernels == [("sdpa", {"sdpa"})] * 3
    same = replace(config, output=tmp_path / "same", compute=ComputeConfig(workers=0))
    pretrain(same)
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    found = [row["loss/total"] for row in rows if "loss/total" in row]
    np.testing.assert_allclose(found, losses(same.output), rtol=1e-4)


class Waits(TorchDispatchMode):
    """Notes operators for whose result, or for whose numbers from main memory, the host would wait on a GPU."""

    NAMES = (
        *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "bincount"),
        *("unique_dim", "_unique2", "unique_consecutive", "lift_fresh", "repeat_interleave.Tensor"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        indices = args[1] if name.startswith(("index.", "index_put", "_index_put_impl_")) else ()
        by_mask = any(each is not None and each.dtype == torch.bool for each in indices)
        if by_mask or name in self.NAMES or name.split(".")[0] in self.NAMES:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("centring", ["sinkhorn", "softmax"])
def test_between_log_steps_the_host_waits_for_nothing(shard_set: Path, tmp_path: Path, centring: Any) -> None:
    config = config_of(
        shard_set,
        tmp_path / "run",
        model=ModelConfig(variant="nano", drop_path=0.3),
        losses=LossConfig(centring=centring, reconstruction=ReconstructionConfig(weight=1.0)),
        schedules=Schedules(learning_rate=Schedule(peak=0.01), gram_weight=Schedule(peak=1.0, hold=2)),
        optim=OptimConfig(accumulate=2),
    )
    stream, model, trainer = prepared(config)
    for side in (model.student, model.teacher, model.gram):
        prepare.backbone_of(side).one_pass = True  # as on a GPU
    batches = iter(stream)
    for step in range(4):  # the first makes the optimizer's moments and what is kept from step to step
        parts = [inputs(next(batches), config) for _ in range(2)]
        with Waits() as waits:
            trainer.step(step, parts, measure=False)
        assert step == 0 or waits.found == []
    with Waits() as waits:
        trainer.step(4, parts, measure=True)
    assert "_local_scalar_dense.default" in waits.found, "a log step looks: this test would notice"


@pytest.mark.slow
def test_compiled_steps_equal_plain_ones(shard_set: Path, tmp_path: Path) -> None:
    """Whole passes or, where blocks are computed again, block by block; targets and losses.

    In a process of its own (the annotations that the test suite checks at run time are not for the compiler), with the
    compiler's front half alone: its kernels are tried in test_ssl_losses_cross_entropy and take half a minute.
    """
    schedules = Schedules(learning_rate=Schedule(peak=0.01), gram_weight=Schedule(peak=1.0, hold=2))
    terms = LossConfig(reconstruction=ReconstructionConfig(weight=1.0, target="other", patch_normalised=True))
    plain = config_of(
        shard_set,
        tmp_path / "plain",
        steps=3,
        schedules=schedules,
        losses=terms,
        online_eval=OnlineEvalConfig(every=0),
    )
    pretrain(plain)
    runs = {
        "passes": ComputeConfig(workers=0, compile="all"),
        "passes_by_blocks": ComputeConfig(workers=0, compile="all", recompute="blocks"),
        "blocks": ComputeConfig(workers=0, compile="blocks"),
    }
    for name, compute in runs.items():
        (tmp_path / f"{name}.yaml").write_text(to_yaml(replace(plain, output=tmp_path / name, compute=compute)))
    script = """
        import functools
        import sys
        import torch
        import torch._dynamo
        from torch._dynamo.utils import counters

        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        compile_module = torch.nn.Module.compile
        torch.nn.Module.compile = functools.partialmethod(compile_module, backend="aot_eager")
        from dinocell.cli import main
        for recipe in sys.argv[1:]:
            torch._dynamo.reset()
            assert main(["pretrain", recipe]) == 0
            assert counters["stats"]["unique_graphs"] > 0
            assert sum(counters["graph_break"].values()) == 0
            counters.clear()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *(str(tmp_path / f"{name}.yaml") for name in runs)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for name in runs:
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "plain"), rtol=1e-4, err_msg=name)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(shard_set: Path, output: Path, **compute: Any) -> PretrainConfig:
    """Return a recipe without noise of the device's own, so that both devices can be compared."""
    return config_of(
        shard_set,
        output,
        model=ModelConfig(variant="nano", layer_scale=0.1, drop_path=0.0),
        compute=ComputeConfig(workers=0, **{"device": "cuda", "dtype": "float32", **compute}),
    )


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(
    ("compute", "tolerance"),
    [
        ({}, 2e-3),
        ({"compile": "blocks"}, 2e-3),
        ({"compile": "all"}, 2e-3),
        ({"recompute": "activations"}, 2e-3),
        ({"recompute": "blocks"}, 2e-3),
        ({"dtype": "bfloat16"}, 3e-2),
        ({"dtype": "bfloat16", "compile": "blocks"}, 3e-2),
        ({"dtype": "bfloat16", "compile": "all"}, 3e-2),
        ({"dtype": "bfloat16", "attention": "varlen"}, 3e-2),
    ],
)
def test_a_gpu_gives_the_losses_of_the_cpu(
    shard_set: Path, tmp_path: Path, compute: dict[str, Any], tolerance: float
) -> None:
    pretrain(on_cuda(shard_set, tmp_path / "cpu", device="cpu"))
    on_gpu = on_cuda(shard_set, tmp_path / "gpu", **compute)
    if (
        on_gpu.compute.compile != "nothing"
    ):  # the annotations that the test suite checks at run time are not for the compiler
        (tmp_path / "recipe.yaml").write_text(to_yaml(on_gpu))
        command = [sys.executable, "-m", "dinocell", "pretrain", str(tmp_path / "recipe.yaml")]
        subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    else:
        pretrain(on_gpu)
    np.testing.assert_allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=tolerance)


@pytest.mark.cuda
@needs_cuda
def test_an_interrupted_run_on_a_gpu_resumes_to_the_same_losses(shard_set: Path, tmp_path: Path) -> None:
    whole = replace(config_of(shard_set, tmp_path / "whole"), compute=ComputeConfig(workers=0, device="cuda"))
    pretrain(whole)
    parts = replace(whole, output=tmp_path / "parts", checkpoint_every=4)

    def stop_at_six(_: Path) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunStopped):
        pretrain(parts, on_export=stop_at_six)
    assert len(losses(parts.output)) == 6
    pretrain(parts)
    np.testing.assert_allclose(losses(parts.output), losses(whole.output), rtol=2e-2)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("centring", ["sinkhorn", "softmax"])
def test_between_logging_steps_nothing_waits_for_the_gpu(
    shard_set: Path, tmp_path: Path, centring: Literal["sinkhorn", "softmax"]
) -> None:
    device = torch.device("cuda", 0)
    config = config_of(
        shard_set,
        tmp_path,
        losses=LossConfig(centring=centring),
        views=ViewsConfig(global_size=32, local_size=16, num_local=2, blur=0.5, noise=0.5),
        compute=ComputeConfig(device="cuda", workers=0),
    )
    world = World(device=device)
    stream, model = open_shards(config, world), prepare.build_model(config, world)
    trainer = Trainer(config, model, world)
    batches = [batch.pin_memory() for batch, _ in zip(stream, range(4), strict=False)]
    for step in range(2):
        trainer.step(step, [inputs(batches[step], config, "cuda")], measure=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 4):
            trainer.step(step, [inputs(batches[step], config, "cuda")], measure=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_group_of_one_on_nccl_gives_the_losses_of_a_single_process(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: Literal["ddp", "fsdp"]
) -> None:
    """What one GPU can show of FSDP2: wrapping, bfloat16 weights, the moving average, saving, exporting."""
    config = on_cuda(shard_set, tmp_path / "alone", dtype="bfloat16", parallel=parallel)
    pretrain(config)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    alone = prepare.build_model

    def spread(config: PretrainConfig, world: World) -> prepare.StudentTeacher:
        model = alone(config, world)
        prepare._distribute(config, model, world)
        return model

    monkeypatch.setattr("dinocell.ssl.train.build_model", spread)
    grouped = replace(config, output=tmp_path / "grouped")
    try:
        last = pretrain(grouped)
    finally:
        torch.distributed.destroy_process_group()
    np.testing.assert_allclose(losses(grouped.output), losses(config.output), rtol=3e-2)
    assert all(torch.isfinite(each).all() for each in load_backbone(str(last), in_channels=1).parameters())
