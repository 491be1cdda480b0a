"""Opera Phenix, Human Protein Atlas and a user's pattern: what names say, and pixels as other readers see them."""

import itertools
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinocell.data_shards.sources import phenix as harmony
from dinocell.data_shards.sources.field import Field, Rejected, Source, common_order, read_field
from dinocell.data_shards.sources.hpa import HpaSource
from dinocell.data_shards.sources.pattern import NamePattern, PatternSource
from dinocell.data_shards.sources.phenix import PhenixSource, well_name
from dinocell.errors import ImageError
from dinocell.images.storage import open_bytes
from dinocell.images.write import write_png, write_tiff
from helpers.real_data import DATA, needs_data

RNG = np.random.default_rng(0)


def listed(source: Source) -> tuple[list[Field], list[Rejected]]:
    items = list(source.fields())
    return [item for item in items if isinstance(item, Field)], [item for item in items if isinstance(item, Rejected)]


def fields(source: Source) -> list[Field]:
    found, rejected = listed(source)
    assert rejected == []
    return found


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def channels_of(field: Field) -> list[str]:
    return [name for file in field.files for name in file.channels]


def error_of(source: Source) -> str:
    with pytest.raises(ImageError) as caught:
        list(source.fields())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def phenix_name(row: int, column: int, field: int, channel: int, plane: int = 1, time_point: int = 1) -> str:
    return f"r{row:02d}c{column:02d}f{field:02d}p{plane:02d}-ch{channel}sk{time_point}fk1fl1.tiff"


# Opera Phenix.


@needs_data
def test_phenix_gives_the_real_field_pixel_by_pixel() -> None:
    folder = DATA / "jump_cell_painting"
    stains = ("ER", "RNA", "Mito", "DNA", "AGP", "brightfield")
    (field,) = fields(PhenixSource(input=str(folder), channels=stains))
    assert (field.id, field.plate, field.well, field.site) == ("A02/f01", "jump_cell_painting", "A02", "f01")
    picture = read_field(field)
    assert picture.channel_names == stains
    assert picture.pixels.dtype == np.uint16
    for number, plane in enumerate(picture.pixels, start=1):
        with Image.open(folder / f"r01c02f01p01-ch{number}sk1fk1fl1.tiff") as image:
            np.testing.assert_array_equal(plane, np.asarray(image))


def test_phenix_plates_wells_and_sites_come_from_folders_and_names(tmp_path: Path) -> None:
    touch(
        tmp_path,
        f"BR1__2020-11-05T19_51_35-Measurement 1/Images/{phenix_name(1, 1, 1, 1)}",
        f"BR1__2020-11-05T19_51_35-Measurement 2/Images/{phenix_name(1, 1, 1, 1)}",
        f"batch/P 2/Images/{phenix_name(16, 24, 9, 1)}",
        f"P3/{phenix_name(32, 48, 12, 1)}",
    )
    found = fields(PhenixSource(input=str(tmp_path)))
    assert [(field.id, field.plate, field.well, field.site) for field in found] == [
        ("BR1__2020-11-05T19_51_35-Measurement 1/A01/f01", "BR1", "A01", "f01"),
        ("BR1__2020-11-05T19_51_35-Measurement 2/A01/f01", "BR1", "A01", "f01"),
        ("P3/AF48/f12", "P3", "AF48", "f12"),
        ("batch/P 2/P24/f09", "P 2", "P24", "f09"),
    ]


def test_phenix_plate_is_known_whichever_folder_is_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, f"top/BR1__x/Images/{phenix_name(1, 1, 1, 1)}")
    for folder in ("top", "top/BR1__x", "top/BR1__x/Images", "top/BR1__x/Images/"):
        assert fields(PhenixSource(input=f"{tmp_path}/{folder}"))[0].plate == "BR1"
    monkeypatch.chdir(tmp_path / "top/BR1__x/Images")
    assert fields(PhenixSource(input="."))[0].plate == "BR1"
    monkeypatch.chdir(tmp_path / "top/BR1__x")
    assert fields(PhenixSource(input="Images"))[0].plate == "BR1"


def test_ids_do_not_depend_on_where_the_input_is(tmp_path: Path) -> None:
    ids = []
    for top in ("a", "another/place"):
        touch(tmp_path / top, f"P1/Images/{phenix_name(1, 1, 1, 1)}", f"P1/Images/{phenix_name(1, 1, 2, 1)}")
        ids.append([field.id for field in fields(PhenixSource(input=str(tmp_path / top)))])
    assert ids[0] == ids[1] == ["P1/A01/f01", "P1/A01/f02"]


