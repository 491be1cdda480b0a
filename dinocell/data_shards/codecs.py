"""How one channel of a tile becomes bytes and back, without loss.

========  ==============================  =========================================================================
suffix    what                            when
========  ==============================  =========================================================================
``pco``   pcodec (default)                the smallest of the fast, the fastest of the small (docs/data-format.md)
``png``   PNG, 8 and 16 bit               to look into shards with any tool; decodes about six times slower
``npy``   NumPy's own file, uncompressed  where the disk is large and faster than the processor
========  ==============================  =========================================================================
"""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from dinocell.errors import ShardError

# pcodec's own default: 6 % smaller than level 4 on Cell Painting fields, decoded as fast, encoded 20 % slower.
_PCODEC_LEVEL = 8


class Codec(NamedTuple):
    """Bytes from a plane (h w); a plane of a known shape and type from bytes, written into ``out``."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[memoryview, np.ndarray], None]
    dtypes: tuple[str, ...]


_NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64")


def codec(name: str, dtype: np.dtype) -> Codec:
    """Return the codec of a member's suffix.

    Raises
    ------
    ShardError
        If there is no such codec, it cannot hold the type, or this installation lacks it.
    """
    if name not in CODECS:
        raise ShardError(f"codec {name!r}: expected one of {', '.join(CODECS)}")
    if dtype.name not in CODECS[name].dtypes:
        raise ShardError(f"codec {name}: expected {', '.join(CODECS[name].dtypes)}, got {dtype}")
    if name == "pco":
        import imagecodecs

        if not imagecodecs.PCODEC.available:
            raise ShardError(
                "this installation of imagecodecs lacks pcodec: install its wheel, or build with --codec png"
            )
    return CODECS[name]


def _encode_pco(plane: Shaped[np.ndarray, "h w"]) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.pcodec_encode(plane, level=_PCODEC_LEVEL))


def _decode_pco(content: memoryview, out: Shaped[np.ndarray, "h w"]) -> None:
    import imagecodecs

    decoded = imagecodecs.pcodec_decode(content, out=out)  # type: ignore[arg-type]  # takes any buffer
    if decoded.size != out.size:
        raise ValueError(f"expected {out.size} values, got {decoded.size}")


def _encode_png(plane: Shaped[np.ndarray, "h w"]) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.png_encode(plane))


def _decode_png(content: memoryview, out: Shaped[np.ndarray, "h w"]) -> None:
    import imagecodecs

    _copy(imagecodecs.png_decode(content), out)  # type: ignore[arg-type]  # takes any buffer


def _encode_npy(plane: Shaped[np.ndarray, "h w"]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, plane, allow_pickle=False)
    return buffer.getvalue()


def _decode_npy(content: memoryview, out: Shaped[np.ndarray, "h w"]) -> None:
    _copy(np.load(io.BytesIO(content), allow_pickle=False), out)


def _copy(plane: np.ndarray, out: np.ndarray) -> None:
    if plane.shape != out.shape or plane.dtype != out.dtype:
        raise ValueError(f"expected {out.dtype} of {out.shape}, got {plane.dtype} of {plane.shape}")
    out[...] = plane


CODECS = {
    "pco": Codec(_encode_pco, _decode_pco, _NUMBERS),
    "png": Codec(_encode_png, _decode_png, ("uint8", "uint16")),
    "npy": Codec(_encode_npy, _decode_npy, _NUMBERS),
}
