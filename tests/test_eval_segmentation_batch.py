"""The batch of ``dinocell segment``: overlapping work, interrupts, full disks, existing results, many cells."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from roifile import roiread

from dinocell.cli import main
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.segmentation import batch
from dinocell.eval.segmentation.pipeline import DINOCellPipeline, Segmentation
from dinocell.finetune.model import DINOCell
from dinocell.images.read import read_image
from dinocell.images.write import write_tiff
from dinocell.runtime import files as atomic
from helpers.commands import segment

SMALL = SyntheticConfig(size=(96, 130), num_cells=(6, 10), cell_radius_px=12.0)
EVERYTHING = (
    "--csv",
    "--save-viz",
    "--save-outlines",
    "--save-dist-map",
    "--save-geojson",
    "--save-rois",
    "--save-coco",
)
DISTANCE = DINOCellPipeline.maps


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of five images, ``t0.tif`` to ``t4.tif``."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        write_tiff(folder / f"t{number}.tif", make_field(number, SMALL).pixels[0])
    return folder


def at_image(number: int, act: Callable[[], object]) -> tuple[Callable[..., Any], list[int]]:
    """Return a stand-in for `DINOCellPipeline.maps` that acts before it works on an image, and what it has seen."""
    seen: list[int] = []

    def distance(self: DINOCellPipeline, image: np.ndarray, **how: Any) -> np.ndarray:
        seen.append(len(seen))
        if len(seen) - 1 == number:
            act()
        return DISTANCE(self, image, **how)

    return distance, seen


def summary(out: Path) -> dict[str, int]:
    with (out / "summary.csv").open(encoding="utf-8") as file:
        return {row["image"]: int(row["cells"]) for row in csv.DictReader(file)}


def contents(out: Path) -> dict[str, bytes]:
    # A zip holds the time of writing: the cells of its regions are compared instead.
    return {
        path.name: b"".join(roi.tobytes() for roi in roiread(path)) if path.suffix == ".zip" else path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_images_segmented_together_give_the_results_of_each_by_itself(
    images: Path, segmenter: str, tmp_path: Path
) -> None:
    assert segment(images, "--model", segmenter, "--output", tmp_path / "together", *EVERYTHING) == 0
    for file in sorted(images.iterdir()):
        assert segment(file, "--model", segmenter, "--output", tmp_path / "one by one", *EVERYTHING) == 0
    assert contents(tmp_path / "together") == contents(tmp_path / "one by one")
    pipeline = DINOCellPipeline(DINOCell.from_pretrained(segmenter))
    for number in range(5):
        found = tifffile.imread(tmp_path / "together" / f"t{number}_labels.tif")
        np.testing.assert_array_equal(found, pipeline.run(read_image(images / f"t{number}.tif").pixels[0]))
        assert found.any()


def test_reading_and_writing_overlap_with_the_network(
    images: Path, segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_is_read, first_is_written = threading.Event(), threading.Event()
    waited: list[bool] = []
    read, write = batch.read_image, batch.write_labels

    def reading(path: Path) -> Any:
        image = read(path)
        if path.name == "t1.tif":
            second_is_read.set()
        return image

    def writing(path: Path, labels: np.ndarray, **how: Any) -> None:
        write(path, labels, **how)
        if path.name == "t0_labels.tif":
            first_is_written.set()

    def distance(self: DINOCellPipeline, image: np.ndarray, **how: Any) -> np.ndarray:
        # The network on the first image waits for the second to be read, on the second for the first to be written.
        waited.append((second_is_read if not waited else first_is_written).wait(timeout=60))
        return DISTANCE(self, image, **how)

    monkeypatch.setattr(batch, "read_image", reading)
    monkeypatch.setattr(batch, "write_labels", writing)
    monkeypatch.setattr(DINOCellPipeline, "maps", distance)
    assert segment(images, "--model", segmenter, "--output", tmp_path / "out") == 0
    assert waited == [True] * 5


@pytest.mark.usefixtures("default_sigint")
def test_after_an_interrupt_finished_results_stay_and_the_next_run_continues(
    images: Path, segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = (images, "--model", segmenter, "--output", out, *EVERYTHING)
    distance, _ = at_image(2, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(DINOCellPipeline, "maps", distance)
    assert segment(*line) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(out.glob(".*"))
    assert sorted(summary(out)) == ["t0", "t1"]
    assert [image["name"] for image in json.loads((out / "coco.json").read_text())["images"]] == ["t0", "t1"]
    assert not (out / "t2_labels.tif").exists()
    distance, seen = at_image(-1, lambda: None)
    monkeypatch.setattr(DINOCellPipeline, "maps", distance)
    assert segment(*line) == 0
    assert len(seen) == 3
    assert segment(images, "--model", segmenter, "--output", tmp_path / "whole", *EVERYTHING) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_full_disk_ends_the_run_in_one_line_and_the_next_run_continues(
    images: Path, segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, is_full = tmp_path / "out", threading.Event()
    fsync = os.fsync

    def full(file: int) -> None:
        if is_full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    def fill() -> None:
        while not (out / "t0_labels.tif").exists():
            threading.Event().wait(0.01)
        is_full.set()

    monkeypatch.setattr(atomic.os, "fsync", full)
    distance, seen = at_image(1, fill)
    monkeypatch.setattr(DINOCellPipeline, "maps", distance)
    assert segment(images, "--model", segmenter, "--output", out, "--csv", "--save-viz") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out" in line
    assert os.strerror(errno.ENOSPC) in line
    assert len(seen) < 5, "the rest is not computed for nothing"
    assert not list(out.glob(".*")), "no part of a file stays"
    assert {path.name for path in out.iterdir()} == {"t0_labels.tif", "t0_cells.csv", "t0_overlay.png", "summary.jsonl"}
    is_full.clear()
    assert segment(images, "--model", segmenter, "--output", out, "--csv", "--save-viz") == 0
    assert "t0.tif: skipped" in capsys.readouterr().out
    assert summary(out) == {f"t{n}": tifffile.imread(out / f"t{n}_labels.tif").max() for n in range(5)}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_results_folder_is_refused_before_any_work(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    distance, seen = at_image(-1, lambda: None)
    monkeypatch.setattr(DINOCellPipeline, "maps", distance)
    assert segment(images, "--model", segmenter, "--output", out) == 2
    assert f"{out}: cannot be written (Permission denied)" in capsys.readouterr().err
    assert not seen


def test_records_that_cannot_be_written_are_refused_before_any_work(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(batch, "_append", refuse)
    distance, seen = at_image(-1, lambda: None)
    monkeypatch.setattr(DINOCellPipeline, "maps", distance)
    assert segment(images, "--model", segmenter, "--output", tmp_path / "out") == 2
    assert f"{tmp_path / 'out'}: cannot be written ({os.strerror(errno.EACCES)})" in capsys.readouterr().err
    assert not seen


def test_an_output_that_cannot_be_a_folder_is_one_line(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert segment(images, "--model", segmenter, "--output", tmp_path / "file" / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line


def test_a_damaged_file_is_listed_at_the_end(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (images / "t1.tif").read_bytes()
    (images / "t1.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit) as caught:
        main(["segment", str(images), "--model", segmenter, "--output", str(tmp_path / "out"), *EVERYTHING])
    assert str(caught.value.code).startswith("dinocell: 1 of 5 images could not be segmented:\n")
    assert "t1.tif" in str(caught.value.code)
    assert sorted(summary(tmp_path / "out")) == ["t0", "t2", "t3", "t4"]
    assert "[5/5]" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("t1*"))


def test_results_of_another_image_of_the_same_name_are_refused(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    write_tiff(other / "t3.tif", make_field(9, SMALL).pixels[0])
    assert segment(images, "--model", segmenter, "--output", out) == 0
    before = (out / "t3_labels.tif").read_bytes()
    assert segment(other, "--model", segmenter, "--output", out) == 2
    assert "t3_labels.tif: exists and was made from ../in/t3.tif" in capsys.readouterr().err
    assert (out / "t3_labels.tif").read_bytes() == before
    assert segment(other, "--model", segmenter, "--output", out, "--overwrite") == 0
    assert (out / "t3_labels.tif").read_bytes() != before
    images.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "in")
    assert segment(tmp_path / "elsewhere/in/t1.tif", "--model", segmenter, "--output", out) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_large_image_reports_its_progress(
    segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiff(tmp_path / "large.tif", np.zeros((300, 1500), np.uint8))
    monkeypatch.setattr(batch, "_REPORT_EVERY_S", 0.0)
    assert segment(tmp_path / "large.tif", "--model", segmenter, "--output", tmp_path / "out") == 0
    first, *_, done, results = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'large.tif'}: 8 of ")
    assert first.endswith(" tiles")
    assert done.startswith("[1/1] ")
    assert results == f"results: {tmp_path / 'out'}"


def test_results_that_were_half_replaced_on_a_full_disk_are_recomputed(
    images: Path, segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (images / "t0.tif", "--model", segmenter, "--output", tmp_path / "out", "--csv", "--save-viz")
    assert segment(*line, "--cells-max", "0.2", "--cell-fill", "0.1") == 0
    old = contents(tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_png", full)
        assert segment(*line, "--cells-max", "0.6", "--overwrite") == 2
    assert segment(*line, "--cells-max", "0.6") == 0
    found = contents(tmp_path / "out")
    assert all(found[name] != old[name] for name in ("t0_cells.csv", "t0_overlay.png", "t0_labels.tif"))
    assert len(found["t0_cells.csv"].splitlines()) - 1 == summary(tmp_path / "out")["t0"]


def test_results_made_with_other_settings_are_refused(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (images / "t0.tif", "--model", segmenter, "--output", tmp_path / "out")
    assert segment(*line, "--cells-max", "0.2", "--cell-fill", "0.1") == 0
    assert segment(*line, "--cells-max", "0.2", "--cell-fill", "0.1", "--csv", "--stride", "192") == 0
    for other in (["--cells-max", "0.6"], ["--cells-max", "0.2", "--cell-fill", "0.1", "--pixel-size", "0.5"]):
        assert segment(*line, *other) == 2
        (text,) = capsys.readouterr().err.splitlines()
        assert "t0_labels.tif: exists and was made with model" in text
        assert segment(images / "t1.tif", *line[1:], *other) == 0  # another image may have been made by others
        (tmp_path / "out" / "t1_labels.tif").unlink()
    another = DINOCell.from_pretrained(segmenter)
    torch.nn.init.zeros_(another.decoder.head.weight)
    another.save_pretrained(tmp_path / "other.pt")
    more = ("--cells-max", "0.2", "--cell-fill", "0.1")
    assert segment(line[0], "--model", tmp_path / "other.pt", *line[3:], *more) == 2
    assert segment(line[0], "--model", tmp_path / "other.pt", *line[3:], *more, "--overwrite") == 0
    another.save_pretrained(tmp_path / "same.safetensors")
    assert segment(line[0], "--model", tmp_path / "same.safetensors", *line[3:], *more) == 0


def test_results_of_the_version_without_records_are_recognised(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ("--model", segmenter, "--output", out)
    assert segment(images / "t0.tif", *line) == 0
    table = (out / "summary.csv").read_text(encoding="utf-8")
    assert table.splitlines()[0] == "image,cells,covered_share,file,settings"
    (out / "summary.jsonl").unlink()
    (out / "summary.csv").write_text(f"\ufeff{table}", encoding="utf-8")
    assert segment(images, *line) == 0
    assert "t0.tif: skipped" in capsys.readouterr().out
    assert sorted(summary(out)) == ["t0", "t1", "t2", "t3", "t4"]
    assert table in (out / "summary.csv").read_text(encoding="utf-8")
    assert segment(images, *line, "--cells-max", "0.6") == 2
    assert "t0_labels.tif: exists" in capsys.readouterr().err


def test_results_of_the_first_version_without_settings_are_refused(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ("--model", segmenter, "--output", out)
    assert segment(images / "t0.tif", *line) == 0
    rows = [row[:4] for row in csv.reader((out / "summary.csv").read_text(encoding="utf-8").splitlines())]
    (out / "summary.csv").write_text("".join(f"{','.join(row)}\n" for row in rows), encoding="utf-8")
    (out / "summary.jsonl").unlink()
    assert segment(images, *line) == 2
    assert "t0_labels.tif: exists and was made with unknown settings" in capsys.readouterr().err
    assert segment(images / "t1.tif", *line) == 0
    assert sorted(summary(out)) == ["t0", "t1"]


def test_an_image_that_was_changed_since_is_refused(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (images / "t0.tif", "--model", segmenter, "--output", tmp_path / "out")
    assert segment(*line) == 0
    (images / "t0.tif").touch()  # the same content at another time
    assert segment(*line) == 0
    assert "skipped" in capsys.readouterr().out
    (images / "t0.tif").write_bytes((images / "t1.tif").read_bytes())
    assert segment(*line) == 2
    assert "t0_labels.tif: exists and was made from" in capsys.readouterr().err
    assert segment(*line, "--overwrite") == 0


def test_a_record_that_a_killed_run_left_unfinished_is_ignored(images: Path, segmenter: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert segment(images / "t0.tif", "--model", segmenter, "--output", out) == 0
    with (out / "summary.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"image": "t1", "cel')
    assert segment(images, "--model", segmenter, "--output", out) == 0
    assert sorted(summary(out)) == ["t0", "t1", "t2", "t3", "t4"]


@pytest.mark.parametrize("content", ["{}\n", "[1, 2]}\n", '{"image": "t1"}\n'])
def test_records_of_another_program_are_refused(
    content: str, images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "out" / "summary.jsonl"
    records.parent.mkdir()
    records.write_text(content)
    assert segment(images, "--model", segmenter, "--output", records.parent) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(records) in line
    assert records.read_text() == content


def test_images_of_two_plates_with_one_name_are_told_apart(
    images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for plate in ("p1", "p2"):
        (tmp_path / plate / "images").mkdir(parents=True)
        (images / f"t{plate[1]}.tif").rename(tmp_path / plate / "images" / "A01.tif")
    assert segment(tmp_path / "p1", "--model", segmenter, "--output", out) == 0
    assert segment(tmp_path / "p2", "--model", segmenter, "--output", out) == 2
    assert "A01_labels.tif: exists and was made from ../p1/images/A01.tif" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(out)
    assert segment(tmp_path / "p1", "--model", segmenter, "--output", tmp_path / "link") == 0
    out.rename(tmp_path / "p1" / "images" / "results")  # moved away from its images, which are still the same
    assert segment(tmp_path / "p1", "--model", segmenter, "--output", tmp_path / "p1" / "images" / "results") == 0
    assert capsys.readouterr().out.count("skipped") == 2


def test_two_runs_at_once_lose_none_of_each_others_rows(
    images: Path, segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run starts and ends while the first works on its image."""
    out = tmp_path / "out"
    line = ("--model", segmenter, "--output", out, "--save-coco")
    assert segment(images / "t0.tif", *line) == 0

    def other() -> None:
        monkeypatch.setattr(DINOCellPipeline, "maps", DISTANCE)
        assert segment(images / "t1.tif", *line) == 0

    monkeypatch.setattr(DINOCellPipeline, "maps", at_image(0, other)[0])
    assert segment(images / "t2.tif", *line) == 0
    assert sorted(summary(out)) == ["t0", "t1", "t2"]
    assert [image["name"] for image in json.loads((out / "coco.json").read_text())["images"]] == ["t0", "t1", "t2"]


