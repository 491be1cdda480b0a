"""Reading and writing images: any file of a microscope or an archive in, exact values out, or one clear line.

What a file is, its first bytes say, not its name: a PNG named ``.tif`` is read as the PNG that it is. Values come as
they are stored, in their own type. A file that is cut short is an error, never an image with a black part.

- TIFF: 8 to 64 bit, integer, float, bool; every compression of imagecodecs; ImageJ, OME, MetaMorph; pyramids at full
  size. A palette (ImageJ's lookup tables) only colours: its numbers are the values. Stored with 0 as white: turned.
- PNG: 8 and 16 bit, grey, colour, alpha. A palette becomes its colours (its numbers on demand, for masks).
- JPEG, BMP: 8 bit.
- .npy: (h w), (h w 3), (h w 4), or (c h w) with up to 16 channels.
- OME-Zarr: the folder or address of a group (needs the package ``zarr``), at its highest resolution.
- ND2, CZI: on this disk (needs the extra ``microscopes``); scenes, time points and slices are frames.
"""

import io
import struct
import tokenize
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinocell.errors import ImageError, StackError
from dinocell.images.image import COLOURS, MOST_CHANNELS, Frames, Image, percentile_range, to_uint8
from dinocell.images.storage import local_path, open_bytes
from dinocell.images.write import write_labels, write_png, write_tiff

__all__ = [
    "Image",
    "count_frames",
    "has_image_name",
    "image_stem",
    "open_bytes",
    "percentile_range",
    "read_image",
    "read_stack",
    "to_uint8",
    "write_labels",
    "write_png",
    "write_tiff",
]

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".npy", ".zarr", ".nd2", ".czi")

_PNG, _JPEG, _BMP, _NPY = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"\x93NUMPY"
_ND2, _OLD_ND2, _CZI = b"\xda\xce\xbe\x0a", b"\x00\x00\x00\x0cjP  ", b"ZISRAWFILE"
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

# What the decoders raise on damaged files. imagecodecs' own errors are RuntimeErrors; Pillow adds SyntaxError; tifffile
# stumbles over damaged tags in every way that Python knows.
_DECODER_ERRORS = (
    ValueError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    SyntaxError,
    struct.error,
    zlib.error,
    tokenize.TokenError,
)


def has_image_name(name: str) -> bool:
    """Say whether a file is an image by its name: hidden ones are not, nor what Cellpose leaves beside images.

    Its ``NAME_seg.npy`` is a pickle of masks and settings, which nothing here would open.
    """
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and not name.lower().endswith("_seg.npy")


def image_stem(name: str) -> str:
    """Return an image's name, with folders or without, less its ending: ``2026.01.05`` of ``2026.01.05.ome.tif``."""
    endings = (".ome.tif", ".ome.tiff", *IMAGE_SUFFIXES)
    return next((name[: -len(ending)] for ending in endings if name.lower().endswith(ending)), name)


def read_image(
    path: str | Path, *, frame: int | None = None, frames_as_channels: bool = False, palette_as_colour: bool = True
) -> Image:
    """Read one image.

    Parameters
    ----------
    path
        A path on this disk, or an address (``https://``, ``s3://``, ``memory://``...).
    frame
        Which frame of a stack (time points, slices, pages), from 0. None expects a file with one.
    frames_as_channels
        Take the frames of a stack, equal in size and type, as the channels of one image.
    palette_as_colour
        False returns the numbers of a palette PNG, as masks mean them, instead of the colours.

    Raises
    ------
    ImageError
        If the file cannot be read whole, or holds several frames and none was chosen. One line, which names the file.
    """
    with _errors_named(path), closing(_open(path, palette_as_colour=palette_as_colour)) as frames:
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
    """Yield the frames of a file one by one, in its order; a single image is a stack of one.

    Raises
    ------
    ImageError
        As ``read_image`` does.
    """
    with _errors_named(path):
        frames = _open(path)
    with closing(frames):
        for index in range(len(frames)):
            with _errors_named(path):
                image = frames[index]
            yield image


def count_frames(path: str | Path) -> int:
    """Return the number of frames; reads only the headers of a TIFF.

    Raises
    ------
    ImageError
        As ``read_image`` does.
    """
    with _errors_named(path), closing(_open(path)) as frames:
        return len(frames)


@contextmanager
def _errors_named(path: str | Path) -> Iterator[None]:
    """Turn whatever a damaged file makes a decoder raise into one line that names the file."""
    try:
        yield
    except ImageError as error:
        if str(path) in str(error):
            raise
        kind = StackError if isinstance(error, StackError) else ImageError
        raise kind(f"{path}: {error}") from error
    except _DECODER_ERRORS as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{path}: damaged or not supported ({cause}); copy it again or convert it to TIFF") from error


class _OneFrame:
    """A file that holds one image."""

    def __init__(self, image: Image) -> None:
        self._image = image

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Image:
        return self._image

    def close(self) -> None:
        """Nothing is held open."""


