"""``dinocell finetune`` on folders of images: invalid pairs, and images of any size."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell.cli import main
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.finetune.model import DINOCell
from dinocell.models.config import VARIANTS, variant_config

NUM_IMAGES = 5


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the size `nano` four narrow blocks."""
    monkeypatch.setitem(VARIANTS, "nano", variant_config("nano", width=32, depth=4, heads=2, mlp_hidden=64))


def make_folder(root: Path, size: tuple[int, int] = (60, 72)) -> Path:
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    config = SyntheticConfig(size=size, channels=("AGP",), num_cells=(4, 6), cell_radius_px=7.0)
    for number in range(NUM_IMAGES):
        made = make_field(number, config)
        tifffile.imwrite(root / "images" / f"f{number}.tif", made.pixels[0])
        tifffile.imwrite(root / "masks" / f"f{number}.tif", made.labels.astype(np.uint16))
    return root


def finetune(folder: Path, *more: str, output: str = "run") -> int:
    fixed = ["model.size=nano", "model.pretrained=false", "augment.crop=64", "compute.workers=0", "compute.device=cpu"]
    pairs = [f"data.images={folder}/images", f"data.masks={folder}/masks", f"output={folder / output}"]
    return main(["finetune", "own_folder", *pairs, *fixed, *more])


def mask(folder: Path, number: int) -> np.ndarray:
    return np.asarray(tifffile.imread(folder / "masks" / f"f{number}.tif"))


def corrupt(folder: Path, how: str) -> None:
    """Make image or mask 1 unusable."""
    image, labels = folder / "images" / "f1.tif", folder / "masks" / "f1.tif"
    cells = mask(folder, 1)
    if how == "without cells":
        tifffile.imwrite(labels, np.zeros_like(cells))
    elif how == "another size":
        tifffile.imwrite(labels, cells[:50])
    elif how == "in colours":
        tifffile.imwrite(labels, np.stack([cells, 2 * cells, 3 * cells], -1).astype(np.uint8), photometric="rgb")
    elif how == "in floating point numbers":
        tifffile.imwrite(labels, cells.astype(np.float32))
    elif how == "missing mask":
        labels.unlink()
    elif how == "missing image":
        image.unlink()
    elif how == "NaN":
        pixels = tifffile.imread(image).astype(np.float32)
        pixels[3, 4] = np.nan
        tifffile.imwrite(image, pixels)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("without cells", "no cells"),
        ("another size", "sizes differ"),
        ("in colours", "not a label image"),
        ("in floating point numbers", "not a label image"),
        ("missing mask", "no mask"),
        ("missing image", "no image"),
        ("NaN", "values or channels"),
    ],
)
def test_unusable_pairs_are_skipped_and_named_and_strict_stops(
    how: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "mine")
    corrupt(folder, how)
    assert finetune(folder, "--dry-run") == 0
    output = capsys.readouterr().out
    assert "3 images for training, 1 for validation" in output
    assert f"skipped, {kind}: 1 (f1)" in output
    assert finetune(folder, "--dry-run", "--strict") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("dinocell: images and masks that cannot be used: ")
    assert f"{kind}: 1 (f1)" in line


def test_all_unusable_pairs_are_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "mine")
    corrupt(folder, "NaN")
    (folder / "masks" / "f2.tif").unlink()
    (folder / "masks" / "f3.tif").unlink()
    assert finetune(folder, "--strict", "--dry-run") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "values or channels: 1 (f1); the first: f1: 1 of 4320 values are not finite" in line
    assert "no mask: 2 (f2, f3)" in line


def test_ids_above_32767_are_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "mine")
    cells = mask(folder, 1).astype(np.int32)
    tifffile.imwrite(folder / "masks" / "f1.tif", np.where(cells > 0, cells + 40_000, 0))
    assert finetune(folder, "--dry-run", "--strict") == 0
    assert "4 images for training, 1 for validation" in capsys.readouterr().out


def test_too_few_images_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "mine")
    for number in range(1, NUM_IMAGES):
        (folder / "images" / f"f{number}.tif").unlink()
        (folder / "masks" / f"f{number}.tif").unlink()
    assert finetune(folder) == 2
    assert "mine/images: one image" in capsys.readouterr().err
    tifffile.imwrite(folder / "masks" / "f0.tif", np.zeros((60, 72), np.uint16))
    assert finetune(folder) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dinocell: data.images, data.masks: no pair could be used (1 x no cells)")


def test_advice_names_the_keys_of_this_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "mine")
    for path in (folder / "images").iterdir():
        stains = np.random.default_rng(0).integers(0, 255, (2, 60, 72), np.uint8)
        tifffile.imwrite(path, stains, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    assert finetune(folder) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "5 x several channels" in line
    assert "data.channel" in line
    assert "--" not in line


def test_images_fixed_before_the_first_checkpoint_are_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "mine")
    whole = mask(folder, 1)
    corrupt(folder, "another size")
    short = ("epochs=1", "data.crops_per_image=1", "score_every=1")
    assert finetune(folder, "--strict", *short) == 2
    tifffile.imwrite(folder / "masks" / "f1.tif", whole)
    capsys.readouterr()
    assert finetune(folder, "--strict", *short) == 0
    assert "4 images for training, 1 for validation" in capsys.readouterr().out
    for path in (folder / "images").iterdir():
        path.unlink()
    assert finetune(folder, "--strict", *short) == 0, "a run with a checkpoint does not need the image files"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["distance", "flows"])
@pytest.mark.parametrize("size", [(20, 24), (40, 150), (16, 70)])
def test_images_smaller_than_a_crop_are_trained_on_validated_and_scored(
    target: str, size: tuple[int, int], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "mine", size)
    short = ["epochs=1", "data.crops_per_image=1", "score_every=1", "image_every=1"]
    assert finetune(folder, *short, f"target={target}") == 0
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(rows[-1]["loss/validation"])
    assert 0 <= rows[-1]["score/op_csb"] <= 1
    model = DINOCell.from_pretrained(folder / "run" / "best.pt")
    assert model.settings.window_px == 64
    image = folder / "images" / "f0.tif"
    assert main(["segment", str(image), "--model", str(folder / "run" / "best.pt"), "--output", str(folder)]) == 0
    (labels,) = folder.glob("*label*.tif")
    assert tifffile.imread(labels).shape == size


def test_validation_images_without_a_cell_keep_the_thresholds(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine")
    sets = []
    for name, is_empty in (("cells", False), ("empty", True)):
        (tmp_path / name).mkdir()
        labels = np.stack([mask(folder, number) for number in range(2)]).astype(np.int16)
        images = np.stack([tifffile.imread(folder / "images" / f"f{number}.tif") for number in range(2)])
        np.save(tmp_path / name / "imgs.npy", (images >> 8).astype(np.uint8))
        np.save(tmp_path / name / "anns.npy", labels * (not is_empty))
        sets.append(tmp_path / name)
    fixed = ["model.size=nano", "model.pretrained=false", "augment.crop=64", "compute.workers=0", "compute.device=cpu"]
    settings = [f"data.sets=[{sets[0]}]", f"data.validation_sets=[{sets[1]}]", f"output={tmp_path / 'run'}", "epochs=1"]
    assert main(["finetune", "livecell_frozen", *settings, *fixed, "score_every=1"]) == 0
    assert DINOCell.from_pretrained(tmp_path / "run" / "best.pt").settings.cells_max == 0.47
