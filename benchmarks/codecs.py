"""Which codec should a channel of a tile be stored with? Size, decoding and encoding speed on one core.

    python benchmarks/codecs.py JUMP=plate/ HPA=fields/ ...   # folders of images by name, writes results/codecs.md
    python benchmarks/codecs.py --quick                       # generated fields only, 1 round, writes nothing

512 px tiles of each image's channels, lossless, checked. Bits a pixel; millions of pixels a second, the median of
alternated rounds. A step of five channels of 512 px is 1.3 million pixels.
"""

import argparse
import io
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
from _harness import write_result

from dinocell.demo.synthetic.field import make_field
from dinocell.errors import ImageError
from dinocell.images.read import IMAGE_SUFFIXES, read_image

TILE = 512
MAX_TILES = 24


class Pair(NamedTuple):
    """Bytes of a plane, and the plane of bytes, given its shape and type."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, tuple[int, ...], np.dtype], np.ndarray]


def _npy(plane: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, plane)
    return buffer.getvalue()


def _zstd(level: int) -> Pair:
    return Pair(
        lambda plane: imagecodecs.zstd_encode(plane.tobytes(), level),
        lambda content, shape, dtype: np.frombuffer(imagecodecs.zstd_decode(content), dtype).reshape(shape),
    )


def _blosc2(compressor: str, level: int) -> Pair:
    return Pair(
        lambda plane: imagecodecs.blosc2_encode(plane, level=level, compressor=compressor, shuffle=2, numthreads=1),
        lambda content, shape, dtype: np.frombuffer(imagecodecs.blosc2_decode(content, numthreads=1), dtype).reshape(
            shape
        ),
    )


def _pcodec(level: int) -> Pair:
    return Pair(
        lambda plane: imagecodecs.pcodec_encode(plane, level=level),
        lambda content, shape, dtype: imagecodecs.pcodec_decode(content, shape=shape, dtype=dtype),
    )


def _image(name: str, **options: object) -> Pair:
    encode, decode = getattr(imagecodecs, f"{name}_encode"), getattr(imagecodecs, f"{name}_decode")
    threads = {"numthreads": 1} if name == "jpegxl" else {}
    return Pair(
        lambda plane: encode(plane, **options, **threads), lambda content, _shape, _dtype: decode(content, **threads)
    )


CODECS = {
    "npy (uncompressed)": Pair(_npy, lambda content, _shape, _dtype: np.load(io.BytesIO(content))),
    "zstd 3": _zstd(3),
    "blosc2 bitshuffle lz4": _blosc2("lz4", 5),
    "blosc2 bitshuffle zstd 1": _blosc2("zstd", 1),
    "pcodec 4": _pcodec(4),
    "pcodec 8 (chosen)": _pcodec(8),
    "TIFF zstd 1, predictor": _image("tiff", compression="zstd", level=1, predictor=True),
    "PNG": _image("png"),
    "HTJ2K": _image("htj2k"),
    "JPEG-XL effort 1": _image("jpegxl", lossless=True, effort=1),
    "JPEG-LS": _image("jpegls"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER", help="real images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="generated fields only, 1 round, no result file")
    options = parser.parse_args()
    sets = {"generated": list(make_field(0).pixels)}
    if not options.quick:
        for folder in options.folders:
            name, _, path = folder.partition("=")
            sets[name] = tiles_of(Path(path))
    measured = measure(sets, rounds=1 if options.quick else options.rounds)
    lines = ["# Codecs for one channel of a tile", "", *(describe(name, planes) for name, planes in sets.items()), ""]
    for heading, number in (("Bits a pixel", 0), ("Decoding, Mpx/s", 1), ("Encoding, Mpx/s", 2)):
        lines += [f"## {heading}", "", f"| codec | {' | '.join(sets)} |", f"|---|{'---|' * len(sets)}"]
        for codec in CODECS:
            figures = [measured[codec, name][number] for name in sets]
            lines.append(
                f"| {codec} | {' | '.join(f'{figure:.2f}' if number == 0 else f'{figure:.0f}' for figure in figures)} |"
            )
        lines.append("")
    print("\n".join(lines))
    if not options.quick:
        print(write_result("codecs", "\n".join(lines), ["imagecodecs", "numpy"]))


def tiles_of(folder: Path) -> list[np.ndarray]:
    """Cut tiles from every image below a folder that can be read as channels of one picture."""
    planes: list[np.ndarray] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        try:
            pixels = read_image(path).grey().pixels
        except ImageError as error:
            print(error)
            continue
        for plane in pixels:
            if len(pixels) == 3 and plane.dtype == np.uint8 and not plane.any():
                continue  # the two dark channels of a tinted picture
            for row, column in itertools.product(*(range(0, max(1, side - TILE + 1), TILE) for side in plane.shape)):
                planes.append(np.ascontiguousarray(plane[row : row + TILE, column : column + TILE]))
    return planes[:: max(1, len(planes) // MAX_TILES)][:MAX_TILES]


def measure(sets: dict[str, list[np.ndarray]], *, rounds: int) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Return bits a pixel, and decoding and encoding speed, by codec and set."""
    encoding: dict[tuple[str, str], list[float]] = {}
    decoding: dict[tuple[str, str], list[float]] = {}
    bits: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for (codec, pair), (name, planes) in itertools.product(CODECS.items(), sets.items()):
            num_pixels = sum(plane.size for plane in planes)
            start = time.perf_counter()
            contents = [pair.encode(plane) for plane in planes]
            middle = time.perf_counter()
            decoded = [pair.decode(content, p.shape, p.dtype) for content, p in zip(contents, planes, strict=True)]
            end = time.perf_counter()
            assert all(np.array_equal(a, b) for a, b in zip(decoded, planes, strict=True)), codec
            bits[codec, name] = 8 * sum(map(len, contents)) / num_pixels
            encoding.setdefault((codec, name), []).append(num_pixels / 1e6 / (middle - start))
            decoding.setdefault((codec, name), []).append(num_pixels / 1e6 / (end - middle))
    return {key: (bits[key], statistics.median(decoding[key]), statistics.median(encoding[key])) for key in bits}


def describe(name: str, planes: list[np.ndarray]) -> str:
    """Say what a set is."""
    return (
        f"- {name}: {len(planes)} tiles of up to {TILE} px, {', '.join(sorted({plane.dtype.name for plane in planes}))}"
    )


if __name__ == "__main__":
    main()
