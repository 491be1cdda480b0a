"""Fine-tuning: crops, targets, the run, going on after an interruption."""

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from dinocell.configs.load import load_config
from dinocell.data_shards.distance import labels_to_distance
from dinocell.data_shards.flows import labels_to_flows
from dinocell.data_shards.images import write_labels, write_tiff
from dinocell.data_shards.labelled import open_labelled
from dinocell.data_shards.labelled_build import build_labelled
from dinocell.data_shards.labelled_sources import folder_pairs
from dinocell.data_shards.synthetic import SyntheticConfig, make_field
from dinocell.errors import ConfigError, DinocellError
from dinocell.eval.scoring import score_segmenter
from dinocell.finetune import train
from dinocell.finetune.augment import cut, plain
from dinocell.finetune.config import AugmentConfig, DataConfig, FinetuneConfig
from dinocell.finetune.data import Crops, loader, open_sets, split
from dinocell.finetune.losses import map_loss
from dinocell.finetune.model import DINOCell
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.finetune.train import dry_run, finetune
from dinocell.models.config import VARIANTS, variant_config
from dinocell.runtime.preemption import RunStopped

SMALL = SyntheticConfig(size=(96, 112), channels=("AGP",), num_cells=(6, 10), cell_radius_px=12.0)


@pytest.fixture(autouse=True)
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the size `tiny` four narrow blocks."""
    monkeypatch.setitem(VARIANTS, "tiny", variant_config("tiny", width=32, depth=4, heads=2, mlp_hidden=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six images with masks, and their labelled set."""
    root = tmp_path_factory.mktemp("own")
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for number in range(6):
        made = make_field(number, SMALL)
        write_tiff(root / "images" / f"f{number}.tif", made.pixels)
        write_labels(root / "masks" / f"f{number}.tif", made.labels)
    build_labelled(folder_pairs(root, images="images/{name}.tif", masks="masks/{name}.tif"), root / "set")
    return root


def recipe(folder: Path, output: Path, *overrides: str) -> FinetuneConfig:
    fixed = ["model.size=tiny", "model.pretrained=false", "augment.crop=64", "batch_size=4", "epochs=2"]
    fixed += ["compute.workers=0", "log_every=1", "data.crops_per_image=2", "optim.warmup_steps=1"]
    return load_config(FinetuneConfig, None, [f"output={output}", f"data.sets=[{folder / 'set'}]", *fixed, *overrides])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss/train"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_target_of_an_unturned_crop_is_the_map_of_the_whole_image() -> None:
    made = make_field(3, SMALL)
    image = (made.pixels[0] >> 8).astype(np.uint8)
    still = AugmentConfig(
        crop=64, flip=0.0, rotation_deg=0.0, scale=(1.0, 1.0), brightness=(1.0, 1.0), inversion=0.0, with_cells=0.0
    )
    crop = cut(image, made.labels, still, np.random.default_rng(0))
    found = cv2.matchTemplate(image.astype(np.float32), crop.image, cv2.TM_SQDIFF)
    top, left = np.unravel_index(found.argmin(), found.shape)
    whole = labels_to_distance(made.labels)[top : top + 64, left : left + 64]
    # The crop's place is not a whole pixel, so cells at its edges may differ by one.
    assert np.abs(crop.distance() - whole).mean() < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_the_target_is_computed_from_the_turned_cells(seed: int) -> None:
    made = make_field(4, SMALL)
    image = (made.pixels[0] >> 8).astype(np.uint8)
    crop = cut(image, made.labels, AugmentConfig(crop=64), np.random.default_rng(seed))
    inner = crop.labels[crop.context : crop.context + 64, crop.context : crop.context + 64]
    distance = crop.distance()
    np.testing.assert_array_equal(distance > 0, inner > 0)
    assert set(np.unique(crop.labels)) <= set(np.unique(made.labels))
    np.testing.assert_array_equal(distance, labels_to_distance(crop.labels)[crop.context :, crop.context :][:64, :64])


def test_plain_crops_cover_the_image_in_order() -> None:
    made = make_field(5, SMALL)
    image = (made.pixels[0] >> 8).astype(np.uint8)
    crops = plain(image, made.labels, 64)
    rows = [np.concatenate([crop.image for crop in crops[start : start + 2]], axis=1) for start in (0, 2)]
    np.testing.assert_array_equal(np.concatenate(rows)[:96, :112], image)
    maps = [np.concatenate([crop.distance() for crop in crops[start : start + 2]], axis=1) for start in (0, 2)]
    np.testing.assert_allclose(np.concatenate(maps)[:90, :106], labels_to_distance(made.labels)[:90, :106], atol=0.5)