def test_phenix_planes_and_times_are_fields_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, *(f"P1/{phenix_name(1, 1, 1, channel, plane)}" for channel in (1, 2) for plane in (1, 2)))
    touch(tmp_path, *(f"P2/{phenix_name(1, 1, 1, 1, time_point=number)}" for number in (1, 2, 10)))
    touch(tmp_path, f"P3/{phenix_name(1, 1, 1, 1)}", "P3/r01c01f02p01-ch1.tiff", "P3/R01C01F03P01-CH1SK1FK1FL1.TIF")
    found = fields(PhenixSource(input=str(tmp_path)))
    assert [(field.id, len(field.files)) for field in found] == [
        ("P1/A01/f01p01", 2),
        ("P1/A01/f01p02", 2),
        ("P2/A01/f01p01t1", 1),
        ("P2/A01/f01p01t10", 1),
        ("P2/A01/f01p01t2", 1),
        ("P3/A01/f01", 1),
        ("P3/A01/f02", 1),
        ("P3/A01/f03", 1),
    ]


def test_phenix_channels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    touch(tmp_path, *(phenix_name(1, 1, 1, channel) for channel in (10, 2, 1)))
    (field,) = fields(PhenixSource(input=str(tmp_path)))
    assert channels_of(field) == ["ch1", "ch2", "ch10"]
    (field,) = fields(PhenixSource(input=str(tmp_path), channels=("10=DNA", "ch1=ER")))
    assert channels_of(field) == ["DNA", "ER"]
    assert [file.path[-18:-14] for file in field.files] == ["ch10", "-ch1"]


def test_phenix_names_by_number_can_leave_channels_out(tmp_path: Path) -> None:
    touch(tmp_path, *(phenix_name(1, 1, 1, channel) for channel in (1, 2, 3)))
    (field,) = fields(PhenixSource(input=str(tmp_path), channels=("DNA", "-", "ER")))
    assert channels_of(field) == ["DNA", "ER"]
    assert field.missing == ()
    assert "ch1, ch2, ch3" in error_of(PhenixSource(input=str(tmp_path), channels=("DNA", "ER")))
    assert "ch4" in error_of(PhenixSource(input=str(tmp_path), channels=("DNA", "ER", "AGP", "RNA")))
    assert "name all" in error_of(PhenixSource(input=str(tmp_path), channels=("1=DNA", "ER", "AGP")))
    assert "twice" in error_of(PhenixSource(input=str(tmp_path), channels=("DNA", "DNA", "AGP")))


V5_INDEX = """<?xml version="1.0" encoding="utf-8"?>
<EvaluationInputData Version="1" xmlns="http://www.perkinelmer.com/PEHH/HarmonyV5">
  <Plates><Plate><PlateID>P1</PlateID><Well id="0101" /></Plate></Plates>
  <Images>
    {images}
  </Images>
</EvaluationInputData>"""
V5_IMAGE = """<Image Version="1"><id>0101K1F1P1R{number}</id><URL>r01c01f01p01-ch{number}sk1fk1fl1.tiff</URL>
<ChannelID>{number}</ChannelID><ChannelName>{name}</ChannelName>
<ImageResolutionX Unit="m">{across}</ImageResolutionX><ImageResolutionY Unit="m">{down}</ImageResolutionY></Image>"""
V6_INDEX = """<EvaluationInputData xmlns="43B2A954-E3C3-47E1-B392-6635266B0DD3/HarmonyV7"><Maps><Map>
<Entry ChannelID="1"><FlatfieldProfile>x</FlatfieldProfile></Entry></Map><Map>
<Entry ChannelID="1"><ChannelName>HOECHST 33342</ChannelName>
<ImageResolutionX Unit="m">5.9793E-07</ImageResolutionX></Entry>
<Entry ChannelID="2"><ChannelName>Alexa 488</ChannelName>
<ImageResolutionX Unit="m">5.9793E-07</ImageResolutionX></Entry></Map></Maps>
<Images><Image><ChannelID>1</ChannelID></Image></Images></EvaluationInputData>"""


def v5_index(*images: tuple[int, str, str, str]) -> str:
    keys = ("number", "name", "across", "down")
    return V5_INDEX.format(images="".join(V5_IMAGE.format(**dict(zip(keys, image, strict=True))) for image in images))


