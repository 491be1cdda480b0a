"""Frames of formats that need an optional package: OME-Zarr 0.4 and 0.5, Nikon's ND2 and Zeiss' CZI."""

import itertools
import math
from typing import Any

import numpy as np

from dinocell.errors import ImageError
from dinocell.images.image import COLOURS, Image, header_errors, native, square_pixel
from dinocell.images.storage import bucket_options

_UM_PER_UNIT = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3}
_NEEDS = "reading ND2 and CZI needs an extra: pip install 'dinocell-toolkit[microscopes]', or export as OME-TIFF"


class ZarrFrames:
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

    def close(self) -> None:
        """Do nothing: no file is open."""


def _zarr_pixel_size_um(axes: list[dict[str, Any]], scales: dict[str, Any]) -> float | None:
    sizes = np.ones(len(axes))
    for level in (scales["datasets"][0], scales):
        for transform in level.get("coordinateTransformations", []):
            if transform["type"] == "scale":
                sizes = sizes * transform["scale"]
    units = [_UM_PER_UNIT.get(str(axis.get("unit"))) for axis in axes[-2:]]
    if units[0] is None or units[0] != units[1]:
        return None
    return square_pixel(float(sizes[-1] * units[0]), float(sizes[-2] * units[0]))


class MicroscopeFrames:
    """A local ND2 or CZI file through bioio, as a list of frames: scenes, their time points, and slices of these."""

    @header_errors()
    def __init__(self, path: str) -> None:
        try:
            from bioio import BioImage
            from bioio_base.exceptions import UnsupportedFileFormatError
        except ImportError:
            raise ImageError(_NEEDS) from None
        try:
            self._file = BioImage(path)
        except UnsupportedFileFormatError:  # bioio is installed without its plug-in for this format
            raise ImageError(_NEEDS) from None
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

    def close(self) -> None:
        """Do nothing: no file is open."""


def _image(pixels: Any, names: tuple[str, ...], pixel_size_um: float | None) -> Image:
    """Return (... h w) as an image; names are dropped unless every channel has one."""
    pixels = np.asarray(pixels)
    pixels = native(pixels.reshape(-1, *pixels.shape[-2:]))
    names = names if len(names) == len(pixels) and all(names) else ()
    return Image(pixels=pixels, channel_names=names, pixel_size_um=pixel_size_um)