def test_every_image_comes_equally_often_whatever_the_epoch(folder: Path) -> None:
    divided = split([folder / "set"], DataConfig(sets=("x",)), seed=0, record=None)
    crops = Crops(divided, SegmenterSettings(), AugmentConfig(crop=64), seed=1, crops_per_image=3)
    for epoch in range(3):
        numbers = range(epoch * crops.epoch_length, (epoch + 1) * crops.epoch_length)
        counts = np.bincount([crops.chosen(number).image for number in numbers], minlength=6)
        assert sorted(counts) == [0, 3, 3, 3, 3, 3]


def test_two_ranks_see_together_what_one_sees(folder: Path) -> None:
    divided = split([folder / "set"], DataConfig(sets=("x",)), seed=0, record=None)
    crops = Crops(divided, SegmenterSettings(), AugmentConfig(crop=64), seed=1, crops_per_image=2)
    settings = {"first_step": 1, "last_step": 3, "batch_size": 4, "workers": 0}
    alone = list(loader(crops, rank=0, ranks=1, **settings))
    halves = [list(loader(crops, rank=rank, ranks=2, **settings)) for rank in range(2)]
    for whole, first, second in zip(alone, *halves, strict=True):
        torch.testing.assert_close(whole.images[0::2], first.images)
        torch.testing.assert_close(whole.targets[1::2], second.targets)


def test_the_split_is_by_image_fixed_by_the_seed_and_recorded(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "split.json"
    config = DataConfig(sets=("x",), validation_share=0.4)
    divided = split([folder / "set"], config, seed=3, record=record)
    assert split([folder / "set"], config, seed=3, record=None).validation == divided.validation
    names = json.loads(record.read_text())
    assert len(names["validation"]) == 2
    assert not set(names["validation"]) & set(names["training"])


def test_one_image_cannot_be_divided(tmp_path: Path, folder: Path) -> None:
    pairs = folder_pairs(folder, images="images/f0.{name}", masks="masks/f0.{name}")
    build_labelled(pairs, tmp_path / "one")
    with pytest.raises(DinocellError, match="one image cannot be divided"):
        split([tmp_path / "one"], DataConfig(sets=("x",)), seed=0, record=None)


def test_a_run_writes_a_segmenter_that_says_where_it_comes_from(folder: Path, tmp_path: Path) -> None:
    path = finetune(recipe(folder, tmp_path / "run", "score_every=2"), score=score_segmenter)
    model = DINOCell.from_pretrained(path)
    assert model.settings.trained_on == ("set",)
    assert "fine-tuning" in model.card.derived_from[-1]
    assert len(losses(tmp_path / "run")) == 6
    before = path.read_bytes()
    assert finetune(recipe(folder, tmp_path / "run", "score_every=2"), score=score_segmenter) == path
    assert path.read_bytes() == before  # a finished run is not touched


def test_the_validation_error_is_written_whatever_the_log_steps(folder: Path, tmp_path: Path) -> None:
    finetune(recipe(folder, tmp_path / "run", "log_every=1000", "epochs=3"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/validation" in row] == [3, 6, 9]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(recipe(folder, tmp_path / "whole", "optim.ema=0.9", "model.freeze_backbone=false"))
    step = train.Training.step

    def stopped_in_the_third(self: train.Training, number: int, batch: object) -> dict[str, object]:
        if number == 2:
            signal.raise_signal(signal.SIGUSR2)
        return step(self, number, batch)  # type: ignore[arg-type]

    parts = recipe(folder, tmp_path / "parts", "optim.ema=0.9", "model.freeze_backbone=false")
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "step", stopped_in_the_third)
        with pytest.raises(RunStopped, match=r"stopped after step 3 \(SIGUSR2\)"):
            finetune(parts)
    assert len(losses(tmp_path / "parts")) == 3
    finetune(parts)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights = [DINOCell.from_pretrained(tmp_path / name / "last.pt").state_dict() for name in ("whole", "parts")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_frozen_backbone_does_not_change(folder: Path, tmp_path: Path) -> None:
    config = recipe(folder, tmp_path / "run", "epochs=1")
    start = train.Training(config, train.World()).learner.model.backbone.state_dict()
    end = DINOCell.from_pretrained(finetune(config)).backbone.state_dict()
    assert all(torch.equal(end[name], tensor) for name, tensor in start.items())


def test_another_recipe_in_the_same_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    finetune(recipe(folder, tmp_path / "run", "epochs=1"))
    with pytest.raises(ConfigError, match="other settings"):
        finetune(recipe(folder, tmp_path / "run", "epochs=1", "optim.learning_rate=0.5"))


def test_a_step_that_is_not_finite_changes_nothing(folder: Path, tmp_path: Path) -> None:
    training = train.Training(recipe(folder, tmp_path / "run"), train.World())
    batch = next(iter(training.batches(0)))
    before = {name: tensor.clone() for name, tensor in training.learner.model.state_dict().items()}
    metrics = training.step(0, batch._replace(images=batch.images * torch.nan))
    assert float(metrics["health/skipped_steps"]) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in training.learner.model.state_dict().items())


def test_a_folder_of_pairs_needs_no_set(folder: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path / 'run'}", f"data.images={folder}/images/{{name}}.tif"]
    overrides += [f"data.masks={folder}/masks", "model.size=tiny", "model.pretrained=false", "augment.crop=64"]
    text = dry_run(load_config(FinetuneConfig, None, [*overrides, "compute.workers=0", "compute.device=cpu"]))
    assert "5 images to learn from, 1 to validate on" in text
    assert "a step takes" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sets=[a]", "data.images=b", "data.masks=c"], "got both"),
        (["data.images=b"], "go together"),
        (["data.sets=[a]", "model.weights=w", "model.pretrained=false"], "random weights"),
        (["data.sets=[a]", "data.weights=[1,2]"], "expected one a set"),
        (["data.sets=[a,b]", "data.weights=[1,0]"], "above 0"),
        (["data.sets=[a]", "model.patch_size=0"], "patch_size: expected at least 1"),
        (["data.sets=[a]", "model.blocks=[0,1,2,99]"], "from 0 to 3 for size tiny"),
        (["data.sets=[a]", "model.blocks=[3,2,1,0]"], "ascending"),
        (["data.sets=[a]", "model.segmenter=s", "model.blocks=[0,1,2,3]"], "leave out weights and blocks"),
        (["data.sets=[a]", "optim.learning_rate=0"], "learning_rate: expected more than 0"),
        (["data.sets=[a]", "optim.clip=0"], "clip: expected more than 0"),
        (["data.sets=[a]", "optim.betas=[2,3]"], "less than 1"),
        (["data.sets=[a]", "optim.layer_decay=0"], "layer_decay"),
        (["data.sets=[a]", "optim.warmup_steps=-3"], "warmup_steps: expected at least 0"),
        (["data.sets=[a]", "stopping.patience=-1"], "patience: expected at least 0"),
        (["data.sets=[a]", "augment.rotation_deg=-5"], "rotation_deg: expected 0 to 180"),
        (["data.sets=[a]", "compute.workers=-1"], "workers: expected at least 0"),
        (["data.sets=[a]", "seed=-1"], "seed: expected at least 0"),
    ],
)
def test_impossible_combinations_are_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, None, [f"output={tmp_path}", "model.size=tiny", *overrides])


