"""Images and masks in published layouts: LIVECell, Cellpose, CTC, DSB2018, any folder; and the command for them."""

import argparse
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinocell.commands import dataset as dataset_command
from dinocell.errors import DinocellError, ImageError
from dinocell.images.listing import Listed, list_files
from dinocell.images.read import read_image
from dinocell.images.write import write_labels, write_png, write_tiff
from dinocell.labelled import layouts as labelled_sources
from dinocell.labelled.build import build_labelled
from dinocell.labelled.dataset import open_labelled
from dinocell.labelled.layouts import (
    Pair,
    PairContent,
    cellpose_pairs,
    ctc_pairs,
    dsb2018_pairs,
    folder_pairs,
    livecell_pairs,
)
from dinocell.labelled.masks import (
    PairError,
    cropped,
    decode_run_lengths,
    draw,
    paint,
    polygons_piece,
    read_instances,
    read_labels,
    read_regions,
    uncompressed,
)
from helpers.real_data import DATA, needs_data

RNG = np.random.default_rng(0)


def contents(pairs: list[Pair]) -> dict[str, PairContent]:
    return {pair.name: pair.read() for pair in pairs}


def kind_of(pair: Pair) -> str:
    with pytest.raises(PairError) as caught:
        pair.read()
    assert "\n" not in str(caught.value)
    return caught.value.kind


# Masks.


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_label_images_keep_their_ids(tmp_path: Path, suffix: str, dtype: str) -> None:
    labels = RNG.integers(0, 200, (20, 30)).astype(dtype)
    path = tmp_path / f"mask{suffix}"
    write_png(path, labels) if suffix == ".png" else write_tiff(path, labels)
    np.testing.assert_array_equal(read_labels(path), labels)


def test_label_images_stored_as_rgba_or_palette_are_label_images(tmp_path: Path) -> None:
    labels = RNG.integers(0, 200, (20, 30)).astype(np.uint8)
    write_png(tmp_path / "rgba.png", np.stack([labels] * 3 + [np.full_like(labels, 255)]))
    np.testing.assert_array_equal(read_labels(tmp_path / "rgba.png"), labels)
    image = Image.fromarray(labels)
    image.putpalette(RNG.integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "palette.png"), labels)


@pytest.mark.parametrize(
    ("pixels", "fragment"),
    [
        (np.zeros((8, 8), np.float32), "float32"),
        (np.eye(8) > 0, "'regions'"),
        (np.eye(8, dtype=np.uint8) * 255, "'regions'"),
        (np.eye(8, dtype=np.uint16) * 65535, "'regions'"),
        (RNG.integers(0, 9, (3, 8, 8)).astype(np.uint8), "3 channels"),
        (-np.eye(8, dtype=np.int16), "negative"),
    ],
)
def test_images_without_one_integer_per_cell_are_rejected(tmp_path: Path, pixels: np.ndarray, fragment: str) -> None:
    write_tiff(tmp_path / "mask.tif", pixels)
    with pytest.raises(PairError, match=fragment) as caught:
        read_labels(tmp_path / "mask.tif")
    assert caught.value.kind == "not a label image"


