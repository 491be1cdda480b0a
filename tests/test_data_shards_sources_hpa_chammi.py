"""HPAone, HPA-FoV and CHAMMI, in folders with the real file and column names; fields of the atlas by file name."""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinocell.data_shards.sources.field import Field, read_field
from dinocell.data_shards.sources.hpa_chammi import ChammiSource, HpaFovSource, HpaOneSource, HpaSource
from dinocell.data_shards.sources.table import read_table, row_labels
from dinocell.errors import ImageError
from dinocell.images.write import write_png, write_tiff
from helpers.real_data import DATA, needs_data
from helpers.sources import error_of, fields, listed

RNG = np.random.default_rng(0)
HPA = ("microtubules", "protein", "nucleus", "er")


def write_table(path: Path, columns: Sequence[str], *rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_side_by_side(path: Path, num_channels: int, side: int = 6) -> np.ndarray:
    pixels = RNG.integers(0, 255, (num_channels, side, side)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = np.concatenate(list(pixels), axis=1)
    write_png(path, wide) if path.suffix == ".png" else write_tiff(path, wide)
    return pixels


# HPAone.


@pytest.fixture
def hpa_one(tmp_path: Path) -> Path:
    varied, fixed = "varied_size_masked_single_cells", "fixed_size_masked_single_cells"
    table = f"{varied}_pretrain_20240507.csv"
    write_table(tmp_path / table, ("", "img_path"), (0, "a/800_A6_1_cell 1.png"), (1, "größe.png"))
    columns = ("", "file", "actin filaments,focal adhesion sites", "cytosol", "A-431", "U-2 OS", "plate_position")
    rows = [
        (0, "/old/place/800_A6_1_3.png", True, False, False, True, 7),
        (1, "x/b.png", False, False, True, False, ""),
    ]
    write_table(tmp_path / f"{fixed}_pretrain_20240507.csv", columns, *rows)
    write_table(tmp_path / f"{fixed}_evaluation_20240507.csv", columns, rows[1])
    return tmp_path


def test_hpaone_cells_for_pretraining(hpa_one: Path) -> None:
    folder = "varied_size_masked_single_cells_HPA"
    pixels = [write_side_by_side(hpa_one / folder / name, 4) for name in ("a/800_A6_1_cell 1.png", "größe.png")]
    found = fields(HpaOneSource(input=str(hpa_one), pixel_size_um=0.08))
    assert [field.id for field in found] == [f"{folder}/a/800_A6_1_cell 1.png", f"{folder}/größe.png"]
    for field, expected in zip(found, pixels, strict=True):
        picture = read_field(field)
        assert (picture.channel_names, picture.pixel_size_um) == (HPA, 0.08)
        np.testing.assert_array_equal(picture.pixels, expected)
        assert field.labels == {}


def test_hpaone_cells_with_labels(hpa_one: Path) -> None:
    pixels = write_side_by_side(hpa_one / "fixed_size_masked_single_cells_HPA" / "800_A6_1_3.png", 4)
    first, second = fields(HpaOneSource(input=str(hpa_one), split="TRAIN"))
    np.testing.assert_array_equal(read_field(first).pixels, pixels)
    assert first.labels == {
        "actin filaments,focal adhesion sites": True,
        "cytosol": False,
        "A-431": False,
        "U-2 OS": True,
        "plate_position": 7,
    }
    assert second.labels == {
        "actin filaments,focal adhesion sites": False,
        "cytosol": False,
        "A-431": True,
        "U-2 OS": False,
    }
    (evaluated,) = fields(HpaOneSource(input=str(hpa_one), split="val"))
    assert evaluated.id == "fixed_size_masked_single_cells_HPA/b.png"


def test_hpaone_errors_name_what_is_missing(hpa_one: Path) -> None:
    assert "expected one of all, train, val" in error_of(HpaOneSource(input=str(hpa_one), split="test"))
    message = error_of(HpaOneSource(input=str(hpa_one), path_column="image"))
    assert "no column image; it has img_path" in message
    (hpa_one / "varied_size_masked_single_cells_pretrain_20240507.csv").unlink()
    assert "varied_size_masked_single_cells_pretrain_20240507.csv: no such file" in error_of(
        HpaOneSource(input=str(hpa_one))
    )


def test_tables_may_be_elsewhere_or_the_input(hpa_one: Path, tmp_path: Path) -> None:
    table = tmp_path / "tables" / "mine.csv.gz"
    table.parent.mkdir()
    table.write_bytes(gzip.compress(b"picture\nc.png\n"))
    (field,) = fields(HpaOneSource(input=str(hpa_one), table=(str(table),), path_column="picture"))
    assert field.files[0].path == str(hpa_one / "varied_size_masked_single_cells_HPA" / "c.png")
    (hpa_one / "mine.csv").write_text("img_path\nd.png\n")
    (field,) = fields(HpaOneSource(input=str(hpa_one / "mine.csv")))
    assert field.files[0].path == str(hpa_one / "varied_size_masked_single_cells_HPA" / "d.png")
    assert "is a table" in error_of(HpaOneSource(input=str(hpa_one / "mine.csv"), table=(str(table),)))


def test_rows_that_give_no_field_are_rejected_one_by_one(tmp_path: Path) -> None:
    rows = [("a.png",), ("../../secret.png",), ("",), ("./a.png",), ("b\\c.png",)]
    write_table(tmp_path / "t.csv", ("img_path",), *rows)
    # csv writes the empty row as "": it stays a row.
    found, rejected = listed(HpaOneSource(input=str(tmp_path), table=(str(tmp_path / "t.csv"),)))
    folder = "varied_size_masked_single_cells_HPA"
    assert [field.id for field in found] == [f"{folder}/a.png", f"{folder}/b/c.png"]
    assert [(item.input, item.kind) for item in rejected] == [
        ("t.csv:3", "unmatched"),
        ("t.csv:4", "unmatched"),
        ("t.csv:5", "listed twice"),
    ]
    assert "../../secret.png" in rejected[0].reason
    assert "no file name in img_path" in rejected[1].reason


# HPA-FoV.


@pytest.fixture
def hpa_fov(tmp_path: Path) -> Path:
    write_table(tmp_path / "whole_images_names.csv", ("ID",), ("1_800_A6_2",), ("0a1b",), ("gone",))
    columns = ("file", "ID", "cell_type", "nucleoplasm", "rods & rings")
    rows = [("/data/x/1_800_A6_2.png", "1_800_A6_2", "U-2 OS", True, False), ("0a1b.png", "0a1b", "", False, False)]
    write_table(tmp_path / "whole_images_512_train.csv", columns, *rows)
    write_table(tmp_path / "whole_images_512_test.csv", columns, rows[1])
    return tmp_path


def test_hpafov_images_for_pretraining(hpa_fov: Path) -> None:
    pixels = [write_side_by_side(hpa_fov / "normalized_data" / f"{name}.png", 4) for name in ("1_800_A6_2", "0a1b")]
    found, rejected = listed(HpaFovSource(input=str(hpa_fov)))
    assert [field.id for field in found] == ["normalized_data/1_800_A6_2.png", "normalized_data/0a1b.png"]
    assert [(field.plate, field.well, field.site) for field in found] == [("800", "A6", "2"), (None, None, None)]
    for field, expected in zip(found, pixels, strict=True):
        np.testing.assert_array_equal(read_field(field).pixels, expected)
        assert read_field(field).channel_names == HPA
    assert [(item.input, item.kind) for item in rejected] == [("whole_images_names.csv:4", "missing file")]


def test_hpafov_images_with_labels_may_be_tiff(hpa_fov: Path) -> None:
    pixels = write_side_by_side(hpa_fov / "512_whole_images" / "1_800_A6_2.tiff", 4)
    write_side_by_side(hpa_fov / "512_whole_images" / "0a1b.png", 4)
    first, second = fields(HpaFovSource(input=str(hpa_fov), split="train"))
    assert first.id == "512_whole_images/1_800_A6_2.tiff"
    np.testing.assert_array_equal(read_field(first).pixels, pixels)
    assert first.labels == {"ID": "1_800_A6_2", "cell_type": "U-2 OS", "nucleoplasm": True, "rods & rings": False}
    assert second.labels == {"ID": "0a1b", "nucleoplasm": False, "rods & rings": False}
    (test_image,) = fields(HpaFovSource(input=str(hpa_fov), split="VAL"))
    assert test_image.id == "512_whole_images/0a1b.png"


def test_hpafov_without_the_folder_of_images_is_an_error(hpa_fov: Path) -> None:
    assert "normalized_data: no such folder" in error_of(HpaFovSource(input=str(hpa_fov)))


# CHAMMI.


@pytest.fixture
def chammi(tmp_path: Path) -> Path:
    columns = ("", "file_path", "train_test_split", "label", "Plate", "Well", "FOVId")
    rows = [
        (0, "Allen/crops/a 1.ome.tiff", "Train", "M0", "", "", 12),
        (1, "HPA/crops/b.png", "Train", "golgi apparatus", "", "", ""),
        (2, "CP/crops/c.png", "Task_one", "BRD-A29260609", "BR00117010", "A01", ""),
        (3, "Elsewhere/d.png", "Train", "x", "", "", ""),
    ]
    write_table(tmp_path / "morphem70k_v2.csv", columns, *rows)
    for number, subset in enumerate(("Allen", "HPA", "CP")):
        write_table(tmp_path / subset / "enriched_meta.csv", columns, rows[number])
    return tmp_path


def test_chammi_images_have_the_channels_of_their_subset(chammi: Path) -> None:
    pixels = [
        write_side_by_side(chammi / name, count)
        for name, count in (("Allen/crops/a 1.ome.tiff", 3), ("HPA/crops/b.png", 4), ("CP/crops/c.png", 5))
    ]
    found, rejected = listed(ChammiSource(input=str(chammi)))
    assert [field.id for field in found] == ["Allen/crops/a 1.ome.tiff", "HPA/crops/b.png", "CP/crops/c.png"]
    names = [("nucleus", "membrane", "protein"), HPA, ("nucleus", "er", "rna", "agp", "mito")]
    for field, expected, channels in zip(found, pixels, names, strict=True):
        picture = read_field(field)
        assert picture.channel_names == channels
        np.testing.assert_array_equal(picture.pixels, expected)
    assert found[0].labels == {"train_test_split": "Train", "label": "M0", "FOVId": 12, "subset": "Allen"}
    assert (found[2].plate, found[2].well) == ("BR00117010", "A01")
    assert "Plate" not in found[2].labels
    assert [(item.input, item.kind) for item in rejected] == [("morphem70k_v2.csv:5", "unmatched")]


def test_chammi_subsets_and_splits_are_chosen(chammi: Path) -> None:
    assert [field.id[:2] for field in listed(ChammiSource(input=str(chammi), split="TRAIN"))[0]] == ["Al", "HP"]
    assert [f.id[:2] for f in listed(ChammiSource(input=str(chammi), subset=("cp", "HPA")))[0]] == ["HP", "CP"]
    assert "splits found: Task_one, Train" in error_of(ChammiSource(input=str(chammi), split="Task_nine"))
    assert "no image of split Task_one in HPA" in error_of(
        ChammiSource(input=str(chammi), split="Task_one", subset=("HPA",))
    )
    assert "expected some of Allen, HPA, CP" in error_of(ChammiSource(input=str(chammi), subset=("WTC",)))
    assert "no column path; it has file_path" in error_of(ChammiSource(input=str(chammi), path_column="path"))


def test_chammi_tables_of_the_subsets_are_used(chammi: Path) -> None:
    whole = [field.id for field in listed(ChammiSource(input=str(chammi)))[0]]
    (chammi / "morphem70k_v2.csv").unlink()
    assert [field.id for field in fields(ChammiSource(input=str(chammi)))] == whole
    assert [field.id for field in fields(ChammiSource(input=str(chammi), subset=("CP",)))] == whole[2:]
    (chammi / "CP" / "enriched_meta.csv").unlink()
    assert "CP/enriched_meta.csv: no such file" in error_of(ChammiSource(input=str(chammi)))


# Tables.


def test_tables_are_utf8_with_or_without_bom_and_may_have_tabs(tmp_path: Path) -> None:
    for name, separator in (("a.csv", ","), ("a.tsv", "\t"), ("a.txt.gz", "\t")):
        text = f'größe{separator}b\r\n"1{separator} 2"{separator}é\r\n\r\nx{separator}"two\nlines"\r\n'
        content = ("\ufeff" + text).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        table = read_table(str(tmp_path / name))
        assert table.columns == ("größe", "b")
        assert list(table.rows()) == [
            (2, {"größe": f"1{separator} 2", "b": "é"}),
            (5, {"größe": "x", "b": "two\nlines"}),
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty table"),
        (b"\xff\xfea\x00", "UTF-8"),
        (b"a,b\n1,2\n3\n", "line 3: 1 cells, but the header has 2"),
        (b"a,b\n1,2,3\n", "line 2: 3 cells"),
        (b"a,b,a\n1,2,3\n", "duplicate column names: a"),
        (gzip.compress(b"a,b\n1,2\n" * 100, mtime=0)[:-20], "gzip"),
        (b'a,b\n1,2\n3,"4\n5,6\n', "line 4: unexpected end of data; the table is cut short, or a quote"),
        (b'a,b\n1,"2\n' + b"3,4\n" * 40_000, "field larger than field limit"),
        (b"\xef\xbb\xbfFileName_DNA;Well\r\na.tif;A1\r\n", "save it as CSV, with commas"),
        (b"a\tb\n1\t2\n", "separated by"),
    ],
)
def test_damaged_tables_are_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        list(read_table(str(tmp_path / "t.csv")).rows())
    assert "t.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cells_become_labels_without_loss() -> None:
    row = {"a": "True", "b": "False", "c": "7", "d": "007", "e": "0.50", "f": "12E3", "g": " ", "h": "1" * 25, "": "3"}
    row |= {"i": "-3", "Unnamed: 0": "9", "j": "true", "k": "nan", "l": "1.5e-3", "m": "1.5e999"}
    assert row_labels(row, without={"j"}) == {
        "a": True,
        "b": False,
        "c": 7,
        "d": "007",
        "e": 0.5,
        "f": "12E3",
        "h": "1" * 25,
        "i": -3,
        "k": "nan",
        "l": 0.0015,
        "m": "1.5e999",
    }
    assert row_labels({"Metadata_Dose": "1", "Other": "2"}, prefix="Metadata_") == {"Dose": 1}


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.text())
def test_every_label_reads_back_as_its_cell(value: int | float | bool | str) -> None:
    cell = str(value)
    label = row_labels({"a": cell}).get("a")
    if not cell.strip():
        assert label is None
    elif isinstance(label, float):
        assert label == float(cell)
    else:
        assert str(label) == cell.strip()


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def channels_of(field: Field) -> list[str]:
    return [name for file in field.files for name in file.channels]