@pytest.mark.parametrize("wrong", ["images/f0.tif", "pictures"])
def test_images_that_are_no_folder_are_one_line(wrong: str, folder: Path, tmp_path: Path) -> None:
    config = DataConfig(images=str(folder / wrong), masks=str(folder / "masks"))
    with pytest.raises(DinocellError, match=f"data.images: no folder {folder / wrong}; name a folder, or a pattern"):
        open_sets(config, tmp_path)


def test_the_loss_weighs_cells_and_differences() -> None:
    maps, targets = torch.zeros(1, 1, 1, 4), torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4)
    assert float(map_loss(maps, targets, "distance")) == pytest.approx(0.5)
    assert float(map_loss(maps, targets, "distance", foreground_weight=1.0)) == pytest.approx(4 / 4 / 1.5)
    with_edges = float(map_loss(maps.expand(1, 1, 2, 4), targets.expand(1, 1, 2, 4), "distance", gradient_weight=3.0))
    assert with_edges == pytest.approx(0.5 + 3 * (1 / 3))


def test_the_loss_of_flows_is_cellposes() -> None:
    maps = torch.tensor([0.5, -0.5, 0.25]).view(1, 3, 1, 1)
    targets = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    expected = 0.5 * torch.nn.functional.mse_loss(5 * maps[:, :2], 5 * targets[:, :2]) - math.log(0.25)
    assert float(map_loss(maps, targets, "flows")) == pytest.approx(float(expected))