def test_phenix_names_and_pixel_size_come_from_the_index_beside_the_images(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{plate}/Images/{phenix_name(1, 1, 1, c)}" for plate in ("P1", "P2", "P3") for c in (1, 2)))
    index = v5_index((1, "HOECHST 33342", "6.5E-07", "6.5E-07"), (2, "Größe", "6.5E-07", "6.5E-07"))
    (tmp_path / "P1/Images/Index.idx.xml").write_text(index, encoding="utf-8")
    (tmp_path / "P2/Images/Index.xml").write_text(V6_INDEX)
    one, two, three = fields(PhenixSource(input=str(tmp_path)))
    assert (channels_of(one), one.pixel_size_um) == (["HOECHST 33342", "Größe"], 0.65)
    assert (channels_of(two), two.pixel_size_um) == (["HOECHST 33342", "Alexa 488"], 0.59793)
    assert (channels_of(three), three.pixel_size_um) == (["ch1", "ch2"], None)
    one, *_ = fields(PhenixSource(input=str(tmp_path), channels=("DNA", "ER"), pixel_size_um=0.5))
    assert (channels_of(one), one.pixel_size_um) == (["DNA", "ER"], 0.5)
    one, *_ = fields(PhenixSource(input=str(tmp_path), channels=("DNA", "ER")))
    assert (channels_of(one), one.pixel_size_um) == (["DNA", "ER"], 0.65)
    one, *_ = fields(PhenixSource(input=str(tmp_path), pixel_size_um=0.5))
    assert (channels_of(one), one.pixel_size_um) == (["HOECHST 33342", "Größe"], 0.5)


def test_phenix_index_may_name_two_channels_alike_or_not_at_all(tmp_path: Path) -> None:
    touch(tmp_path, *(phenix_name(1, 1, 1, channel) for channel in (1, 2, 3)))
    index = v5_index((1, "Brightfield", "1E-06", "2E-06"), (2, "Brightfield", "5.98E-07", ""))
    (tmp_path / "Index.idx.xml").write_text(index, encoding="utf-8")
    (field,) = fields(PhenixSource(input=str(tmp_path)))
    assert channels_of(field) == ["Brightfield (ch1)", "Brightfield (ch2)", "ch3"]
    assert field.pixel_size_um == 0.598  # of channel 2; the axes of channel 1 differ


def test_damaged_phenix_index_is_named_unless_nothing_is_missing(tmp_path: Path) -> None:
    touch(tmp_path, phenix_name(1, 1, 1, 1))
    whole = v5_index(*[(number, f"stain {number}", "1E-06", "1E-06") for number in (1, 2)])
    (tmp_path / "Index.idx.xml").write_text(whole[: whole.index("</Image>") + 20])
    (field,) = fields(PhenixSource(input=str(tmp_path)))
    assert channels_of(field) == ["stain 1"]
    (tmp_path / "Index.idx.xml").write_text(whole[: whole.index("</Image>") - 20])
    assert "Index.idx.xml: damaged" in error_of(PhenixSource(input=str(tmp_path)))
    assert fields(PhenixSource(input=str(tmp_path), channels=("DNA",), pixel_size_um=1.0))
    (tmp_path / "Index.idx.xml").write_text(v5_index((1, "a", "0,65", "")))
    assert "damaged" in error_of(PhenixSource(input=str(tmp_path)))


def test_only_as_much_of_a_large_index_is_read_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harmony, "_HEAD_BYTES", 1 << 17)
    asked: list[int | None] = []

    def counting(path: str, *, first: int | None = None) -> bytes:
        asked.append(first)
        return open_bytes(path, first=first)

    monkeypatch.setattr(harmony, "open_bytes", counting)
    touch(tmp_path, phenix_name(1, 1, 1, 1), phenix_name(1, 1, 1, 2))
    images = [(1 + number % 2, f"stain {1 + number % 2}", "1E-06", "1E-06") for number in range(1000)]
    (tmp_path / "Index.idx.xml").write_text(v5_index(*images))
    assert channels_of(fields(PhenixSource(input=str(tmp_path)))[0]) == ["stain 1", "stain 2"]
    assert asked == [1 << 17]
    late = [(1, "stain 1", "1E-06", "1E-06")] * 999 + [(2, "stain 2", "1E-06", "1E-06")]
    (tmp_path / "Index.idx.xml").write_text(v5_index(*late))
    assert channels_of(fields(PhenixSource(input=str(tmp_path)))[0]) == ["stain 1", "stain 2"]
    assert asked == [1 << 17, 1 << 17, None]
    (tmp_path / "Index.idx.xml").write_text(v5_index(*late[:999]))
    assert channels_of(fields(PhenixSource(input=str(tmp_path)))[0]) == ["stain 1", "ch2"]
    (tmp_path / "Index.idx.xml").write_text(v5_index(*late)[:-2000])
    assert "damaged" in error_of(PhenixSource(input=str(tmp_path)))


