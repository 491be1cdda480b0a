"""The files of ``dinocell segment`` for other programs: all from one pass, all the same cells."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image
from pycocotools.coco import COCO
from roifile import roiread
from shapely.geometry import shape as geometry_of

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.metrics.ctc import write_reference
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.images.write import write_tiff
from helpers.commands import segment
from helpers.ctc import score_sequence

SMALL = SyntheticConfig(size=(96, 130), num_cells=(6, 10), cell_radius_px=12.0)
EXPORTS = ("--save-geojson", "--save-rois", "--save-coco", "--save-ctc", "--save-outlines")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    """Return a folder ``01`` of two frames, ``t000.tif`` and ``t001.tif``."""
    folder = tmp_path / "data" / "01"
    folder.mkdir(parents=True)
    for number in range(2):
        write_tiff(folder / f"t{number:03d}.tif", make_field(number, SMALL).pixels[0])
    return folder


def test_every_export_holds_the_cells_of_the_label_image(
    sequence: Path, segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, ...]] = []
    distance = DINOCellPipeline.maps
    monkeypatch.setattr(
        DINOCellPipeline,
        "maps",
        lambda self, image, **how: passes.append(image.shape) or distance(self, image, **how),
    )
    out = tmp_path / "out"
    assert segment(sequence, "--model", segmenter, "--output", out, *EXPORTS) == 0
    assert len(passes) == 2, "one pass of the network gives all files of an image"
    coco = COCO(str(out / "coco.json"))
    rows, columns = np.mgrid[:96, :130] + 0.5
    for number, name in enumerate(("t000", "t001")):
        labels = tifffile.imread(out / f"{name}_labels.tif")
        assert labels.max() > 1
        np.testing.assert_array_equal(tifffile.imread(out / "01_RES" / f"mask00{number}.tif"), labels)
        from_coco, from_geojson = np.zeros_like(labels), np.zeros_like(labels)
        image = next(each for each in coco.imgs.values() if each["name"] == name)
        assert image["file_name"] == f"{name}.tif"
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]])):
            from_coco[coco.annToMask(annotation) == 1] = annotation["cell"]
        np.testing.assert_array_equal(from_coco, labels)
        for feature in json.loads((out / f"{name}_cells.geojson").read_text())["features"]:
            inside = shapely.contains_xy(geometry_of(feature["geometry"]), columns.ravel(), rows.ravel())
            from_geojson[inside.reshape(labels.shape)] = int(feature["properties"]["name"].split()[1])
        np.testing.assert_array_equal(from_geojson, labels)
        assert [int(roi.name) for roi in roiread(out / f"{name}_rois.zip")] == np.unique(labels[labels > 0]).tolist()
        outlines = np.asarray(Image.open(out / f"{name}_outlines.png"))
        assert outlines.shape == (96, 130, 4)
        assert (labels[outlines[..., 3] == 255] > 0).all()
        assert set(np.unique(outlines[..., 3])) == {0, 255}


def test_the_challenges_folder_can_be_scored(sequence: Path, segmenter: str) -> None:
    out = sequence.parent
    assert segment(sequence, "--model", segmenter, "--output", out / "found") == 0
    labels = [tifffile.imread(out / "found" / f"t00{number}_labels.tif") for number in range(2)]
    write_reference(out, "01", labels)
    assert segment(sequence, "--model", segmenter, "--output", out, "--save-ctc") == 0
    assert score_sequence(out, "01").op_csb == 1


def test_a_linked_frame_belongs_to_the_sequence_that_it_is_linked_into(sequence: Path, segmenter: str) -> None:
    """As git-annex and DVC keep large files: a link whose name counts, to a store whose names do not."""
    store = sequence.parent / "store" / "SHA256-1"
    store.mkdir(parents=True)
    (sequence / "t000.tif").rename(store / "SHA256-1.tif")
    (sequence / "t000.tif").symlink_to(store / "SHA256-1.tif")
    out = sequence.parent / "out"
    assert segment(sequence, "--model", segmenter, "--output", out, "--save-ctc") == 0
    masks = sorted(path.relative_to(out).as_posix() for path in out.rglob("mask*"))
    assert masks == ["01_RES/mask000.tif", "01_RES/mask001.tif"]


def test_frames_of_a_stack_become_a_sequence_and_entries_of_their_own(segmenter: str, tmp_path: Path) -> None:
    planes = np.stack([make_field(seed, SMALL).pixels[0] for seed in range(3)])
    tifffile.imwrite(tmp_path / "film.tif", planes, imagej=True, metadata={"axes": "TYX"})
    out = tmp_path / "out"
    line = (tmp_path / "film.tif", "--model", segmenter, "--output", out, "--frames", "--save-ctc", "--save-coco")
    assert segment(*line) == 0
    assert sorted(path.name for path in (out / "film_RES").iterdir()) == [f"mask00{n}.tif" for n in range(3)]
    images = COCO(str(out / "coco.json")).imgs.values()
    assert [(image["name"], image["file_name"], image["frame"]) for image in images] == [
        (f"film_f000{n}", "film.tif", n) for n in range(3)
    ]


def test_a_name_without_a_frame_number_is_refused_before_any_work(
    sequence: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sequence / "t001.tif").rename(sequence / "last.tif")
    assert segment(sequence, "--model", segmenter, "--output", tmp_path / "out", "--save-ctc") == 2
    assert "last.tif: --save-ctc needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_frame_number_are_refused(
    sequence: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sequence / "t001.tif").rename(sequence / "u000.tif")
    assert segment(sequence, "--model", segmenter, "--output", tmp_path / "out", "--save-ctc") == 2
    assert "would both write" in capsys.readouterr().err


def test_a_second_run_adds_to_the_coco_file_and_computes_missing_entries(
    sequence: Path, segmenter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ("--model", segmenter, "--output", out, "--save-coco")
    assert segment(sequence / "t001.tif", *line) == 0
    first = json.loads((out / "coco.json").read_text())["annotations"]
    assert segment(sequence, *line) == 0
    assert "t001.tif: skipped" in capsys.readouterr().out
    content = json.loads((out / "coco.json").read_text())
    assert [image["name"] for image in content["images"]] == ["t000", "t001"]
    kept = [each for each in content["annotations"] if each["image_id"] == 2]
    assert [each["segmentation"] for each in kept] == [each["segmentation"] for each in first]
    (out / "coco.json").unlink()
    assert segment(sequence, *line) == 0
    assert json.loads((out / "coco.json").read_text()) == content
