"""``dinocell evaluate`` on common folder layouts, and with the challenge's own programs."""

import csv
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell.cli import main
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.eval.evaluate import OURS, score, score_with_programs, segmenter_methods, tool_method
from dinocell.eval.evaluation_sets import PairSet, open_evaluation_set
from dinocell.eval.metrics.ctc import write_reference, write_results
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.finetune.model import DINOCell
from dinocell.images.read import read_image
from dinocell.images.write import write_labels, write_png, write_tiff
from dinocell.labelled.dataset import LabelledSet
from helpers.ctc import score_sequence

CONFIG = SyntheticConfig(size=(72, 80), num_cells=(6, 9), cell_radius_px=9.0)
FIELDS = [make_field(seed, CONFIG) for seed in range(2)]
LABELS = [field.labels for field in FIELDS]
SHIFTED = [np.roll(labels, 3, axis=1) for labels in LABELS]
REAL_SEQUENCE = Path(__file__).parents[2] / "shared" / "data" / "ctc_layout_ipsc"


def write_sequence(folder: Path, sequence: str = "01", *, with_images: bool = True) -> None:
    write_reference(folder, sequence, LABELS)
    if with_images:
        for number, field in enumerate(FIELDS):
            (folder / sequence).mkdir(exist_ok=True)
            write_tiff(folder / sequence / f"t{number:03d}.tif", field.pixels[0], pixel_size_um=0.5)


def write_folders(folder: Path) -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number, field in enumerate(FIELDS):
        write_tiff(folder / "images" / f"größe {number}.ome.tif", field.pixels, pixel_size_um=0.5)
        write_labels(folder / "masks" / f"größe {number}_masks.tif", field.labels)


def write_cellpose(folder: Path) -> None:
    folder.mkdir()
    for number, field in enumerate(FIELDS):
        write_png(folder / f"00{number}_img.png", field.pixels[0])
        write_png(folder / f"00{number}_masks.png", field.labels.astype(np.uint16))


def write_bowl(folder: Path) -> None:
    for number, field in enumerate(FIELDS):
        for kind in ("images", "masks"):
            (folder / f"id{number}" / kind).mkdir(parents=True)
        write_png(folder / f"id{number}" / "images" / f"id{number}.png", field.pixels[0])
        for label in range(1, field.labels.max() + 1):
            write_png(folder / f"id{number}" / "masks" / f"{label:02d}.png", field.labels == label)


@pytest.mark.parametrize("write", [write_sequence, write_folders, write_cellpose, write_bowl])
def test_a_folder_is_opened_by_what_is_in_it(write: object, tmp_path: Path) -> None:
    assert callable(write)
    write(tmp_path / "set")
    found = open_evaluation_set(tmp_path / "set")
    assert isinstance(found, PairSet)
    assert len(found) == len(found.names) == 2
    for index, field in enumerate(FIELDS):
        assert found[index].name == found.names[index]
        outlines = found[index].labels != 0
        np.testing.assert_array_equal(outlines, field.labels != 0)
        assert len(np.unique(found[index].labels)) == len(np.unique(field.labels))
    if write is write_folders:
        image = found[1]
        np.testing.assert_array_equal(image.pixels, read_image(tmp_path / "set/images/größe 1.ome.tif").mean().pixels)
        assert image.pixel_size_um == pytest.approx(0.5)


def test_one_sequence_may_be_named_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sequence(tmp_path, "01")
    write_sequence(tmp_path, "02")
    assert open_evaluation_set(tmp_path / "02").names == ["02/000", "02/001"]
    assert open_evaluation_set(tmp_path).names == ["01/000", "01/001", "02/000", "02/001"]
    monkeypatch.chdir(tmp_path / "02")
    assert open_evaluation_set(Path()).names == open_evaluation_set(Path("../02")).names == ["02/000", "02/001"]


def test_labelled_sets_are_opened_as_such(tmp_path: Path) -> None:
    np.save(tmp_path / "imgs.npy", np.zeros((1, 8, 8), np.uint8))
    np.save(tmp_path / "anns.npy", np.zeros((1, 8, 8), np.int16))
    assert isinstance(open_evaluation_set(tmp_path), LabelledSet)