def test_missing_channels_are_recorded_or_rejected(tmp_path: Path) -> None:
    for field in (1, 2, 3):
        for channel in (1, 2, 3):
            if (field, channel) not in ((2, 1), (3, 1), (3, 3)):
                touch(tmp_path, phenix_name(1, 1, field, channel))
    kept = fields(PhenixSource(input=str(tmp_path), channels=("DNA", "ER", "AGP")))
    assert [(channels_of(field), field.missing) for field in kept] == [
        (["DNA", "ER", "AGP"], ()),
        (["ER", "AGP"], ("DNA",)),
        (["ER"], ("DNA", "AGP")),
    ]
    whole, rejected = listed(PhenixSource(input=str(tmp_path), missing="reject"))
    assert [field.id for field in whole] == ["A01/f01"]
    assert [(item.input, item.kind) for item in rejected] == [
        ("A01/f02", "missing channel"),
        ("A01/f03", "missing channel"),
    ]
    assert "no ch1, ch3" in rejected[1].reason
    some, rejected = listed(PhenixSource(input=str(tmp_path), channels=("DNA", "-", "AGP")))
    assert [field.id for field in some] == ["A01/f01", "A01/f02"]
    assert [(item.input, item.kind) for item in rejected] == [("A01/f03", "missing channel")]


def test_a_channel_that_the_index_names_is_missed_by_that_name(tmp_path: Path) -> None:
    touch(tmp_path, phenix_name(1, 1, 1, 1), phenix_name(1, 1, 1, 2), phenix_name(1, 1, 2, 2))
    (tmp_path / "Index.idx.xml").write_text(v5_index((1, "Hoechst", "1E-06", ""), (2, "ER", "1E-06", "")))
    assert [field.missing for field in fields(PhenixSource(input=str(tmp_path)))] == [(), ("Hoechst",)]


def test_two_files_of_one_channel_are_an_error_that_names_both(tmp_path: Path) -> None:
    touch(tmp_path, "P1/r01c01f01p01-ch1sk1fk1fl1.tiff", "P1/r01c01f01p01-ch1sk1fk1fl1.tif")
    message = error_of(PhenixSource(input=str(tmp_path)))
    assert "fl1.tif and" in message
    assert "fl1.tiff:" in message
    assert "P1/A01/f01" in message
    touch(tmp_path / "b", f"P1/Images/{phenix_name(1, 1, 1, 1)}", f"P1/{phenix_name(1, 1, 1, 1)}")
    assert "Images/" in error_of(PhenixSource(input=str(tmp_path / "b")))


def test_other_files_are_unmatched_and_an_input_without_fields_is_an_error(tmp_path: Path) -> None:
    assert "0 file(s)" in error_of(PhenixSource(input=str(tmp_path)))
    touch(tmp_path, "Index.idx.xml", "a/thumbnail.png", "readme.txt")
    message = error_of(PhenixSource(input=str(tmp_path)))
    assert str(tmp_path) in message
    assert "r01c01f01p01-ch1sk1fk1fl1.tiff" in message
    assert "2 file(s) (such as a/thumbnail.png)" in message
    (tmp_path / "Index.idx.xml").unlink()
    touch(tmp_path, phenix_name(1, 1, 1, 1))
    found, rejected = listed(PhenixSource(input=str(tmp_path)))
    assert len(found) == 1
    assert [(item.input, item.kind) for item in rejected] == [
        ("a/thumbnail.png", "unmatched"),
        ("readme.txt", "unmatched"),
    ]


@pytest.mark.parametrize("row", [1, 2, 26, 27, 32, 52, 53, 702, 703])
def test_well_rows_count_as_spreadsheet_columns_do(row: int) -> None:
    letters = well_name(row, 5)[:-2]
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("A") + 1
    assert number == row
    assert well_name(row, 5).endswith("05")


