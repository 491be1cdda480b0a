"""The frames of a TIFF file, whatever its flavour: plain, ImageJ, OME, MetaMorph; and what it says about itself.

A frame is one two-dimensional image with its channels. The axes C (channel) and S (sample of a colour) become
channels; every other axis longer than 1 - time, depth, the pages of a plain multi-page file, the images of an OME
file - counts frames, in the order of the file. Previews (pages marked as reduced) are not frames.
"""

import io
import logging
import math
import os
import struct
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import tifffile

from dinocell.errors import ImageError
from dinocell.images.image import COLOURS, Image, square_pixel

_UM_PER_UNIT = {"um": 1.0, "µm": 1.0, "μm": 1.0, "micron": 1.0, "microns": 1.0, "\\u00b5m": 1.0}
_UM_PER_UNIT |= {"nm": 1e-3, "mm": 1e3, "cm": 1e4}

# tifffile logs what it finds odd. What makes an image incomplete is checked below; the rest is no news to a user who
# has not set up logging (without a handler, Python prints it to stderr).
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class TiffFrames:
    """An open TIFF file, as a list of frames that are read one at a time.

    Parameters
    ----------
    file
        A path on this disk, or the bytes of the file.
    """

    def __init__(self, file: str | io.BytesIO) -> None:
        self._tiff = tifffile.TiffFile(file)
        try:
            self._size = _num_bytes(file)
            _check_page_chain(self._tiff, self._size)
            self._series = [
                _Series(self._tiff, series, number, None if isinstance(file, str) else file)
                for number, series in enumerate(self._tiff.series)
                if not series.keyframe.is_reduced
            ]
        except BaseException:
            self._tiff.close()
            raise

    def __len__(self) -> int:
        return sum(series.num_frames for series in self._series)

    def __getitem__(self, index: int) -> Image:
        for series in self._series:
            if index < series.num_frames:
                return series.read(index, self._size)
            index -= series.num_frames
        raise IndexError(index)

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()


class _Series:
    """Pages of one size and type, laid out along named axes."""

    def __init__(self, tiff: tifffile.TiffFile, series: Any, number: int, content: io.BytesIO | None) -> None:
        self._tiff, self._series, self._content = tiff, series, content
        self._axes, self._shape = str(series.axes), tuple(int(size) for size in series.shape)
        if not {"Y", "X"} <= set(self._axes):
            raise ImageError(f"no image in it: its axes are {self._axes}, of sizes {self._shape}")
        self._frame_axes = [k for k, axis in enumerate(self._axes) if axis not in "CSYX"]
        self._frame_shape = [self._shape[k] for k in self._frame_axes]
        self.num_frames = math.prod(self._frame_shape)
        page = series.keyframe
        self._compression, self._photometric = page.compression.name, page.photometric.name
        undecoded = self._photometric == "YCBCR" and "JPEG" not in self._compression
        if undecoded or self._photometric in _NOT_GREY_OR_RGB:
            raise ImageError(f"its colours are {self._photometric}; convert it to RGB or grey")
        self._alpha = bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2)
        self._pixel_size_um, self._channel_names = _described(tiff, page, number)

    def read(self, index: int, num_bytes: int) -> Image:
        position = np.unravel_index(index, self._frame_shape) if self._frame_axes else ()
        selection: list[Any] = [slice(None)] * len(self._shape)
        for axis, at in zip(self._frame_axes, position, strict=True):
            selection[axis] = int(at)
        pixels = self._pixels(tuple(selection), num_bytes)
        axes = [axis for axis in self._axes if axis in "CSYX"]
        pixels = pixels.transpose([axes.index(axis) for axis in "CSYX" if axis in axes])
        pixels = pixels.reshape(-1, *pixels.shape[-2:])
        return self._image(pixels)

    def _pixels(self, selection: tuple[Any, ...], num_bytes: int) -> np.ndarray:
        series, page = self._series, self._series.keyframe
        if series.dataoffset is not None:  # one uncompressed block: touch only what the frame needs
            dtype = page.dtype.newbyteorder(self._tiff.byteorder)
            if series.dataoffset + math.prod(self._shape) * dtype.itemsize > num_bytes:
                raise ImageError("the file is cut short: its pixels end beyond it; copy it again")
            return np.array(self._mapped(dtype)[selection])
        page_ndim = len(page.shape)
        leading = self._shape[: len(self._shape) - page_ndim]
        by_page = math.prod(leading) == len(series.pages) and self._shape[len(leading) :] == tuple(page.shape)
        if not by_page or any(axis >= len(leading) for axis in self._frame_axes):
            self._check_whole(range(len(series.pages)))
            return np.asarray(series.asarray(maxworkers=1)[selection])
        numbers = np.arange(len(series.pages)).reshape(leading)[selection[: len(leading)]]
        self._check_whole(numbers.ravel().tolist())
        planes = [_read_page(series.pages[number]) for number in numbers.ravel().tolist()]
        return np.stack(planes).reshape(*numbers.shape, *page.shape)

    def _mapped(self, dtype: np.dtype[Any]) -> np.ndarray:
        count, start = math.prod(self._shape), self._series.dataoffset
        if self._content is not None:
            return np.frombuffer(self._content.getbuffer(), dtype, count, start).reshape(self._shape)
        return np.asarray(self._tiff.filehandle.memmap_array(dtype, self._shape, start))

    def _check_whole(self, numbers: range | list[int]) -> None:
        """Raise if strips or tiles are missing, which tifffile would fill with zeros."""
        for number in numbers:
            page = self._series.pages[number]
            if page is None:
                raise ImageError(f"plane {number} is missing, or in another file that is not beside this one")
            ends = [start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=False)]
            written = sum(size > 0 for size in page.databytecounts[: len(ends)])
            expected = math.prod(self._series.keyframe.chunked)
            if written < expected:
                raise ImageError(f"only {written} of {expected} strips or tiles of its pixels were written")
            if max(ends) > page.parent.filehandle.size:  # an OME-TIFF may lie in several files
                raise ImageError("the file is cut short: its pixels end beyond it; copy it again")

    def _image(self, pixels: np.ndarray) -> Image:
        pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))
        if self._photometric == "MINISWHITE" and pixels.dtype.kind == "u":
            # Stored with 0 as white: turned, so that more is brighter everywhere. One-bit masks stay: tifffile marks
            # all that it writes so, and means by 1 what Python means by True.
            pixels = ~pixels
        names = self._channel_names
        if self._photometric in ("RGB", "YCBCR") and "S" in self._axes and len(names) != len(pixels):
            names = {3: COLOURS, 4: (*COLOURS, "alpha") if self._alpha else ()}.get(len(pixels), ())
        if self._alpha and len(pixels) > 1 and (pixels[-1] == pixels[-1, 0, 0]).all():
            pixels, names = pixels[:-1], names[: len(pixels) - 1] if len(names) >= len(pixels) - 1 else ()
        if len(names) != len(pixels):
            names = ()
        return Image(pixels=pixels, channel_names=names, pixel_size_um=self._pixel_size_um)


