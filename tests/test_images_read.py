"""Images in and out: exact values, and an error of one line for everything that cannot be read completely."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from dinocell.errors import ImageError
from dinocell.images import write
from dinocell.images.image import Image, as_image, percentile_range, to_uint8
from dinocell.images.read import count_frames, read_image, read_stack
from dinocell.images.storage import open_bytes
from dinocell.images.write import write_labels, write_png, write_tiff
from helpers.real_data import DATA, needs_data
from helpers.servers import serving_folder

RNG = np.random.default_rng(0)


def noise(*shape: int, dtype: str = "uint16") -> np.ndarray:
    return (RNG.random(shape) * 60000 + 1).astype(dtype) if dtype != "bool" else RNG.random(shape) > 0.5


def one_line(path: Path | str, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# What a file holds is what comes out.


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits"])
def test_tiff_values_and_types_come_back(tmp_path: Path, dtype: str, compression: str | None) -> None:
    pixels = noise(33, 47, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression=compression, metadata=None)
    image = read_image(tmp_path / "a.tif")
    assert image.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(image.pixels, pixels[None])
    assert image.channel_names == ()
    assert image.pixel_size_um is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("flavour", [{}, {"ome": True}, {"imagej": True}, {"metadata": None}])
def test_one_pixel_wide_tiffs_keep_both_axes(tmp_path: Path, shape: tuple[int, int], flavour: dict[str, bool]) -> None:
    pixels = noise(*shape)
    tifffile.imwrite(tmp_path / "a.tif", pixels, **flavour)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, pixels[None])


def test_big_endian_tiled_and_predicted_tiffs_are_read(tmp_path: Path) -> None:
    pixels = noise(70, 50)
    options = {"byteorder": ">", "tile": (32, 32), "compression": "zlib", "predictor": True}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    image = read_image(tmp_path / "a.tif")
    assert image.pixels.dtype.isnative
    np.testing.assert_array_equal(image.pixels[0], pixels)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colour_tiff_has_named_channels_first(tmp_path: Path, planar: str) -> None:
    pixels = noise(3, 20, 30, dtype="uint8")
    stored = pixels if planar == "separate" else pixels.transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar)
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.channel_names == ("red", "green", "blue")


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("axes", ["CYX", "TCYX", "CTYX", "TZCYX", "YXS", "TYXS"])
@pytest.mark.parametrize("flavour", ["ome", "imagej"])
def test_frames_run_over_time_and_depth_and_keep_their_channels(
    tmp_path: Path, axes: str, flavour: str, compression: str | None
) -> None:
    if flavour == "imagej" and axes == "CTYX":
        pytest.skip("ImageJ has one order of axes")
    sizes = {"T": 2, "Z": 4, "C": 3, "Y": 11, "X": 13, "S": 3}
    dtype = "uint8" if "S" in axes else "uint16"
    pixels = noise(*(sizes[axis] for axis in axes), dtype=dtype)
    photometric = "rgb" if "S" in axes else "minisblack"
    options = {flavour: True, "metadata": {"axes": axes}, "photometric": photometric, "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    order = [axes.index(axis) for axis in "TZCSYX" if axis in axes]
    expected = pixels.transpose(order).reshape(-1, 3, 11, 13)
    frames = list(read_stack(tmp_path / "a.tif"))
    assert count_frames(tmp_path / "a.tif") == len(frames) == len(expected)
    for frame, want in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame.pixels, want)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", frame=len(expected) - 1).pixels, expected[-1])


def test_a_stack_needs_a_frame_and_the_error_states_their_number(tmp_path: Path) -> None:
    pixels = noise(5, 8, 9)
    tifffile.imwrite(tmp_path / "a.tif", pixels, metadata=None)
    assert "5 frames" in one_line(tmp_path / "a.tif")
    assert "it has 5" in one_line(tmp_path / "a.tif", frame=5)
    assert "no frame -1" in one_line(tmp_path / "a.tif", frame=-1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", frames_as_channels=True).pixels, pixels)


def test_pages_of_different_sizes_are_frames_and_cannot_be_channels(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for side in (8, 9):
            writer.write(noise(side, 7), metadata=None)
    assert [frame.pixels.shape for frame in read_stack(tmp_path / "a.tif")] == [(1, 8, 7), (1, 9, 7)]
    assert "2 sizes or types" in one_line(tmp_path / "a.tif", frames_as_channels=True)


def test_volumetric_tiles_give_their_slices(tmp_path: Path) -> None:
    pixels = noise(5, 20, 30)
    tifffile.imwrite(tmp_path / "a.tif", pixels, volumetric=True, tile=(16, 16, 16), compression="zlib")
    np.testing.assert_array_equal(np.stack([f.pixels[0] for f in read_stack(tmp_path / "a.tif")]), pixels)


def test_previews_and_pyramid_levels_are_not_frames(tmp_path: Path) -> None:
    pixels = noise(64, 64)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif", ome=True) as writer:
        writer.write(pixels, subifds=1, metadata={"axes": "YX"})
        writer.write(pixels[::2, ::2], subfiletype=1)
    with tifffile.TiffWriter(tmp_path / "preview.tif") as writer:
        writer.write(pixels, metadata=None)
        writer.write(pixels[::4, ::4], subfiletype=1, metadata=None)
    for name in ("pyramid.tif", "preview.tif"):
        np.testing.assert_array_equal(read_image(tmp_path / name).pixels[0], pixels)


def test_white_is_zero_is_inverted_and_palette_indices_are_kept(tmp_path: Path) -> None:
    pixels = noise(9, 9, dtype="uint8")
    tifffile.imwrite(tmp_path / "white.tif", pixels, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "white.tif").pixels[0], 255 - pixels)
    colormap = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "palette.tif", pixels, photometric="palette", colormap=colormap)
    np.testing.assert_array_equal(read_image(tmp_path / "palette.tif").pixels[0], pixels)


def test_pixel_size_and_channel_names_come_from_ome_and_imagej_but_not_from_dots_per_inch(tmp_path: Path) -> None:
    pixels = noise(2, 8, 8)
    metadata = {"axes": "CYX", "PhysicalSizeX": 325, "PhysicalSizeY": 325, "Channel": {"Name": ["DNA", "Größe µ"]}}
    units = {"PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}
    tifffile.imwrite(tmp_path / "ome.tif", pixels, ome=True, metadata=metadata | units)
    image = read_image(tmp_path / "ome.tif")
    assert image.pixel_size_um == pytest.approx(0.325)
    assert image.channel_names == ("DNA", "Größe µ")
    imagej = {"axes": "CYX", "unit": "um", "Labels": ["DNA", "ER"]}
    tifffile.imwrite(tmp_path / "ij.tif", pixels, imagej=True, resolution=(4, 4), metadata=imagej)
    image = read_image(tmp_path / "ij.tif")
    assert image.pixel_size_um == pytest.approx(0.25)
    assert image.channel_names == ("DNA", "ER")
    tifffile.imwrite(tmp_path / "dpi.tif", pixels[0], resolution=(72, 72), resolutionunit="INCH", metadata=None)
    assert read_image(tmp_path / "dpi.tif").pixel_size_um is None
    # What ImageJ saves of it: dots an inch have become the image's scale.
    tifffile.imwrite(tmp_path / "inch.tif", pixels[0], imagej=True, resolution=(300, 300), metadata={"unit": "inch"})
    assert read_image(tmp_path / "inch.tif").pixel_size_um is None
    tifffile.imwrite(tmp_path / "oblong.tif", pixels[0], imagej=True, resolution=(4, 2), metadata={"unit": "um"})
    assert read_image(tmp_path / "oblong.tif").pixel_size_um is None


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_round_trip_is_exact(tmp_path: Path, dtype: str, channels: int) -> None:
    pixels = noise(channels, 13, 17, dtype=dtype)
    write_png(tmp_path / "a.png", pixels)
    image = read_image(tmp_path / "a.png")
    assert image.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.is_colour == (channels > 1)
    for size in ((1, 17), (13, 1), (1, 1)):
        write_png(tmp_path / "a.png", pixels[:, : size[0], : size[1]])
        np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels[:3], pixels[:3, : size[0], : size[1]])


def test_png_of_one_bit_is_bool_and_a_palette_is_colours_or_indices(tmp_path: Path) -> None:
    mask = noise(9, 11, dtype="bool")
    PILImage.fromarray(mask).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png").pixels.dtype == np.bool_
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png").pixels[0], mask)
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = PILImage.fromarray(numbers)
    image.putpalette([value for i in range(256) for value in (i, 0, 255 - i)])
    image.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").pixels[:, 1, 2].tolist() == [6, 0, 249]
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png", palette_as_colour=False).pixels[0], numbers)


def test_a_constant_alpha_is_dropped_and_one_that_varies_is_kept(tmp_path: Path) -> None:
    pixels = noise(4, 6, 7, dtype="uint8")
    write_png(tmp_path / "varies.png", pixels)
    tifffile.imwrite(tmp_path / "varies.tif", pixels.transpose(1, 2, 0), photometric="rgb", extrasamples=["unassalpha"])
    pixels[3] = 255
    write_png(tmp_path / "constant.png", pixels)
    tifffile.imwrite(
        tmp_path / "constant.tif", pixels.transpose(1, 2, 0), photometric="rgb", extrasamples=["unassalpha"]
    )
    for suffix in (".png", ".tif"):
        assert read_image(tmp_path / f"varies{suffix}").channel_names == ("red", "green", "blue", "alpha")
        constant = read_image(tmp_path / f"constant{suffix}")
        assert constant.channel_names == ("red", "green", "blue")
        np.testing.assert_array_equal(constant.pixels, pixels[:3])


def test_grey_stored_as_colour_becomes_one_channel_and_real_colour_stays() -> None:
    plane = noise(5, 6, dtype="uint8")
    colour = Image(pixels=np.stack([plane] * 3), channel_names=("red", "green", "blue"), pixel_size_um=0.5)
    np.testing.assert_array_equal(colour.grey().pixels, plane[None])
    assert colour.grey().pixel_size_um == 0.5
    real = Image(pixels=noise(3, 5, 6), channel_names=("red", "green", "blue"))
    assert real.grey() is real
    stains = Image(pixels=np.stack([plane] * 3))  # three equal channels of no known colour are three channels
    assert stains.grey() is stains


def test_channels_are_selected_by_index_or_name() -> None:
    image = Image(pixels=noise(2, 4, 4), channel_names=("DNA", "ER"))
    np.testing.assert_array_equal(image.select("ER").pixels, image.pixels[1:])
    assert image.select(0).channel_names == ("DNA",)
    for wrong in ("er", 2, -1):
        with pytest.raises(ImageError, match="2 channel"):
            image.select(wrong)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_jpeg_and_bmp_are_what_pillow_decodes(tmp_path: Path, suffix: str) -> None:
    pixels = noise(20, 31, 3, dtype="uint8")
    PILImage.fromarray(pixels).save(tmp_path / f"a{suffix}")
    expected = np.asarray(PILImage.open(tmp_path / f"a{suffix}"))
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}").pixels, expected.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 6), (1, 5, 6)), ((5, 6, 3), (3, 5, 6)), ((7, 5, 6), (7, 5, 6)), ((1, 1), (1, 1, 1))]
)
def test_npy_channels_are_first_unless_there_are_three_or_four_last(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    np.save(tmp_path / "a.npy", noise(*shape).astype(">u2"))
    image = read_image(tmp_path / "a.npy")
    assert image.pixels.shape == expected
    assert image.pixels.dtype == np.uint16


@pytest.mark.parametrize("size", ["NaN", "INF", "-1", "0"])
def test_an_invalid_pixel_size_is_unknown(tmp_path: Path, size: str) -> None:
    write_tiff(tmp_path / "a.tif", noise(8, 8), pixel_size_um=0.5)
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content.replace(b'="0.5"', f'="{size}"'.encode().ljust(6)))
    assert read_image(tmp_path / "a.tif").pixel_size_um is None


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_gives_its_highest_resolution_frame_by_frame(tmp_path: Path, version: str) -> None:
    zarr = pytest.importorskip("zarr", reason="the optional package zarr is not installed")
    pixels = noise(2, 3, 8, 9)
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    scale = [{"type": "scale", "scale": [1, 1, 0.65, 0.65]}]
    content = {"multiscales": [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]}
    content["omero"] = {"channels": [{"label": name} for name in ("DNA", "ER", "RNA")]}
    path = tmp_path / "a.ome.zarr"
    attributes = {"ome": content} if version == "0.5" else content
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2, attributes=attributes)
    group.create_array("0", data=pixels, chunks=(1, 1, 8, 9))
    frames = list(read_stack(path))
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in frames]), pixels)
    assert frames[0].channel_names == ("DNA", "ER", "RNA")
    assert frames[0].pixel_size_um == pytest.approx(0.65)
    assert "nowhere.zarr" in one_line(tmp_path / "nowhere.zarr")
    scale[0]["scale"] = [1, 1, float("nan"), float("nan")]
    group.attrs.update({"ome": content} if version == "0.5" else content)
    assert read_image(path, frame=0).pixel_size_um is None


def test_the_content_decides_about_the_format_not_the_suffix(tmp_path: Path) -> None:
    pixels = noise(5, 6, dtype="uint8")
    write_png(tmp_path / "really a png.tif", pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "really a png.tif").pixels[0], pixels)


def test_names_may_have_spaces_and_umlauts(tmp_path: Path) -> None:
    path = tmp_path / "Zellen größe 5 µm #1 日本.tif"
    write_tiff(path, noise(4, 5))
    assert read_image(str(path)).pixels.shape == (1, 4, 5)
    write_png(path.with_suffix(".png"), noise(4, 5))
    assert read_image(path.with_suffix(".png")).pixels.shape == (1, 4, 5)


# What cannot be read whole is an error of one line.


def encoded(kind: str, *, frames: int = 1) -> bytes:
    pixels = noise(frames, 60, 80, dtype="uint8") if frames > 1 else noise(60, 80, dtype="uint8")
    file = io.BytesIO()
    if kind.startswith("tif"):
        compression = kind.removeprefix("tif-") if "-" in kind else None
        # Several strips, so that a cut can fall between two of them.
        tifffile.imwrite(file, pixels, compression=compression, rowsperstrip=8, photometric="minisblack", metadata=None)
    elif kind == "npy":
        np.save(file, pixels)
    else:
        PILImage.fromarray(pixels).save(file, kind)
    return file.getvalue()


KINDS = ["tif", "tif-lzw", "tif-zlib", "tif-zstd", "tif-packbits", "png", "jpeg", "bmp", "npy"]


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), share=st.floats(0, 0.995))
def test_a_truncated_file_is_never_an_image(tmp_path_factory: pytest.TempPathFactory, kind: str, share: float) -> None:
    content = encoded(kind)
    path = tmp_path_factory.getbasetemp() / "cut.img"
    path.write_bytes(content[: int(len(content) * share)])
    one_line(path)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.booleans(), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_files_with_changed_bytes_are_read_or_an_error_of_one_line(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[float, bool, int]]
) -> None:
    content = bytearray(encoded(kind))
    for place, in_header, value in changes:
        content[int(place * (min(len(content), 300) if in_header else len(content)))] = value
    path = tmp_path_factory.getbasetemp() / "changed.img"
    path.write_bytes(content)
    try:
        list(read_stack(path))
    except ImageError as error:
        message = str(error)
    else:
        return
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("compression", ["tif", "tif-zlib"])
def test_a_stack_truncated_between_two_pages_is_an_error(tmp_path: Path, compression: str) -> None:
    whole = encoded(compression, frames=4)
    path = tmp_path / "a.tif"
    path.write_bytes(whole)
    with tifffile.TiffFile(path) as tiff:
        cuts = [page.offset for page in list(tiff.pages)[1:]]
    for cut in (*cuts, cuts[-1] - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(ImageError, match=r"a\.tif: .*(truncated|damaged)"):
            list(read_stack(path))


def test_strips_that_were_never_written_are_an_error_not_black(tmp_path: Path) -> None:
    pixels = noise(16, 16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, rowsperstrip=4, compression="zlib", metadata=None)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        tag = tiff.pages[0].tags["StripByteCounts"]
        size = tag.valuebytecount // tag.count
        content[tag.valueoffset + 2 * size : tag.valueoffset + 3 * size] = bytes(size)
    (tmp_path / "a.tif").write_bytes(content)
    assert "3 of 4 strips" in one_line(tmp_path / "a.tif")


def test_an_ome_set_of_several_files_is_read_and_one_that_misses_a_file_is_an_error_not_black(tmp_path: Path) -> None:
    plane = '<TiffData IFD="0" FirstT="{0}" PlaneCount="1"><UUID FileName="{0}.tif">urn:uuid:{0}</UUID></TiffData>'
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="8" SizeY="8" SizeZ="1" '
        'SizeC="1" SizeT="2">' + plane.format(0) + plane.format(1) + "</Pixels></Image></OME>"
    )
    tifffile.imwrite(tmp_path / "0.tif", noise(8, 8, dtype="uint8"), description=xml, metadata=None)
    with pytest.raises(ImageError, match=r"0\.tif"):
        list(read_stack(tmp_path / "0.tif"))
    other = noise(8, 8, dtype="uint8")
    longer = xml.replace('UUID="urn:uuid:0"', 'UUID="urn:uuid:1"') + " " * 5000
    tifffile.imwrite(tmp_path / "1.tif", other, description=longer, metadata=None)
    np.testing.assert_array_equal(list(read_stack(tmp_path / "0.tif"))[1].pixels[0], other)


def test_a_tag_that_the_decoder_rejects_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(8, 8))

    def refuse(self: tifffile.TiffFile) -> None:
        raise AssertionError  # as tifffile does where a page has a type of number that there is not

    monkeypatch.setattr(tifffile.TiffFile, "series", property(refuse))
    assert "damaged or not supported (AssertionError)" in one_line(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("empty.png", b"", "0 bytes"),
        ("page.tif", b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        ("zeros.tif", bytes(4000), "never fully written"),
        ("lfs.tif", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("cells.lif", b"\x70\x00\x00\x00" + bytes(100), "a .lif file"),
        ("notes.tif", b"hello", "not an image"),
        ("header.tif", b"II*\x00", "damaged"),
        ("nowhere.tif", b"II*\x00\x00\x00\x00\x00", "no image in it"),
        ("objects.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O', ", "damaged"),
    ],
)
def test_other_files_are_identified_in_the_error(tmp_path: Path, name: str, content: bytes, fragment: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert fragment in one_line(tmp_path / name)


def test_missing_files_folders_and_invalid_addresses_are_named(tmp_path: Path) -> None:
    assert "no such file" in one_line(tmp_path / "missing.tif")
    assert "folder" in one_line(tmp_path)
    assert "slash" in one_line(Path("s3://bucket/a.tif"))
    assert "nonsense" in one_line("nonsense://bucket/a.tif")


def test_an_image_larger_than_the_memory_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(8, 8), compression="zlib")

    def allocate(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 90.0 GiB")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", allocate)
    message = one_line(tmp_path / "a.tif")
    assert "memory" in message
    assert "90.0 GiB" in message


def test_errors_of_the_program_are_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "a.png", noise(8, 8))
    monkeypatch.setattr("dinocell.images.read._coloured", None)
    with pytest.raises(TypeError):
        read_image(tmp_path / "a.png")


def test_a_pickle_in_an_npy_is_never_run(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "pickle" in one_line(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", [(3,), (20, 5, 6), (2, 3, 4, 5), (0, 5)])
def test_ambiguous_npy_arrays_are_rejected(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape))
    assert str(shape) in one_line(tmp_path / "a.npy")


def test_colours_that_are_not_rgb_are_rejected(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(5, 5, 4, dtype="uint8"), photometric="separated")
    assert "SEPARATED" in one_line(tmp_path / "a.tif")
    PILImage.new("CMYK", (8, 8)).save(tmp_path / "a.jpg")
    assert "CMYK" in one_line(tmp_path / "a.jpg")


# Elsewhere than on this disk.


def test_memory_addresses_are_read_through_fsspec() -> None:
    fsspec = pytest.importorskip("fsspec")
    pixels = noise(3, 9, 8)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", metadata=None)
    with fsspec.open("memory://plates/größe 1.tif", "wb") as target:
        target.write(file.getvalue())
    assert open_bytes("memory://plates/größe 1.tif") == file.getvalue()
    np.testing.assert_array_equal(np.stack([f.pixels[0] for f in read_stack("memory://plates/größe 1.tif")]), pixels)
    assert "no such file" in one_line("memory://plates/missing.tif")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    with serving_folder(tmp_path) as root:
        yield root


def test_web_addresses_are_read(web: str, tmp_path: Path) -> None:
    pixels = noise(9, 8)
    write_tiff(tmp_path / "a.tif", pixels)
    np.testing.assert_array_equal(read_image(f"{web}/a.tif").pixels[0], pixels)
    assert "404" in one_line(f"{web}/missing.tif")


# Writing.


def test_images_that_may_exceed_four_gigabytes_get_offsets_of_64_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = noise(2, 16, 16)
    for limit, is_big in ((pixels.nbytes, False), (pixels.nbytes - 1, True)):
        monkeypatch.setattr(write, "_CLASSIC_TIFF_BYTES", limit)
        write_tiff(tmp_path / "a.tif", pixels)
        with tifffile.TiffFile(tmp_path / "a.tif") as file:
            assert file.is_bigtiff == is_big
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, pixels)


def test_written_tiffs_carry_channels_and_pixel_size_and_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    pixels = noise(3, 20, 30)
    for name in ("a.tif", "b.tif"):
        write_tiff(tmp_path / name, pixels, pixel_size_um=0.325, channel_names=("DNA", "ER", "größe"))
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.pixel_size_um == pytest.approx(0.325)
    assert image.channel_names == ("DNA", "ER", "größe")
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (1, 7, 9), (4, 7, 9)])
def test_written_tiffs_come_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    pixels = noise(*shape, dtype=dtype)
    write_tiff(tmp_path / "a.tif", pixels)
    image = read_image(tmp_path / "a.tif")
    assert image.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(image.pixels, pixels if pixels.ndim == 3 else pixels[None])


@pytest.mark.parametrize(("highest", "dtype"), [(65535, "uint16"), (65536, "uint32"), (2**32 - 1, "uint32")])
def test_labels_keep_their_ids_in_the_smallest_type_that_holds_them(tmp_path: Path, highest: int, dtype: str) -> None:
    labels = np.zeros((5, 6), np.int64)
    labels[2, 3] = highest
    write_labels(tmp_path / "a.tif", labels)
    back = read_image(tmp_path / "a.tif").pixels[0]
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, labels)
    assert np.asarray(tifffile.imread(tmp_path / "a.tif")).shape == (5, 6)


def test_labels_beyond_32_bits_are_rejected(tmp_path: Path) -> None:
    for wrong in (-1, 2**32):
        with pytest.raises(ValueError, match="expected ids"):
            write_labels(tmp_path / "a.tif", np.full((2, 2), wrong))


def test_failed_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiff(tmp_path / "a.tif", noise(4, 4))
    before = (tmp_path / "a.tif").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", full)
    with pytest.raises(ImageError, match="No space left"):
        write_tiff(tmp_path / "a.tif", noise(5, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
    assert (tmp_path / "a.tif").read_bytes() == before
    monkeypatch.undo()
    with pytest.raises(ImageError, match="cannot be written"):
        write_png(tmp_path / "no folder" / "a.png", noise(4, 4))


# Grey levels.


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["bool", "uint8", "uint16", "int32", "float32"]),
    size=st.integers(1, 50),
    percent=st.tuples(st.floats(0, 100), st.floats(0, 100)).map(sorted),
    seed=st.integers(0, 1000),
)
def test_percentiles_are_numpys(dtype: str, size: int, percent: list[float], seed: int) -> None:
    pixels = (np.random.default_rng(seed).random((size, 3)) * 300).astype(dtype)
    low, high = percentile_range(pixels, *percent)
    np.testing.assert_allclose((low, high), np.percentile(pixels.astype(float), percent), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "float16"])
def test_percentiles_between_the_ends_of_a_type(dtype: str) -> None:
    top = 60_000 if dtype == "float16" else np.iinfo(dtype).max
    pixels = np.array([[top, -top]], dtype)
    assert percentile_range(pixels, 0, 50) == (-top, 0)
    assert to_uint8(pixels, -top, top).tolist() == [[255, 0]]


def test_8_bits_of_an_8_bit_image_are_itself() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(to_uint8(pixels, 0, 255), pixels)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_the_range_is_mapped_to_black_and_white(dtype: str) -> None:
    pixels = np.array([[0, 100, 150, 200, 999]], dtype)
    assert to_uint8(pixels, 100, 200).tolist() == [[0, 0, 128, 255, 255]]


def test_constant_images_become_black() -> None:
    for dtype in ("uint8", "uint16", "float32"):
        pixels = np.full((4, 4), 7, dtype)
        assert to_uint8(pixels, *percentile_range(pixels, 0.1, 99.9)).tolist() == np.zeros((4, 4)).tolist()
    assert to_uint8(np.array([[True, False]]), 0, 1).tolist() == [[255, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_errors(bad: float) -> None:
    pixels = np.ones((3, 3), np.float32)
    pixels[1, 1] = bad
    with pytest.raises(ImageError, match="1 of 9 values"):
        percentile_range(pixels, 0, 100)
    with pytest.raises(ImageError, match="1 of 9 values"):
        to_uint8(pixels, 0, 1)


# The real files.


# Folder and pattern, number of files, axes of the array that tifffile or Pillow gives.
REAL_FILES = [
    ("dsb2018_stage1_train/*/images/*.png", 60, "yxc"),
    ("bbbc039/images/*.tif", 12, "yx"),
    ("bbbc039/masks/*.png", 12, "yxc"),
    ("usiigaci_t98g/*/raw.tif", 6, "yx"),
    ("usiigaci_t98g/*/instances_ids.png", 6, "yx"),
    ("stardist_2d/*/*.tif", 4, "yx"),
    ("ctc_layout_ipsc/02_GT/SEG/*.tif", 41, "yx"),
    ("coco_polygons_nanoshapes/*.jpg", 4, "yxc"),
    ("jump_cell_painting/*.tiff", 6, "yx"),
    ("nf1_schwann_cell_painting/Plate_2_images/*.tif", 9, "yx"),
    ("nf1_schwann_cell_painting/Plate_2_masks/*.tiff", 9, "yx"),
    ("hpa_4channel/*.jpg", 4, "yxc"),
    ("hpa_reference_3channel/*.tiff", 2, "yxc"),
    ("cellprofiler_examplehuman/*.tif", 3, "yx"),
    ("livecell_phase/images/*.tif", 7, "yx"),
    ("fields/a549_phase_1ch/*.tif", 10, "cyx"),
    ("fields/fly_kc167_3ch/*.tif", 3, "cyx"),
    ("fields/skns_phenix_4ch/*.tif", 2, "cyx"),
]


@needs_data
@pytest.mark.parametrize(("pattern", "count", "axes"), REAL_FILES)
def test_every_real_file_reads_as_its_own_decoder_reads_it(pattern: str, count: int, axes: str) -> None:
    paths = sorted(DATA.glob(pattern))
    if not paths:
        pytest.skip(f"no ../shared/data/{pattern}")
    assert len(paths) == count
    for path in paths:
        decoded = tifffile.imread(path) if path.suffix in (".tif", ".tiff") else np.asarray(PILImage.open(path))
        assert decoded.ndim == len(axes), path
        if axes == "yxc":
            decoded = decoded.transpose(2, 0, 1)[:3]  # without alpha
        pixels = read_image(path).pixels
        assert pixels.dtype == decoded.dtype, path
        np.testing.assert_array_equal(pixels, decoded[None] if axes == "yx" else decoded, err_msg=str(path))


@needs_data
def test_the_calibration_of_a_real_metamorph_file_is_its_pixel_size() -> None:
    path = next(DATA.glob("bbbc039/images/IXMtest_A20*.tif"))
    assert read_image(path).pixel_size_um == pytest.approx(0.645)


@needs_data
def test_the_real_grey_images_stored_as_rgba_become_one_channel() -> None:
    kinds = [len(read_image(path).grey().pixels) for path in DATA.glob("dsb2018_stage1_train/*/images/*.png")]
    assert (kinds.count(1), kinds.count(3)) == (52, 8)


@needs_data
def test_a_real_field_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    names = ("ER", "RNA", "Mito", "DNA", "AGP")
    paths = [DATA / "jump_cell_painting" / f"r01c02f01p01-ch{k}sk1fk1fl1.tiff" for k in range(1, 6)]
    pixels = np.concatenate([read_image(path).pixels for path in paths])
    write_tiff(tmp_path / "field.ome.tiff", pixels, channel_names=names)
    image = read_image(tmp_path / "field.ome.tiff")
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.channel_names == names


def test_the_mean_of_channels_weighs_dim_and_bright_stains_alike() -> None:
    rng = np.random.default_rng(0)
    dim, bright = rng.random((2, 32, 48))
    pixels = np.stack([np.rint(dim * 100), np.rint(bright * 60_000)]).astype(np.uint16)
    mean = Image(pixels=pixels, channel_names=("DNA", "ER")).select("mean")
    low, high = np.percentile(pixels, (0.1, 99.9), axis=(1, 2), keepdims=True)
    expected = np.clip((pixels - low) / (high - low), 0, 1).mean(0)
    np.testing.assert_allclose(mean.pixels[0], expected, atol=1e-6)
    assert mean.channel_names == ("mean",)


def test_the_plane_is_the_chosen_channel_or_the_mean() -> None:
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    image = Image(pixels=pixels, channel_names=("DNA", "ER"))
    np.testing.assert_array_equal(image.plane("ER"), pixels[1])
    np.testing.assert_array_equal(image.plane(0), pixels[0])
    np.testing.assert_array_equal(image.plane(), image.mean().pixels[0])


@pytest.mark.parametrize(
    ("shape", "dtype", "channels", "names"),
    [
        ((5, 4), np.uint8, 1, ()),
        ((2, 40, 50), np.uint16, 2, ()),
        ((40, 50, 3), np.uint8, 3, ("red", "green", "blue")),
        ((40, 50, 4), np.uint8, 4, ("red", "green", "blue", "alpha")),
        ((4, 40, 50), np.uint16, 4, ()),
    ],
)
def test_an_array_becomes_an_image(shape: tuple[int, ...], dtype: type, channels: int, names: tuple[str, ...]) -> None:
    image = as_image(np.zeros(shape, dtype))
    assert len(image.pixels) == channels
    assert image.channel_names == names


@pytest.mark.parametrize("shape", [(0, 4), (7,), (2, 3, 4, 5), (20, 40, 50)])
def test_an_array_that_is_no_image_is_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="expected"):
        as_image(np.zeros(shape))


def test_a_channel_that_is_called_mean_is_that_channel() -> None:
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    image = Image(pixels=pixels, channel_names=("mean", "other"))
    np.testing.assert_array_equal(image.select("mean").pixels[0], pixels[0])


def test_the_mean_of_a_grey_image_stored_as_rgb_with_alpha_is_that_image() -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    pixels = np.stack([grey, grey, grey, grey[::-1]])
    mean = Image(pixels=pixels, channel_names=("red", "green", "blue", "alpha")).mean()
    np.testing.assert_array_equal(mean.pixels, grey[None])