def test_regions_are_connected_by_edges_and_of_one_colour(tmp_path: Path) -> None:
    colours = np.zeros((3, 5, 6), np.uint8)
    colours[:, 0, 0] = colours[:, 1, 1] = (9, 0, 0)  # touch by a corner only: two cells
    colours[:, 3, 0:2] = np.array([(9, 0, 0)] * 2).T
    colours[:, 3, 2:4] = np.array([(0, 9, 0)] * 2).T  # beside it in another colour
    write_png(tmp_path / "mask.png", colours)
    regions = read_regions(tmp_path / "mask.png")
    assert len(np.unique(regions)) - 1 == 4
    assert regions[3].tolist()[0] == regions[3].tolist()[1] != regions[3].tolist()[2]
    binary = np.zeros((6, 6), np.bool_)
    binary[:2, :2] = binary[4:, 4:] = True
    write_png(tmp_path / "binary.png", binary)
    assert read_regions(tmp_path / "binary.png").max() == 2
    write_tiff(tmp_path / "float.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(PairError, match="float32"):
        read_regions(tmp_path / "float.tif")


def test_where_cells_overlap_the_smaller_one_stays_complete(tmp_path: Path) -> None:
    large, small, hidden = (np.zeros((10, 10), np.bool_) for _ in range(3))
    large[:8, :8] = small[2:5, 2:5] = hidden[3, 3] = True
    for order in ((small, large), (large, small)):
        notes: Counter[str] = Counter()
        labels = paint([cropped(mask) for mask in order], (10, 10), notes)
        number = 1 + next(k for k, mask in enumerate(order) if mask is small)
        np.testing.assert_array_equal(labels == number, small)
        assert notes["pixels of two or more cells, given to the smaller"] == 9
    notes = Counter()
    paint([cropped(mask) for mask in (hidden, hidden, np.zeros((10, 10), np.bool_))], (10, 10), notes)
    assert (notes["cells hidden under others"], notes["cells without a pixel"]) == (1, 1)


def test_dsb2018_with_two_images_in_a_folder_uses_neither(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/a copy.png", "masks/1.png"):
        (tmp_path / "id" / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(tmp_path / "id" / name, np.eye(8, dtype=np.uint8))
    [pair] = dsb2018_pairs(tmp_path)
    assert kind_of(pair) == "several files"
    (tmp_path / "id" / "images" / "a copy.png").unlink()
    [pair] = dsb2018_pairs(tmp_path)
    assert pair.read().labels.max() == 1


def test_one_file_per_cell_gives_ids_in_their_order(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        mask = np.zeros((8, 9), np.uint8)
        mask[2 * number : 2 * number + 2, 1:4] = 255
        paths.append(tmp_path / f"{number}.png")
        write_png(paths[-1], mask)
    labels = read_instances(paths, Counter())
    assert [labels[2 * number, 1] for number in range(3)] == [1, 2, 3]
    write_png(paths[1], np.zeros((8, 8), np.uint8))
    with pytest.raises(PairError, match="8 x 8"):
        read_instances(paths, Counter())


# COCO.


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 10_000), density=st.floats(0, 1))
def test_run_lengths_are_pycocotools(height: int, width: int, seed: int, density: float) -> None:
    oracle = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    mask = np.random.default_rng(seed).random((height, width)) < density
    encoded = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = uncompressed(encoded["counts"].decode("ascii"))
    np.testing.assert_array_equal(decode_run_lengths(counts, (height, width)), mask)


def test_long_run_lengths_are_pycocotools() -> None:
    oracle = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    mask = np.zeros((900, 1100), np.uint8)
    mask[100:800, 50:1000] = mask[5, 5] = 1
    mask[300:400, 300:310] = 0
    counts = uncompressed(oracle.encode(np.asfortranarray(mask))["counts"].decode("ascii"))
    np.testing.assert_array_equal(decode_run_lengths(counts, mask.shape), mask)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), vertices=st.integers(3, 40), radius=st.floats(6, 40))
def test_polygons_are_nearly_pycocotools(seed: int, vertices: int, radius: float) -> None:
    oracle = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    random = np.random.default_rng(seed)
    angles = np.sort(random.random(vertices)) * 2 * np.pi
    radii = radius * random.uniform(0.7, 1, vertices)
    polygon = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1) + random.uniform(20, 60, 2)
    (encoded,) = oracle.frPyObjects([polygon.ravel().tolist()], 80, 90)
    expected = decode_run_lengths(uncompressed(encoded["counts"].decode("ascii")), (80, 90))
    notes: Counter[str] = Counter()
    labels = draw([{"segmentation": [polygon.ravel().tolist()]}], (80, 90), notes) == 1
    # COCO's tool traces the outline at 5 times the resolution; ours asks each pixel's centre. They differ where that
    # centre lies on the outline: within 0.21 px of it in 3,001 polygons.
    outline = polygon.astype(np.float32)[:, None]
    for row, column in np.argwhere(labels != expected).tolist():
        assert abs(cv2.pointPolygonTest(outline, (column + 0.5, row + 0.5), True)) < 0.3


