"""A sample on disk: one tile of one field, each channel a member of its own, so that a reader decodes what it needs.

In the tar file of a shard, a sample is a run of members of one key::

    plate1_B02_s3__y0_x512.c0.pco     channel 0, encoded (codecs.py)
    plate1_B02_s3__y0_x512.c1.pco     channel 1 ...
    plate1_B02_s3__y0_x512.json       what it is: SampleInfo

WebDataset reads such a file as it is. Values are those of the source, in its type, unless the set was built with 8 bit.
"""

import dataclasses
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import ShardError


class SampleError(ShardError):
    """A sample whose bytes are damaged; others of its set may be well."""


_HEADER = 512  # a tar header, and the unit that members are padded to
_MAX_KEY = 72  # a ustar name has 100 characters: key, tile, channel and suffix


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """What is known about a sample; the content of its JSON member.

    Attributes
    ----------
    field
        The source's id of the field.
    channels
        Channel names, in the order of the members.
    dtype, height, width
        Type and size of every channel's tile.
    row, column
        Where the tile's first pixel lies in the field.
    crc32
        CRC-32 of each channel's encoded bytes.
    missing
        Channels that other fields of the source have and this one has not.
    ranges
        For sets of 8 bit: the source's levels that became 0 and 255, a channel.
    """

    field: str
    channels: tuple[str, ...]
    dtype: str
    height: int
    width: int
    row: int
    column: int
    crc32: tuple[int, ...]
    missing: tuple[str, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()
    plate: str | None = None
    well: str | None = None
    site: str | None = None
    labels: Mapping[str, LabelValue] = dataclasses.field(default_factory=dict)
    pixel_size_um: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RawSample:
    """A sample as it lies in its shard: what it is, and the encoded bytes of each channel with their codec's name."""

    key: str
    info: SampleInfo
    members: tuple[tuple[str, memoryview], ...]


def sample_key(field_id: str, row: int, column: int) -> str:
    """Return the name of a sample's members: ASCII, without dots, short enough for a tar header, unique to the tile.

    Where the field's id cannot be kept as it is, a hash of it follows what is kept.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", field_id)
    if name != field_id or len(name) > _MAX_KEY - 26:
        name = f"{name[: _MAX_KEY - 38]}-{hashlib.sha256(field_id.encode()).hexdigest()[:12]}"
    return f"{name}__y{row}_x{column}"


def encode_sample(
    pixels: Shaped[np.ndarray, "c h w"], *, codec_name: str, **known: Any
) -> tuple[SampleInfo, dict[str, bytes]]:
    """Encode a tile; ``known`` are the attributes of ``SampleInfo`` that the pixels do not tell.

    Returns
    -------
    What the sample is, and the members by suffix (``c0.pco``, ..., ``json``).
    """
    planes = [np.ascontiguousarray(plane) for plane in pixels]
    chosen = codec(codec_name, pixels.dtype)
    encoded = [chosen.encode(plane) for plane in planes]
    info = SampleInfo(
        dtype=pixels.dtype.name,
        height=pixels.shape[1],
        width=pixels.shape[2],
        crc32=tuple(zlib.crc32(content) for content in encoded),
        **known,
    )
    members = {f"c{number}.{codec_name}": content for number, content in enumerate(encoded)}
    members["json"] = json.dumps(asdict(info), ensure_ascii=False, allow_nan=False).encode()
    return info, members


def parse_sample(span: memoryview) -> RawSample:
    """Take a sample's members from the bytes of its tar members, headers included; nothing is decoded or copied.

    Raises
    ------
    SampleError
        If the bytes are not the members of one sample.
    """
    members: dict[str, memoryview] = {}
    keys = set()
    start = 0
    while start + _HEADER <= len(span):
        header = bytes(span[start : start + _HEADER])
        if header[257:262] != b"ustar":
            raise SampleError(f"damaged: no tar header at byte {start} of a sample")
        try:
            name = header[:100].rstrip(b"\0").decode("ascii")
            size = int(header[124:136].rstrip(b"\0 "), 8)
        except ValueError as error:
            raise SampleError(f"damaged: tar header at byte {start} of a sample ({error})") from error
        key, _, suffix = name.partition(".")
        keys.add(key)
        members[suffix] = span[start + _HEADER : start + _HEADER + size]
        if len(members[suffix]) != size:
            raise SampleError(f"damaged: {name} is cut short")
        start += _HEADER + -(-size // _HEADER) * _HEADER
    if len(keys) != 1:
        raise SampleError(
            f"damaged: expected the members of one sample, got those of {', '.join(sorted(keys)) or 'none'}"
        )
    return raw_sample(keys.pop(), members)


def raw_sample(key: str, members: Mapping[str, bytes | memoryview]) -> RawSample:
    """Put together a sample from its members by suffix, as WebDataset hands them over.

    Raises
    ------
    SampleError
        If the JSON member or a channel is missing or damaged.
    """
    info = _read_info(key, members)
    by_channel: dict[int, tuple[str, memoryview]] = {}
    for suffix, content in members.items():
        found = re.fullmatch(r"c(\d+)\.(\w+)", suffix)
        if found and found[2] in CODECS:
            by_channel[int(found[1])] = (found[2], memoryview(content))
    if sorted(by_channel) != list(range(len(info.channels))):
        raise SampleError(f"{key}: expected {len(info.channels)} channels, got members {', '.join(sorted(members))}")
    return RawSample(key=key, info=info, members=tuple(by_channel[number] for number in range(len(by_channel))))


def decode_sample(
    sample: RawSample, channels: Sequence[int] | None = None, *, out: Shaped[np.ndarray, "c h w"] | None = None
) -> Shaped[np.ndarray, "c h w"]:
    """Decode a sample, or some of its channels.

    Parameters
    ----------
    channels
        Which ones, from 0, in this order; None decodes all.
    out
        Where to write; its shape and type must be the sample's.

    Raises
    ------
    SampleError
        If a channel's bytes are damaged; the message names the sample and the channel.
    """
    info = sample.info
    chosen = range(len(sample.members)) if channels is None else channels
    if out is None:
        out = np.empty((len(chosen), info.height, info.width), np.dtype(info.dtype))
    for plane, number in zip(out, chosen, strict=True):
        name, content = sample.members[number]
        if zlib.crc32(content) != info.crc32[number]:
            raise SampleError(f"{sample.key}: channel {info.channels[number]} is damaged (its checksum differs)")
        try:
            codec(name, plane.dtype).decode(content, plane)
        except (ValueError, RuntimeError, OSError, EOFError) as error:
            cause = " ".join(str(error).split())
            raise SampleError(f"{sample.key}: channel {info.channels[number]} cannot be decoded ({cause})") from error
    return out


_LISTS = ("channels", "crc32", "missing")


def _read_info(key: str, members: Mapping[str, bytes | memoryview]) -> SampleInfo:
    if "json" not in members:
        raise SampleError(f"{key}: no JSON member; got {', '.join(sorted(members))}")
    try:
        content = json.loads(bytes(members["json"]))
        content = {known.name: content[known.name] for known in fields(SampleInfo)}
        content |= {name: tuple(content[name]) for name in _LISTS}
        content["ranges"] = tuple((float(low), float(high)) for low, high in content["ranges"])
        info = SampleInfo(**content)
        np.dtype(info.dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise SampleError(f"{key}: damaged JSON member ({type(error).__name__}: {error})") from error
    if len(info.crc32) != len(info.channels) or info.height < 1 or info.width < 1:
        raise SampleError(f"{key}: damaged JSON member (channels, checksums and size do not fit together)")
    return info


# --- codecs --------------------------------------------------------------------------------------------------------
#
# How one channel of a tile becomes bytes and back, without loss.
#
# ========  ==============================  =========================================================================
# suffix    what                            when
# ========  ==============================  =========================================================================
# ``pco``   pcodec (default)                the smallest of the fast, the fastest of the small (docs/data-format.md)
# ``png``   PNG, 8 and 16 bit               to look into shards with any tool; decodes about six times slower
# ``npy``   NumPy's own file, uncompressed  where the disk is large and faster than the processor
# ========  ==============================  =========================================================================

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