@pytest.mark.parametrize(
    "content",
    [
        b"well;compound\nA1;DMSO\nA1;drug\n",
        b"image,drug\nt1,DMSO\n",
        "image;cells;covered_share;file\r\nt\xe4;3;0,1;d/t\xe4.tif\r\n".encode("cp1252"),
    ],
)
def test_a_summary_of_another_program_is_not_replaced(
    content: bytes, images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "out" / "summary.csv"
    table.parent.mkdir()
    table.write_bytes(content)
    assert segment(images, "--model", segmenter, "--output", table.parent) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(table) in line
    assert table.read_bytes() == content
    assert [path.name for path in table.parent.iterdir()] == ["summary.csv"]


def test_labels_drawn_by_hand_are_not_replaced(
    images: Path, segmenter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = np.arange(96 * 130, dtype=np.uint16).reshape(96, 130)
    for stem in ("t1", "t2_f0000"):
        tifffile.imwrite(images / f"{stem}_labels.tif", drawn)
    for words in ((images / "t1.tif",), (images / "t2.tif", "--frames")):
        assert segment(*words, "--model", segmenter, "--output", images, "--csv") == 2
        assert "_labels.tif: exists and is not recorded" in capsys.readouterr().err
        assert not list(images.glob("*_cells.csv"))
    np.testing.assert_array_equal(tifffile.imread(images / "t1_labels.tif"), drawn)
    assert segment(images / "t1.tif", "--model", segmenter, "--output", images, "--csv", "--overwrite") == 0
    assert tifffile.imread(images / "t1_labels.tif").max() < 100
    assert segment(images / "t1.tif", "--model", segmenter, "--output", images, "--csv", "--save-viz") == 0


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--csv", "t1_cells.csv"),
        ("--save-viz", "t1_overlay.png"),
        ("--save-outlines", "t1_outlines.png"),
        ("--save-dist-map", "t1_distance.tif"),
        ("--save-geojson", "t1_cells.geojson"),
        ("--save-rois", "t1_rois.zip"),
        ("--save-ctc", "in_RES/mask1.tif"),
    ],
)
def test_a_file_of_the_users_own_is_not_replaced(
    option: str, name: str, images: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    line = (images, "--model", segmenter, "--output", tmp_path / "out", option)
    for dry in ((), ("--dry-run",)):
        assert segment(*line, *dry) == 2
        (text,) = capsys.readouterr().err.splitlines()
        assert all(word in text for word in (f"{own}: ", "--output", "--overwrite"))
        assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [own]
        assert own.read_bytes() == b"mine"
    assert segment(*line, "--overwrite") == 0
    assert own.read_bytes() != b"mine"


@pytest.mark.parametrize("at", ["batch.writers.write_outlines", "batch.write_labels"])
def test_what_a_killed_run_left_is_recomputed_without_complaint(
    at: str, images: Path, segmenter: str, tmp_path: Path
) -> None:
    words = [str(images), "--model", segmenter, "--output", str(tmp_path / "out"), *EVERYTHING]
    kill = (
        "import os, signal; from dinocell.cli import main; from dinocell.eval.segmentation import batch; "
        f"{at} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL); main({['segment', *words]})"
    )
    assert subprocess.run([sys.executable, "-c", kill], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "t0_cells.csv").exists()
    assert not (tmp_path / "out" / "t0_labels.tif").exists()
    assert segment(*words) == 0
    assert segment(images, "--model", segmenter, "--output", tmp_path / "whole", *EVERYTHING) == 0
    found = contents(tmp_path / "out")
    found["summary.jsonl"] = found["summary.jsonl"].split(b"\n", 1)[1]  # the record of the killed run is the first
    assert found == contents(tmp_path / "whole")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_may_have_spaces_and_umlauts(form: str, segmenter: str, tmp_path: Path) -> None:
    name = unicodedata.normalize(form, "Müllers Zellen, größte (1) 007")
    folder = tmp_path / unicodedata.normalize(form, "Größe 1")
    folder.mkdir()
    write_tiff(folder / f"{name}.tif", make_field(0, SMALL).pixels[0])
    out = tmp_path / "Ergebnisse ä"
    assert segment(folder, "--model", segmenter, "--output", out, *EVERYTHING, "--save-ctc") == 0
    labels = tifffile.imread(out / f"{name}_labels.tif")
    np.testing.assert_array_equal(tifffile.imread(out / f"{folder.name}_RES" / "mask007.tif"), labels)
    assert len(json.loads((out / f"{name}_cells.geojson").read_text(encoding="utf-8"))["features"]) == labels.max()
    (image,) = json.loads((out / "coco.json").read_text(encoding="utf-8"))["images"]
    assert image["file_name"] == f"{name}.tif"
    assert summary(out) == {name: labels.max()}


@pytest.mark.slow
def test_more_cells_than_16_bits_can_number(
    images: Path, segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, columns = np.mgrid[:1060, :1060]
    labels = (rows // 4 * 265 + columns // 4 + 1).astype(np.int32)
    labels[(rows % 4 == 0) | (columns % 4 == 0)] = 0
    found = Segmentation(labels, np.zeros(labels.shape, np.float32))
    monkeypatch.setattr(DINOCellPipeline, "run", lambda *_, **__: found)
    write_tiff(tmp_path / "many0.tif", np.zeros(labels.shape, np.uint8))
    out = tmp_path / "out"
    assert segment(tmp_path / "many0.tif", "--model", segmenter, "--output", out, *EVERYTHING) == 0
    written = tifffile.imread(out / "many0_labels.tif")
    assert written.dtype == np.uint32
    np.testing.assert_array_equal(written, labels)
    assert summary(out) == {"many0": 70225}
    assert len((out / "many0_cells.csv").read_text().splitlines()) == 70226
    assert len(json.loads((out / "many0_cells.geojson").read_text())["features"]) == 70225
    assert len(json.loads((out / "coco.json").read_text())["annotations"]) == 70225
    assert len(roiread(out / "many0_rois.zip")) == 70225
    assert segment(tmp_path / "many0.tif", "--model", segmenter, "--output", tmp_path / "ctc", "--save-ctc") == 1
    assert "masks have 16 bits), got 70225" in capsys.readouterr().out
