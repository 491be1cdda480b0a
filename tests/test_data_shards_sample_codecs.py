"""Codecs: every type that images have comes back bit for bit."""

import numpy as np
import pytest

from dinocell.data_shards.sample import CODECS, get_codec
from dinocell.errors import ShardError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, entry in CODECS.items() for dtype in entry.dtypes])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (64, 64)])
def test_values_come_back_exactly(name: str, dtype: str, shape: tuple[int, int]) -> None:
    plane = (RNG.normal(100, 50, shape) * (1 if np.dtype(dtype).itemsize == 1 else 20)).clip(0, 127 * 20)
    plane = plane.clip(0, 127).astype(dtype) if np.dtype(dtype).itemsize == 1 else plane.astype(dtype)
    chosen = get_codec(name, plane.dtype)
    out = np.zeros_like(plane)
    chosen.decode(memoryview(chosen.encode(plane)), out)
    np.testing.assert_array_equal(out, plane)


@pytest.mark.parametrize("name", list(CODECS))
def test_extreme_values_come_back_exactly(name: str) -> None:
    plane = np.array([[0, 65535, 1], [65534, 0, 32768]], np.uint16)
    out = np.zeros_like(plane)
    CODECS[name].decode(memoryview(CODECS[name].encode(plane)), out)
    np.testing.assert_array_equal(out, plane)


@pytest.mark.parametrize("name", list(CODECS))
def test_bytes_of_another_size_are_refused(name: str) -> None:
    content = CODECS[name].encode(np.zeros((8, 8), np.uint16))
    for shape in ((8, 9), (7, 8)):
        with pytest.raises((ValueError, RuntimeError)):
            CODECS[name].decode(memoryview(content), np.zeros(shape, np.uint16))


def test_unknown_codecs_and_types_are_refused() -> None:
    with pytest.raises(ShardError, match="expected one of pco, png, npy"):
        get_codec("jpg", np.dtype(np.uint8))
    with pytest.raises(ShardError, match="codec png: expected uint8, uint16, got float32"):
        get_codec("png", np.dtype(np.float32))
