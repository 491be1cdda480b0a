"""Samples: what is encoded is decoded, channel by channel; what is damaged is noticed."""

import dataclasses
import io
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from dinocell.data_shards.sample import (
    CODECS,
    RawSample,
    SampleError,
    decode_sample,
    encode_sample,
    get_codec,
    parse_sample,
    raw_sample,
    sample_key,
)
from dinocell.errors import ShardError

PIXELS = np.random.default_rng(0).integers(0, 4000, (3, 20, 30), dtype=np.uint16)


def encoded(codec_name: str = "pco", **known: object) -> dict[str, bytes]:
    about: dict[str, object] = {"field": "größe 1.tif", "channels": ("a", "b", "ç"), "row": 4, "column": 8} | known
    return encode_sample(PIXELS, codec_name=codec_name, **about)[1]


def as_tar(members: dict[str, bytes], key: str = "k") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for suffix, content in members.items():
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        end = tar.offset
    return buffer.getvalue()[:end]


@pytest.mark.parametrize("codec_name", list(CODECS))
def test_a_sample_decodes_to_its_pixels_and_metadata(codec_name: str) -> None:
    labels = {"cell_line": "U2OS", "dose": 0.5, "count": 3, "positive": True}
    members = encoded(codec_name, labels=labels, plate="P", pixel_size_um=0.6, ranges=((0.5, 2.0),) * 3)
    sample = parse_sample(memoryview(as_tar(members, "key")))
    assert sample.key == "key"
    np.testing.assert_array_equal(decode_sample(sample), PIXELS)
    info = sample.info
    assert (info.field, info.channels, info.row, info.column) == ("größe 1.tif", ("a", "b", "ç"), 4, 8)
    assert (info.labels, info.plate, info.pixel_size_um, info.ranges) == (labels, "P", 0.6, ((0.5, 2.0),) * 3)


def test_only_the_requested_channels_are_decoded() -> None:
    members = encoded()
    members["c1.pco"] = b"damaged"
    sample = raw_sample("k", members)
    np.testing.assert_array_equal(decode_sample(sample, [2, 0]), PIXELS[[2, 0]])
    with pytest.raises(ShardError, match="channel b is damaged"):
        decode_sample(sample)


def test_decoding_writes_into_the_output_array() -> None:
    out = np.zeros((1, 20, 30), np.uint16)
    assert decode_sample(raw_sample("k", encoded()), [1], out=out) is out
    np.testing.assert_array_equal(out, PIXELS[1:2])


def test_every_flipped_byte_of_a_channel_is_detected() -> None:
    members = encoded()
    content = members["c0.pco"]
    for place in range(0, len(content), 37):
        broken = bytearray(content)
        broken[place] ^= 0x10
        with pytest.raises(ShardError, match="channel a is damaged"):
            decode_sample(raw_sample("k", members | {"c0.pco": bytes(broken)}), [0])


@pytest.mark.parametrize("length", [0, 1, 100, 511, 512, 600, 2000])
def test_a_truncated_span_is_rejected(length: int) -> None:
    with pytest.raises(ShardError):
        parse_sample(memoryview(as_tar(encoded())[:length]))


def test_spans_of_other_bytes_are_rejected() -> None:
    content = as_tar(encoded())
    with pytest.raises(ShardError, match="no tar header"):
        parse_sample(memoryview(content[512:]))
    with pytest.raises(ShardError, match="members of one sample"):
        parse_sample(memoryview(content + as_tar(encoded(), "other")))


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"field": 1}',
        encoded()["json"].replace(b'"height": 20', b'"height": -1'),
        encoded()["json"].replace(b'"uint16"', b'"uint99"'),
        encoded()["json"].replace(b'"crc32": [', b'"crc32": [1, '),
        encoded()["json"].replace(b'"channels": [', b'"channels": ["x", '),
    ],
)
def test_a_damaged_json_member_is_rejected(broken: bytes) -> None:
    with pytest.raises(ShardError, match="k: "):
        raw_sample("k", encoded() | {"json": broken})


def test_a_missing_channel_or_json_member_is_named() -> None:
    for suffix in ("c2.pco", "json"):
        members = encoded()
        del members[suffix]
        with pytest.raises(ShardError, match=r"k: .*got"):
            raw_sample("k", members)


@pytest.mark.parametrize("key", ["../../escape", "/etc/escape", "a/../b"])
def test_members_with_paths_are_only_bytes(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with suppress(SampleError):  # refused, or read like any other
        decode_sample(parse_sample(memoryview(as_tar(encoded(), key))))
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


def test_unknown_members_are_ignored() -> None:
    sample = raw_sample("k", encoded() | {"txt": b"a note", "c9.jpg": b"?"})
    assert isinstance(sample, RawSample)
    assert len(sample.members) == 3


@pytest.mark.parametrize("field", ["a", "p1/A01.s1", "größe 2 [x]", "x" * 500, "../../etc/passwd", "", "日本"])
def test_keys_are_short_plain_and_differ(field: str) -> None:
    key = sample_key(field, 99999, 99999)
    assert key.isascii()
    assert "." not in key
    assert "/" not in key
    assert len(f"{key}.c999.pco") <= 100
    assert key != sample_key(field + "_", 99999, 99999)
    assert key != sample_key(field, 99998, 99999)


def test_ids_that_differ_only_in_replaced_characters_get_different_keys() -> None:
    assert len({sample_key(field, 0, 0) for field in ("a b", "a.b", "a/b", "a_b")}) == 4


# Codecs.


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, entry in CODECS.items() for dtype in entry.dtypes])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (64, 64)])
def test_values_are_decoded_exactly(name: str, dtype: str, shape: tuple[int, int]) -> None:
    plane = (np.random.default_rng(0).normal(100, 50, shape) * (1 if np.dtype(dtype).itemsize == 1 else 20)).clip(
        0, 127 * 20
    )
    plane = plane.clip(0, 127).astype(dtype) if np.dtype(dtype).itemsize == 1 else plane.astype(dtype)
    chosen = get_codec(name, plane.dtype)
    decoded = chosen.decode(memoryview(chosen.encode(plane)), np.zeros_like(plane))
    assert decoded.dtype == plane.dtype
    np.testing.assert_array_equal(decoded, plane)


@pytest.mark.parametrize("name", list(CODECS))
def test_extreme_values_are_decoded_exactly(name: str) -> None:
    plane = np.array([[0, 65535, 1], [65534, 0, 32768]], np.uint16)
    decoded = CODECS[name].decode(memoryview(CODECS[name].encode(plane)), np.zeros_like(plane))
    np.testing.assert_array_equal(decoded, plane)


@pytest.mark.parametrize("name", list(CODECS))
def test_bytes_of_another_size_are_rejected(name: str) -> None:
    info, members = encode_sample(
        np.zeros((1, 8, 8), np.uint16), codec_name=name, field="f", channels=("a",), row=0, column=0
    )
    for height, width in ((8, 9), (7, 8)):
        raw = RawSample(
            key="k",
            info=dataclasses.replace(info, height=height, width=width),
            members=((name, memoryview(members[f"c0.{name}"])),),
        )
        with pytest.raises(SampleError, match="channel a"):
            decode_sample(raw)


def test_unknown_codecs_and_types_are_rejected() -> None:
    with pytest.raises(ShardError, match="expected one of pco, png, npy"):
        get_codec("jpg", np.dtype(np.uint8))
    with pytest.raises(ShardError, match="codec png: expected uint8, uint16, got float32"):
        get_codec("png", np.dtype(np.float32))