def test_a_polygon_contains_the_pixels_whose_centres_it_contains() -> None:
    notes: Counter[str] = Counter()
    square = [2, 3, 6, 3, 6, 5, 2, 5]  # x from 2 to 6, y from 3 to 5
    labels = draw([{"segmentation": [square]}], (8, 8), notes)
    assert sorted(map(tuple, np.argwhere(labels == 1))) == [(r, c) for r in (3, 4) for c in (2, 3, 4, 5)]


def test_polygons_are_clipped_to_the_image_and_several_are_one_cell() -> None:
    piece = polygons_piece([np.array([[-5, -5], [3, -5], [3, 3], [-5, 3]], float)], (10, 10))
    assert (piece.top, piece.left, piece.mask.shape, piece.mask.all()) == (0, 0, (3, 3), True)
    notes: Counter[str] = Counter()
    two = [[0, 0, 2, 0, 2, 2, 0, 2], [5, 5, 8, 5, 8, 8, 5, 8]]
    assert (draw([{"segmentation": two}], (10, 10), notes) == 1).sum() == 4 + 9
    outside = [[50, 50, 60, 50, 60, 60]]
    assert not draw([{"segmentation": outside}], (10, 10), notes).any()
    assert notes["cells without a pixel"] == 1


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        None,
        [[1, 2, 3]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, float("nan"), 6]],
        [["a", "b", "c", "d", "e", "f"]],
        {"size": [8, 8], "counts": [10]},
        {"size": [8, 8], "counts": [70, -6]},
        {"size": [8, 8], "counts": [10**30]},
        {"size": [8, 8], "counts": "\x7f"},
        {"size": [8, 8], "counts": "P"},
        {"size": [9, 8], "counts": [72]},
        {"counts": [64]},
    ],
)
def test_malformed_annotations_are_named(segmentation: Any) -> None:
    with pytest.raises(PairError) as caught:
        draw([{"id": 77, "segmentation": segmentation}], (8, 8), Counter())
    assert caught.value.kind in ("bad annotation", "sizes differ")


def livecell(folder: Path, *, annotations_as_object: bool = False) -> Path:
    """Lay out two cell types, as LIVECell does, with a polygon, both kinds of run lengths and a crowd region."""
    pixels = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    for name in ("A172/A172_Phase_1.tif", "SkBr3/SkBr3_Phase_1.tif"):
        path = folder / "images" / "livecell_train_val_images" / name
        path.parent.mkdir(parents=True)
        tifffile.imwrite(path, pixels, metadata=None, compression="lzw")
    images = [
        {"id": 1, "file_name": "A172_Phase_1.tif", "height": 20, "width": 30},
        {"id": 2, "file_name": "SkBr3_Phase_1.tif", "height": 20, "width": 30},
        {"id": 3, "file_name": "../../Missing_1.tif", "height": 20, "width": 30},
    ]
    rle = {"size": [20, 30], "counts": [40, 10, 550]}
    annotations = [
        {"id": 1, "image_id": 1, "iscrowd": 0, "segmentation": [[2, 2, 8, 2, 8, 8, 2, 8]]},
        {"id": 2, "image_id": 1, "iscrowd": 1, "segmentation": rle},
        {"id": 3, "image_id": 2, "iscrowd": 0, "segmentation": rle},
    ]
    content = {"images": images, "annotations": {str(a["id"]): a for a in annotations}}
    if not annotations_as_object:
        content["annotations"] = annotations
    path = folder / "annotations" / "LIVECell" / "livecell_coco_train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("annotations_as_object", [True, False])
