"""Opera Phenix exports: what names and index say, pixels as other readers see them, and listings of many names."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocell.data_shards.sources import phenix as harmony
from dinocell.data_shards.sources.field import Field, merged_channel_order, read_field
from dinocell.data_shards.sources.phenix import PhenixSource, well_name
from dinocell.images.storage import open_bytes
from helpers.real_data import DATA, needs_data
from helpers.sources import error_of, fields, listed

RNG = np.random.default_rng(0)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def channels_of(field: Field) -> list[str]:
    return [name for file in field.files for name in file.channels]


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
    assert "1=DNA,ER,AGP" in error_of(PhenixSource(input=str(tmp_path), channels=("1=DNA", "ER", "AGP")))
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


def test_phenix_names_and_pixel_size_come_from_the_index(tmp_path: Path) -> None:
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
    assert "3 file(s) (such as Index.idx.xml)" in message
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
from dinocell.data_shards.sources import files as patterns, phenix
from dinocell.images.listing import Listed
names = [f"P{plate}/Images/r{row:02d}c{column:02d}f{field:02d}p01-ch{channel}sk1fk1fl1.tiff" for plate in range(6)
         for row in range(1, 17) for column in range(1, 25) for field in range(1, 10) for channel in range(1, 6)]
files = sorted(Listed(name, f"/data/{name}") for name in names[:100_000])
patterns.list_files = phenix.list_files = lambda *_, **__: files
places = "{plate}/Images/{place}p01-ch{channel}sk1fk1fl1.tiff"
for make in (lambda: phenix.PhenixSource(input="/data"),
             lambda: patterns.PatternSource(input="/data", pattern=places)):
    times, bare_times = [], []
    for _ in range(2):
        start = time.process_time()
        found = list(make().fields())
        middle = time.process_time()
        bare = {}
        for file in files:
            bare.setdefault(phenix._NAME.search(file.name).groups()[:4], []).append(file)
        times.append(middle - start)
        bare_times.append(time.process_time() - middle)
    print(len(found), min(times), min(bare_times))
"""


@pytest.mark.slow
def test_a_hundred_thousand_names_are_parsed_within_two_seconds() -> None:
    # In a process of its own: here, every annotation is checked.
    done = subprocess.run([sys.executable, "-c", MANY_NAMES], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [int(found) for found, _, _ in lines] == [20_000, 20_000]
    for _, seconds, bare_seconds in lines:  # on a machine that others use, as a multiple of bare matching and grouping
        assert float(seconds) < max(2.0, 12 * float(bare_seconds))


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
def test_channels_get_an_order_consistent_with_all_fields(orders: list[tuple[str, ...]], expected: str) -> None:
    for shuffled in itertools.permutations(orders):
        assert merged_channel_order(shuffled) == expected.split()
