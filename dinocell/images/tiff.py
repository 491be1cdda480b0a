"""The frames of a TIFF file (plain, ImageJ, OME, MetaMorph), with pixel size and channel names from its metadata.

A frame is one two-dimensional image with its channels. The axes C (channel) and S (sample of a colour) become
channels; every other axis longer than 1 (time, z, the pages of a plain multi-page file, the images of an OME file)
counts frames, in the order of the file. Previews (pages marked as reduced) are not frames.
"""

import bisect
import io
import itertools
import logging
import math
import os
import struct
import xml.etree.ElementTree as ElementTree
from operator import add
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Shaped

from dinocell.errors import ImageError
from dinocell.images.image import COLOURS, Image, header_errors, is_constant, native, square_pixel

_UM_PER_UNIT = {"um": 1.0, "µm": 1.0, "μm": 1.0, "micron": 1.0, "microns": 1.0, "\\u00b5m": 1.0}
_UM_PER_UNIT |= {"nm": 1e-3, "mm": 1e3, "cm": 1e4}

_NOT_GREY_OR_RGB = ("SEPARATED", "CIELAB", "ICCLAB", "ITULAB", "CFA", "LOGL", "LOGLUV", "LINEAR_RAW")
_TRUNCATED = "the file is truncated: its pixels extend beyond its end; copy it again"

# tifffile logs unusual tags, which Python prints to stderr where logging is not set up. What makes an image incomplete
# is checked below.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class TiffFrames:
    """An open TIFF file (a local path or its bytes), as a list of frames that are read one at a time."""

    @header_errors()
    def __init__(self, file: str | io.BytesIO) -> None:
        self._tiff = tifffile.TiffFile(file)
        try:
            _check_page_chain(self._tiff)
            self._series = [
                _Series(self._tiff, series, index, None if isinstance(file, str) else file)
                for index, series in enumerate(self._tiff.series)
                if not series.keyframe.is_reduced
            ]
            self._ends = list(itertools.accumulate(series.num_frames for series in self._series))
        except BaseException:
            self._tiff.close()
            raise

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @header_errors()
    def __getitem__(self, index: int) -> Image:
        position = bisect.bisect_right(self._ends, index)
        series = self._series[position]
        return series.read(index - (self._ends[position] - series.num_frames))

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()


class _Series:
    """Pages of one size and type, arranged along named axes."""

    def __init__(self, tiff: tifffile.TiffFile, series: Any, index: int, content: io.BytesIO | None) -> None:
        self._tiff, self._series, self._content = tiff, series, content
        self._axes, self._shape = str(series.axes), tuple(int(size) for size in series.shape)
        self._frame_axes = [k for k, axis in enumerate(self._axes) if axis not in "CSYX"]
        self._frame_shape = [self._shape[k] for k in self._frame_axes]
        self.num_frames = math.prod(self._frame_shape)
        page = series.keyframe
        self._photometric = page.photometric.name
        undecoded = self._photometric == "YCBCR" and "JPEG" not in page.compression.name
        is_image = {"Y", "X"} <= set(self._axes)
        if not is_image or undecoded or self._photometric in _NOT_GREY_OR_RGB:
            colours = f"its colours are {self._photometric}; convert it to RGB or grey"
            raise ImageError(colours if is_image else f"its axes are {self._axes}, of sizes {self._shape}: no image")
        self._alpha = bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2)
        self._pixel_size_um, self._channel_names = _described(tiff, page, index)

    def read(self, index: int) -> Image:
        position = np.unravel_index(index, self._frame_shape) if self._frame_axes else ()
        selection: list[Any] = [slice(None)] * len(self._shape)
        for axis, coordinate in zip(self._frame_axes, position, strict=True):
            selection[axis] = int(coordinate)
        pixels = self._pixels(tuple(selection))
        # The remaining axes in the order channel, sample, row, column; the first two become channels.
        axes = [axis for axis in self._axes if axis in "CSYX"]
        pixels = pixels.transpose([axes.index(axis) for axis in "CSYX" if axis in axes])
        pixels = native(pixels.reshape(-1, *pixels.shape[-2:]))
        if self._photometric == "MINISWHITE" and pixels.dtype.kind == "u":
            # Stored with 0 as white: inverted, so that larger is brighter in every image. Not one-bit masks: tifffile
            # writes all of them as MINISWHITE, with 1 for True.
            pixels = ~pixels
        names = self._channel_names
        if self._photometric in ("RGB", "YCBCR") and "S" in self._axes and len(names) != len(pixels):
            names = {3: COLOURS, 4: (*COLOURS, "alpha") if self._alpha else ()}.get(len(pixels), ())
        if self._alpha and len(pixels) > 1 and is_constant(pixels[-1]):
            pixels, names = pixels[:-1], names[: len(pixels) - 1]
        if len(names) != len(pixels):
            names = ()
        return Image(pixels=pixels, channel_names=names, pixel_size_um=self._pixel_size_um)

    def _pixels(self, selection: tuple[Any, ...]) -> Shaped[np.ndarray, "..."]:
        series, page = self._series, self._series.keyframe
        if series.dataoffset is not None:  # one uncompressed block: read only the bytes of the frame
            dtype, count = page.dtype.newbyteorder(self._tiff.byteorder), math.prod(self._shape)
            if series.dataoffset + count * dtype.itemsize > self._tiff.filehandle.size:
                raise ImageError(_TRUNCATED)
            if self._content is not None:
                block = np.frombuffer(self._content.getbuffer(), dtype, count, series.dataoffset).reshape(self._shape)
            else:
                block = self._tiff.filehandle.memmap_array(dtype, self._shape, series.dataoffset)
            return np.array(block[selection])
        page_ndim = len(page.shape)
        leading = self._shape[: len(self._shape) - page_ndim]
        by_page = math.prod(leading) == len(series.pages) and self._shape[len(leading) :] == tuple(page.shape)
        if not by_page or any(axis >= len(leading) for axis in self._frame_axes):
            # Frames are within pages, as in volumetric tiles: decode everything.
            self._check_complete(range(len(series.pages)))
            return np.asarray(series.asarray(maxworkers=1)[selection])
        pages = np.arange(len(series.pages)).reshape(leading)[selection[: len(leading)]]
        self._check_complete(pages.ravel().tolist())
        planes = [_read_page(series.pages[index]) for index in pages.ravel().tolist()]
        return np.stack(planes).reshape(*pages.shape, *page.shape)

    def _check_complete(self, pages: range | list[int]) -> None:
        """Raise if strips or tiles are missing, which tifffile would fill with zeros."""
        for index in pages:
            page, problem = self._series.pages[index], None
            expected = math.prod(self._series.keyframe.chunked)
            if page is None:
                problem = f"plane {index} is missing, or in another file that is not next to this one"
            elif (written := sum(size > 0 for size in page.databytecounts[: len(page.dataoffsets)])) < expected:
                problem = f"only {written} of {expected} strips or tiles of its pixels were written"
            elif max(map(add, page.dataoffsets, page.databytecounts)) > page.parent.filehandle.size:
                problem = _TRUNCATED
            if problem:
                raise ImageError(problem)