MANY_NAMES = """
import time
from dinocell.data_shards import sources_names
from dinocell.images.storage import Listed
names = [f"P{plate}/Images/r{row:02d}c{column:02d}f{field:02d}p01-ch{channel}sk1fk1fl1.tiff" for plate in range(6)
         for row in range(1, 17) for column in range(1, 25) for field in range(1, 10) for channel in range(1, 6)]
files = sorted(Listed(name, f"/data/{name}") for name in names[:100_000])
sources_names.list_files = lambda *_, **__: files
pattern = "{plate}/Images/{place}p01-ch{channel}sk1fk1fl1.tiff"
for make in (lambda: sources_names.PhenixSource(input="/data"),
             lambda: sources_names.PatternSource(input="/data", pattern=pattern)):
    times, bare_times = [], []
    for _ in range(2):
        start = time.process_time()
        found = list(make().fields())
        middle = time.process_time()
        bare = {}
        for file in files:
            bare.setdefault(sources_names._PHENIX_NAME.search(file.name).groups()[:4], []).append(file)
        times.append(middle - start)
        bare_times.append(time.process_time() - middle)
    print(len(found), min(times), min(bare_times))
"""


def test_a_hundred_thousand_names_are_parsed_within_two_seconds() -> None:
    # In a process of its own: here, every annotation is checked.
    done = subprocess.run([sys.executable, "-c", MANY_NAMES], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [int(found) for found, _, _ in lines] == [20_000, 20_000]
    for _, seconds, bare_seconds in lines:  # on a machine that others use, as a multiple of bare matching and grouping
        assert float(seconds) < max(2.0, 12 * float(bare_seconds))


# Human Protein Atlas.


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


# A user's pattern.


@needs_data
def test_pattern_gives_the_real_fields_pixel_by_pixel() -> None:
    folder = DATA / "nf1_schwann_cell_painting"
    pattern = "Plate_2_images/{well}_01_*_{site}_{channel}_001.tif"
    found, rejected = listed(PatternSource(input=str(folder), pattern=pattern))
    assert [(field.id, field.well, field.site) for field in found] == [
        ("B7/3", "B7", "3"),
        ("D6/2", "D6", "2"),
        ("D7/1", "D7", "1"),
    ]
    assert {item.kind for item in rejected} == {"unmatched"}
    assert len(rejected) == sum(path.is_file() for path in folder.rglob("*")) - 9
    for field in found:
        picture = read_field(field)
        assert picture.channel_names == ("DAPI", "GFP", "RFP")
        for number, (name, plane) in enumerate(zip(picture.channel_names, picture.pixels, strict=True), start=1):
            path = folder / f"Plate_2_images/{field.well}_01_{number}_{field.site}_{name}_001.tif"
            np.testing.assert_array_equal(plane, tifffile.imread(path))


@needs_data
def test_pattern_renames_the_channels_of_the_real_example() -> None:
    folder = DATA / "cellprofiler_examplehuman"
    source = PatternSource(
        input=str(folder),
        pattern="**/AS_09125_{plate}_{well}f{site}d{channel}.tif",
        channels=("2=cell", "0=DNA", "1=PH3"),
    )
    found, _ = listed(source)
    (field,) = found
    assert (field.plate, field.well, field.site) == ("050116030001", "D03", "00")
    picture = read_field(field)
    assert picture.channel_names == ("cell", "DNA", "PH3")
    for plane, number in zip(picture.pixels, (2, 0, 1), strict=True):
        (path,) = folder.rglob(f"*d{number}.tif")
        np.testing.assert_array_equal(plane, tifffile.imread(path))


def test_pattern_fields_become_plate_well_site_and_labels(tmp_path: Path) -> None:
    touch(
        tmp_path, "P 1/A01_s1_w1_t5_größe.tif", "P 1/A01_s1_w2_t5_größe.tif", "P 1/A01_s1_w1_t6_größe.tif", "P 1/x.tif"
    )
    found, rejected = listed(
        PatternSource(input=str(tmp_path), pattern="{plate}/{well}_s{site}_w{channel}_t{frame}_{cells}.tif")
    )
    assert [(field.id, channels_of(field), field.missing) for field in found] == [
        ("P 1/A01/1/5/größe", ["1", "2"], ()),
        ("P 1/A01/1/6/größe", ["1"], ("2",)),
    ]
    assert (found[0].plate, found[0].well, found[0].site) == ("P 1", "A01", "1")
    assert found[0].labels == {"frame": "5", "cells": "größe"}
    assert [(item.input, item.kind) for item in rejected] == [("P 1/x.tif", "unmatched")]


def test_a_name_that_only_numbers_the_channels_is_refused(tmp_path: Path) -> None:
    """As of a Cytation, ``B7_01_2_3_GFP_001.tif``: each file became a field of its own, without a word."""
    for well in ("B7", "D6"):
        for number, channel in enumerate(("DAPI", "GFP"), start=1):
            write_tiff(tmp_path / f"{well}_{number}_{channel}.tif", RNG.integers(0, 99, (64, 64), np.uint16))
    with pytest.raises(
        ImageError, match=r"\{number\} changes with the channel \(1 in DAPI\) .*; write \* in its place"
    ):
        fields(PatternSource(input=str(tmp_path), pattern="{well}_{number}_{channel}.tif"))
    assert len(fields(PatternSource(input=str(tmp_path), pattern="{well}_*_{channel}.tif"))) == 2
    # The same where it does not number them: another time point of one channel.
    (tmp_path / "D6_2_GFP.tif").rename(tmp_path / "D6_1_GFP.tif")
    assert len(fields(PatternSource(input=str(tmp_path), pattern="{well}_{number}_{channel}.tif"))) == 3


def test_pattern_with_channel_takes_grey_pictures_stored_as_colour(tmp_path: Path) -> None:
    plane = RNG.integers(1, 255, (5, 7)).astype(np.uint8)
    Image.fromarray(np.stack([plane] * 3, axis=-1)).save(tmp_path / "A01_DNA.png")
    (field,) = fields(PatternSource(input=str(tmp_path), pattern="{well}_{channel}.png"))
    picture = read_field(field)
    assert picture.channel_names == ("DNA",)
    np.testing.assert_array_equal(picture.pixels, plane[None])


def test_pattern_without_channel_takes_files_with_all_channels(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (3, 5, 7)).astype(np.uint8)
    write_tiff(tmp_path / "A01_1.tif", pixels, channel_names=("a", "b", "c"))
    source = PatternSource(input=str(tmp_path), pattern="{well}_{site}.tif")
    (field,) = fields(source)
    assert (field.id, field.well, field.site, field.missing) == ("A01/1", "A01", "1", ())
    picture = read_field(field)
    assert picture.channel_names == ("a", "b", "c")
    np.testing.assert_array_equal(picture.pixels, pixels)
    (field,) = fields(PatternSource(input=str(tmp_path), pattern="{well}_{site}.tif", channels=("DNA", "ER", "RNA")))
    assert read_field(field).channel_names == ("DNA", "ER", "RNA")


@pytest.mark.parametrize("num_planes", [1, 3, 4])
def test_pattern_without_channel_takes_grey_pictures_stored_as_colour(tmp_path: Path, num_planes: int) -> None:
    plane = RNG.integers(1, 255, (5, 7)).astype(np.uint8)
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7)
    planes = np.stack([plane] * min(num_planes, 3) + [alpha] * (num_planes == 4), axis=-1)
    Image.fromarray(planes[..., 0] if num_planes == 1 else planes).save(tmp_path / "A01.png")
    for channels, name in (((), "grey"), (("DNA",), "DNA")):
        (field,) = fields(PatternSource(input=str(tmp_path), pattern="{well}.png", channels=channels))
        picture = read_field(field)
        assert picture.channel_names == (name,)
        np.testing.assert_array_equal(picture.pixels, plane[None])
    if num_planes == 3:  # three names say that there are three channels, equal or not
        (field,) = fields(PatternSource(input=str(tmp_path), pattern="{well}.png", channels=("a", "b", "c")))
        assert read_field(field).channel_names == ("a", "b", "c")