def test_livecell_is_read_with_its_cell_type_folders(tmp_path: Path, annotations_as_object: bool) -> None:
    pairs = livecell_pairs(livecell(tmp_path, annotations_as_object=annotations_as_object), split="train")
    assert [pair.name for pair in pairs] == ["A172_Phase_1.tif", "SkBr3_Phase_1.tif", "../../Missing_1.tif"]
    found = contents(pairs[:2])
    assert (found["A172_Phase_1.tif"].labels == 1).sum() == 36
    assert found["A172_Phase_1.tif"].labels.max() == 1
    assert found["A172_Phase_1.tif"].notes["crowd regions skipped"] == 1
    np.testing.assert_array_equal(np.argwhere(found["SkBr3_Phase_1.tif"].labels)[:, 1], np.full(10, 2))
    assert kind_of(pairs[2]) == "no image"


def test_annotations_of_another_image_size_and_two_files_of_a_name_are_rejected(tmp_path: Path) -> None:
    folder = livecell(tmp_path)
    path = folder / "images" / "livecell_train_val_images" / "A172" / "A172_Phase_1.tif"
    tifffile.imwrite(path, np.zeros((20, 31), np.uint8), metadata=None)
    assert kind_of(livecell_pairs(folder, split="train")[0]) == "sizes differ"
    path.with_name("SkBr3_Phase_1.tif").write_bytes(path.read_bytes())
    assert kind_of(livecell_pairs(folder, split="train")[1]) == "several files"


def test_linked_folders_are_searched(tmp_path: Path) -> None:
    livecell(tmp_path / "data")
    (tmp_path / "input").mkdir()
    for name in ("images", "annotations"):
        (tmp_path / "input" / name).symlink_to(tmp_path / "data" / name)
    assert len(contents(livecell_pairs(tmp_path / "input", split="train")[:2])) == 2
    pattern = "images/*/{name}/{name}_Phase_1.tif"
    pairs = folder_pairs(tmp_path / "input", images=pattern, masks=pattern.replace("images", "masks"))
    assert [pair.name for pair in pairs] == ["A172", "SkBr3"]


