"""A field's files become one picture: layouts of channels in files, and what does not fit together."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocell.data_shards.sources.field import Field, FieldFile, Layout, read_field
from dinocell.errors import ImageError
from dinocell.images.write import write_png, write_tiff


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 250, shape).astype(dtype)


def one(path: Path, *channels: str, layout: Layout = "planes", **options: int | bool) -> Field:
    return Field(id="f", files=(FieldFile(path=str(path), channels=channels, layout=layout, **options),))  # type: ignore[arg-type]


def error_of(field: Field) -> str:
    with pytest.raises(ImageError) as caught:
        read_field(field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_are_stacked_in_their_order_under_the_names_of_the_source(tmp_path: Path) -> None:
    pixels = noise(4, 6, 9, dtype="uint16")
    write_tiff(tmp_path / "a.tif", pixels[:1], pixel_size_um=0.5)
    write_tiff(tmp_path / "bc.tif", pixels[1:3], channel_names=("x", "y"))
    write_tiff(tmp_path / "d.tif", pixels[3:])
    files = (
        FieldFile(path=str(tmp_path / "a.tif"), channels=("DNA",)),
        FieldFile(path=str(tmp_path / "bc.tif")),
        FieldFile(path=str(tmp_path / "d.tif"), channels=("ER",), layout="grey"),
    )
    picture = read_field(Field(id="f", files=files))
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.channel_names == ("DNA", "x", "y", "ER")
    assert picture.pixel_size_um == pytest.approx(0.5)
    assert read_field(Field(id="f", files=files, pixel_size_um=0.2)).pixel_size_um == 0.2


def test_files_that_differ_in_pixel_size_have_none(tmp_path: Path) -> None:
    for number, size in enumerate((0.5, 0.6)):
        write_tiff(tmp_path / f"{number}.tif", noise(4, 4), pixel_size_um=size)
    files = tuple(FieldFile(path=str(tmp_path / f"{n}.tif"), channels=(f"c{n}",)) for n in range(2))
    assert read_field(Field(id="f", files=files)).pixel_size_um is None


def test_channels_without_names_are_numbered(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(5, 4, 6))
    assert read_field(one(tmp_path / "a.npy")).channel_names == ("c0", "c1", "c2", "c3", "c4")


@pytest.mark.parametrize("channels", [("DNA",), ("DNA", "ER", "AGP")])
def test_another_number_of_channels_than_named_is_an_error(tmp_path: Path, channels: tuple[str, ...]) -> None:
    np.save(tmp_path / "a.npy", noise(2, 4, 6))
    message = error_of(one(tmp_path / "a.npy", *channels))
    assert f"expected {len(channels)} channel(s) (DNA" in message
    assert "got 2" in message


def test_files_of_other_size_or_type_are_named(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", noise(4, 6))
    write_tiff(tmp_path / "b.tif", noise(4, 7))
    write_tiff(tmp_path / "c.tif", noise(4, 6, dtype="uint16"))
    for name, kind in (("b", "4 x 7 uint8"), ("c", "4 x 6 uint16")):
        files = tuple(FieldFile(path=str(tmp_path / f"{n}.tif"), channels=(n,)) for n in ("a", name))
        message = error_of(Field(id="f", files=files))
        assert f"{name}.tif: {kind}" in message
        assert "a.tif, is 4 x 6 uint8" in message


def test_two_channels_of_one_name_are_an_error(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", noise(4, 6))
    twice = FieldFile(path=str(tmp_path / "a.tif"), channels=("DNA",))
    assert "two channels of one name in field f: DNA, DNA" in error_of(Field(id="f", files=(twice, twice)))


def test_grey_pictures_stored_as_colour_are_one_channel(tmp_path: Path) -> None:
    plane = noise(5, 7)
    zero = np.zeros_like(plane)
    for name, planes in {
        "grey": (plane, plane, plane),
        "red": (plane, zero, zero),
        "blue": (zero, zero, plane),
        "black": (zero, zero, zero),
    }.items():
        Image.fromarray(np.stack(planes, axis=-1)).save(tmp_path / f"{name}.png")
        picture = read_field(one(tmp_path / f"{name}.png", "DNA", layout="grey"))
        np.testing.assert_array_equal(picture.pixels[0], zero if name == "black" else plane)
    write_png(tmp_path / "one.png", plane)
    np.testing.assert_array_equal(read_field(one(tmp_path / "one.png", "DNA", layout="grey")).pixels[0], plane)


def test_real_colour_is_not_one_channel(tmp_path: Path) -> None:
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "a.png")
    assert "expected one channel, got 3 that differ" in error_of(one(tmp_path / "a.png", "DNA", layout="grey"))


@pytest.mark.parametrize("layout", ["red", "green", "blue"])
def test_tinted_pictures_give_their_plane_whatever_compression_left_in_the_others(
    tmp_path: Path, layout: Layout
) -> None:
    pixels = noise(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    number = ("red", "green", "blue").index(layout)
    picture = read_field(one(tmp_path / "a.png", "DNA", layout=layout))
    np.testing.assert_array_equal(picture.pixels, pixels[..., number][None])
    assert picture.channel_names == ("DNA",)
    write_png(tmp_path / "grey.png", pixels[..., 0])
    grey = read_field(one(tmp_path / "grey.png", "DNA", layout=layout))
    np.testing.assert_array_equal(grey.pixels[0], pixels[..., 0])
    np.save(tmp_path / "c.npy", noise(2, 5, 7))
    assert "expected a grey or an RGB picture, got 2" in error_of(one(tmp_path / "c.npy", "DNA", layout=layout))
    Image.fromarray(noise(5, 7, 4)).save(tmp_path / "rgba.png")
    assert "got 4" in error_of(one(tmp_path / "rgba.png", "DNA", layout=layout))


def test_colour_pictures_keep_three_channels_and_grey_ones_have_one(tmp_path: Path) -> None:
    pixels = noise(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = read_field(one(tmp_path / "a.png", layout="colour"))
    assert picture.channel_names == ("red", "green", "blue")
    np.testing.assert_array_equal(picture.pixels, pixels.transpose(2, 0, 1))
    Image.fromarray(np.repeat(pixels[..., :1], 3, axis=-1)).save(tmp_path / "b.png")
    picture = read_field(one(tmp_path / "b.png", layout="colour"))
    assert picture.channel_names == ("grey",)
    np.testing.assert_array_equal(picture.pixels[0], pixels[..., 0])


def test_channels_side_by_side_are_set_apart(tmp_path: Path) -> None:
    pixels = noise(4, 6, 6, dtype="uint16")
    write_png(tmp_path / "a.png", np.concatenate(list(pixels), axis=1))
    names = ("microtubules", "protein", "nucleus", "er")
    picture = read_field(one(tmp_path / "a.png", *names, layout="side_by_side"))
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.channel_names == names
    assert picture.pixels.flags.c_contiguous
    write_tiff(tmp_path / "b.tif", pixels)
    apart = read_field(one(tmp_path / "b.tif", *names, layout="side_by_side"))
    np.testing.assert_array_equal(apart.pixels, pixels)


def test_channels_side_by_side_must_be_square_and_as_many_as_named(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", noise(6, 20))
    assert "6 x 20" in error_of(one(tmp_path / "a.png", "a", "b", layout="side_by_side"))
    write_png(tmp_path / "b.png", noise(6, 24))
    assert "expected 3" in error_of(one(tmp_path / "b.png", "a", "b", "c", layout="side_by_side"))
    write_tiff(tmp_path / "c.tif", noise(2, 6, 12))
    assert "got 2 channel(s)" in error_of(one(tmp_path / "c.tif", "a", "b", "c", "d", layout="side_by_side"))


def test_frames_are_chosen_or_taken_as_channels(tmp_path: Path) -> None:
    import tifffile

    pixels = noise(3, 6, 9)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(read_field(one(tmp_path / "a.tif", "DNA", frame=1)).pixels, pixels[1:2])
    picture = read_field(one(tmp_path / "a.tif", "a", "b", "c", frames_as_channels=True))
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert "a stack of 3 frames" in error_of(one(tmp_path / "a.tif"))
    assert "no frame 3" in error_of(one(tmp_path / "a.tif", frame=3))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.tif").write_bytes(b"")
    assert "empty.tif" in error_of(one(tmp_path / "empty.tif"))
    assert "none.tif: no such file" in error_of(one(tmp_path / "none.tif"))


def test_fields_are_plain_data() -> None:
    field = Field(id="ä/1", files=(FieldFile(path="a.tif", channels=("DNA",)),), labels={"dose": 0.5})
    assert asdict(field)["labels"] == {"dose": 0.5}
    assert Field(**{**asdict(field), "files": (FieldFile(**asdict(field)["files"][0]),)}) == field