@pytest.mark.parametrize("seed", range(3))
def test_the_flows_of_a_crop_are_computed_from_the_turned_cells(seed: int) -> None:
    made = make_field(4, SMALL)
    image = (made.pixels[0] >> 8).astype(np.uint8)
    crop = cut(image, made.labels, AugmentConfig(crop=64), np.random.default_rng(seed))
    inner = np.s_[crop.context : crop.context + 64, crop.context : crop.context + 64]
    pieces = np.zeros_like(crop.labels)
    for number in np.unique(crop.labels[crop.labels > 0]):
        found, _ = ndimage.label(crop.labels == number, np.ones((3, 3)))
        pieces[found > 0] = found[found > 0] + pieces.max()
    np.testing.assert_array_equal(crop.flows(), labels_to_flows(pieces)[:, inner[0], inner[1]])
    np.testing.assert_array_equal(crop.flows()[2] > 0, crop.labels[inner] > 0)


def test_a_cell_and_its_mirror_image_have_a_middle_each() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[4:20, 10:26] = 1  # near the upper border, beyond which it is seen again
    image = np.zeros((40, 40), np.uint8)
    settings = AugmentConfig(crop=64, scale=(1.0, 1.0), with_cells=0.0)
    for seed in range(8):
        crop = cut(image, labels, settings, np.random.default_rng(seed))
        flows = crop.flows()
        is_cell = flows[2] > 0
        assert is_cell.sum() > 400, "more than the cell itself"
        still = is_cell & (np.hypot(flows[0], flows[1]) == 0)
        assert still.sum() < 0.02 * is_cell.sum()


def test_options_of_the_other_target_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="for target distance; leave them out"):
        recipe(folder, tmp_path / "run", "target=flows", "loss.gradient_weight=1.0")


def test_a_segmenter_of_the_other_target_is_refused(tmp_path: Path, folder: Path) -> None:
    path = DINOCell("vitt8", pretrained=False).save_pretrained(tmp_path / "cells.pt")
    with pytest.raises(ConfigError, match="is a segmenter by distance, not flows"):
        finetune(recipe(folder, tmp_path / "run", "target=flows", f"model.segmenter={path}"))


def test_a_model_of_flows_learns_two_images_by_heart(tmp_path: Path) -> None:
    config = SyntheticConfig(size=(48, 48), channels=("AGP",), num_cells=(4, 6), cell_radius_px=10.0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(2):
        made = make_field(number, config)
        write_tiff(tmp_path / "images" / f"f{number}.tif", made.pixels)
        write_labels(tmp_path / "masks" / f"f{number}.tif", made.labels)
    build_labelled(folder_pairs(tmp_path, images="images/{name}.tif", masks="masks/{name}.tif"), tmp_path / "set")
    still = ["augment.flip=0", "augment.rotation_deg=0", "augment.scale=[1,1]", "augment.brightness=[1,1]"]
    still += ["augment.inversion=0", "augment.with_cells=0", "stopping.patience=0", "score_every=50"]
    both = [f"data.validation_sets=[{tmp_path / 'set'}]", "data.crops_per_image=16", "batch_size=2", "epochs=10"]
    quick = ["target=flows", "optim.learning_rate=1e-2", "augment.crop=48", "log_every=100", "checkpoint_every=50"]
    path = finetune(recipe(tmp_path, tmp_path / "run", *still, *both, *quick), score=score_segmenter)
    images = open_labelled(tmp_path / "set")
    # In one window that holds the whole image: windows of the crop's size would cut it elsewhere than it learnt.
    scored = score_segmenter(DINOCell.from_pretrained(path), [images[0], images[1]], False, crop_size=256)
    # .8 to 1, by the machine's rounding; without learning 0.
    assert scored.metrics["score/op_csb"] > 0.7
    assert (tmp_path / "run" / "split.json").exists()


def test_a_still_crop_of_the_images_size_is_the_image() -> None:
    made = make_field(3, SMALL)
    image, labels = (np.ascontiguousarray(each[:96, :96]) for each in (made.pixels[0] >> 8, made.labels))
    still = AugmentConfig(
        crop=96, flip=0.0, rotation_deg=0.0, scale=(1.0, 1.0), brightness=(1.0, 1.0), inversion=0.0, with_cells=0.0
    )
    crop = cut(image.astype(np.uint8), labels, still, np.random.default_rng(0))
    np.testing.assert_array_equal(crop.image, image)
    np.testing.assert_array_equal(crop.labels[crop.context :, crop.context :][:96, :96], labels)


def test_progress_counts_epochs_without_a_fall_and_comes_back_from_plain_values() -> None:
    progress = train.Progress()
    assert train.Progress.of(json.loads(json.dumps(progress.values()))) == progress
    assert progress.take(0.5, 1, after=1, min_delta=0.01)
    assert progress.take(0.495, 2, after=1, min_delta=0.01)  # the least so far, but not by enough to go on for
    assert (progress.best, progress.best_epoch, progress.stale) == (0.495, 2, 1)
    assert not progress.take(math.nan, 4, after=2, min_delta=0.01)
    assert (progress.best_epoch, progress.stale) == (2, 3)
    assert progress.take(0.4, 5, after=1, min_delta=0.01)
    assert progress.stale == 0
    assert train.Progress.of(progress.values()) == progress


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("target", ["distance", "flows"])
@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_gpu_takes_the_steps_of_the_cpu(folder: Path, tmp_path: Path, target: str, frozen: str) -> None:
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "auto")):
        changes = [f"compute.device={device}", f"compute.dtype={dtype}", f"target={target}"]
        finetune(recipe(folder, tmp_path / f"{device}{dtype}", *changes, f"model.freeze_backbone={frozen}"))
    exact = losses(tmp_path / "cpufloat32")
    np.testing.assert_allclose(losses(tmp_path / "cudafloat32"), exact, rtol=5e-3)
    np.testing.assert_allclose(losses(tmp_path / "cudaauto"), exact, rtol=5e-2)


