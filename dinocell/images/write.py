"""Write images atomically: to a temporary file in the same folder, which is then renamed."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from jaxtyping import Integer, Shaped

from dinocell.errors import ImageError
from dinocell.runtime.files import replacing

_TIFF_TYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
_ZLIB_LEVEL = 6
# Larger images get 64-bit offsets: compressed noise is as large as plain, and 32 bits address 4 GB.
_CLASSIC_TIFF_BYTES = 2**32 - 2**25


def write_tiff(
    path: str | Path,
    pixels: Shaped[np.ndarray, "h w"] | Shaped[np.ndarray, "c h w"],
    *,
    pixel_size_um: float | None = None,
    channel_names: Sequence[str] = (),
) -> None:
    """Write an OME-TIFF (deflate), which Fiji, QuPath, napari and ``read_image`` open with channels and pixel size.

    The same image always gives the same bytes. If it cannot be written (ImageError), an existing file is unchanged.
    """
    planes = pixels if pixels.ndim == 3 else pixels[None]
    num_names = len(channel_names) or len(planes)
    if pixels.dtype.name not in _TIFF_TYPES or pixels.size == 0 or num_names != len(planes):
        raise ValueError(
            f"expected pixels of {', '.join(_TIFF_TYPES)}, and no name or one per channel; got {pixels.dtype} of "
            f"{pixels.shape} and {num_names} names"
        )
    import tifffile

    # OME requires a UUID; derived from the content, it is the same in every run.
    digest = hashlib.sha256(np.ascontiguousarray(planes).data).hexdigest()
    metadata: dict[str, Any] = {
        "axes": "CYX" if len(planes) > 1 else "YX",
        "UUID": f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}",
    }
    options: dict[str, Any] = {}
    if channel_names:
        metadata["Channel"] = {"Name": list(channel_names)}
    if pixel_size_um is not None:
        metadata |= {f"PhysicalSize{axis}": pixel_size_um for axis in "XY"}
        metadata |= {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
        # For readers without OME.
        options |= {"resolution": (1e4 / pixel_size_um, 1e4 / pixel_size_um), "resolutionunit": "CENTIMETER"}
    with _replacing(path) as temporary:
        tifffile.imwrite(
            temporary,
            planes if len(planes) > 1 else planes[0],
            ome=True,
            bigtiff=planes.nbytes > _CLASSIC_TIFF_BYTES,  # tifffile decides only for uncompressed images
            photometric="minisblack",
            compression="zlib",
            compressionargs={"level": _ZLIB_LEVEL},
            predictor=planes.dtype.kind in "ui",  # not all readers support it for floats
            metadata=metadata,
            **options,
        )


def write_labels(path: str | Path, labels: Integer[np.ndarray, "h w"], *, pixel_size_um: float | None = None) -> None:
    """Write a label image as TIFF: uint16, or uint32 if an id exceeds 65,535. Ids are not changed."""
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if low < 0 or high >= 2**32:
        raise ValueError(f"labels: expected ids from 0 to {2**32 - 1}, got {low} to {high}")
    write_tiff(path, labels.astype(np.uint16 if high < 2**16 else np.uint32), pixel_size_um=pixel_size_um)


def write_png(path: str | Path, pixels: Shaped[np.ndarray, "h w"] | Shaped[np.ndarray, "c h w"]) -> None:
    """Write a PNG: uint8 or uint16 (bool becomes 0 and 255), with 1 (grey), 3 (RGB) or 4 (RGBA) channels."""
    planes = pixels if pixels.ndim == 3 else pixels[None]
    if planes.dtype == np.bool_:
        planes = planes.astype(np.uint8) * 255
    samples = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
    # Always a copy: one pixel is contiguous in every order, and the encoder depends on the strides.
    content = imagecodecs.png_encode(samples.copy(order="C"))
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name next to ``path``; rename it to ``path`` afterwards, or remove it if writing failed."""
    try:
        with replacing(Path(path)) as temporary:
            yield temporary
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error.strerror or error})") from error
