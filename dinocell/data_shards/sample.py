"""A sample on disk: one tile of one field, each channel in a member of its own, so that channels decode separately.

In the tar file of a shard, a sample is a sequence of members with the same key::

    plate1_B02_s3__y0_x512.c0.pco     channel 0, encoded (see the codecs below)
    plate1_B02_s3__y0_x512.c1.pco     channel 1 ...
    plate1_B02_s3__y0_x512.json       metadata: SampleInfo

WebDataset can read such a file. Values and types are those of the source, unless the set was built with 8 bit.
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

import imagecodecs
import numpy as np
from jaxtyping import Shaped

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import ShardError, one_line


class SampleError(ShardError):
    """A sample whose bytes are damaged; other samples of its set may be readable."""


_HEADER = 512  # bytes of a tar header, and the unit that members are padded to
_MAX_KEY = 72  # a ustar name has 100 characters: key, tile, channel and suffix


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """Metadata of a sample; the content of its JSON member.

    Attributes
    ----------
    field
        The source's id of the field.
    channels
        Channel names, in the order of the members.
    row, column
        Position of the tile's first pixel in the field.
    crc32
        CRC-32 of each channel's encoded bytes.
    missing
        Channels that other fields of the source have and this one lacks.
    ranges
        For 8-bit sets: for each channel, the source's values that became 0 and 255.
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
    """An encoded sample: its metadata, and the codec name and encoded bytes of each channel."""

    key: str
    info: SampleInfo
    members: tuple[tuple[str, memoryview], ...]


def sample_key(field_id: str, row: int, column: int) -> str:
    """Return the name of a sample's members: ASCII, without dots, short enough for a tar header, unique to the tile.

    If the field's id has to be changed for that, a hash of it is appended.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", field_id)
    if name != field_id or len(name) > _MAX_KEY - 26:
        name = f"{name[: _MAX_KEY - 38]}-{hashlib.sha256(field_id.encode()).hexdigest()[:12]}"
    return f"{name}__y{row}_x{column}"


def encode_sample(
    pixels: Shaped[np.ndarray, "c h w"], *, codec_name: str, **metadata: Any
) -> tuple[SampleInfo, dict[str, bytes]]:
    """Encode a tile; return its metadata, and the members by suffix (``c0.pco``, ..., ``json``).

    ``metadata`` has the attributes of ``SampleInfo`` that do not follow from the pixels.
    """
    encode = get_codec(codec_name, pixels.dtype).encode
    encoded = [encode(np.ascontiguousarray(plane)) for plane in pixels]
    info = SampleInfo(
        dtype=pixels.dtype.name,
        height=pixels.shape[1],
        width=pixels.shape[2],
        crc32=tuple(zlib.crc32(content) for content in encoded),
        **metadata,
    )
    members = {f"c{channel}.{codec_name}": content for channel, content in enumerate(encoded)}
    members["json"] = json.dumps(asdict(info), ensure_ascii=False, allow_nan=False).encode()
    return info, members


def parse_sample(span: memoryview) -> RawSample:
    """Return a sample from the bytes of its tar members, including the headers, without decoding or copying.

    Raise SampleError if the bytes are not the members of one sample.
    """
    members: dict[str, memoryview] = {}
    keys: set[str] = set()
    problem = ""
    start = 0
    while start + _HEADER <= len(span):
        name, size = _parse_header(bytes(span[start : start + _HEADER]))
        content = start + _HEADER
        if not 0 <= size <= len(span) - content:
            problem = f"{name} is cut short" if size > 0 else f"no tar header at byte {start} of a sample"
            break
        key, _, suffix = name.partition(".")
        keys.add(key)
        members[suffix] = span[content : content + size]
        start = content + -(-size // _HEADER) * _HEADER
    if not problem and len(keys) != 1:
        problem = f"expected the members of one sample, got those of {', '.join(sorted(keys)) or 'none'}"
    if problem:
        raise SampleError(f"damaged: {problem}")
    return raw_sample(keys.pop(), members)


def _parse_header(header: bytes) -> tuple[str, int]:
    """Return name and size of a tar member; size -1 if this is not a header."""
    if header[257:262] != b"ustar":
        return "", -1
    try:
        return header[:100].rstrip(b"\0").decode("ascii"), int(header[124:136].rstrip(b"\0 "), 8)
    except ValueError:
        return "", -1


def raw_sample(key: str, members: Mapping[str, bytes | memoryview]) -> RawSample:
    """Return a sample from its members by suffix, such as those of WebDataset; raise SampleError if it is damaged."""
    by_channel: dict[int, tuple[str, memoryview]] = {}
    for suffix, content in members.items():
        match = re.fullmatch(r"c(\d+)\.(\w+)", suffix)
        if match and match[2] in CODECS:
            by_channel[int(match[1])] = (match[2], memoryview(content))
    try:
        info = _parse_info(members["json"])
        indices = range(len(info.channels))
        if sorted(by_channel) == list(indices) and len(info.crc32) == len(indices) and min(info.height, info.width) > 0:
            return RawSample(key=key, info=info, members=tuple(by_channel[index] for index in indices))
        problem = f"expected {len(indices)} channels of {info.height} x {info.width} with checksums"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"JSON member missing or damaged ({type(error).__name__}: {error})"
    raise SampleError(f"{key}: {problem}; got members {', '.join(sorted(members))}")


def _parse_info(member: bytes | memoryview) -> SampleInfo:
    content = json.loads(bytes(member))
    content = {field.name: content[field.name] for field in fields(SampleInfo)}
    content |= {name: tuple(content[name]) for name in ("channels", "crc32", "missing")}
    content["ranges"] = tuple((float(low), float(high)) for low, high in content["ranges"])
    info = SampleInfo(**content)
    np.dtype(info.dtype)
    return info


def decode_sample(
    sample: RawSample, channels: Sequence[int] | None = None, *, out: Shaped[np.ndarray, "c h w"] | None = None
) -> Shaped[np.ndarray, "c h w"]:
    """Decode a sample, or some of its channels.

    Parameters
    ----------
    channels
        Indices of the channels, in this order; None decodes all.
    out
        Output array; its shape and type must be the sample's.

    Raises
    ------
    SampleError
        If a channel's bytes are damaged; the message names the sample and the channel.
    """
    info = sample.info
    chosen = range(len(sample.members)) if channels is None else channels
    if out is None:
        out = np.empty((len(chosen), info.height, info.width), np.dtype(info.dtype))
    for plane, channel in zip(out, chosen, strict=True):
        codec_name, content = sample.members[channel]
        problem = "" if zlib.crc32(content) == info.crc32[channel] else "its checksum differs"
        try:
            if not problem:
                decoded = get_codec(codec_name, plane.dtype).decode(content, plane)
                if decoded.shape != plane.shape or decoded.dtype != plane.dtype:
                    problem = f"expected {plane.dtype} of {plane.shape}, got {decoded.dtype} of {decoded.shape}"
                elif decoded is not plane:
                    plane[...] = decoded
        except (ValueError, RuntimeError, OSError, EOFError) as error:
            problem = f"it cannot be decoded: {one_line(error)}"
        if problem:
            raise SampleError(f"{sample.key}: channel {info.channels[channel]} is damaged ({problem})")
    return out


# Codecs: lossless encodings of one channel of a tile.
#
# ========  ==============================  =========================================================================
# suffix    encoding                        use
# ========  ==============================  =========================================================================
# ``pco``   pcodec (default)                the smallest of the fast, the fastest of the small (docs/data-format.md)
# ``png``   PNG, 8 and 16 bit               to inspect shards with any tool; decodes about six times slower
# ``npy``   NumPy's own file, uncompressed  not on the command line; for disks that are faster than the processor
# ========  ==============================  =========================================================================

# pcodec's own default: 6 % smaller than level 4 on Cell Painting fields, decoded as fast, encoded 20 % slower.
_PCODEC_LEVEL = 8


class Codec(NamedTuple):
    """Encoder of a plane (h w), decoder, which may use an array of the plane's shape and type, and supported types."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[memoryview, np.ndarray], np.ndarray]
    dtypes: tuple[str, ...]


