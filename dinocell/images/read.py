"""Read image files: the stored values in their own type, or an error of one line that names the file.

The format follows from a file's first bytes, not from its name. A truncated file is an error, never an image with a
black part.

- TIFF: 8 to 64 bit, integer, float, bool; every compression of imagecodecs; ImageJ, OME, MetaMorph; pyramids at full
  size. Of a palette (ImageJ's lookup tables) the indices are the values. Images stored with 0 as white are inverted.
- PNG: 8 and 16 bit, grey, colour, alpha. A palette becomes its colours (its indices on request, for masks).
- JPEG, BMP: 8 bit.
- .npy: (h w), (h w 3), (h w 4), or (c h w) with up to 16 channels.
- OME-Zarr: the folder or address of a group (needs the package ``zarr``), at its highest resolution.
- ND2, CZI: local files (needs the extra ``microscopes``); scenes, time points and slices are frames.
"""

import io
import itertools
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import imagecodecs
import numpy as np
from jaxtyping import Shaped

from dinocell.errors import ImageError, StackError, one_line
from dinocell.images.image import COLOURS, MAX_CHANNELS, Image, header_errors, is_constant, native, square_pixel
from dinocell.images.storage import bucket_options, local_path, open_bytes

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile


IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".npy", ".zarr", ".nd2", ".czi")

_PNG, _JPEG, _BMP, _NPY = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"\x93NUMPY"
_ND2, _OLD_ND2, _CZI = b"\xda\xce\xbe\x0a", b"\x00\x00\x00\x0cjP  ", b"ZISRAWFILE"
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

# What decoders raise on damaged pixels; imagecodecs' errors are RuntimeErrors. For headers see `header_errors`.
_DECODER_ERRORS = (ValueError, RuntimeError, OSError, EOFError, ArithmeticError)


