"""Features of images from a frozen backbone, in memory (`extract`) or in files that all probes share (`extract_to`)."""

import csv
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import ConfigError, DinocellError, require
from dinocell.eval.probes.image_sets import ImageSet, ProbeImage
from dinocell.models.locate import sha256_of
from dinocell.models.vit import VisionTransformer
from dinocell.runtime.distributed import World, barrier
from dinocell.runtime.files import folder_lock, replacing, write_atomically, write_table

_log = logging.getLogger(__name__)
_PLACE = "weights_from"

Channels = Literal["stack", "bag", "mean", "each"]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Settings of feature extraction (Cell-DINO's names).

    Attributes
    ----------
    channels
        ``stack``: all channels as joint input of a model with as many. For a model of one channel: ``bag`` concatenates
        the features of the channels, ``mean`` uses their mean image, ``each`` returns one feature per channel.
    resize_size, crop_size
        Resize the shorter side to this many pixels, then take the central crop, padded with 0 where the image is
        smaller; 0: unchanged. The crop is reduced to whole patches.
    n_last_blocks
        Number of last blocks whose CLS tokens are concatenated.
    avgpool
        Append the mean patch token of the last block.
    batch_size
        Images per batch.
    """

    channels: Channels = "stack"
    resize_size: int = 0
    crop_size: int = 0
    n_last_blocks: int = 1
    avgpool: bool = False
    batch_size: int = 64

    def __post_init__(self) -> None:
        if min(self.resize_size, self.crop_size) < 0 or min(self.n_last_blocks, self.batch_size) < 1:
            raise ConfigError("sizes are at least 0, blocks and batch at least 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Features of a set, one row per image, (n d) or (n c d) per channel; unreadable images are skipped."""

    values: Float[np.ndarray, "n *c d"]
    ids: tuple[str, ...]
    labels: tuple[Mapping[str, LabelValue], ...]
    channel_names: tuple[str, ...]
    problems: tuple[str, ...] = ()

    def stored(self) -> Shaped[Tensor, "n *c d"]:
        """Return the values without copying; values in a file stay memory-mapped."""
        return torch.from_numpy(self.values)

    def tensor(self, rows: Bool[Tensor, " n"] | Int[Tensor, " m"] | None = None) -> Float[Tensor, "m *c d"]:
        """Return all values, or selected rows, in float32."""
        values = self.values if rows is None else self.values[rows.numpy()]
        return torch.from_numpy(np.array(values, np.float32))


def default_channels(backbone: VisionTransformer) -> Channels:
    """Return ``stack`` for a model of several channels, ``bag`` for a model of one."""
    return "stack" if backbone.config.in_channels > 1 else "bag"


def to_input(image: ProbeImage, backbone: VisionTransformer, settings: FeatureSettings) -> Float[Tensor, "k c h w"]:
    """Return the model inputs of one image: resized, cropped, normalised by the model's input convention.

    A DinocellError if the channels, the image's size or the model's input convention do not fit.
    """
    assert image.pixels is not None
    pixels = torch.from_numpy(np.ascontiguousarray(image.pixels))
    in_channels, convention = backbone.config.in_channels, backbone.card.input.convention
    mode, names, expected = settings.channels, list(image.channel_names), backbone.card.input.channel_names
    is_named = bool(expected) and set(expected) <= set(names)
    takes = f"{in_channels} ({', '.join(expected)})" if expected else str(in_channels)
    if mode == "stack":
        fits = is_named or len(names) == in_channels
        require(fits, f"{image.id}: has the channels {', '.join(names)}, the model takes {takes}")
    else:
        problem = f"channels {mode}: needs a model of one channel, this one has {takes}"
        require(in_channels == 1, f"{image.id}: {problem}")
    problem = f"the model expects {convention} input; load it with input='standardised' or 'unit'"
    require(convention in ("standardised", "unit"), f"{image.id}: {problem}")
    if mode == "mean":
        pixels = pixels.mean(0, keepdim=True)
    if mode == "stack":
        pixels = pixels[[names.index(name) for name in expected] if is_named else slice(None)][None]
    else:
        pixels = pixels[:, None]
    if settings.resize_size:
        height, width = pixels.shape[-2:]
        scale = settings.resize_size / min(height, width)
        size = (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    pixels = _cropped(pixels, settings.crop_size, backbone.config.patch_size)
    if convention == "unit":
        return pixels
    # Population standard deviation and epsilon 1e-7 as in Cell-DINO: a blank channel becomes 0.
    std, mean = torch.std_mean(pixels, dim=(-2, -1), keepdim=True, correction=0)
    return (pixels - mean) / (std + 1e-7)


def _cropped(pixels: Tensor, crop: int, patch: int) -> Tensor:
    height, width = pixels.shape[-2:]
    sides = [crop or height, crop or width]
    if min(sides) < patch:
        raise DinocellError(f"images of {height} x {width} px are smaller than a patch of {patch}")
    sides = [side // patch * patch for side in sides]
    missing = [max(0, side - size) for side, size in zip(sides, (height, width), strict=True)]
    if any(missing):
        top, left = missing[0] // 2, missing[1] // 2
        pixels = F.pad(pixels, (left, missing[1] - left, top, missing[0] - top))
    top, left = ((size - side) // 2 for side, size in zip(sides, pixels.shape[-2:], strict=True))
    return pixels[..., top : top + sides[0], left : left + sides[1]]


@torch.no_grad()
def tokens_to_feature(
    backbone: VisionTransformer, images: Float[Tensor, "b c h w"], settings: FeatureSettings
) -> Float[Tensor, "b d"]:
    """Return the feature of each input."""
    if settings.n_last_blocks > backbone.config.depth:
        raise ConfigError(f"n_last_blocks: the model has {backbone.config.depth}, got {settings.n_last_blocks}")
    outputs = backbone.forward_blocks(images, range(-settings.n_last_blocks, 0))
    parts = [output.cls for output in outputs]
    if settings.avgpool:
        parts.append(outputs[-1].patches.mean(1))
    return torch.cat(parts, dim=1).float()


def feature_rows(
    backbone: VisionTransformer, images: Iterator[ProbeImage], settings: FeatureSettings
) -> Iterator[tuple[ProbeImage, Float32[np.ndarray, "*c d"] | None]]:
    """Yield each image with its feature, or None if the image could not be read; images of one size are batched."""
    device = next(backbone.parameters()).device
    pending: list[tuple[ProbeImage, Tensor]] = []

    def flush() -> Iterator[tuple[ProbeImage, np.ndarray]]:
        if pending:
            counts = [len(inputs) for _, inputs in pending]
            batch = torch.cat([inputs for _, inputs in pending]).to(device)
            features = torch.cat([tokens_to_feature(backbone, part, settings) for part in batch.split(256)]).cpu()
            for (image, _), rows in zip(pending, features.split(counts), strict=True):
                row = rows if settings.channels == "each" else rows.flatten()
                yield image, row.numpy()
            pending.clear()

    for image in images:
        if image.pixels is None:
            yield from flush()
            yield image, None
            continue
        inputs = to_input(image, backbone, settings)
        if pending and (pending[0][1].shape != inputs.shape or len(pending) >= settings.batch_size):
            yield from flush()
        pending.append((image, inputs))
    yield from flush()


def extract(
    backbone: VisionTransformer,
    images: ImageSet,
    settings: FeatureSettings,
    *,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Extract the features of a set, or of its first ``limit`` images, into memory.

    A DinocellError if no image can be read, or the numbers of channels differ.
    """
    stop = len(images) if limit is None else min(limit, len(images))
    good: list[tuple[ProbeImage, np.ndarray]] = []
    problems: list[str] = []
    for done, (image, row) in enumerate(feature_rows(backbone, images.images(0, stop), settings), start=1):
        progress(done)
        if row is None:
            problems.append(f"{image.id}: {image.problem}")
        else:
            good.append((image, row))
    _check_rows(images, [(image.id, row.shape, image.channel_names) for image, row in good], problems)
    return Features(
        values=np.stack([row for _, row in good]),
        ids=tuple(image.id for image, _ in good),
        labels=tuple(image.labels for image, _ in good),
        channel_names=good[0][0].channel_names,
        problems=tuple(problems),
    )


def _check_rows(
    images: ImageSet, rows: Sequence[tuple[str, Sequence[int], Sequence[str]]], problems: Sequence[str]
) -> None:
    """Raise a DinocellError if there are no rows (image id, shape, channel names), or they differ in shape."""
    unread = f"; the first: {problems[0]}" if problems else ""
    require(rows, f"{images.name}: no image could be read{unread}")
    for name, shape, channels in rows:
        got = f"{name} has the channels {', '.join(channels)}, the first image has {', '.join(rows[0][2])}"
        is_same = tuple(shape) == tuple(rows[0][1])
        require(is_same, f"{images.name}: {got}; all features of a set must have the same shape")


def extract_to(
    folder: Path,
    backbone: VisionTransformer,
    images: ImageSet,
    settings: FeatureSettings,
    *,
    weights: str,
    half: bool = False,
    world: World | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Extract the features of a set to a folder, resume an interrupted extraction, or read existing features.

    ::

        features.npy       (n d) or (n c d), float32 or float16, memory-mapped when read
        rows.csv           one row per image: id and labels
        extraction.json    weights (content and path), set and settings; a folder of another is rejected

    A DinocellError if the folder contains other features, another process is extracting them, or the folder cannot be
    created; and as ``extract``.

    Parameters
    ----------
    weights
        Source of the backbone; files are compared by content, not by name.
    half
        Store float16.
    world
        Ranks over which the images are distributed; each calls this, and all return the same.
    progress
        Called with the number of images that this rank has processed.
    """
    world = world or World()
    facts = {
        "weights": fingerprint(weights),
        "images": images.name,
        "num_images": len(images),
        "settings": {key: value for key, value in asdict(settings).items() if key != "batch_size"},
        "dtype": "float16" if half else "float32",
    }
    part = folder / f".features-{world.rank}-of-{world.size}.jsonl"
    with _claimed(folder, facts, weights) if world.is_main else nullcontext():
        barrier()
        if not (folder / "rows.csv").exists():
            _extract_part(part, backbone, images, settings, world.part(len(images)), half=half, progress=progress)
            barrier()
            if world.is_main:
                _join(folder, images, world.size, half=half)
            barrier()
    return read_features(folder)


@contextmanager
def _claimed(folder: Path, facts: Mapping[str, object], weights: str) -> Iterator[None]:
    """Create the folder, lock it, so that two runs do not mix their rows, and record what it contains."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinocellError(f"{folder}: cannot be written ({error.strerror or error})") from error
    record = folder / "extraction.json"
    with folder_lock(folder, wait=False) as is_ours:
        before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else facts
        differing = [key for key, value in facts.items() if before.get(key) != json.loads(json.dumps(value))]
        problem = "another process is extracting these features; start again when it has finished"
        require(is_ours or (folder / "rows.csv").exists(), f"{folder}: {problem}")
        problem = f"contains features with other {', '.join(differing)}; remove it, or choose another folder"
        require(not differing, f"{folder} {problem}")
        place = str(Path(weights).absolute()) if Path(weights).exists() else weights
        write_atomically(record, json.dumps({**facts, _PLACE: place}, indent=1) + "\n")
        yield


def _extract_part(
    part: Path,
    backbone: VisionTransformer,
    images: ImageSet,
    settings: FeatureSettings,
    span: slice,
    *,
    half: bool,
    progress: Callable[[int], None],
) -> None:
    """Append a line and a row per image to this rank's part, after the complete lines of an earlier start."""
    rows_path = part.with_suffix(".rows")
    complete, size = _complete_lines(part, rows_path.stat().st_size if rows_path.exists() else 0)
    done = len(complete)
    dtype = np.float16 if half else np.float32
    with part.open("w", encoding="utf-8") as lines, rows_path.open("ab") as rows:
        lines.writelines(complete)
        rows.truncate(size)
        start = span.start + done
        for count, (image, row) in enumerate(
            feature_rows(backbone, images.images(start, span.stop), settings), start=done + 1
        ):
            content = b"" if row is None else np.ascontiguousarray(row, dtype).tobytes()
            rows.write(content)
            rows.flush()
            line = {"id": image.id, "labels": dict(image.labels), "problem": image.problem, "bytes": len(content)}
            line |= {"shape": [] if row is None else list(row.shape), "channels": list(image.channel_names)}
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            progress(count)


def _complete_lines(part: Path, num_bytes: int) -> tuple[list[str], int]:
    """Return the complete lines whose rows are within the first ``num_bytes``, and the number of bytes of these rows.

    After a crash either file may be shorter than the other.
    """
    complete: list[str] = []
    size = 0
    for line in part.read_text(encoding="utf-8").splitlines(keepends=True) if part.exists() else []:
        if not line.endswith("\n") or (after := size + int(json.loads(line)["bytes"])) > num_bytes:
            break
        complete.append(line)
        size = after
    return complete, size


def _join(folder: Path, images: ImageSet, size: int, *, half: bool) -> None:
    parts = [folder / f".features-{rank}-of-{size}.jsonl" for rank in range(size)]
    lines = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    good = [line for line in lines if line["bytes"]]
    problems = [f"{line['id']}: {line['problem']}" for line in lines if not line["bytes"]]
    _check_rows(images, [(line["id"], line["shape"], line["channels"]) for line in good], problems)
    for problem in problems:
        _log.warning("skipped: %s", problem)
    dtype = np.float16 if half else np.float32
    values = np.concatenate([np.fromfile(part.with_suffix(".rows"), dtype) for part in parts])
    with replacing(folder / "features.npy") as temporary, temporary.open("wb") as file:
        np.save(file, values.reshape(-1, *good[0]["shape"]))
    write_atomically(folder / "channels.json", json.dumps(good[0]["channels"]))
    write_atomically(folder / "problems.txt", "".join(f"{problem}\n" for problem in problems))
    columns = sorted({key for line in good for key in line["labels"]})
    # The table is the last file: its existence shows that the features are complete.
    rows = [[line["id"], *(line["labels"].get(column, "") for column in columns)] for line in good]
    write_table(folder / "rows.csv", [["id", *columns], *rows])
    for part in folder.glob(".features-*"):  # also those of a start with another number of ranks
        part.unlink()


def read_features(folder: Path) -> Features:
    """Read features written by `extract_to`; values are memory-mapped.

    A DinocellError if the folder contains no complete features.
    """
    problem = "contains no features (rows.csv is missing); extract them with 'dinocell features'"
    require((folder / "rows.csv").exists(), f"{folder}: {problem}")
    with (folder / "rows.csv").open(encoding="utf-8", newline="") as file:
        (_, *columns), *rows = csv.reader(file)  # by position: a label may also be called id
    return Features(
        # c: copy on write; torch warns about memory that is not writable.
        values=np.load(folder / "features.npy", mmap_mode="c", allow_pickle=False),
        ids=tuple(row[0] for row in rows),
        labels=tuple(dict(zip(columns, row[1:], strict=True)) for row in rows),
        channel_names=tuple(json.loads((folder / "channels.json").read_text(encoding="utf-8"))),
        problems=tuple((folder / "problems.txt").read_text(encoding="utf-8").splitlines()),
    )


def weights_of(folder: Path) -> str:
    """Return the path of the weights at the time of extraction; "" if it was not recorded."""
    record: dict[str, str] = json.loads((folder / "extraction.json").read_text(encoding="utf-8"))
    return record.get(_PLACE, "")


def fingerprint(weights: str) -> str:
    """Return an identifier of weights: the hash of the content of a file, else the name."""
    return f"sha256:{sha256_of(Path(weights))}" if Path(weights).is_file() else weights