def test_hidden_files_and_files_of_cellpose_are_not_images(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for name in ("größe 0_seg.npy", "größe 1_seg.npy", "._größe 0.ome.tif"):
        (tmp_path / "images" / name).touch()
    assert open_evaluation_set(tmp_path).names == ["größe 0", "größe 1"]


def test_names_of_images_keep_their_dots(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for kind, end in (("images", ".ome.tif"), ("masks", "_masks.tif")):
        for number in range(2):
            (tmp_path / kind / f"größe {number}{end}").rename(tmp_path / kind / f"2026.01.{number}{end}")
    assert open_evaluation_set(tmp_path).names == ["2026.01.0", "2026.01.1"]


def test_folders_and_pairs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(DinocellError, match="nowhere"):
        open_evaluation_set(tmp_path / "nowhere")
    with pytest.raises(DinocellError, match="not a labelled set"):
        open_evaluation_set(tmp_path)
    write_folders(tmp_path / "a")
    write_labels(tmp_path / "a/masks/größe 1_masks.tif", LABELS[1][:-1])
    with pytest.raises(DinocellError, match=r"größe 1: the image is 72 x 80, its mask 71 x 80"):
        open_evaluation_set(tmp_path / "a")
    (tmp_path / "a/masks/größe 1_masks.tif").unlink()
    with pytest.raises(DinocellError, match=r"1 of the 2 images .*größe 1"):
        open_evaluation_set(tmp_path / "a")
    write_sequence(tmp_path / "b")
    (tmp_path / "b/01/t001.tif").unlink()
    with pytest.raises(DinocellError, match="no image of frame 1"):
        open_evaluation_set(tmp_path / "b")


def test_coloured_masks_are_read_as_regions_with_that_encoding(tmp_path: Path) -> None:
    write_folders(tmp_path / "a")
    for path in (tmp_path / "a/masks").iterdir():
        path.unlink()
    for number, labels in enumerate(LABELS):
        write_png(
            tmp_path / "a/masks" / f"größe {number}.png",
            np.stack([labels % 7 * 30, labels, labels * 0]).astype(np.uint8),
        )
    with pytest.raises(DinocellError, match="encoding 'regions'"):
        open_evaluation_set(tmp_path / "a")
    found = open_evaluation_set(tmp_path / "a", encoding="regions")
    np.testing.assert_array_equal(found[0].labels != 0, LABELS[0] != 0)
    write_cellpose(tmp_path / "b")
    with pytest.raises(DinocellError, match="regions"):
        open_evaluation_set(tmp_path / "b", encoding="regions")


def test_masks_of_some_cells_only_are_noted(tmp_path: Path) -> None:
    write_sequence(tmp_path)
    assert open_evaluation_set(tmp_path).note == ""  # type: ignore[attr-defined]
    path = tmp_path / "01_GT" / "SEG" / "man_seg000.tif"
    mask = tifffile.imread(path)
    mask[mask == 1] = 0
    tifffile.imwrite(path, mask)
    cells = sum(int(labels.max()) for labels in LABELS)
    note = f"01: only {cells - 1} of the {cells} cells that TRA marks have a mask"
    assert open_evaluation_set(tmp_path).note.startswith(note)  # type: ignore[attr-defined]


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "scores.csv").open(encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_results_in_the_challenges_folders_are_scored(tmp_path: Path) -> None:
    write_sequence(tmp_path / "set", with_images=False)
    write_results(tmp_path / "set", "01", SHIFTED)
    line = ["evaluate", "--dataset", str(tmp_path / "set"), "--output", str(tmp_path / "out")]
    assert main([*line, "--predictions", f"Theirs={tmp_path / 'set'}"]) == 0
    expected = score_sequence(tmp_path / "set", "01")
    row = rows(tmp_path / "out")["Theirs"]
    assert (float(row["seg"]), float(row["det"])) == pytest.approx((expected.seg, expected.det), abs=1e-6)
    assert 0 < expected.seg < 1


def test_a_model_needs_images(tmp_path: Path, segmenter: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_sequence(tmp_path / "set", with_images=False)
    line = ["evaluate", "--dataset", str(tmp_path / "set"), "--output", str(tmp_path / "out"), "--model", segmenter]
    assert main(line) == 2
    assert "masks without images" in capsys.readouterr().err


def test_pairs_are_scored_as_segment_writes_them(tmp_path: Path, segmenter: str) -> None:
    write_folders(tmp_path / "set")
    assert main(["segment", str(tmp_path / "set/images"), "--model", segmenter, "--output", str(tmp_path / "seg")]) == 0
    data = open_evaluation_set(tmp_path / "set")
    pipeline = DINOCellPipeline(DINOCell.from_pretrained(segmenter))
    sets = {"set": data}
    found = score(sets, [*segmenter_methods(sets, pipeline), tool_method("files", tmp_path / "seg", sets)])
    scores = {row.method: row.scores for row in found.pooled}
    assert scores[OURS] == scores["files"]
    assert scores[OURS].num_predicted > 0


def write_program(folder: Path, name: str) -> Path:
    """Write a program with the interface of the challenge's that computes our scores."""
    path = folder / f"{name}Measure"
    places = [os.fspath(folder) for folder in Path(__file__).parents[:2]]
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:0] = {places!r}\n"
        "from pathlib import Path\nfrom helpers.ctc import score_sequence\n"
        "score = score_sequence(Path(sys.argv[1]), sys.argv[2])\n"
        f"print(f'{name} measure: {{score.{name.lower()}:.6f}}')\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="needs programs that start by their first line")
def test_scores_of_the_official_programs_are_in_all_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    write_folders(tmp_path / "set")
    (tmp_path / "tool").mkdir()
    for number, labels in enumerate(SHIFTED):
        write_labels(tmp_path / "tool" / f"größe {number}.tif", labels)
    (tmp_path / "bin").mkdir()
    for name in ("SEG", "DET"):
        write_program(tmp_path / "bin", name)
    line = ["evaluate", "--dataset", str(tmp_path / "set"), "--output", str(tmp_path / "out")]
    line += ["--predictions", f"Tool={tmp_path / 'tool'}", "--binary-path", str(tmp_path / "bin")]
    assert main(line) == 0
    assert "SEG official  DET official" in capsys.readouterr().out
    row = rows(tmp_path / "out")["Tool"]
    assert float(row["seg_official"]) == pytest.approx(float(row["seg"]), abs=2e-6)
    assert float(row["det_official"]) == pytest.approx(float(row["det"]), abs=2e-6)
    kept = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert kept["pooled"][0]["official"]["seg"] == pytest.approx(float(row["seg"]), abs=2e-6)
    assert "SEG official" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "SEG official" in (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="needs permissions")
def test_programs_that_cannot_run_are_named_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(tmp_path / "set")
    line = ["evaluate", "--dataset", str(tmp_path / "set"), "--predictions", f"Tool={tmp_path}"]
    line += ["--output", str(tmp_path / "out"), "--binary-path", str(tmp_path)]
    assert main(line) == 2
    assert "SEGMeasure: no such program" in capsys.readouterr().err
    write_program(tmp_path, "SEG")
    write_program(tmp_path, "DET").chmod(0o644)
    assert main(line) == 2
    assert "DETMeasure: not executable" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_set_with_more_cells_than_the_programs_have_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("SEG", "DET"):
        write_program(tmp_path / "bin", name)
    np.save(tmp_path / "imgs.npy", np.zeros((1, 260, 260), np.uint8))
    np.save(tmp_path / "anns.npy", np.arange(260 * 260, dtype=np.int32).reshape(1, 260, 260))
    write_labels(tmp_path / "000000.tif", np.ones((260, 260), np.int32))
    sets = {"one": open_evaluation_set(tmp_path)}
    tool = tool_method("Tool", tmp_path, sets)
    with pytest.raises(DinocellError, match="one: 67599 cells"):
        score_with_programs(sets, [tool], tmp_path / "scratch", binary_path=tmp_path / "bin")


def test_the_note_is_shown_with_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sequence(tmp_path / "set", with_images=False)
    write_results(tmp_path / "set", "01", SHIFTED)
    tifffile.imwrite(tmp_path / "set/01_GT/SEG/man_seg000.tif", (LABELS[0] == 1).astype(np.uint16))
    line = ["evaluate", "--dataset", str(tmp_path / "set"), "--output", str(tmp_path / "out")]
    assert main([*line, "--predictions", f"Theirs={tmp_path / 'set'}"]) == 0
    assert "cells that TRA marks have a mask" in capsys.readouterr().out
    assert "cells that TRA marks have a mask" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_real_sequence_is_scored_without_its_images(tmp_path: Path) -> None:
    if not REAL_SEQUENCE.exists():
        pytest.skip("no ../shared/data/ctc_layout_ipsc")
    line = ["evaluate", "--dataset", str(REAL_SEQUENCE), "--output", str(tmp_path / "out")]
    assert main([*line, "--predictions", f"Theirs={REAL_SEQUENCE}"]) == 0
    assert float(rows(tmp_path / "out")["Theirs"]["seg"]) == pytest.approx(
        score_sequence(REAL_SEQUENCE, "02").seg, abs=1e-6
    )