def test_only_the_literal_folders_of_patterns_are_listed(tmp_path: Path) -> None:
    for name in ("a/images/x.png", "b/masks/x.png", "of others/x.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_png(tmp_path / name, np.eye(8, dtype=np.uint8))
    (tmp_path / "of others" / "x.png").rename(tmp_path / "of others" / os.fsdecode(b"\xff.png"))  # no Unicode
    [pair] = folder_pairs(tmp_path, images="a/images/{name}.png", masks="b/masks/{name}.png")
    assert pair.read().labels.max() == 1


def test_annotations_without_a_matching_image_id_are_an_error(tmp_path: Path) -> None:
    path = livecell(tmp_path) / "annotations" / "LIVECell" / "livecell_coco_train.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = str(image["id"])
    path.write_text(json.dumps(content))
    with pytest.raises(ImageError, match=r"train\.json: .* image_id 1 among '1', '2', '3'"):
        livecell_pairs(tmp_path, split="train")


def test_missing_and_invalid_annotation_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"livecell_coco_val\.json"):
        livecell_pairs(livecell(tmp_path / "a"), split="val")
    for content in ("<html>", "[]", '{"images": [{"id": 1}], "annotations": []}', '{"images": [{"file_name": "a"}]}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ImageError, match=r"x\.json"):
            livecell_pairs(tmp_path / "a", annotations=tmp_path / "x.json")
    with pytest.raises(ImageError, match="no such folder"):
        livecell_pairs(tmp_path / "nowhere")


# Folders.


def test_cellpose_pairs_are_matched_by_number(tmp_path: Path) -> None:
    labels = np.zeros((20, 30), np.uint16)
    labels[3:9, 4:9] = 300
    for number in range(2):
        (tmp_path / "train").mkdir(exist_ok=True)
        write_png(tmp_path / "train" / f"{number:03d}_img.png", RNG.integers(0, 256, (3, 20, 30), dtype=np.uint8))
        write_png(tmp_path / "train" / f"{number:03d}_masks.png", labels)
    write_png(tmp_path / "train" / "002_img.png", labels)
    for pairs in (cellpose_pairs(tmp_path, split="train"), cellpose_pairs(tmp_path / "train", split="train")):
        assert [pair.name for pair in pairs] == ["000", "001", "002"]
        np.testing.assert_array_equal(pairs[1].read().labels, labels)
        assert kind_of(pairs[2]) == "no mask"
    with pytest.raises(ImageError, match="no file matches"):
        cellpose_pairs(tmp_path)


def test_ctc_frames_are_matched_by_number_and_truth(tmp_path: Path) -> None:
    labels = np.zeros((9, 9), np.uint16)
    for sequence, truth, digits in (("01", "GT", 3), ("01", "ST", 3), ("02", "GT", 4)):
        for folder in (tmp_path / sequence, tmp_path / f"{sequence}_{truth}" / "SEG"):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(2 if truth == "GT" else 3):
            labels[2:5, 2:5] = number + (10 if truth == "ST" else 1)
            write_labels(tmp_path / f"{sequence}_{truth}" / "SEG" / f"man_seg{number:0{digits}d}.tif", labels)
            write_tiff(tmp_path / sequence / f"t{number:0{digits}d}.tif", labels)
    (tmp_path / "02" / "t0001.tif").unlink()
    write_labels(tmp_path / "01_GT" / "SEG" / "man_seg_000_003.tif", labels)
    gold = ctc_pairs(tmp_path)
    assert [pair.name for pair in gold] == ["01/000", "01/001", "02/0000", "02/0001"]
    assert gold[1].read().labels.max() == 2
    assert kind_of(gold[3]) == "no image"
    assert ctc_pairs(tmp_path, truth="silver")[2].read().labels.max() == 12
    assert [pair.name for pair in ctc_pairs(tmp_path, sequences=["02"])] == ["02/0000", "02/0001"]
    with pytest.raises(ImageError, match="_GT/SEG"):
        ctc_pairs(tmp_path / "01")


def test_patterns_match_names_with_umlauts_spaces_and_brackets_in_either_unicode_form(tmp_path: Path) -> None:
    name = "Größe 5 µm [B02] (1)"
    labels = np.zeros((9, 8), np.uint16)
    labels[2:5, 2:6] = 3
    for folder, spelling, suffix in (("imgs", "NFC", ".tif"), ("masks", "NFD", ".png")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / (unicodedata.normalize(spelling, name) + suffix)
        write_tiff(path, labels) if suffix == ".tif" else write_png(path, labels)
    (pair,) = folder_pairs(tmp_path, images="imgs/{name}.tif", masks="masks/{name}.png")
    assert pair.name == name
    np.testing.assert_array_equal(pair.read().labels, labels)


def test_patterns_may_have_several_fields_repeat_them_and_skip_parts(tmp_path: Path) -> None:
    labels = np.ones((4, 4), np.uint8)
    for plate in ("p1", "p2"):
        for site in "12":
            for folder, name in ((f"{plate}/images", f"{plate}_s{site}_w1ABC.png"), (f"{plate}/masks", f"s{site}.png")):
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                write_png(tmp_path / folder / name, labels)
    pairs = folder_pairs(tmp_path, images="{plate}/images/{plate}_s{site}_w1*.png", masks="{plate}/masks/s{site}.png")
    assert [pair.name for pair in pairs] == ["p1/1", "p1/2", "p2/1", "p2/2"]
    assert all(pair.read().labels.all() for pair in pairs)
    for images, masks in (("*.png", "*.png"), ("{a}.png", "{b}.png")):
        with pytest.raises(DinocellError, match="field"):
            folder_pairs(tmp_path, images=images, masks=masks)
    with pytest.raises(DinocellError, match="fields such as"):
        folder_pairs(tmp_path, images="{1a}.png", masks="{1a}.png")


def test_only_the_literal_start_of_patterns_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images on one disk and masks on another have only the root in common; and folders may be links to a disk."""
    one, other = tmp_path / "disk1" / "Bilder gro\u0308ße", tmp_path / "disk2"
    for folder in (one, other / "masks", other / "masks" / ".snapshot", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        write_png(folder / "a.png", np.ones((4, 4), np.uint8))
    (tmp_path / "disk1" / "masks").symlink_to(other / "masks")
    searched: list[Path] = []

    def listing(folder: Path, **how: Any) -> list[Listed]:
        searched.append(folder)
        return list_files(folder, **how)

    monkeypatch.setattr(labelled_sources, "list_files", listing)
    images = "disk1/Bilder größe/{name}.png"
    for masks in ("disk2/masks/{name}.png", "disk1/masks/{name}.png"):
        (pair,) = folder_pairs(tmp_path, images=images, masks=masks)
        assert pair.read().labels.all()
    assert searched == [one, other / "masks", one, tmp_path / "disk1" / "masks"]
    assert kind_of(folder_pairs(tmp_path, images=images, masks="disk3/masks/{name}.png")[0]) == "no mask"


def test_missing_and_duplicate_partners_are_reported(tmp_path: Path) -> None:
    for name in ("a_img", "b_mask", "c_img", "c_mask", "c2_mask"):
        write_png(tmp_path / f"{name}.png", np.ones((4, 4), np.uint8))
    pairs = {pair.name: pair for pair in folder_pairs(tmp_path, images="{name}_img.png", masks="{name}_mask.png")}
    assert (kind_of(pairs["a"]), kind_of(pairs["b"])) == ("no mask", "no image")
    write_png(tmp_path / "c_img.bmp.png", np.ones((4, 4), np.uint8))
    pairs = {pair.name: pair for pair in folder_pairs(tmp_path, images="{name}_img*.png", masks="{name}_mask.png")}
    assert kind_of(pairs["c"]) == "several files"


# The command.


def run(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    dataset_command.register(parser.add_subparsers(required=True))
    options = parser.parse_args(["dataset", *map(str, arguments)])
    options.run(options)


def test_the_command_builds_a_set_and_prints_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = livecell(tmp_path / "LIVECell [2021]")
    output = tmp_path / "train"
    run("livecell", "--input", folder, "--output", output, "--split", "train")
    shown = " ".join(capsys.readouterr().out.split())
    for fragment in ("images 2", "cells 2", "2 of 20 x 30", "1 crowd regions skipped", "skipped 1", "1 x no image"):
        assert fragment in shown
    assert "NC" in open_labelled(output).description["licence"]
    with pytest.raises(DinocellError, match="--overwrite"):
        run("livecell", "--input", folder, "--output", output, "--split", "train")
    with pytest.raises(DinocellError, match="Missing_1"):
        run("livecell", "--input", folder, "--output", output, "--split", "train", "--overwrite", "--strict")
    assert len(open_labelled(output)) == 2


def test_advice_names_the_options_of_this_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.kron(np.arange(6, dtype=np.uint16).reshape(2, 3), np.ones((9, 9), np.uint16))
    for number, planes in enumerate((labels[None], np.stack([labels, labels[::-1]]))):
        write_tiff(tmp_path / f"{number}.tif", planes)
        write_labels(tmp_path / f"{number}_mask.png", labels * number)
    line = ["folder", "--input", tmp_path, "--images", "{name}.tif", "--masks", "{name}_mask.png"]
    with pytest.raises(DinocellError, match=r"1 x no cells, 1 x several channels.*--keep-empty"):
        run(*line, "--output", tmp_path / "set")
    run(*line, "--output", tmp_path / "set", "--keep-empty")
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 x several channels, such as 1: 2 channels" in shown
    assert "(--channel" in shown


def test_every_kind_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ([], ["livecell"], ["cellpose"], ["ctc"], ["dsb2018"], ["folder"]):
        with pytest.raises(SystemExit, match="0"):
            run(*kind, "--help")
        assert f"example:\n  dinocell dataset {' '.join(kind)}" in capsys.readouterr().out


# The real sets.


def assert_same(output: Path, pairs: list[Pair]) -> None:
    found = {image.name: image for image in open_labelled(output)}
    assert len(found) == len(pairs)
    for name, content in contents(pairs).items():
        np.testing.assert_array_equal(found[name].labels, content.labels)
        if content.image.pixels.dtype == np.uint8:
            np.testing.assert_array_equal(found[name].pixels[: len(content.image.pixels)], content.image.pixels)


@needs_data
def test_the_real_dsb2018_comes_back_with_its_2255_nuclei(tmp_path: Path) -> None:
    pairs = dsb2018_pairs(DATA / "dsb2018_stage1_train")
    report = build_labelled(pairs, tmp_path / "set", strict=True)
    assert (report.num_images, report.num_cells, len(report.sizes)) == (60, 2255, 9)
    assert report.notes == {}
    assert_same(tmp_path / "set", pairs)


@needs_data
def test_the_real_bbbc039_comes_back_with_its_1331_nuclei_by_the_red_plane(tmp_path: Path) -> None:
    pairs = folder_pairs(DATA / "bbbc039", images="images/{name}.tif", masks="masks/{name}.png", encoding="regions")
    report = build_labelled(pairs, tmp_path / "set")
    assert (report.num_images, report.num_cells) == (11, 1331)
    assert [(skip.kind, skip.name[:11]) for skip in report.skipped] == [("no cells", "IXMtest_L10")]
    assert open_labelled(tmp_path / "set").description["pixel_size_um"] == pytest.approx(0.645)
    for image in open_labelled(tmp_path / "set"):
        red = read_image(DATA / "bbbc039" / "masks" / f"{image.name}.png").pixels[0]
        np.testing.assert_array_equal(image.labels > 0, red > 0)
    assert build_labelled(pairs, tmp_path / "all", keep_empty=True).num_images == 12


@needs_data
@pytest.mark.parametrize(
    ("source", "images", "masks", "num_images", "num_cells"),
    [
        ("usiigaci_t98g", "{name}/raw.tif", "{name}/instances_ids.png", 6, 348),
        ("stardist_2d", "{name}/img2d.tif", "{name}/mask2d.tif", 2, 190),
    ],
)
def test_the_real_label_images_come_back(
    tmp_path: Path, source: str, images: str, masks: str, num_images: int, num_cells: int
) -> None:
    pairs = folder_pairs(DATA / source, images=images, masks=masks)
    report = build_labelled(pairs, tmp_path / "set", strict=True)
    assert (report.num_images, report.num_cells) == (num_images, num_cells)
    assert_same(tmp_path / "set", pairs)


@needs_data
def test_the_real_coco_polygons_come_back_and_are_nearly_pycocotools(tmp_path: Path) -> None:
    oracle = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    folder = DATA / "coco_polygons_nanoshapes"
    pairs = livecell_pairs(folder)
    report = build_labelled(pairs, tmp_path / "set", strict=True)
    assert (report.num_images, report.num_cells) == (4, 230)
    assert_same(tmp_path / "set", pairs)
    overlaps = []
    for annotation in json.loads((folder / "_annotations.coco.json").read_text())["annotations"]:
        encoded = oracle.merge(oracle.frPyObjects(annotation["segmentation"], 416, 416))
        expected = decode_run_lengths(uncompressed(encoded["counts"].decode("ascii")), (416, 416))
        ours = draw([annotation], (416, 416), Counter()) == 1
        overlaps.append((ours & expected).sum() / (ours | expected).sum())
    assert np.mean(overlaps) > 0.98
    assert min(overlaps) > 0.95


@needs_data
def test_the_real_ctc_masks_without_raw_images_are_each_reported(tmp_path: Path) -> None:
    pairs = ctc_pairs(DATA / "ctc_layout_ipsc")
    assert len(pairs) == 41
    assert {kind_of(pair) for pair in pairs} == {"no image"}
    with pytest.raises(ImageError, match="41 x no image"):
        build_labelled(pairs, tmp_path / "set")


@needs_data
def test_real_semantic_masks_are_rejected_as_labels() -> None:
    masks = sorted((DATA / "nf1_schwann_cell_painting" / "Plate_2_masks").glob("*MaskNuclei.tiff"))
    with pytest.raises(PairError, match="regions"):
        read_labels(masks[0])
    assert [int(read_regions(path).max()) for path in masks] == [28, 27, 29]