def test_pattern_without_channel_takes_zarr_folders_as_files(tmp_path: Path) -> None:
    touch(tmp_path, "A02_1.zarr/0/0")
    (field,) = fields(PatternSource(input=str(tmp_path), pattern="{well}_{site}.zarr"))
    assert field.id == "A02/1"


def test_pattern_names_in_two_unicode_spellings_fit(tmp_path: Path) -> None:
    touch(tmp_path, unicodedata.normalize("NFD", "größe_1.tif"))
    for form in ("NFC", "NFD"):
        pattern = unicodedata.normalize(form, "größe_{channel}.tif")
        (field,) = fields(PatternSource(input=str(tmp_path), pattern=pattern))
        assert (field.id, channels_of(field)) == ("field", ["1"])


def test_one_field_of_two_files_of_one_channel_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "A01_1_w1.tif", "A01_2_w1.tif")
    message = error_of(PatternSource(input=str(tmp_path), pattern="{well}_*_w{channel}.tif"))
    assert "A01_1_w1.tif and" in message
    assert "A01_2_w1.tif:" in message


def test_folders_before_the_pattern_keep_fields_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a/b/A01_w1.tif", "a/A01_w1.tif", "A01_w1.tif", "A01_w2.tif")
    found = fields(PatternSource(input=str(tmp_path), pattern="**/{well}_w{channel}.tif"))
    assert [(field.id, len(field.files)) for field in found] == [("A01", 2), ("a/A01", 1), ("a/b/A01", 1)]
    assert found[0].labels == {}


