"""Check a shard set against its manifest, and draw a contact sheet of its samples."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8, UInt64

from dinocell.data_shards.build import run_tasks
from dinocell.data_shards.manifest import INDEX, Manifest, Shard, file_address, read_index, read_manifest
from dinocell.data_shards.read import stream
from dinocell.data_shards.sample import SampleInfo, decode_sample, parse_sample, raw_sample
from dinocell.errors import ImageError, ShardError
from dinocell.images.image import to_uint8
from dinocell.images.storage import copy_remote, local_path
from dinocell.images.write import write_png

_MAX_PROBLEMS_PER_SHARD = 5


class Problem(NamedTuple):
    """A problem with a file of the set."""

    file: str
    what: str


# A shard to check, and its part of the index.
_Task = tuple[Shard, UInt64[np.ndarray, "samples 2"]]


def verify(
    location: str | Path, *, workers: int = 1, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> list[Problem]:
    """Read a whole set and return its problems.

    Every shard must exist with the size and sha256 of the manifest; the index must point to as many samples as the
    manifest has, every channel of which can be decoded; and WebDataset must find the same samples. Remote shards are
    downloaded to the system's temporary folder, one per worker at a time.

    Parameters
    ----------
    progress
        Called with the number of shards done and in total.

    Raises
    ------
    ShardError
        If the manifest or the index cannot be read.
    """
    manifest = read_manifest(location)
    index = read_index(location, manifest)
    problems = []
    folder = local_path(location)
    if folder is not None and hashlib.sha256((folder / INDEX).read_bytes()).hexdigest() != manifest.index_sha256:
        problems.append(Problem(file=INDEX, what="content differs from the manifest's sha256"))
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    tasks: list[_Task] = list(zip(manifest.shards, np.split(np.array(index), ends[:-1]), strict=True))
    verify_shard = partial(_verify_shard, str(location))
    for done, of_shard in enumerate(run_tasks(verify_shard, tasks, workers=workers), start=1):
        problems += of_shard
        progress(done, len(tasks))
    return sorted(problems, key=lambda problem: problem.file)


def _verify_shard(location: str, task: _Task) -> list[Problem]:
    shard, index = task
    with tempfile.TemporaryDirectory() as folder:
        address = file_address(location, shard.file)
        path = local_path(address)
        try:
            if path is None:
                path = Path(folder) / shard.file
                with path.open("wb") as file:
                    copy_remote(address, file, num_bytes=shard.num_bytes)
            problems = list(_find_problems(path, shard, index))
        except FileNotFoundError:
            problems = ["missing"]
        except (OSError, ImageError) as error:
            problems = [f"cannot be read ({error})"]
    if (num_more := len(problems) - _MAX_PROBLEMS_PER_SHARD) > 0:
        problems = [*problems[:_MAX_PROBLEMS_PER_SHARD], f"... and {num_more} more"]
    return [Problem(file=shard.file, what=what) for what in problems]


def _find_problems(path: Path, shard: Shard, index: UInt64[np.ndarray, "samples 2"]) -> Iterator[str]:
    size = path.stat().st_size
    if size != shard.num_bytes:
        yield f"{size} bytes instead of {shard.num_bytes}"
    keys = set()
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            yield "content differs from the manifest's sha256"
        for sample_index, (start, length) in enumerate(index.tolist()):
            if start + length > size:
                yield f"sample {sample_index}: the index points to bytes {start} to {start + length}"
                continue
            file.seek(start)
            try:
                sample = parse_sample(memoryview(file.read(length)))
                decode_sample(sample)
            except ShardError as error:
                yield f"sample {sample_index}: {error}"
            else:
                keys.add(sample.key)
    yield from _compare_with_webdataset(path, keys)


def _compare_with_webdataset(path: Path, keys: set[str]) -> Iterator[str]:
    """Read the shard without the index, with WebDataset; it must find the same samples."""
    import webdataset  # type: ignore[import-untyped]

    found = set()
    source: dict[str, Any] = {"url": str(path.absolute())}  # WebDataset adds the open file, as "stream"
    try:
        for members in webdataset.tarfile_samples([source]):
            key = members["__key__"]
            raw_sample(key, {suffix: content for suffix, content in members.items() if not suffix.startswith("__")})
            found.add(key)
    except Exception as error:  # WebDataset does not wrap the errors of tarfile and of its own code
        yield f"WebDataset cannot read it ({type(error).__name__}: {error})"
        return
    finally:
        if "stream" in source:
            source["stream"].close()
    if found != keys:
        yield f"WebDataset finds {len(found)} samples, the index points to {len(keys)}"


# --- preview: a contact sheet, one row per sample with its channels side by side ------------------------------------

_GAP_PX = 4
_CAPTION_PX = 14
_BACKGROUND, _TEXT = 24, 230
# Percentiles of the data set: one intensity range per channel, so that tiles can be compared.
_BLACK, _WHITE = "0.1", "99.9"


def preview(
    location: str | Path,
    output: str | Path,
    *,
    num_samples: int = 8,
    tile_px: int = 192,
    seed: int = 0,
    cache: str | Path | None = None,
) -> None:
    """Write a PNG with ``num_samples`` random samples, each channel scaled to its 0.1 and 99.9 percentiles in the set.

    Raise ShardError if the set cannot be read; ImageError if the image cannot be written.
    """
    samples = stream(location, batch_size=1, seed=seed, cache=cache)
    manifest = samples.sets[0].manifest
    names = list(manifest.channels)
    step = tile_px + _GAP_PX
    rows = [_draw_text([(index * step, name) for index, name in enumerate(names)], len(names) * step)]
    for batch in islice(samples, min(num_samples, manifest.num_samples)):
        info = batch.infos[0]
        thumbnails = {
            name: _thumbnail(plane, name, manifest, tile_px)
            for name, plane in zip(info.channels, batch.tile(0).numpy(), strict=True)
        }
        empty = np.full((tile_px, tile_px), _BACKGROUND, np.uint8)
        planes = [thumbnails.get(name, empty) for name in names]
        rows += [caption(_describe(info), planes), side_by_side(planes)]
    write_png(output, np.concatenate(rows))


def _thumbnail(
    plane: Shaped[np.ndarray, "h w"], name: str, manifest: Manifest, size: int
) -> UInt8[np.ndarray, "size size"]:
    import cv2

    percentiles = manifest.channels[name].percentiles
    grey = to_uint8(plane, percentiles[_BLACK], percentiles[_WHITE])
    height, width = grey.shape
    scale = size / max(height, width)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(grey, fitted, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    framed = np.full((size, size), _BACKGROUND, np.uint8)
    framed[: small.shape[0], : small.shape[1]] = small
    return framed


def side_by_side(planes: list[UInt8[np.ndarray, "_ _"]]) -> UInt8[np.ndarray, "h w"]:
    """Concatenate images of the same height horizontally, with a gap after each."""
    padded = [np.pad(plane, ((0, _GAP_PX), (0, _GAP_PX)), constant_values=_BACKGROUND) for plane in planes]
    return np.concatenate(padded, axis=1)


def caption(text: str, planes: list[UInt8[np.ndarray, "_ _"]]) -> UInt8[np.ndarray, "h w"]:
    """Return a line of text as wide as the images side by side."""
    return _draw_text([(0, text)], sum(plane.shape[1] + _GAP_PX for plane in planes))


def _draw_text(texts: list[tuple[int, str]], width: int) -> UInt8[np.ndarray, "h {width}"]:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (width, _CAPTION_PX), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for left, text in texts:
        draw.text((left + 2, 0), text, fill=_TEXT, font=ImageFont.load_default(size=11))
    return np.array(image)


def _describe(info: SampleInfo) -> str:
    size = f"{info.height} x {info.width} {info.dtype}, row {info.row}, column {info.column}"
    missing = f", without {', '.join(info.missing)}" if info.missing else ""
    return f"{info.field}   {size}{missing}"
