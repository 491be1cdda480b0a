"""Fine-tuning: the run, its files, and resuming after an interruption."""

import json
import math
import re
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocell.configs.load import load_config
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import ConfigError, WeightsError
from dinocell.eval.threshold_search import score_segmenter
from dinocell.finetune import train
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.model import DINOCell
from dinocell.finetune.train import dry_run, finetune, help_text
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.dataset import open_labelled
from dinocell.labelled.layouts import folder_pairs
from dinocell.models.config import VARIANTS, variant_config
from dinocell.runtime.preemption import RunStopped

SMALL = SyntheticConfig(size=(96, 112), channels=("AGP",), num_cells=(6, 10), cell_radius_px=12.0)


@pytest.fixture(autouse=True)
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the size `tiny` four narrow blocks."""
    monkeypatch.setitem(VARIANTS, "tiny", variant_config("tiny", width=32, depth=4, heads=2, mlp_hidden=64))


def recipe(labelled_folder: Path, output: Path, *overrides: str) -> FinetuneConfig:
    fixed = ["model.size=tiny", "model.pretrained=false", "augment.crop=64", "batch_size=4", "epochs=2"]
    fixed += ["compute.workers=0", "log_every=1", "data.crops_per_image=2", "optim.warmup_steps=1"]
    return load_config(
        FinetuneConfig, None, [f"output={output}", f"data.sets=[{labelled_folder / 'set'}]", *fixed, *overrides]
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss/train"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_a_segmenter_with_its_provenance(labelled_folder: Path, tmp_path: Path) -> None:
    path = finetune(recipe(labelled_folder, tmp_path / "run", "score_every=2"), score=score_segmenter)
    model = DINOCell.from_pretrained(path)
    assert model.settings.trained_on == ("set",)
    assert "fine-tuning" in model.card.derived_from[-1]
    assert len(losses(tmp_path / "run")) == 6
    explained = re.findall(r"`([\w/*.]+)", help_text(recipe(labelled_folder, tmp_path / "run")))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in {name for row in rows for name in row} - {"step", "time"}:
        assert name in explained or f"{name.split('/')[0]}/*" in explained
    before = path.read_bytes()
    assert finetune(recipe(labelled_folder, tmp_path / "run", "score_every=2"), score=score_segmenter) == path
    assert path.read_bytes() == before  # a finished run is not touched
    path.unlink()
    with pytest.raises(WeightsError, match=r"best\.pt: removed"):
        finetune(recipe(labelled_folder, tmp_path / "run", "score_every=2"), score=score_segmenter)


def test_the_validation_loss_is_logged_between_log_steps_too(labelled_folder: Path, tmp_path: Path) -> None:
    finetune(recipe(labelled_folder, tmp_path / "run", "log_every=1000", "epochs=3"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/validation" in row] == [3, 6, 9]


def test_an_interrupted_run_resumes_with_the_same_losses_and_weights(
    labelled_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(recipe(labelled_folder, tmp_path / "whole", "optim.ema=0.9", "model.freeze_backbone=false"))
    step = train.Training.step

    def interrupted_step(self: train.Training, number: int, batch: object) -> dict[str, object]:
        if number == 2:
            signal.raise_signal(signal.SIGUSR2)
        return step(self, number, batch)  # type: ignore[arg-type]

    parts = recipe(labelled_folder, tmp_path / "parts", "optim.ema=0.9", "model.freeze_backbone=false")
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "step", interrupted_step)
        with pytest.raises(RunStopped, match=r"stopped after step 3 \(SIGUSR2\)"):
            finetune(parts)
    assert len(losses(tmp_path / "parts")) == 3
    finetune(parts)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights = [DINOCell.from_pretrained(tmp_path / name / "last.pt").state_dict() for name in ("whole", "parts")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_frozen_backbone_does_not_change(labelled_folder: Path, tmp_path: Path) -> None:
    config = recipe(labelled_folder, tmp_path / "run", "epochs=1")
    start = train.Training(config, train.World()).learner.model.backbone.state_dict()
    end = DINOCell.from_pretrained(finetune(config)).backbone.state_dict()
    assert all(torch.equal(end[name], tensor) for name, tensor in start.items())


def test_another_recipe_in_the_same_folder_is_refused(labelled_folder: Path, tmp_path: Path) -> None:
    finetune(recipe(labelled_folder, tmp_path / "run", "epochs=1"))
    with pytest.raises(ConfigError, match="other settings"):
        finetune(recipe(labelled_folder, tmp_path / "run", "epochs=1", "optim.learning_rate=0.5"))


def test_a_non_finite_step_changes_no_weight(labelled_folder: Path, tmp_path: Path) -> None:
    training = train.Training(recipe(labelled_folder, tmp_path / "run"), train.World())
    batch = next(iter(training.batches(0)))
    before = {name: tensor.clone() for name, tensor in training.learner.model.state_dict().items()}
    metrics = training.step(0, batch._replace(images=batch.images * torch.nan))
    assert float(metrics["health/skipped_steps"]) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in training.learner.model.state_dict().items())


def test_a_folder_of_pairs_can_be_used_without_a_set(labelled_folder: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path / 'run'}", f"data.images={labelled_folder}/images/{{name}}.tif"]
    overrides += [f"data.masks={labelled_folder}/masks", "model.size=tiny", "model.pretrained=false", "augment.crop=64"]
    text = dry_run(load_config(FinetuneConfig, None, [*overrides, "compute.workers=0", "compute.device=cpu"]))
    assert "5 images for training, 1 for validation" in text
    assert "a step takes" in text


def test_options_of_the_other_target_are_refused(tmp_path: Path, labelled_folder: Path) -> None:
    with pytest.raises(ConfigError, match="gradient_weight"):
        recipe(labelled_folder, tmp_path / "run", "target=flows", "loss.gradient_weight=1.0")


def test_a_segmenter_of_the_other_target_is_refused(tmp_path: Path, labelled_folder: Path) -> None:
    path = DINOCell("vitt8", pretrained=False).save_pretrained(tmp_path / "cells.pt")
    with pytest.raises(ConfigError, match=r"cells\.pt predicts distance, not flows"):
        finetune(recipe(labelled_folder, tmp_path / "run", "target=flows", f"model.segmenter={path}"))


@pytest.mark.slow
def test_a_model_of_flows_overfits_two_images(tmp_path: Path) -> None:
    config = SyntheticConfig(size=(48, 48), channels=("AGP",), num_cells=(4, 6), cell_radius_px=10.0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(2):
        made = make_field(number, config)
        write_tiff(tmp_path / "images" / f"f{number}.tif", made.pixels)
        write_labels(tmp_path / "masks" / f"f{number}.tif", made.labels)
    build_labelled(folder_pairs(tmp_path, images="images/{name}.tif", masks="masks/{name}.tif"), tmp_path / "set")
    still = ["augment.flip=0", "augment.rotation_deg=0", "augment.scale=[1,1]", "augment.brightness=[1,1]"]
    still += ["augment.invert_contrast=0", "augment.with_cells=0", "stopping.patience=0", "score_every=50"]
    both = [f"data.validation_sets=[{tmp_path / 'set'}]", "data.crops_per_image=16", "batch_size=2", "epochs=10"]
    quick = ["target=flows", "optim.learning_rate=1e-2", "augment.crop=48", "log_every=100", "checkpoint_every=50"]
    path = finetune(recipe(tmp_path, tmp_path / "run", *still, *both, *quick), score=score_segmenter)
    images = open_labelled(tmp_path / "set")
    # In one tile that contains the whole image, as in training.
    scored = score_segmenter(DINOCell.from_pretrained(path), [images[0], images[1]], False, crop_size=256)
    # .8 to 1, by the machine's rounding; without learning 0.
    assert scored.metrics["score/op_csb"] > 0.7
    assert (tmp_path / "run" / "split.json").exists()


def test_progress_counts_epochs_without_improvement_and_round_trips() -> None:
    progress = train.Progress()
    assert train.Progress(**json.loads(json.dumps(asdict(progress)))) == progress
    assert progress.update(0.5, 1, after=1, min_delta=0.01)
    assert progress.update(0.495, 2, after=1, min_delta=0.01)  # the lowest so far, but not an improvement
    assert (progress.best, progress.best_epoch, progress.stale) == (0.495, 2, 1)
    assert not progress.update(math.nan, 4, after=2, min_delta=0.01)
    assert (progress.best_epoch, progress.stale) == (2, 3)
    assert progress.update(0.4, 5, after=1, min_delta=0.01)
    assert progress.stale == 0
    assert train.Progress(**json.loads(json.dumps(asdict(progress)))) == progress


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("target", ["distance", "flows"])
@pytest.mark.parametrize("frozen", ["true", "false"])
def test_gpu_and_cpu_have_the_same_losses(labelled_folder: Path, tmp_path: Path, target: str, frozen: str) -> None:
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "auto")):
        changes = [f"compute.device={device}", f"compute.dtype={dtype}", f"target={target}"]
        finetune(recipe(labelled_folder, tmp_path / f"{device}{dtype}", *changes, f"model.freeze_backbone={frozen}"))
    exact = losses(tmp_path / "cpufloat32")
    np.testing.assert_allclose(losses(tmp_path / "cudafloat32"), exact, rtol=5e-3)
    np.testing.assert_allclose(losses(tmp_path / "cudaauto"), exact, rtol=5e-2)
