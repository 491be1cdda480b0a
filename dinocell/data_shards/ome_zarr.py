"""The frames of an OME-Zarr image, versions 0.4 and 0.5, at its highest resolution.

Chunks that a Zarr array lacks mean its fill value, by that format's own rule: an incomplete copy cannot be told from an
empty region.
"""

import math
from typing import Any

import numpy as np

from dinocell.data_shards.locations import bucket_options
from dinocell.data_shards.picture import Picture, square_pixel
from dinocell.errors import ImageError

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

    def __getitem__(self, index: int) -> Picture:
        selection: list[Any] = [slice(None)] * len(self._axes)
        for axis, at in zip(self._frame_axes, np.unravel_index(index, self._frame_shape), strict=True):
            selection[axis] = int(at)
        pixels = np.asarray(self._array[tuple(selection)])
        pixels = pixels.reshape(-1, *pixels.shape[-2:])
        names = self._names if len(self._names) == len(pixels) and all(self._names) else ()
        pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))
        return Picture(pixels=pixels, channel_names=names, pixel_size_um=self._pixel_size_um)

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