@needs_data
def test_hpa_gives_the_real_field_pixel_by_pixel() -> None:
    folder = DATA / "hpa_4channel"
    (field,) = fields(HpaSource(input=str(folder)))
    assert (field.id, field.plate, field.well, field.site) == ("800_A6_1", "800", "A6", "1")
    picture = read_field(field)
    assert picture.channel_names == ("microtubules", "protein", "nucleus", "er")
    planes = {"red": 0, "green": 1, "blue": 2, "yellow": 0}
    for pixels, (colour, plane) in zip(picture.pixels, planes.items(), strict=True):
        with Image.open(folder / f"800_A6_1_{colour}.jpg") as image:
            np.testing.assert_array_equal(pixels, np.asarray(image)[..., plane])


def test_hpa_files_may_be_grey_png_or_tiff_in_any_folder(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 60000, (4, 6, 8)).astype(np.uint16)
    folder = tmp_path / "größe" / "a b"
    folder.mkdir(parents=True)
    for colour, plane in zip(("red", "green", "blue"), pixels, strict=False):
        write_png(folder / f"00070df0-bbc3-11e8_{colour}.png", plane)
    write_tiff(folder / "00070df0-bbc3-11e8_yellow.tif", pixels[3])
    (field,) = fields(HpaSource(input=str(tmp_path)))
    assert (field.id, field.plate) == ("größe/a b/00070df0-bbc3-11e8", None)
    np.testing.assert_array_equal(read_field(field).pixels, pixels)


