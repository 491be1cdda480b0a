"""The command line of ``dinocell segment``: inputs, options, and what is refused before any work."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dinocell.commands.segment import find_images
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.export.writers import write_cells
from dinocell.images.read import read_image
from dinocell.images.write import write_tiff
from helpers.commands import segment

SMALL = SyntheticConfig(size=(96, 130), num_cells=(6, 10), cell_radius_px=12.0)


@pytest.fixture
def model(segmenter: str) -> str:
    return segmenter


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder with a five-channel OME-TIFF of known pixel size, a PNG with an odd name, and a sub-folder."""
    folder = tmp_path / "bilder mit ü"
    (folder / "sub").mkdir(parents=True)
    write_tiff(folder / "a.ome.tif", make_field(1, SMALL).pixels, pixel_size_um=0.5)
    Image.fromarray((make_field(2, SMALL).pixels[0] >> 8).astype(np.uint8)).save(folder / "sub" / "zwei größen.png")
    return folder


def test_one_call_writes_labels_map_overlay_and_table_that_agree(images: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert segment(images, "--model", model, "--output", out, "--csv", "--save-viz", "--save-dist-map") == 0
    labels = tifffile.imread(out / "a_labels.tif")
    assert labels.dtype == np.uint16
    assert labels.shape == (96, 130)
    assert read_image(out / "a_labels.tif").pixel_size_um == pytest.approx(0.5)
    distance = tifffile.imread(out / "a_distance.tif")
    assert distance.dtype == np.float32
    assert 0 <= distance.min() <= distance.max() <= 1
    with (out / "a_cells.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["cell"]) for row in rows] == list(np.unique(labels[labels > 0]))
    areas = np.bincount(labels.ravel())[1:] * 0.25
    np.testing.assert_allclose([float(row["area_um2"]) for row in rows], areas, rtol=1e-5)
    for number, plane in enumerate(read_image(images / "a.ome.tif").pixels):
        means = np.bincount(labels.ravel(), plane.ravel())[1:] / np.bincount(labels.ravel())[1:]
        np.testing.assert_allclose([float(row[f"mean_intensity_{number}"]) for row in rows], means, rtol=1e-6)
    overlay = np.asarray(Image.open(out / "a_overlay.png"))
    assert overlay.shape == (96, 130, 3)
    coloured = overlay[..., 0] != overlay[..., 2]
    assert (labels[coloured] > 0).all()
    with (out / "summary.csv").open(encoding="utf-8") as file:
        summary = {row["image"]: int(row["cells"]) for row in csv.DictReader(file)}
    assert summary == {"a": labels.max(), "zwei größen": tifffile.imread(out / "zwei größen_labels.tif").max()}


def test_existing_results_are_skipped_unless_overwritten(images: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = (images / "a.ome.tif", "--model", model, "--output", out)
    assert segment(*line) == 0
    (out / "a_labels.tif").write_bytes(b"mine")
    assert segment(*line) == 0
    assert (out / "a_labels.tif").read_bytes() == b"mine"
    assert segment(*line, "--overwrite") == 0
    assert tifffile.imread(out / "a_labels.tif").shape == (96, 130)


def test_a_damaged_file_is_reported_and_the_others_are_segmented(
    images: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.tif").write_bytes((images / "a.ome.tif").read_bytes()[:900])
    assert segment(images, "--model", model, "--output", tmp_path / "out") == 1
    assert "broken.tif" in capsys.readouterr().out
    assert (tmp_path / "out" / "a_labels.tif").exists()
    assert not (tmp_path / "out" / "broken_labels.tif").exists()


def test_two_files_of_one_name_are_refused_before_any_work(images: Path, model: str, tmp_path: Path) -> None:
    (images / "sub" / "a.png").write_bytes((images / "sub" / "zwei größen.png").read_bytes())
    assert segment(images, "--model", model, "--output", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_dots_in_a_name_are_kept(model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for day in (1, 2):
        write_tiff(tmp_path / "in" / f"2026.01.0{day}.ome.tif", make_field(day, SMALL).pixels[0])
    assert segment(tmp_path / "in", "--model", model, "--output", tmp_path / "out") == 0
    labels = sorted(path.name for path in (tmp_path / "out").glob("*.tif"))
    assert labels == ["2026.01.01_labels.tif", "2026.01.02_labels.tif"]


def test_frames_of_a_stack_are_segmented_on_request(model: str, tmp_path: Path) -> None:
    planes = np.stack([make_field(seed, SMALL).pixels[0] for seed in range(3)])
    tifffile.imwrite(tmp_path / "film.tif", planes, imagej=True, metadata={"axes": "TYX"})
    out = tmp_path / "out"
    assert segment(tmp_path / "film.tif", "--model", model, "--output", out) == 1
    assert segment(tmp_path / "film.tif", "--model", model, "--output", out, "--frames") == 0
    assert sorted(path.name for path in out.glob("*_labels.tif")) == [f"film_f{n:04d}_labels.tif" for n in range(3)]


def test_a_stack_without_frames_option_names_that_option(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(tmp_path / "film; 2.tif", np.zeros((3, 40, 40), np.uint8), imagej=True, metadata={"axes": "TYX"})
    assert segment(tmp_path / "film; 2.tif", "--model", model, "--output", tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "film; 2.tif: " in out
    assert "--frames" in out


def test_a_dry_run_lists_results_and_writes_nothing(
    images: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (images, "--model", model, "--output", tmp_path / "out", "--dry-run", "--save-rois", "--save-coco")
    assert segment(*line) == 0
    shown = capsys.readouterr().out
    assert f"a.ome.tif -> {tmp_path / 'out' / 'a_labels.tif'}, {tmp_path / 'out' / 'a_rois.zip'}\n" in shown
    assert f"all images -> {tmp_path / 'out' / 'summary.csv'}, {tmp_path / 'out' / 'coco.json'}\n" in shown
    cost = r"2 images; the first has 96 x 130 pixels, and 2 like it take about 0:\d\d:\d\d and 0\.8 GB on \w+; nothing"
    assert re.search(cost, shown)
    assert not (tmp_path / "out").exists()
    (tmp_path / "broken.png").write_bytes(b"")
    assert segment(tmp_path / "broken.png", *line[1:]) == 0
    assert "1 images; none of them can be read; nothing was written" in capsys.readouterr().out
    film = np.random.default_rng(0).integers(0, 255, (3, 40, 50), np.uint8)
    tifffile.imwrite(tmp_path / "film.tif", film, imagej=True, metadata={"axes": "TYX"})
    assert segment(tmp_path / "film.tif", "--model", model, "--frames", "--dry-run", "--output", tmp_path / "out") == 0
    assert "the first has 40 x 50 pixels, and 3 like it take about" in capsys.readouterr().out
    assert segment(images, "--model", tmp_path / "missing.pt", "--dry-run") == 2
    assert "missing.pt" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("nothing/*.tif",), ("missing.tif",)])
def test_an_input_without_images_is_named_in_one_line(
    words: tuple[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(*words, "--model", model, "--output", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words[0] in line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--pixel-size", "0"], "--pixel-size: expected more than 0 micrometres, got 0"),
        (["--pixel-size", "inf"], "--pixel-size: expected more than 0 micrometres, got inf"),
        (["--stride", "999"], "stride: expected 1 to 224 px"),
        (["--device", "gpu"], "expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_an_option_out_of_range_is_one_line_and_nothing_is_written(
    option: list[str], message: str, images: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(images, "--model", model, "--output", tmp_path / "out", *option) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_backbone_as_model_is_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"teacher": {"backbone.cls_token": torch.zeros(1, 1, 4)}}, tmp_path / "teacher.pth")
    assert segment(images, "--model", tmp_path / "teacher.pth", "--output", tmp_path / "out") == 2
    assert "teacher.pth: expected a segmenter" in capsys.readouterr().err


def test_the_table_of_cells_names_units_and_channels(tmp_path: Path) -> None:
    labels = np.array([[1, 1, 0, 2], [1, 1, 0, 2]], np.int32)
    pixels = np.arange(16, dtype=np.uint16).reshape(2, 2, 4)
    write_cells(tmp_path / "a.csv", labels, pixels, channel_names=("DNA stain", "ER"), pixel_size_um=0.5)
    write_cells(tmp_path / "b.csv", labels, pixels[:1])
    with (tmp_path / "a.csv").open() as file:
        first, second = csv.DictReader(file)
    with (tmp_path / "b.csv").open() as file:
        plain = next(csv.DictReader(file))
    assert {"area_um2": "1", "box_right_px": "2", "neighbours": "0"}.items() <= first.items()
    assert {"cell": "2", "min_intensity_DNA_stain": "3", "max_intensity_ER": "15"}.items() <= second.items()
    assert {"area_px2": "4", "mean_intensity": "2.5", "centroid_row_px": "0.5"}.items() <= plain.items()
    assert "major_axis_um" in first
    assert "major_axis_px" in plain


@pytest.mark.parametrize("how", ["@", "--list"])
def test_a_list_holds_files_folders_and_patterns(
    how: str,
    images: Path,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(images)
    (tmp_path / "list.txt").write_text("\ufeff# from the microscope\na.ome.tif\n\n  sub/*.png\n", encoding="utf-8")
    words = ("--list", tmp_path / "list.txt") if how == "--list" else (f"@{tmp_path / 'list.txt'}",)
    assert segment(*words, "--model", model, "--output", tmp_path / "out", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "a.ome.tif -> " in shown
    assert "zwei größen.png -> " in shown
    assert "2 images" in shown


def images_in(folder: Path, *inputs: object, without: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images([*map(str, inputs)], without=without)]


def test_folders_are_searched_through_links_but_hidden_files_and_results_are_skipped(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for path in (folder / ".ipynb_checkpoints" / "a.tif", folder / "._a.tif", folder / "a.tif", elsewhere / "b.tif"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("notes.txt", "a_seg.npy"):  # the latter is Cellpose's, and no image
        (folder / name).touch()
    (folder / "plate").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    results = folder / "results"
    assert images_in(folder, folder, without=results) == ["a.tif", "plate/b.tif"]
    for each in (folder, results):
        (each / "c_labels.tif").parent.mkdir(exist_ok=True)
        (each / "c_labels.tif").touch()
    assert images_in(folder, folder, without=results) == ["a.tif", "c_labels.tif", "plate/b.tif"]
    assert images_in(folder, f"{folder}/**/*.tif", without=results) == ["a.tif", "c_labels.tif"]
    (elsewhere / "round").unlink()
    assert images_in(folder, f"{folder}/pl*", without=results) == ["plate/b.tif"]
    assert images_in(folder, f"{results}/*.tif", without=results) == ["results/c_labels.tif"]
    assert images_in(folder, f"{folder}/.ipy*/*.tif", without=results) == [".ipynb_checkpoints/a.tif"]
    (results / "chosen").mkdir()
    (results / "chosen" / "d.tif").touch()
    assert images_in(folder, results / "chosen", without=results) == ["results/chosen/d.tif"]


def test_an_image_given_twice_is_segmented_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tif").touch()
    monkeypatch.chdir(tmp_path)
    assert find_images(["a.tif", str(tmp_path), f"{tmp_path}/*.tif"], without=tmp_path / "out") == [Path("a.tif")]


def test_results_next_to_the_images_are_neither_segmented_nor_overwrite_images(
    images: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(images, "--model", model, "--output", images) == 2
    assert f"results folder {images}" in capsys.readouterr().err
    file = images / "a.ome.tif"
    assert segment(file, "--model", model, "--output", images) == 0
    assert segment(*sorted(images.glob("*.tif")), "--model", model, "--output", images, "--overwrite") == 2
    assert "a_labels.tif: is given as an image" in capsys.readouterr().err
    assert sorted(path.name for path in images.glob("*.*")) == [
        "a.ome.tif",
        "a_labels.tif",
        "summary.csv",
        "summary.jsonl",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [("n" * 249, "too long"), ("zelle\udcf6", r"zelle\xf6_labels.tif")],
)
def test_a_name_that_results_cannot_have_is_refused_before_any_work(
    name: str, said: str, images: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "a.ome.tif").rename(tmp_path / f"{name}.tif")
    assert segment(tmp_path / f"{name}.tif", "--model", model, "--output", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"# nothing\n", "is empty"), (b"II*\x00\xff\xfe", "is it an image?")],
)
def test_a_list_that_cannot_be_used_is_named_in_one_line(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    assert segment(f"@{tmp_path / 'list.txt'}", "--model", "missing.pt", "--dry-run") == 2
    shown = capsys.readouterr().err
    assert "list.txt" in shown
    assert said in shown
    assert segment("--model", "missing.pt", "--dry-run") == 2
    assert "no images" in capsys.readouterr().err


def test_arrays_and_ome_zarr_are_images_in_a_folder(model: str, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="the optional package zarr is not installed")
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    pixels = make_field(1, SMALL).pixels[0]
    np.save(folder / "array.npy", pixels)
    axes = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    scales = {"axes": axes, "datasets": [{"path": "0"}], "version": "0.4"}
    group = zarr.open_group(folder / "b.zarr", mode="w", zarr_format=2, attributes={"multiscales": [scales]})
    group.create_array("0", data=pixels)
    assert segment(folder, "--model", model, "--output", out) == 0
    first, second = (tifffile.imread(out / f"{name}_labels.tif") for name in ("array", "b"))
    np.testing.assert_array_equal(first, second)
    assert first.any()
