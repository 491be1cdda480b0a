"""The frames of an OME-Zarr image, versions 0.4 and 0.5, at its highest resolution.

Chunks that a Zarr array lacks mean its fill value, by that format's own rule: an incomplete copy cannot be told from an
empty region.
"""

import math
from typing import Any

import numpy as np

from dinocell.errors import ImageError
from dinocell.images.image import COLOURS, Image, square_pixel
from dinocell.images.storage import bucket_options

_UM_PER_UNIT = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3}


class ZarrFrames:
    """An OME-Zarr group, as a list of frames that are read one at a time."""

    def __init__(self, address: str) -> None:
        try:
            import zarr
        except ImportError:
            raise ImageError("reading OME-Zarr needs the package zarr: pip install 'zarr>=3'") from None
        group = zarr.open_group(address, mode="r", storage_options=bucket_options(address) or None)
        attributes: dict[str, Any] = dict(group.attrs)
        attributes = attributes.get("ome", attributes)  # 0.5 keeps everything under one key
        if not attributes.get("multiscales"):
            raise ImageError(
                "not an OME-Zarr image: no 'multiscales'; a plate or a collection holds them one folder down"
            )
        scales = attributes["multiscales"][0]
        self._array = _array_of(group, scales["datasets"][0]["path"])
        axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in scales["axes"]]
        self._axes = [str(axis["name"]).lower() for axis in axes]
        if self._axes[-2:] != ["y", "x"] or len(self._axes) != len(self._array.shape):
            raise ImageError(
                f"its axes are {self._axes}, of sizes {self._array.shape}; expected y and x as the last two"
            )
        self._frame_axes = [k for k, name in enumerate(self._axes) if name not in ("c", "y", "x")]
        self._frame_shape = [int(self._array.shape[k]) for k in self._frame_axes]
        self._pixel_size_um = _pixel_size_um(axes, scales)
        channels = attributes.get("omero", {}).get("channels", [])
        self._names = tuple(str(channel.get("label", "")) for channel in channels)

    def __len__(self) -> int:
        return math.prod(self._frame_shape)

    def __getitem__(self, index: int) -> Image:
        selection: list[Any] = [slice(None)] * len(self._axes)
        for axis, at in zip(self._frame_axes, np.unravel_index(index, self._frame_shape), strict=True):
            selection[axis] = int(at)
        pixels = np.asarray(self._array[tuple(selection)])
        pixels = pixels.reshape(-1, *pixels.shape[-2:])
        names = self._names if len(self._names) == len(pixels) and all(self._names) else ()
        pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))
        return Image(pixels=pixels, channel_names=names, pixel_size_um=self._pixel_size_um)

    def close(self) -> None:
        """Nothing is held open."""


def _array_of(group: Any, path: str) -> Any:
    return group[path]


def _pixel_size_um(axes: list[dict[str, Any]], scales: dict[str, Any]) -> float | None:
    sizes = np.ones(len(axes))
    for transforms in (scales["datasets"][0], scales):
        for transform in transforms.get("coordinateTransformations", []):
            if transform["type"] == "scale":
                sizes = sizes * transform["scale"]
    units = [_UM_PER_UNIT.get(str(axis.get("unit"))) for axis in axes[-2:]]
    down, across = sizes[-2:]
    if units[0] is None or units[0] != units[1]:
        return None
    return square_pixel(float(across * units[0]), float(down * units[0]))


# --- microscope_files ----------------------------------------------------------------------------------------------
#
# The frames of a microscope's own files, Nikon's ND2 and Zeiss' CZI, through the optional package bioio.

_NEEDS = "reading ND2 and CZI needs an extra: pip install 'dinocell-toolkit[microscopes]', or export as OME-TIFF"


class MicroscopeFrames:
    """An ND2 or CZI file on this disk, as a list of frames: scenes, in each the time points, in each the slices."""

    def __init__(self, path: str) -> None:
        try:
            from bioio import BioImage
            from bioio_base.exceptions import UnsupportedFileFormatError
        except ImportError:
            raise ImageError(_NEEDS) from None
        try:
            self._image = BioImage(path)
        except UnsupportedFileFormatError:  # bioio is there, its plug-in for this kind of file is not
            raise ImageError(_NEEDS) from None
        self._frames: list[tuple[int, int, int]] = []
        for scene in range(len(self._image.scenes)):
            self._image.set_scene(scene)
            sizes = self._image.dims
            self._frames += [(scene, time, depth) for time in range(sizes.T) for depth in range(sizes.Z)]

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Image:
        scene, time, depth = self._frames[index]
        self._image.set_scene(scene)
        is_colour = "S" in self._image.dims.order
        axes = "CSYX" if is_colour else "CYX"
        pixels = np.asarray(self._image.get_image_dask_data(axes, T=time, Z=depth).compute())
        pixels = pixels.reshape(-1, *pixels.shape[-2:])
        names = COLOURS if is_colour and len(pixels) == len(COLOURS) else tuple(self._image.channel_names or ())
        if len(names) != len(pixels) or not all(names):
            names = ()
        pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))
        return Image(pixels=pixels, channel_names=names, pixel_size_um=_bioio_pixel_size_um(self._image))

    def close(self) -> None:
        """Nothing is held open."""


def _bioio_pixel_size_um(image: Any) -> float | None:
    sizes = image.physical_pixel_sizes
    return square_pixel(sizes.X, sizes.Y)