def get_codec(name: str, dtype: np.dtype) -> Codec:
    """Return the codec of a member's suffix; raise ShardError if it is unknown, not installed, or not for this type."""
    problem = None
    if name not in CODECS:
        problem = f"expected one of {', '.join(CODECS)}"
    elif dtype.name not in CODECS[name].dtypes:
        problem = f"expected {', '.join(CODECS[name].dtypes)}, got {dtype}"
    elif name == "pco" and not imagecodecs.PCODEC.available:
        problem = "this installation of imagecodecs lacks pcodec; install its wheel, or build with --codec png"
    if problem:
        raise ShardError(f"codec {name}: {problem}")
    return CODECS[name]


def _encode_npy(plane: Shaped[np.ndarray, "h w"]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, plane, allow_pickle=False)
    return buffer.getvalue()


_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
NUMBER_TYPES = (*_INTEGERS, "float16", "float32", "float64")

CODECS = {
    "pco": Codec(
        lambda plane: bytes(imagecodecs.pcodec_encode(plane, level=_PCODEC_LEVEL)),
        lambda content, out: imagecodecs.pcodec_decode(content, out=out),  # type: ignore[arg-type]  # takes any buffer
        NUMBER_TYPES,
    ),
    "png": Codec(
        lambda plane: bytes(imagecodecs.png_encode(plane)),
        lambda content, _: imagecodecs.png_decode(content),  # type: ignore[arg-type]
        ("uint8", "uint16"),
    ),
    "npy": Codec(_encode_npy, lambda content, _: np.asarray(np.load(io.BytesIO(content))), NUMBER_TYPES),
}
