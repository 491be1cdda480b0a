"""CellProfiler's load_data.csv: columns as the JUMP pipelines write them, folders of other machines found again."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell.data_shards.sources import load_data as sources_load_data
from dinocell.data_shards.sources.field import Field, Rejected, Source, read_field
from dinocell.data_shards.sources.load_data import LoadDataSource
from dinocell.errors import ImageError
from dinocell.images.write import write_tiff
from helpers.real_data import DATA, needs_data

PLACES = ("Metadata_Plate", "Metadata_Well", "Metadata_Site")
DNA = ("FileName_OrigDNA", "PathName_OrigDNA")
ER = ("FileName_OrigER", "PathName_OrigER")


def listed(source: Source) -> tuple[list[Field], list[Rejected]]:
    items = list(source.fields())
    return [item for item in items if isinstance(item, Field)], [item for item in items if isinstance(item, Rejected)]


def fields(source: Source) -> list[Field]:
    found, rejected = listed(source)
    assert rejected == []
    return found


def error_of(source: Source) -> str:
    with pytest.raises(ImageError) as caught:
        list(source.fields())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(path: Path, columns: Sequence[str], *rows: Sequence[object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def paths(field: Field) -> list[str]:
    return [file.path for file in field.files]


@needs_data
def test_the_real_jump_field_comes_pixel_by_pixel_from_its_table(tmp_path: Path) -> None:
    folder = DATA / "jump_cell_painting"
    stains = {"ER": 1, "RNA": 2, "Mito": 3, "DNA": 4, "AGP": 5, "Brightfield": 6}
    columns = ["Metadata_Source", "Metadata_Batch", *PLACES]
    row: list[object] = ["source_4", "2020_11_04_CPJUMP1", "BR00117010", "A02", 1]
    for stain, number in stains.items():
        columns += [
            f"FileName_Orig{stain}",
            f"PathName_Orig{stain}",
            f"FileName_Illum{stain}",
            f"PathName_Illum{stain}",
        ]
        row += [f"r01c02f01p01-ch{number}sk1fk1fl1.tiff", "/home/ubuntu/bucket/projects/jump_cell_painting/"]
        row += [f"BR00117010_Illum{stain}.npy", "/home/ubuntu/bucket/projects/illum"]
    source = LoadDataSource(input=str(DATA), table=(table(tmp_path / "load_data_with_illum.csv", columns, row),))
    (field,) = fields(source)
    assert (field.id, field.plate, field.well, field.site) == ("BR00117010/A02/1", "BR00117010", "A02", "1")
    assert field.labels == {"Source": "source_4", "Batch": "2020_11_04_CPJUMP1"}
    picture = read_field(field)
    assert picture.channel_names == tuple(stains)
    for plane, number in zip(picture.pixels, stains.values(), strict=True):
        np.testing.assert_array_equal(plane, tifffile.imread(folder / f"r01c02f01p01-ch{number}sk1fk1fl1.tiff"))


def test_folders_that_exist_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "elsewhere").mkdir(parents=True)
    table(tmp_path / "in" / "load_data.csv", (*PLACES, *DNA), ("P", "A01", 1, "a.tif", f"{tmp_path}/elsewhere/"))
    (field,) = fields(LoadDataSource(input=str(tmp_path / "in")))
    assert paths(field) == [str(tmp_path / "elsewhere" / "a.tif")]


@pytest.mark.parametrize(
    ("folder", "existing", "expected"),
    [
        ("/home/ubuntu/bucket/P1/Images", ("P1/Images", "Images"), "P1/Images"),
        ("/home/ubuntu/bucket/P1/Images/", ("Images",), "Images"),
        ("/home/ubuntu/bucket/P1/Images", ("bucket/P1/Images", "P1/Images"), "bucket/P1/Images"),
        ("D:\\screens\\P1\\Images", ("P1/Images",), "P1/Images"),
        ("P1/Images", ("P1/Images",), "P1/Images"),
        ("./P1//Images", ("P1/Images",), "P1/Images"),
        ("/nowhere/größe 1", ("größe 1",), "größe 1"),
        ("/nowhere/at/all", (), ""),
        ("", (), ""),
    ],
)
def test_folders_of_another_machine_are_found_by_their_longest_end(
    tmp_path: Path, folder: str, existing: Sequence[str], expected: str
) -> None:
    for name in existing:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a.tif").touch()
    table(tmp_path / "load_data.csv", (*PLACES, *DNA), ("P", "A01", 1, "a.tif", folder))
    (field,) = fields(LoadDataSource(input=str(tmp_path)))
    assert paths(field) == [str(tmp_path / expected / "a.tif")]


def test_ends_that_would_lead_upwards_are_not_tried(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").mkdir()
    path = table(tmp_path / "in" / "load_data.csv", (*PLACES, *DNA), ("P", "A01", 1, "a.tif", "x/../../secret"))
    message = error_of(LoadDataSource(input=path))
    assert "no row has its files" in message


def test_folders_are_looked_for_once_not_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "P1").mkdir()
    rows = [("P1", f"A{number:02d}", 1, f"{number}.tif", "/far/away/P1") for number in range(50)]
    table(tmp_path / "load_data.csv", (*PLACES, *DNA), *rows)
    asked: list[str] = []
    exists = sources_load_data.folder_exists

    def counting(address: str) -> bool:
        asked.append(address)
        return exists(address)

    monkeypatch.setattr(sources_load_data, "folder_exists", counting)
    assert len(fields(LoadDataSource(input=str(tmp_path)))) == 50
    assert [
        Path(address).relative_to(tmp_path).as_posix() if address != "/far/away/P1" else address for address in asked
    ] == [
        "/far/away/P1",
        "far/away/P1",
        "away/P1",
        "P1",
    ]


def test_rows_whose_folder_is_nowhere_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "P1").mkdir()
    rows = [("P1", "A01", 1, "a.tif", "/x/P1"), ("P2", "A01", 1, "b.tif", "/x/P2")]
    path = table(tmp_path / "load_data.csv", (*PLACES, *DNA), *rows)
    found, rejected = listed(LoadDataSource(input=str(tmp_path)))
    assert [field.id for field in found] == ["P1/A01/1"]
    assert [(item.input, item.kind) for item in rejected] == [("load_data.csv:3", "missing folder")]
    assert "/x/P2" in rejected[0].reason
    (tmp_path / "P1").rmdir()
    message = error_of(LoadDataSource(input=path))
    assert "/x/P1 is not below" in message


def test_one_missing_file_beside_its_table_costs_no_other_row(tmp_path: Path) -> None:
    (tmp_path / "b.tif").touch()
    table(tmp_path / "load_data.csv", ("FileName_OrigDNA",), ("a.tif",), ("b.tif",))
    found = fields(LoadDataSource(input=str(tmp_path)))
    assert [field.files[0].path for field in found] == [str(tmp_path / "a.tif"), str(tmp_path / "b.tif")]


def test_two_plates_that_would_share_files_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    rows = [("P1", "A01", 1, "a.tif", "/x/P1/Images"), ("P2", "A01", 1, "a.tif", "/x/P2/Images")]
    table(tmp_path / "load_data.csv", (*PLACES, *DNA), *rows)
    message = error_of(LoadDataSource(input=str(tmp_path)))
    assert "P1/A01/1" in message
    assert "P2/A01/1" in message
    assert "--input" in message


def test_two_rows_for_one_field_are_an_error_unless_other_columns_tell_them_apart(tmp_path: Path) -> None:
    columns = (*PLACES, "Metadata_ZPlane", *DNA)
    rows = [("P1", "A01", 1, 0, "a.tif", ""), ("P1", "A01", 1, 1, "b.tif", "")]
    (tmp_path / "a.tif").touch()
    table(tmp_path / "load_data.csv", columns, *rows)
    message = error_of(LoadDataSource(input=str(tmp_path)))
    assert "a.tif and" in message
    assert "b.tif" in message
    for names in (("Plate", "Well", "Site", "ZPlane"), ("Metadata_Plate", "Metadata_Well", "site", "Metadata_ZPlane")):
        found = fields(LoadDataSource(input=str(tmp_path), id_columns=names))
        assert [field.id for field in found] == ["P1/A01/1/0", "P1/A01/1/1"]
        assert found[1].labels == {"ZPlane": 1}
    assert "no column Depth" in error_of(LoadDataSource(input=str(tmp_path), id_columns=("Plate", "Depth")))


def test_missing_channels_are_recorded_or_rejected(tmp_path: Path) -> None:
    rows = [
        ("P1", "A01", 1, "a.tif", "", "b.tif", ""),
        ("P1", "A01", 2, "c.tif", "", "", ""),
        ("P1", "A02", 1, "", "", "", ""),
    ]
    (tmp_path / "a.tif").touch()
    (tmp_path / "b.tif").touch()
    table(tmp_path / "load_data.csv", (*PLACES, *ER, *DNA), *rows)
    found, rejected = listed(LoadDataSource(input=str(tmp_path)))
    assert [(field.id, [file.channels for file in field.files], field.missing) for field in found] == [
        ("P1/A01/1", [("ER",), ("DNA",)], ()),
        ("P1/A01/2", [("ER",)], ("DNA",)),
    ]
    assert [(item.input, item.kind) for item in rejected] == [("load_data.csv:4", "missing channel")]
    found, rejected = listed(LoadDataSource(input=str(tmp_path), missing="reject"))
    assert [field.id for field in found] == ["P1/A01/1"]
    assert {item.kind for item in rejected} == {"missing channel"}
    found, _ = listed(LoadDataSource(input=str(tmp_path), channels=("DNA=nucleus",)))
    assert [[file.channels for file in field.files] for field in found] == [[("nucleus",)]]


def test_tables_without_orig_take_all_but_illumination(tmp_path: Path) -> None:
    (tmp_path / "a.tif").touch()
    columns = ("Metadata_Well", "FileName_DAPI", "FileName_IllumDAPI", "Metadata_Dose")
    table(tmp_path / "load_data.csv", columns, ("A01", "a.tif", "i.npy", 0.5))
    (field,) = fields(LoadDataSource(input=str(tmp_path)))
    assert (field.id, field.well, field.labels) == ("a.tif", "A01", {"Dose": 0.5})
    assert [file.channels for file in field.files] == [("DAPI",)]
    table(tmp_path / "load_data.csv", ("Metadata_Well", "Image_DAPI"), ("A01", "a.tif"))
    message = error_of(LoadDataSource(input=str(tmp_path)))
    assert "no column FileName_Orig... or URL_Orig...; it has Metadata_Well, Image_DAPI" in message


def test_frames_of_a_stack_are_chosen_by_the_table(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 60000, (3, 5, 7)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", pixels, photometric="minisblack", metadata=None)
    columns = (*PLACES, "FileName_OrigDNA", "Frame_OrigDNA", "FileName_OrigER", "Frame_OrigER", "Series_OrigER")
    rows = [("P", "A01", 1, "stack.tif", 2, "stack.tif", 0, 0), ("P", "A01", 2, "stack.tif", 1, "", "", "")]
    rows += [("P", "A01", 3, "stack.tif", "x", "", "", ""), ("P", "A01", 4, "", "", "stack.tif", 0, 3)]
    table(tmp_path / "load_data.csv", columns, *rows)
    found, rejected = listed(LoadDataSource(input=str(tmp_path)))
    np.testing.assert_array_equal(read_field(found[0]).pixels, pixels[[2, 0]])
    np.testing.assert_array_equal(read_field(found[1]).pixels, pixels[[1]])
    assert [item.reason.split(";")[0] for item in rejected] == [
        "Frame_OrigDNA is 'x'",
        "Series_OrigER is 3",
    ]


def test_urls_may_be_files_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / "P 1").mkdir()
    write_tiff(tmp_path / "P 1" / "ä.tif", np.full((3, 3), 7, np.uint8))
    columns = (*PLACES, "URL_OrigDNA")
    table(tmp_path / "load_data.csv", columns, ("P", "A01", 1, "file:///home/me/P%201/%C3%A4.tif"))
    (field,) = fields(LoadDataSource(input=str(tmp_path)))
    assert int(read_field(field).pixels.max()) == 7


def test_several_tables_make_one_source(tmp_path: Path) -> None:
    tables = []
    for plate in ("P2", "P1"):
        (tmp_path / plate).mkdir()
        path = tmp_path / "load_data_csv" / plate / "load_data.csv"
        tables.append(table(path, (*PLACES, *DNA), (plate, "A01", 1, "a.tif", f"/x/{plate}")))
    found = fields(LoadDataSource(input=str(tmp_path), table=tuple(tables)))
    assert [field.id for field in found] == ["P1/A01/1", "P2/A01/1"]


def test_without_a_table_the_error_names_it(tmp_path: Path) -> None:
    message = error_of(LoadDataSource(input=str(tmp_path)))
    assert f"{tmp_path}/load_data.csv: no such file; say where the table is with --table" in message
    (tmp_path / "load_data.csv").write_text("")
    assert "--table" not in error_of(LoadDataSource(input=str(tmp_path)))


def test_rows_without_a_place_are_called_after_their_first_file(tmp_path: Path) -> None:
    (tmp_path / "a.tif").touch()
    table(tmp_path / "load_data.csv", (*PLACES, *DNA), ("", "", "", "a.tif", ""))
    (field,) = fields(LoadDataSource(input=str(tmp_path)))
    assert (field.id, field.plate, field.labels) == ("a.tif", None, {})