def _open(path: str | Path, *, palette_as_colour: bool = True) -> Frames:
    if str(path).rstrip("/").endswith(".zarr"):
        from dinocell.images.microscope import ZarrFrames

        return ZarrFrames(str(path))
    local = local_path(path)
    content = open_bytes(path) if local is None else None
    head = content[:512] if content is not None else _head(local or Path(path))
    if head.startswith(_TIFF):
        from dinocell.images.tiff import TiffFrames

        return TiffFrames(str(local) if content is None else io.BytesIO(content))
    if head.startswith((_ND2, _CZI)) or (head.startswith(_OLD_ND2) and str(path).lower().endswith(".nd2")):
        from dinocell.images.microscope import MicroscopeFrames

        if local is None:
            raise ImageError("ND2 and CZI are read from this disk only; download it first")
        return MicroscopeFrames(str(local))
    _check_known(head, str(path))
    return _OneFrame(_decode(content if content is not None else open_bytes(path), palette_as_colour))


def _head(path: Path) -> bytes:
    if not path.is_file():
        return open_bytes(path)[:512]  # raises: missing, a folder
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error


def _check_known(head: bytes, name: str) -> None:
    """Raise, saying what the file is instead, unless its first bytes are those of an image."""
    if head.startswith((_PNG, _JPEG, _BMP, _NPY)):
        return
    start = head.lstrip().lower()
    if not head:
        raise ImageError(f"{name}: the file is empty (0 bytes); copy or download it again")
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        raise ImageError(f"{name}: a web page or XML text, not an image; the download went wrong, fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise ImageError(f"{name}: a Git LFS pointer, not the image; run 'git lfs pull' where it comes from")
    if not head.strip(b"\x00"):
        raise ImageError(f"{name}: begins with zeros only; the file was never fully written, copy it again")
    suffix = Path(name).suffix.lower()
    what = f"a {suffix} file" if suffix and suffix not in IMAGE_SUFFIXES else "not an image that can be read"
    raise ImageError(
        f"{name}: {what}; convert it to TIFF or PNG (readable: TIFF, PNG, JPEG, BMP, .npy, OME-Zarr, ND2, CZI)"
    )


def _decode(content: bytes, palette_as_colour: bool) -> Image:
    if content.startswith(_PNG):
        return _decode_png(content, palette_as_colour)
    if content.startswith(_NPY):
        return _decode_npy(content)
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.ImageFile import ImageFile
    from PIL.JpegImagePlugin import JpegImageFile

    # Named, not Image.open: whole slides are larger than what that function takes for an attack.
    # Pillow, not imagecodecs: that one fills the rest of a JPEG which is cut short with grey.
    opener: type[ImageFile] = JpegImageFile if content.startswith(_JPEG) else BmpImageFile
    with opener(io.BytesIO(content)) as image:
        if image.mode == "P":
            return _coloured(np.asarray(image.convert("RGB")))
        if image.mode not in ("1", "L", "RGB", "RGBA"):
            raise ImageError(f"its colours are {image.mode}; convert it to RGB or grey")
        return _coloured(np.asarray(image))


def _decode_png(content: bytes, palette_as_colour: bool) -> Image:
    bit_depth, colour_type = content[24], content[25]
    if colour_type == 3 and not palette_as_colour:
        from PIL.PngImagePlugin import PngImageFile

        with PngImageFile(io.BytesIO(content)) as image:
            return Image(pixels=np.asarray(image)[None].copy())
    import imagecodecs

    # imagecodecs, not Pillow: Pillow halves the bits of 16-bit colour.
    pixels = imagecodecs.png_decode(content)
    return _coloured(pixels > 0 if bit_depth == 1 and pixels.ndim == 2 and colour_type == 0 else pixels)


def _coloured(pixels: np.ndarray) -> Image:
    """Return (h w) or (h w 1|2|3|4) as an image: grey, grey + alpha, RGB, RGB + alpha."""
    pixels = np.atleast_3d(pixels)
    names: tuple[str, ...] = {1: (), 2: ("grey", "alpha"), 3: COLOURS, 4: (*COLOURS, "alpha")}[pixels.shape[-1]]
    if names[-1:] == ("alpha",) and (pixels[..., -1] == pixels[0, 0, -1]).all():
        pixels = pixels[..., :-1]
        names = names[:-1] if len(names) == 4 else ()
    return Image(pixels=np.ascontiguousarray(pixels.transpose(2, 0, 1)), channel_names=names)


def _decode_npy(content: bytes) -> Image:
    file = io.BytesIO(content)
    pixels = np.load(file, allow_pickle=False)
    if pixels.dtype.kind not in "buif":
        raise ImageError(f"an array of {pixels.dtype}; expected bool, integer or float")
    if pixels.size == 0:
        raise ImageError(f"an array of shape {pixels.shape}, without a pixel")
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
        pixels = pixels.transpose(2, 0, 1)
    elif pixels.ndim != 3 or len(pixels) > MOST_CHANNELS:
        raise ImageError(
            f"an array of shape {pixels.shape}; expected (h w), (h w 3), (h w 4) or (c h w) with at most "
            f"{MOST_CHANNELS} channels; save stacks as TIFF with named axes"
        )
    return Image(pixels=np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("=")))


def _as_channels(frames: list[Image]) -> Image:
    kinds = {(frame.pixels.shape[1:], frame.pixels.dtype) for frame in frames}
    if len(kinds) > 1:
        raise ImageError(f"{len(frames)} frames of {len(kinds)} sizes or types cannot be the channels of one image")
    names = frames[0].channel_names if len(frames) == 1 else ()
    return replace(frames[0], pixels=np.concatenate([frame.pixels for frame in frames]), channel_names=names)