def _read_page(page: Any) -> np.ndarray:
    handle = page.parent.filehandle
    was_closed = handle.closed  # as those of an OME-TIFF's other files are
    handle.open()
    try:
        return np.asarray(page.asarray(maxworkers=1))
    finally:
        if was_closed:
            handle.close()


_NOT_GREY_OR_RGB = ("SEPARATED", "CIELAB", "ICCLAB", "ITULAB", "CFA", "LOGL", "LOGLUV", "LINEAR_RAW")


def _num_bytes(file: str | io.BytesIO) -> int:
    if isinstance(file, str):
        return os.stat(file).st_size  # noqa: PTH116 - a str is what tifffile takes
    file.seek(0, os.SEEK_END)
    return file.tell()


def _check_page_chain(tiff: tifffile.TiffFile, num_bytes: int) -> None:
    """Raise if the last page that could be read points on to another one: the file was cut between its pages."""
    if len(tiff.pages) == 0:
        raise ImageError("there is no image in it")
    if tiff.is_ndpi:  # 32-bit offsets in files beyond 4 GB
        return
    layout, last, handle = tiff.tiff, tiff.pages[-1], tiff.filehandle
    handle.seek(last.offset)
    (num_tags,) = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))
    handle.seek(num_tags * layout.tagsize, os.SEEK_CUR)
    (onward,) = struct.unpack(layout.offsetformat, handle.read(layout.offsetsize))
    if onward != 0:
        where = "beyond its end" if onward >= num_bytes else "that cannot be read"
        raise ImageError(f"the file is cut short: after page {len(tiff.pages)} it has one {where}; copy it again")


def _described(tiff: tifffile.TiffFile, page: Any, number: int) -> tuple[float | None, tuple[str, ...]]:
    """Return pixel size and channel names, from the description of OME, ImageJ or MetaMorph.

    The plain resolution tags are not believed: they hold screen dots an inch (72), and Opera Phenix puts the camera's
    pixel there, not the sample's. Nor are inches of ImageJ's: where an image says dots an inch, and nothing else, it
    takes these for the sample's.
    """
    if tiff.is_ome and tiff.ome_metadata:
        return _described_by_ome(tiff.ome_metadata, number)
    if tiff.is_imagej:
        description: dict[str, Any] = tiff.imagej_metadata or {}
        names = tuple(str(label) for label in description.get("Labels", ()))
        channels = int(description.get("channels", 1))
        if len(names) != channels or len(names) != int(description.get("images", 1)):
            names = ()
        unit = _UM_PER_UNIT.get(str(description.get("unit", "")).lower())
        return square_pixel(*(_um_per_pixel(page, tag, unit) for tag in ("XResolution", "YResolution"))), names
    if tiff.is_stk:
        calibration: dict[str, Any] = tiff.stk_metadata or {}
        unit = _UM_PER_UNIT.get(str(calibration.get("CalibrationUnits", "")).lower())
        if calibration.get("SpatialCalibration") and unit is not None:
            return square_pixel(*(float(calibration.get(f"{axis}Calibration", 0)) * unit for axis in "XY")), ()
    return None, ()


def _described_by_ome(text: str, number: int) -> tuple[float | None, tuple[str, ...]]:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None, ()
    images = [element for element in root if _tag(element) == "Image"]
    pixels = [part for part in images[number] if _tag(part) == "Pixels"] if number < len(images) else []
    if not pixels:
        return None, ()
    sizes: list[float | None] = []
    for axis in "XY":
        unit = _UM_PER_UNIT.get(pixels[0].get(f"PhysicalSize{axis}Unit", "µm").lower())
        size = pixels[0].get(f"PhysicalSize{axis}")
        sizes.append(float(size) * unit if size and unit else None)
    names = tuple(part.get("Name", "") for part in pixels[0] if _tag(part) == "Channel")
    return square_pixel(*sizes), names if all(names) else ()


def _um_per_pixel(page: Any, tag: str, um_per_unit: float | None) -> float | None:
    if tag not in page.tags or um_per_unit is None:
        return None
    pixels, units = page.tags[tag].value
    return float(um_per_unit * units / pixels) if pixels else None


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