def test_hpa_fields_with_fewer_channels_and_other_files(tmp_path: Path) -> None:
    touch(tmp_path, "1_A1_2_red.jpg", "1_A1_2_green.jpg", "1_A1_3_green.jpg", "x/1_A1_4_blue_red_green.jpg", "a.csv")
    found, rejected = listed(HpaSource(input=str(tmp_path), channels=("protein=target", "microtubules")))
    assert [(field.id, channels_of(field), field.missing, field.site) for field in found] == [
        ("1_A1_2", ["target", "microtubules"], (), "2"),
        ("1_A1_3", ["target"], ("microtubules",), "3"),
        ("x/1_A1_4_blue_red", ["target"], ("microtubules",), None),
    ]
    assert [(item.input, item.kind) for item in rejected] == [("a.csv", "unmatched")]
    message = error_of(HpaSource(input=str(tmp_path), channels=("DNA",)))
    assert "DNA" in message
    assert "microtubules, protein" in message
    touch(tmp_path, "1_A1_2_red.png")
    assert "1_A1_2_red.jpg and" in error_of(HpaSource(input=str(tmp_path)))


def test_hpa_folder_without_such_files_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "a_purple.png", "_red.png")
    message = error_of(HpaSource(input=str(tmp_path)))
    assert str(tmp_path) in message
    assert "<id>_red.jpg" in message
