"""Check a shard set against its manifest: every byte, every sample, every channel."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from dinocell.data_shards.build.workers import run_tasks
from dinocell.data_shards.manifest import INDEX, Manifest, Shard, beside, read_index, read_manifest
from dinocell.data_shards.read import stream
from dinocell.data_shards.sample import SampleInfo, decode_sample, parse_sample, raw_sample
from dinocell.errors import ImageError, ShardError
from dinocell.images.image import to_uint8
from dinocell.images.storage import copy_remote, local_path
from dinocell.images.write import write_png

_SHOWN_A_SHARD = 5


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a file of the set."""

    file: str
    what: str


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A shard to check: where it lies, and its part of the index."""

    location: str
    shard: Shard
    index: np.ndarray
    temporary: str | None


def verify(
    location: str | Path,
    *,
    workers: int = 1,
    temporary: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Problem]:
    """Read a whole set and return what is wrong with it.

    Every shard must be there with the size and sha256 of the manifest; the index must lead to as many samples as the
    manifest says, every channel of which can be decoded; and WebDataset must find the same samples.

    Parameters
    ----------
    temporary
        Folder for the shards of a remote set, one a worker at a time; None takes the system's.
    progress
        Called with the number of shards done and of all.

    Raises
    ------
    ShardError
        If there is no manifest or index to check against.
    """
    manifest = read_manifest(location)
    index = read_index(location, manifest)
    problems = []
    folder = local_path(location)
    if folder is not None and hashlib.sha256((folder / INDEX).read_bytes()).hexdigest() != manifest.index_sha256:
        problems.append(Problem(file=INDEX, what="content differs from the manifest's sha256"))
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    tasks = [
        _Task(
            location=str(location),
            shard=shard,
            index=np.array(index[end - shard.num_samples : end]),
            temporary=None if temporary is None else str(temporary),
        )
        for shard, end in zip(manifest.shards, ends.tolist(), strict=True)
    ]
    for done, found in enumerate(run_tasks(_verify_shard, tasks, workers=workers), start=1):
        problems += found
        progress(done, len(tasks))
    return sorted(problems, key=lambda problem: problem.file)


def _verify_shard(task: _Task) -> list[Problem]:
    with tempfile.TemporaryDirectory(dir=task.temporary) as folder:
        address = beside(task.location, task.shard.file)
        path = local_path(address)
        try:
            if path is None:
                path = Path(folder) / task.shard.file
                with path.open("wb") as file:
                    copy_remote(address, file, num_bytes=task.shard.num_bytes)
            found = list(_problems(path, task))
        except FileNotFoundError:
            found = ["missing"]
        except (OSError, ImageError) as error:
            found = [f"cannot be read ({error})"]
    if len(found) > _SHOWN_A_SHARD:
        found = [*found[:_SHOWN_A_SHARD], f"... and {len(found) - _SHOWN_A_SHARD} more"]
    return [Problem(file=task.shard.file, what=what) for what in found]


def _problems(path: Path, task: _Task) -> Iterator[str]:
    size = path.stat().st_size
    if size != task.shard.num_bytes:
        yield f"{size} bytes instead of {task.shard.num_bytes}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != task.shard.sha256:
            yield "content differs from the manifest's sha256"
    keys = set()
    with path.open("rb") as file:
        for number, (start, length) in enumerate(task.index.tolist()):
            if start + length > size:
                yield f"sample {number}: the index leads to bytes {start} to {start + length}"
                continue
            file.seek(start)
            try:
                sample = parse_sample(memoryview(file.read(length)))
                decode_sample(sample)
            except ShardError as error:
                yield f"sample {number}: {error}"
            else:
                keys.add(sample.key)
    yield from _as_webdataset(path, keys)


def _as_webdataset(path: Path, keys: set[str]) -> Iterator[str]:
    """Read the shard without the index, as WebDataset does; it must find the samples that the index leads to."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # type: ignore[import-untyped]

    found = set()
    try:
        with path.open("rb") as file:
            for members in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                key = members["__key__"]
                raw_sample(key, {suffix: content for suffix, content in members.items() if not suffix.startswith("__")})
                found.add(key)
    except Exception as error:  # WebDataset lets through whatever tarfile and its own code raise
        yield f"WebDataset cannot read it ({type(error).__name__}: {error})"
        return
    if found != keys:
        yield f"WebDataset finds {len(found)} samples, the index leads to {len(keys)}"


# --- preview -------------------------------------------------------------------------------------------------------
#
# A contact sheet of a shard set: some samples, a row each, with their channels side by side.

_GAP_PX = 4
_CAPTION_PX = 14
_GROUND, _INK = 24, 230
# Of the data set's values; so that tiles can be compared, each channel is drawn with one range.
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
    """Write a PNG with ``num_samples`` random samples, each channel from its 0.1 to its 99.9 percentile in the set.

    Raises
    ------
    ShardError
        If the set cannot be read.
    ImageError
        If the picture cannot be written.
    """
    samples = stream(location, batch_size=1, seed=seed, cache=cache)
    manifest = samples.sets[0].manifest
    names = list(manifest.channels)
    rows = []
    for batch in islice(samples, min(num_samples, manifest.num_samples)):
        info = batch.infos[0]
        shown = {
            name: _thumbnail(plane, name, manifest, tile_px)
            for name, plane in zip(info.channels, batch.tile(0).numpy(), strict=True)
        }
        empty = np.full((tile_px, tile_px), _GROUND, np.uint8)
        planes = [shown.get(name, empty) for name in names]
        rows.append(np.concatenate([caption(_text(info), planes), side_by_side(planes)]))
    header = _header(names, tile_px)
    write_png(output, np.concatenate([header, *rows]))


def _thumbnail(plane: np.ndarray, name: str, manifest: Manifest, size: int) -> np.ndarray:
    import cv2

    known = manifest.channels[name].percentiles
    grey = to_uint8(plane, known[_BLACK], known[_WHITE])
    height, width = grey.shape
    scale = size / max(height, width)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(grey, fitted, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    framed = np.full((size, size), _GROUND, np.uint8)
    framed[: small.shape[0], : small.shape[1]] = small
    return framed


def side_by_side(planes: list[np.ndarray]) -> np.ndarray:
    """Put pictures of one height next to one another, with a gap after each."""
    padded = [np.pad(plane, ((0, _GAP_PX), (0, _GAP_PX)), constant_values=_GROUND) for plane in planes]
    return np.concatenate(padded, axis=1)


def caption(text: str, planes: list[np.ndarray]) -> np.ndarray:
    """Return a line of text as wide as the pictures side by side."""
    return _line([(0, text)], sum(plane.shape[1] + _GAP_PX for plane in planes))


def _header(names: list[str], tile_px: int) -> np.ndarray:
    width = tile_px + _GAP_PX
    return _line([(number * width, name) for number, name in enumerate(names)], len(names) * width)


def _line(texts: list[tuple[int, str]], width: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (width, _CAPTION_PX), _GROUND)
    draw = ImageDraw.Draw(image)
    for left, text in texts:
        draw.text((left + 2, 0), text, fill=_INK, font=ImageFont.load_default(size=11))
    return np.array(image)


def _text(info: SampleInfo) -> str:
    size = f"{info.height} x {info.width} {info.dtype}, row {info.row}, column {info.column}"
    missing = f", without {', '.join(info.missing)}" if info.missing else ""
    return f"{info.field}   {size}{missing}"