def _read_page(page: Any) -> Shaped[np.ndarray, "..."]:
    handle = page.parent.filehandle
    was_closed = handle.closed  # as for the other files of an OME-TIFF
    handle.open()
    try:
        return np.asarray(page.asarray(maxworkers=1))
    finally:
        if was_closed:
            handle.close()


def _check_page_chain(tiff: tifffile.TiffFile) -> None:
    """Raise if the last page that could be read has a successor: the file was truncated between its pages."""
    problem = None if tiff.pages else "there is no image in it"
    if tiff.pages and not tiff.is_ndpi:  # NDPI has 32-bit offsets in files beyond 4 GB
        # A page is the number of its tags, the tags, and the offset of the next page, 0 in the last one.
        layout, last, handle = tiff.tiff, tiff.pages[-1], tiff.filehandle
        handle.seek(last.offset)
        (num_tags,) = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))
        handle.seek(num_tags * layout.tagsize, os.SEEK_CUR)
        if any(handle.read(layout.offsetsize)):
            problem = f"the file is truncated: the page after page {len(tiff.pages)} is missing; copy it again"
    if problem:
        raise ImageError(problem)


def _described(tiff: tifffile.TiffFile, page: Any, index: int) -> tuple[float | None, tuple[str, ...]]:
    """Return pixel size and channel names from the metadata of OME, ImageJ or MetaMorph.

    The plain resolution tags are ignored: they contain screen resolutions (72 dots per inch), and in Opera Phenix files
    the pixel size of the camera, not of the sample. ImageJ's inches are ignored too: it takes the dots per inch of an
    imported file for the scale of the sample.
    """
    if tiff.is_ome and tiff.ome_metadata:
        return _described_by_ome(tiff.ome_metadata, index)
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


def _described_by_ome(text: str, index: int) -> tuple[float | None, tuple[str, ...]]:
    try:
        images = ElementTree.fromstring(text).findall("{*}Image")
    except ElementTree.ParseError:
        return None, ()
    pixels = images[index].find("{*}Pixels") if index < len(images) else None
    if pixels is None:
        return None, ()
    sizes: list[float | None] = []
    for axis in "XY":
        unit = _UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").lower())
        size = pixels.get(f"PhysicalSize{axis}")
        sizes.append(float(size) * unit if size and unit else None)
    names = tuple(channel.get("Name", "") for channel in pixels.findall("{*}Channel"))
    return square_pixel(*sizes), names if all(names) else ()


def _um_per_pixel(page: Any, tag: str, um_per_unit: float | None) -> float | None:
    if tag not in page.tags or um_per_unit is None:
        return None
    pixels, units = page.tags[tag].value
    return float(um_per_unit * units / pixels) if pixels else None