def has_image_name(name: str) -> bool:
    """Return whether a file name is an image's: not hidden, and not Cellpose's ``NAME_seg.npy``, a pickle."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and not name.lower().endswith("_seg.npy")


def image_stem(name: str) -> str:
    """Return a file name without its image suffix: ``2026.01.05`` of ``2026.01.05.ome.tif``."""
    endings = (".ome.tif", ".ome.tiff", *IMAGE_SUFFIXES)
    return next((name[: -len(ending)] for ending in endings if name.lower().endswith(ending)), name)


def read_image(
    path: str | Path, *, frame: int | None = None, frames_as_channels: bool = False, palette_as_colour: bool = True
) -> Image:
    """Read one image from a file.

    Parameters
    ----------
    path
        A local path, or an address (``https://``, ``s3://``, ``memory://``...).
    frame
        Index of a frame in a stack (time points, slices, pages). None expects a file with one frame.
    frames_as_channels
        Use the frames of a stack, equal in size and type, as the channels of one image.
    palette_as_colour
        False returns the indices of a palette PNG, which are labels in masks, instead of the colours.

    Raises
    ------
    ImageError
        If the file cannot be read completely, or has several frames and none is chosen; one line that names the file.
    """
    with _errors_named(path), _open(path, palette_as_colour=palette_as_colour) as frames:
        if frames_as_channels:
            return _as_channels([frames[index] for index in range(len(frames))])
        if frame is None and len(frames) > 1:
            raise StackError(
                f"a stack of {len(frames)} frames (time, depth or pages), where one image was expected; "
                "choose a frame, read them one by one, or take them as channels"
            )
        if not 0 <= (frame or 0) < len(frames):
            raise ImageError(f"no frame {frame}: it has {len(frames)} (the first is 0)")
        return frames[frame or 0]


def read_stack(path: str | Path) -> Iterator[Image]:
    """Yield the frames of a file one by one, in the file's order; errors as in `read_image`."""
    with _errors_named(path), _open(path) as frames:
        for index in range(len(frames)):
            yield frames[index]


def count_frames(path: str | Path) -> int:
    """Return the number of frames; reads only the headers of a TIFF. Errors as in `read_image`."""
    with _errors_named(path), _open(path) as frames:
        return len(frames)


@contextmanager
def _errors_named(path: str | Path) -> Iterator[None]:
    """Turn the errors of decoders into an ImageError of one line that names the file."""
    try:
        yield
    except (*_DECODER_ERRORS, MemoryError) as error:
        reason = one_line(error)
        if isinstance(error, MemoryError):
            reason = f"larger than the free memory, or its header is damaged ({reason})"
        elif not isinstance(error, ImageError):
            reason = f"damaged or not supported ({reason[:200]}); copy it again or convert it to TIFF"
        kind = StackError if isinstance(error, StackError) else ImageError
        raise kind(reason if str(path) in reason else f"{path}: {reason}") from error


@runtime_checkable
class _Frames(Protocol):
    """An open image file whose frames are read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image: ...


@contextmanager
def _open(path: str | Path, *, palette_as_colour: bool = True) -> Iterator[_Frames]:
    if str(path).rstrip("/").endswith(".zarr"):
        yield _ZarrFrames(str(path))
        return
    local = local_path(path)
    content = open_bytes(path) if local is None else None
    head = content[:512] if content is not None else open_bytes(path, first=512)
    is_nd2_or_czi = head.startswith((_ND2, _CZI)) or (head.startswith(_OLD_ND2) and str(path).lower().endswith(".nd2"))
    if head.startswith(_TIFF):
        from dinocell.images.tiff import TiffFrames

        with closing(TiffFrames(str(local) if content is None else io.BytesIO(content))) as frames:
            yield frames
    elif head.startswith((_PNG, _JPEG, _BMP, _NPY)):
        yield [_decode(content if content is not None else open_bytes(path), palette_as_colour)]
    elif is_nd2_or_czi and local is not None:
        yield _BioioFrames(str(local))
    else:
        raise ImageError(
            "ND2 and CZI files must be local; download it first"
            if is_nd2_or_czi
            else _not_an_image(head, Path(str(path)).suffix.lower())
        )


def _not_an_image(head: bytes, suffix: str) -> str:
    """Return what a file is instead of an image, by its first bytes, and what to do."""
    start = head.lstrip().lower()
    if not head:
        return "the file is empty (0 bytes); copy or download it again"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "a web page or XML text, not an image; the download went wrong, fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image; run 'git lfs pull' in its repository"
    if not head.strip(b"\x00"):
        return "begins with zeros only; the file was never fully written, copy it again"
    what = f"a {suffix} file" if suffix and suffix not in IMAGE_SUFFIXES else "not an image that can be read"
    return f"{what}; convert it to TIFF or PNG (readable: TIFF, PNG, JPEG, BMP, .npy, OME-Zarr, ND2, CZI)"


def _decode(content: bytes, palette_as_colour: bool) -> Image:
    if content.startswith(_PNG):
        return _decode_png(content, palette_as_colour)
    if content.startswith(_NPY):
        return _decode_npy(content)
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.JpegImagePlugin import JpegImageFile

    # Not Image.open, which rejects whole slides as decompression bombs. Not imagecodecs, which fills the missing part
    # of a truncated JPEG with grey.
    opener = JpegImageFile if content.startswith(_JPEG) else BmpImageFile
    with _opened(opener, content) as image:
        if image.mode == "P":
            return _coloured(np.asarray(image.convert("RGB")))
        if image.mode not in ("1", "L", "RGB", "RGBA"):
            raise ImageError(f"its colours are {image.mode}; convert it to RGB or grey")
        return _coloured(np.asarray(image))


def _opened(opener: "type[ImageFile]", content: bytes) -> "ImageFile":
    with header_errors():
        return opener(io.BytesIO(content))


def _decode_png(content: bytes, palette_as_colour: bool) -> Image:
    bit_depth, colour_type = content[24:26]
    if colour_type == 3 and not palette_as_colour:
        from PIL.PngImagePlugin import PngImageFile

        with _opened(PngImageFile, content) as image:
            return Image(pixels=np.asarray(image)[None].copy())
    # Not Pillow, which reduces 16-bit colour to 8 bit.
    pixels = imagecodecs.png_decode(content)
    return _coloured(pixels > 0 if bit_depth == 1 and pixels.ndim == 2 and colour_type == 0 else pixels)


def _coloured(pixels: Shaped[np.ndarray, "h w *c"]) -> Image:
    """Return (h w) or (h w 1|2|3|4) as an image: grey, grey + alpha, RGB, RGB + alpha."""
    pixels = np.atleast_3d(pixels).transpose(2, 0, 1)
    names: tuple[str, ...] = {1: (), 2: ("grey", "alpha"), 3: COLOURS, 4: (*COLOURS, "alpha")}[len(pixels)]
    if names[-1:] == ("alpha",) and is_constant(pixels[-1]):
        pixels, names = pixels[:-1], names[:-1] if len(names) == 4 else ()
    return Image(pixels=np.ascontiguousarray(pixels), channel_names=names)


def _decode_npy(content: bytes) -> Image:
    with header_errors():
        pixels = np.load(io.BytesIO(content), allow_pickle=False)
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
        pixels = pixels.transpose(2, 0, 1)
    if pixels.dtype.kind not in "buif" or pixels.size == 0 or pixels.ndim != 3 or len(pixels) > MAX_CHANNELS:
        raise ImageError(
            f"{pixels.dtype} of shape {shape}; expected bool, integer or float of (h w), (h w 3), (h w 4) or "
            f"(c h w) with at most {MAX_CHANNELS} channels; save stacks as TIFF with named axes"
        )
    return Image(pixels=native(pixels))


def _as_channels(frames: list[Image]) -> Image:
    kinds = {(frame.pixels.shape[1:], frame.pixels.dtype) for frame in frames}
    if len(kinds) > 1:
        raise ImageError(f"{len(frames)} frames of {len(kinds)} sizes or types cannot be the channels of one image")
    names = frames[0].channel_names if len(frames) == 1 else ()
    return replace(frames[0], pixels=np.concatenate([frame.pixels for frame in frames]), channel_names=names)


class _ZarrFrames:
    """An OME-Zarr group at its highest resolution, as a list of frames that are read one at a time.

    Missing chunks have the array's fill value, as the format defines it: an incomplete copy is indistinguishable from
    an empty region. Read with the package zarr alone: bioio needs two more packages and gives no access by bucket.
    """

    @header_errors()
    def __init__(self, address: str) -> None:
        try:
            import zarr
        except ImportError:
            raise ImageError("reading OME-Zarr needs the package zarr: pip install 'zarr>=3'") from None
        group: Any = zarr.open_group(address, mode="r", storage_options=bucket_options(address) or None)
        attributes: dict[str, Any] = dict(group.attrs)
        attributes = attributes.get("ome", attributes)  # version 0.5 has one key for everything
        if not attributes.get("multiscales"):
            raise ImageError("not an OME-Zarr image: no 'multiscales'; images of a plate are in its subfolders")
        scales = attributes["multiscales"][0]
        self._array = group[scales["datasets"][0]["path"]]
        axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in scales["axes"]]
        names = [str(axis["name"]).lower() for axis in axes]
        if names[-2:] != ["y", "x"] or len(names) != len(self._array.shape):
            raise ImageError(f"its axes are {names}, of sizes {self._array.shape}; expected y and x as the last two")
        self._frame_axes = [k for k, name in enumerate(names) if name not in ("c", "y", "x")]
        self._frame_shape = [int(self._array.shape[k]) for k in self._frame_axes]
        self._pixel_size_um = _zarr_pixel_size_um(axes, scales)
        channels = attributes.get("omero", {}).get("channels", [])
        self._channel_names = tuple(str(channel.get("label", "")) for channel in channels)

    def __len__(self) -> int:
        return math.prod(self._frame_shape)

    @header_errors()
    def __getitem__(self, index: int) -> Image:
        selection: list[Any] = [slice(None)] * len(self._array.shape)
        for axis, position in zip(self._frame_axes, np.unravel_index(index, self._frame_shape), strict=True):
            selection[axis] = int(position)
        return _image(self._array[tuple(selection)], self._channel_names, self._pixel_size_um)


def _zarr_pixel_size_um(axes: list[dict[str, Any]], scales: dict[str, Any]) -> float | None:
    sizes = np.ones(len(axes))
    for level in (scales["datasets"][0], scales):
        for transform in level.get("coordinateTransformations", []):
            if transform["type"] == "scale":
                sizes = sizes * transform["scale"]
    um_per_unit = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3}
    units = [um_per_unit.get(str(axis.get("unit"))) for axis in axes[-2:]]
    if units[0] is None or units[0] != units[1]:
        return None
    return square_pixel(float(sizes[-1] * units[0]), float(sizes[-2] * units[0]))


class _BioioFrames:
    """A local ND2 or CZI file through bioio, as a list of frames: scenes, their time points, and slices of these."""

    @header_errors()
    def __init__(self, path: str) -> None:
        self._file: Any = None
        with suppress(ImportError):
            from bioio import BioImage
            from bioio_base.exceptions import UnsupportedFileFormatError

            with suppress(UnsupportedFileFormatError):  # bioio is installed without its plug-in for this format
                self._file = BioImage(path)
        if self._file is None:
            raise ImageError(
                "reading ND2 and CZI needs an extra: pip install 'dinocell-toolkit[microscopes]', or export as OME-TIFF"
            )
        self._frames: list[tuple[int, int, int]] = []
        for scene in range(len(self._file.scenes)):
            self._file.set_scene(scene)
            sizes = self._file.dims
            self._frames += itertools.product([scene], range(sizes.T), range(sizes.Z))

    def __len__(self) -> int:
        return len(self._frames)

    @header_errors()
    def __getitem__(self, index: int) -> Image:
        scene, time, z = self._frames[index]
        self._file.set_scene(scene)
        is_colour = "S" in self._file.dims.order
        pixels = self._file.get_image_dask_data("CSYX" if is_colour else "CYX", T=time, Z=z).compute()
        size = self._file.physical_pixel_sizes
        names = tuple(self._file.channel_names or ())
        if is_colour and math.prod(pixels.shape[:-2]) == len(COLOURS):
            names = COLOURS
        return _image(pixels, names, square_pixel(size.X, size.Y))


def _image(pixels: Any, names: tuple[str, ...], pixel_size_um: float | None) -> Image:
    """Return (... h w) as an image; names are dropped unless every channel has one."""
    pixels = np.asarray(pixels)
    pixels = native(pixels.reshape(-1, *pixels.shape[-2:]))
    names = names if len(names) == len(pixels) and all(names) else ()
    return Image(pixels=pixels, channel_names=names, pixel_size_um=pixel_size_um)