def test_pattern_that_nothing_fits_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "sub/A01.tif")
    message = error_of(PatternSource(input=str(tmp_path), pattern="{well}.tif"))
    assert str(tmp_path) in message
    assert "'{well}.tif'" in message
    assert "such as sub/A01.tif" in message


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "no field"),
        ("image*.tif", "no field"),
        ("{well.tif", "brace"),
        ("well}.tif", "brace"),
        ("{{well}}.tif", "brace"),
        ("{}.tif", "is no field"),
        ("{1st}.tif", "is no field"),
        ("{a-b}.tif", "is no field"),
        ("{a b}.tif", "is no field"),
        ("{well}/**/{site}.tif", "at the start"),
        ("/data/{well}.tif", "relative"),
        ("s3://bucket/{well}.tif", "relative"),
    ],
)
def test_patterns_with_mistakes_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        NamePattern.parse(pattern)
    assert repr(pattern) in str(caught.value)


NAME_PARTS = st.text(
    st.characters(blacklist_characters="/{}*", blacklist_categories=("Cs", "Cc")), min_size=1, max_size=6
)


@given(values=st.lists(NAME_PARTS, min_size=1, max_size=4), literals=st.lists(NAME_PARTS, min_size=5, max_size=5))
def test_patterns_fit_what_is_made_from_them_and_give_it_back(values: Sequence[str], literals: Sequence[str]) -> None:
    values = [unicodedata.normalize("NFC", value) for value in values]
    pattern = "/".join(f"{literal}{{f{number}}}" for number, literal in zip(range(len(values)), literals, strict=False))
    name = "/".join(literal + value for literal, value in zip(literals, values, strict=False))
    found = NamePattern.parse(pattern).match(unicodedata.normalize("NFC", name))
    if (
        unicodedata.is_normalized("NFC", name)
        and unicodedata.is_normalized("NFC", pattern)
        and not pattern.startswith("./")
    ):
        assert found == {f"f{number}": value for number, value in enumerate(values)}
    assert NamePattern.parse(pattern).match(name + "/x") is None


def test_a_field_given_twice_must_be_the_same_text() -> None:
    pattern = NamePattern.parse("{plate}/{plate}_{well}.tif")
    assert pattern.match("P1/P1_A01.tif") == {"plate": "P1", "well": "A01"}
    assert pattern.match("P1/P2_A01.tif") is None
    assert re.fullmatch(pattern.regex, "P1/P1_A01.tif")


def test_a_star_may_stand_for_nothing_but_not_for_a_folder() -> None:
    pattern = NamePattern.parse("{well}_*.tif")
    assert pattern.match("A01_.tif") == {"well": "A01"}
    assert pattern.match("A01_x_y.tif") == {"well": "A01"}
    assert pattern.match("A01_x/y.tif") is None


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        ([("ER", "AGP"), ("DNA", "AGP"), ("DNA", "ER", "AGP")], "DNA ER AGP"),
        ([("ER", "AGP"), ("DNA", "ER")], "DNA ER AGP"),  # no field is whole
        ([("a", "b", "c"), ("d", "e")], "a b c d e"),  # two assays
        ([("a", "b"), ("b", "a"), ("b", "a", "c")], "b a c"),  # files that contradict one another
        ([], ""),
    ],
)
def test_channels_that_some_fields_lack_get_the_order_of_all(orders: list[tuple[str, ...]], expected: str) -> None:
    for shuffled in itertools.permutations(orders):
        assert common_order(shuffled) == expected.split()
