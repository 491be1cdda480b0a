"""Files with several channels, folders of single images, stacks, and a user's pattern of file names."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinocell.data_shards.sources.field import Field, read_field
from dinocell.data_shards.sources.files import ImagesSource, MultichannelSource, PatternSource
from dinocell.errors import ImageError
from dinocell.images.write import write_png, write_tiff
from helpers.real_data import DATA, needs_data
from helpers.sources import error_of, fields, listed

RNG = np.random.default_rng(0)


def stack(path: Path, num_frames: int) -> np.ndarray:
    pixels = RNG.integers(0, 60000, (num_frames, 5, 7)).astype(np.uint16)
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=None)
    return pixels


@needs_data
def test_multichannel_gives_the_real_cells_pixel_by_pixel() -> None:
    folder = DATA / "hpa_reference_3channel"
    names = ("microtubules", "nucleus", "er")
    found = fields(MultichannelSource(input=str(folder), channels=names, pixel_size_um=0.1067))
    assert [field.id for field in found] == ["cell_0.tiff", "cell_12.tiff"]
    for field in found:
        picture = read_field(field)
        assert (picture.channel_names, picture.pixel_size_um) == (names, 0.1067)
        assert picture.pixels.dtype == np.float32
        np.testing.assert_array_equal(picture.pixels, tifffile.imread(folder / field.id).transpose(2, 0, 1))


@needs_data
@pytest.mark.parametrize(("folder", "count"), [("livecell_phase", 7), ("bbbc039/images", 12)])
def test_images_gives_the_real_fields_pixel_by_pixel(folder: str, count: int) -> None:
    found = fields(ImagesSource(input=str(DATA / folder), channels=("phase",)))
    assert len(found) == count
    for field in found:
        picture = read_field(field)
        assert picture.channel_names == ("phase",)
        with Image.open(DATA / folder / field.id) as image:
            np.testing.assert_array_equal(picture.pixels[0], np.asarray(image))


@needs_data
def test_images_distinguishes_grey_from_colour_in_the_real_nuclei() -> None:
    folder = DATA / "dsb2018_stage1_train"
    kept = colour = 0
    for path in sorted(folder.glob("*/images"))[:20]:
        with Image.open(next(path.iterdir())) as image:
            planes = np.asarray(image.convert("RGB"))
        is_grey = bool((planes[..., 0] == planes[..., 1]).all() and (planes[..., 0] == planes[..., 2]).all())
        (field,) = fields(ImagesSource(input=str(path)))
        (with_colour,) = fields(ImagesSource(input=str(path), colour="channels"))
        pixels = read_field(with_colour).pixels
        np.testing.assert_array_equal(pixels, planes.transpose(2, 0, 1)[: 1 if is_grey else 3])
        if is_grey:
            kept += 1
            np.testing.assert_array_equal(read_field(field).pixels[0], planes[..., 0])
        else:
            colour += 1
            with pytest.raises(ImageError, match=r"expected one channel.*got 3"):
                read_field(field)
    assert kept
    assert colour


def test_multichannel_takes_names_from_files_or_from_the_user(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (3, 5, 7)).astype(np.uint8)
    (tmp_path / "größe 1").mkdir()
    write_tiff(tmp_path / "größe 1" / "a.ome.tif", pixels, channel_names=("DNA", "ER", "RNA"), pixel_size_um=0.3)
    np.save(tmp_path / "b.npy", pixels[[0, 1, 2, 0, 1]])
    a, b = sorted(fields(MultichannelSource(input=str(tmp_path))), key=lambda field: "b.npy" in field.id)
    assert a.id == "größe 1/a.ome.tif"
    assert read_field(a).channel_names == ("DNA", "ER", "RNA")
    assert read_field(a).pixel_size_um == pytest.approx(0.3)
    assert read_field(b).channel_names == ("c0", "c1", "c2", "c3", "c4")
    a, b = sorted(
        fields(MultichannelSource(input=str(tmp_path), channels=("x", "y", "z"))), key=lambda field: "b.npy" in field.id
    )
    assert read_field(a).channel_names == ("x", "y", "z")
    with pytest.raises(ImageError, match=r"expected 3 channel\(s\) \(x, y, z\), got 5"):
        read_field(b)


def test_zarr_folders_are_one_input_each(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    pixels = RNG.integers(0, 60000, (2, 5, 7)).astype(np.uint16)
    for name in ("a.zarr", "sub/b.ome.zarr"):
        group = zarr.open_group(str(tmp_path / name), mode="w", zarr_format=2)
        group.create_array("0", shape=pixels.shape, dtype=pixels.dtype, chunks=(1, 4, 4))[:] = pixels
        group.attrs["multiscales"] = [
            {"axes": [{"name": n} for n in "cyx"], "datasets": [{"path": "0"}], "version": "0.4"}
        ]
    found = fields(MultichannelSource(input=str(tmp_path)))
    assert [field.id for field in found] == ["a.zarr", "sub/b.ome.zarr"]
    for field in found:
        np.testing.assert_array_equal(read_field(field).pixels, pixels)
    (field,) = fields(MultichannelSource(input=str(tmp_path / "a.zarr"), channels=("DNA", "ER")))
    assert (field.id, read_field(field).channel_names) == ("a.zarr", ("DNA", "ER"))


def test_stacks_are_rejected_or_fields_or_channels(tmp_path: Path) -> None:
    many, one = stack(tmp_path / "many.tif", 11), stack(tmp_path / "one.tif", 1)
    as_fields = fields(MultichannelSource(input=str(tmp_path), frames_as="fields", channels=("DNA",)))
    assert [field.id for field in as_fields] == [f"many.tif/{n:02d}" for n in range(11)] + ["one.tif"]
    assert [field.labels for field in as_fields] == [{"frame": n} for n in range(11)] + [{}]
    for field, pixels in zip(as_fields, [*many, *one], strict=True):
        np.testing.assert_array_equal(read_field(field).pixels, pixels[None])
    whole, _ = fields(MultichannelSource(input=str(tmp_path), frames_as="channels"))
    np.testing.assert_array_equal(read_field(whole).pixels, many)
    unchosen, single = fields(MultichannelSource(input=str(tmp_path)))
    np.testing.assert_array_equal(read_field(single).pixels, one)
    with pytest.raises(ImageError, match="a stack of 11 frames"):
        read_field(unchosen)
    as_images = fields(ImagesSource(input=str(tmp_path), frames_as="fields"))
    assert [field.id for field in as_images] == [field.id for field in as_fields]
    assert read_field(as_images[3]).channel_names == ("grey",)


def test_files_whose_frames_cannot_be_counted_are_rejected(tmp_path: Path) -> None:
    stack(tmp_path / "a.tif", 2)
    (tmp_path / "b.tif").write_bytes(b"")
    found, rejected = listed(MultichannelSource(input=str(tmp_path), frames_as="fields"))
    assert [field.id for field in found] == ["a.tif/0", "a.tif/1"]
    assert [(item.input, item.kind) for item in rejected] == [("b.tif", "unreadable")]
    assert "0 bytes" in rejected[0].reason


@pytest.mark.parametrize("source", [MultichannelSource, ImagesSource])
def test_other_files_are_unmatched_and_an_input_without_images_is_an_error(tmp_path: Path, source: type) -> None:
    (tmp_path / "notes.txt").write_text("x")
    message = error_of(source(input=str(tmp_path)))
    assert str(tmp_path) in message
    assert ".tif" in message
    assert "such as notes.txt" in message
    write_png(tmp_path / "A.PNG", np.zeros((3, 3), np.uint8))
    found, rejected = listed(source(input=str(tmp_path)))
    assert [field.id for field in found] == ["A.PNG"]
    assert [(item.input, item.kind) for item in rejected] == [("notes.txt", "unmatched")]


def test_one_file_is_an_input(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((3, 3), np.uint8))
    (field,) = fields(ImagesSource(input=str(tmp_path / "a.png"), pixel_size_um=0.5))
    assert (field.id, field.pixel_size_um) == ("a.png", 0.5)


def test_images_have_one_channel(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((3, 3), np.uint8))
    assert "expected one name" in error_of(ImagesSource(input=str(tmp_path), channels=("a", "b")))
    assert "expected one name" in error_of(ImagesSource(input=str(tmp_path), channels=("a",), colour="channels"))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def channels_of(field: Field) -> list[str]:
    return [name for file in field.files for name in file.channels]


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


def test_a_field_that_only_numbers_the_channels_is_rejected(tmp_path: Path) -> None:
    """As of a Cytation, ``B7_01_2_3_GFP_001.tif``: each file became a field of its own, without a word."""
    for well in ("B7", "D6"):
        for number, channel in enumerate(("DAPI", "GFP"), start=1):
            write_tiff(tmp_path / f"{well}_{number}_{channel}.tif", RNG.integers(0, 99, (64, 64), np.uint16))
    with pytest.raises(ImageError, match=r"\{number\} changes with the channel \(1 for DAPI\)"):
        fields(PatternSource(input=str(tmp_path), pattern="{well}_{number}_{channel}.tif"))
    assert len(fields(PatternSource(input=str(tmp_path), pattern="{well}_*_{channel}.tif"))) == 2
    # The same where it does not number them: another time point of one channel.
    (tmp_path / "D6_2_GFP.tif").rename(tmp_path / "D6_1_GFP.tif")
    assert len(fields(PatternSource(input=str(tmp_path), pattern="{well}_{number}_{channel}.tif"))) == 3


def test_pattern_with_channel_accepts_grey_images_stored_as_colour(tmp_path: Path) -> None:
    plane = RNG.integers(1, 255, (5, 7)).astype(np.uint8)
    Image.fromarray(np.stack([plane] * 3, axis=-1)).save(tmp_path / "A01_DNA.png")
    (field,) = fields(PatternSource(input=str(tmp_path), pattern="{well}_{channel}.png"))
    picture = read_field(field)
    assert picture.channel_names == ("DNA",)
    np.testing.assert_array_equal(picture.pixels, plane[None])


def test_pattern_without_channel_reads_files_with_all_channels(tmp_path: Path) -> None:
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
def test_pattern_without_channel_accepts_grey_images_stored_as_colour(tmp_path: Path, num_planes: int) -> None:
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


def test_pattern_without_channel_reads_zarr_folders_as_files(tmp_path: Path) -> None:
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


def test_pattern_without_a_match_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "sub/A01.tif")
    message = error_of(PatternSource(input=str(tmp_path), pattern="{well}.tif"))
    assert str(tmp_path) in message
    assert "'{well}.tif'" in message
    assert "such as sub/A01.tif" in message
