"""Files with several channels, folders of single images, and stacks."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinocell.data_shards.sources.field import Field, Rejected, Source, read_field
from dinocell.data_shards.sources.files import ImagesSource, MultichannelSource
from dinocell.errors import ImageError
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


def error_of(source: Source) -> str:
    with pytest.raises(ImageError) as caught:
        list(source.fields())
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
def test_images_tells_grey_from_colour_in_the_real_nuclei() -> None:
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
            with pytest.raises(ImageError, match="got 3 that differ"):
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
