"""The demo, as `make demo` runs it, in its shortest form."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinocell.cli import main
from dinocell.demo.data import FieldCounts, prepare_own
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.dataset import open_labelled
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import Weights, save_weights


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a demo in a process of its own, as people do."""
    line = [sys.executable, "-m", "dinocell", "demo", "--quick", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=dict(os.environ))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder and what was printed of a demo."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    result = run("--output", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.mark.slow
def test_the_demo_ends_with_scores_and_the_path_of_its_page(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    assert printed.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert "step 18/18" in printed, "the images are counted while they are generated"
    for name in ("pretrained", "random weights", "Otsu + watershed"):
        [line] = [line for line in printed.splitlines() if line.startswith(f"segmentation, {name}: SEG")]
        score = float(line.split("OP_CSB ")[1].split()[0])
        assert 0 <= score <= 1


@pytest.mark.slow
def test_the_page_holds_everything_itself(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 1 + 1 + 2 + 2 * 4
    assert all(source.startswith("data:image/png;base64,") for source in page.split('<img src="')[1:])
    assert "OP_CSB: the mean of both" in page
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)


@pytest.mark.slow
def test_a_second_call_keeps_what_is_done(demo: tuple[Path, str]) -> None:
    folder = demo[0]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("**/*.pth")} | {
        path: path.stat().st_mtime_ns for path in folder.glob("finetune/*.pt")
    }
    (folder / "report.html").unlink()
    assert main(["demo", "--quick", "--output", str(folder)]) == 0
    assert (folder / "report.html").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_the_summary_holds_every_number_of_both_backbones(demo: tuple[Path, str]) -> None:
    summary = json.loads((demo[0] / "summary.json").read_text())
    assert list(summary["features"]) == ["pretrained", "random"]
    assert all(set(row) == {"knn", "margin", "retrieval", "patch_r2"} for row in summary["features"].values())
    assert list(summary["segmentation"]) == ["pretrained", "random", "otsu"]
    assert all(set(row) == {"seg", "det", "op_csb"} for row in summary["segmentation"].values())
    assert 0 < summary["minutes"] < 10
    assert summary["features"]["pretrained"] != summary["features"]["random"]
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    margins = [summary["features"][name]["margin"] for name in ("random", "pretrained")]
    assert f"the margin of channel consistency from {margins[0]:.2f} to {margins[1]:.2f}" in page


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(
    demo: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--quick", "--output", str(demo[0]), "seed=5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_quick_is_one_recipe_and_takes_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "standard"]) == 2
    assert "--quick is the recipe 'quick'" in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_that_is_scored_was_in_a_training(demo: tuple[Path, str]) -> None:
    split = json.loads((demo[0] / "finetune" / "split.json").read_text())
    assert not any("unseen" in name for names in split.values() for name in names)
    shards = [json.loads(path.read_text()) for path in demo[0].glob("shards/*labelled/manifest.json")]
    assert sum(manifest["num_samples"] for manifest in shards) == 8 + 4


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(5):
        made = make_field(number, SyntheticConfig(size=(96, 96), channels=("DNA", "ER"), num_cells=(3, 6)))
        write_tiff(folder / "images" / f"n{number}.ome.tif", made.pixels, channel_names=made.channel_names)
        write_labels(folder / "masks" / f"n{number}.png.tif", made.labels)
    return folder


def test_own_images_are_divided_and_the_unseen_ones_stay_out_of_the_shards(own: Path, tmp_path: Path) -> None:
    data = prepare_own(own, tmp_path / "out", workers=1)
    manifest = json.loads((data.shards[0] / "manifest.json").read_text())
    assert manifest["num_samples"] == 4
    assert [path.name for path in data.unseen_images] == ["n0.ome.tif"]
    assert data.channels == ("DNA", "ER")
    assert data.class_shards is None


def test_own_images_without_masks_still_make_shards(own: Path, tmp_path: Path) -> None:
    shutil.rmtree(own / "masks")
    data = prepare_own(own, tmp_path / "out", workers=1)
    assert data.train is None
    assert json.loads((data.shards[0] / "manifest.json").read_text())["num_samples"] == 5


def test_names_with_points_are_whole_names(own: Path, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        for path in list((own / kind).iterdir()):
            path.rename(path.with_name(f"cells_0.65um.{path.name}"))
        (own / kind / "._n0.tif").write_bytes(b"what macOS writes beside a picture on a foreign disk")
    data = prepare_own(own, tmp_path / "out", workers=1)
    assert json.loads((data.shards[0] / "manifest.json").read_text())["num_samples"] == 4
    assert data.train is not None
    assert data.unseen is not None
    assert open_labelled(data.train).names == [f"cells_0.65um.n{number}" for number in range(1, 5)]
    assert open_labelled(data.unseen).names == ["cells_0.65um.n0"]


def test_two_images_of_one_name_are_one_line(own: Path, tmp_path: Path) -> None:
    shutil.copy(own / "images" / "n0.ome.tif", own / "images" / "n0.tiff")
    with pytest.raises(DinocellError, match=r"n0.ome.tif and .*n0.tiff: two images with the same name"):
        prepare_own(own, tmp_path / "out", workers=1)


def test_too_few_images_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_tiff(tmp_path / "one" / "a.tif", np.zeros((1, 64, 64), np.uint8))
    with pytest.raises(DinocellError, match="at least 2 images"):
        prepare_own(tmp_path / "one", tmp_path / "out", workers=1)


@pytest.mark.parametrize("words", [["quick"], ["quick", "--data", "IMAGES"]])
def test_a_folder_of_something_else_is_left_alone(
    own: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    words = [str(own) if word == "IMAGES" else word for word in words]
    assert main(["demo", *words, "--output", str(own)]) == 2
    assert f"output: {own} exists and contains no demo" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_a_folder_of_images_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "quick", "--data", str(tmp_path / "images"), "--output", str(tmp_path / "demo")]) == 2
    assert "images: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists(), "the next call may name another folder"


def test_weights_of_no_known_size_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit = VisionTransformer(variant_config("nano", depth=2))
    save_weights(tmp_path / "odd.pth", Weights.of(vit))
    words = [f"weights={tmp_path / 'odd.pth'}", "--output", str(tmp_path / "demo")]
    assert main(["demo", "quick", *words]) == 2
    assert "odd.pth has width 192 and 2 blocks; expected a size of pico, nano, tiny" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_counts_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 labelled"):
        FieldCounts(labelled=1)