def test_losses_with_kept_features_are_those_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three crops an image in an epoch, of two fixed ones: some come again within the first epoch.
    settings = ["data.fixed_crops=2", "data.crops_per_image=3", "optim.ema=0.9", "augment.crop=60"]
    finetune(recipe(folder, tmp_path / "kept", *settings))
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "_keep_features", lambda self, check_room: None)
        finetune(recipe(folder, tmp_path / "anew", *settings))
    assert losses(tmp_path / "kept")[:1] == losses(tmp_path / "anew")[:1]
    np.testing.assert_allclose(losses(tmp_path / "kept"), losses(tmp_path / "anew"), rtol=1e-5)
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("kept", "anew")]
    found = [[json.loads(line).get("loss/validation", 0.0) for line in each] for each in rows]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(
        path.name for path in (tmp_path / "anew").iterdir()
    )


def test_kept_features_spare_the_backbone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    tokens = DINOCell.tokens

    def counted(self: DINOCell, images: torch.Tensor) -> list[torch.Tensor]:
        seen.append(len(images))
        return tokens(self, images)

    monkeypatch.setattr(DINOCell, "tokens", counted)
    finetune(recipe(folder, tmp_path / "run", "data.fixed_crops=2", "epochs=4", "picture_every=100"))
    assert sum(seen) == 5 * 2 + 4  # two crops of each training image, and the validation image in four crops


def test_a_run_with_kept_features_that_was_stopped_goes_on_as_if_it_had_not_been(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["data.fixed_crops=1", "epochs=3"]
    finetune(recipe(folder, tmp_path / "whole", *settings))
    step = train.Training.step

    def stopped_in_the_fourth(self: train.Training, number: int, batch: object) -> dict[str, object]:
        if number == 3:
            signal.raise_signal(signal.SIGUSR2)
        return step(self, number, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "step", stopped_in_the_fourth)
        with pytest.raises(RunStopped):
            finetune(recipe(folder, tmp_path / "parts", *settings))
    finetune(recipe(folder, tmp_path / "parts", *settings))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_fixed_crops_come_again_and_others_do_not(folder: Path) -> None:
    divided = split([folder / "set"], DataConfig(sets=("x",)), seed=0, record=None)
    crops = Crops(divided, SegmenterSettings(), AugmentConfig(crop=64), seed=1, crops_per_image=3, fixed=2)
    assert crops.num_drawn == 10
    assert {crops.drawn(number) for number in range(crops.epoch_length)} == set(range(10))
    first: dict[int, torch.Tensor] = {}
    for number in range(2 * crops.epoch_length):
        image = first.setdefault(crops.drawn(number), crops[number].images)
        assert torch.equal(image, crops[number].images)
    assert len({image.numpy().tobytes() for image in first.values()}) == 10
    free = Crops(divided, SegmenterSettings(), AugmentConfig(crop=64), seed=1, crops_per_image=3)
    assert len({free[number].images.numpy().tobytes() for number in range(30)}) == 30


def test_fixed_crops_need_a_frozen_backbone_and_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="other features every step"):
        recipe(folder, tmp_path / "run", "data.fixed_crops=2", "model.freeze_backbone=false")
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        recipe(folder, tmp_path / "run", "data.fixed_crops=0")
    config = recipe(folder, tmp_path / "run", "data.fixed_crops=2")
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    # 10 crops and 4 of the validation image, 4 maps of 32 channels and 8 x 8 patches, in float32.
    with pytest.raises(ConfigError, match=r"take 0\.459 MB, and .* has 0\.1 MB left"):
        finetune(config)
