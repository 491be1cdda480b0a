"""The frames of a microscope's own files, Nikon's ND2 and Zeiss' CZI, through the optional package bioio."""

from typing import Any

import numpy as np

from dinocell.data_shards.picture import COLOURS, Picture, square_pixel
from dinocell.errors import ImageError

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

    def __getitem__(self, index: int) -> Picture:
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
        return Picture(pixels=pixels, channel_names=names, pixel_size_um=_pixel_size_um(self._image))

    def close(self) -> None:
        """Nothing is held open."""


def _pixel_size_um(image: Any) -> float | None:
    sizes = image.physical_pixel_sizes
    return square_pixel(sizes.X, sizes.Y)
