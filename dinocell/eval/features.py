"""Features of images: what a frozen backbone says, extracted once, kept on disk, shared by all probes."""

import csv
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from dinocell.data_shards.fields import LabelValue
from dinocell.errors import ConfigError, DinocellError
from dinocell.eval.image_sets import ImageSet, ProbeImage
from dinocell.models.vit import VisionTransformer
from dinocell.runtime.atomic import write_atomically
from dinocell.runtime.distributed import World, barrier

_log = logging.getLogger(__name__)
Channels = Literal["stack", "bag", "mean", "each"]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """How an image becomes a feature (Cell-DINO's names).

    Attributes
    ----------
    channels
        ``stack``: all channels into a model of so many. For a model of one channel: ``bag`` concatenates the features
        of the channels, ``mean`` takes those of their mean image, ``each`` keeps a feature for each channel.
    resize_size, crop_size
        Scale the shorter side to so many pixels, then cut out the middle, padded with 0 where the image is smaller;
        0: as it is. The crop is cut to whole patches.
    n_last_blocks
        The CLS tokens of so many last blocks, concatenated.
    avgpool
        Append the mean of the last block's patch tokens.
    batch_size
        Images at a time.
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
    """Features of a set, a row an image, (n d) or, channel by channel, (n c d); images without one are left out."""

    values: Float[np.ndarray, "n *c d"]
    ids: tuple[str, ...]
    labels: tuple[Mapping[str, LabelValue], ...]
    channel_names: tuple[str, ...]
    problems: tuple[str, ...] = ()

    def tensor(self) -> Float[Tensor, "n *c d"]:
        """Return the values in float32."""
        return torch.from_numpy(np.array(self.values, np.float32))


def default_channels(backbone: VisionTransformer) -> Channels:
    """Return ``stack`` for a model of several channels, ``bag`` for one of one."""
    return "stack" if backbone.config.in_channels > 1 else "bag"


def to_input(image: ProbeImage, backbone: VisionTransformer, settings: FeatureSettings) -> Float[Tensor, "k c h w"]:
    """Make the model's inputs of one image: scaled, cut out, normalised as the model's card says.

    Raises
    ------
    DinocellError
        If the channels do not fit the model.
    """
    assert image.pixels is not None
    pixels = torch.from_numpy(np.ascontiguousarray(image.pixels))
    if settings.channels == "mean":
        pixels = pixels.mean(0, keepdim=True)
    pixels = _stacked(image, pixels, backbone) if settings.channels == "stack" else pixels[:, None]
    if settings.channels == "stack":
        pixels = pixels[None]
    elif backbone.config.in_channels != 1:
        raise DinocellError(
            f"channels {settings.channels}: needs a model of one channel, this one has {backbone.config.in_channels}"
        )
    if settings.resize_size:
        height, width = pixels.shape[-2:]
        scale = settings.resize_size / min(height, width)
        size = (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    pixels = _cropped(pixels, settings.crop_size, backbone.config.patch_size)
    convention = backbone.card.input.convention
    if convention == "standardised":
        # Population deviation and 1e-7 as Cell-DINO: a blank channel becomes 0.
        deviation, mean = torch.std_mean(pixels, dim=(-2, -1), keepdim=True, correction=0)
        return (pixels - mean) / (deviation + 1e-7)
    if convention == "unit":
        return pixels
    raise DinocellError(f"the model wants {convention} input; load it with input='standardised' or 'unit'")


def _stacked(image: ProbeImage, pixels: Tensor, backbone: VisionTransformer) -> Float[Tensor, "c h w"]:
    wanted, names = backbone.card.input.channel_names, image.channel_names
    if wanted and set(wanted) <= set(names):
        return pixels[[names.index(name) for name in wanted]]
    if len(names) != backbone.config.in_channels:
        raise DinocellError(
            f"{image.id}: has the channels {', '.join(names)}, the model takes {backbone.config.in_channels}"
            + (f" ({', '.join(wanted)})" if wanted else "")
        )
    return pixels


def _cropped(pixels: Tensor, crop: int, patch: int) -> Tensor:
    height, width = pixels.shape[-2:]
    sides = [crop or height, crop or width]
    if min(sides) < patch:
        raise DinocellError(f"images of {height} x {width} px are smaller than a patch of {patch}")
    sides = [side // patch * patch for side in sides]
    short = [max(0, side - have) for side, have in zip(sides, (height, width), strict=True)]
    if any(short):
        top, left = short[0] // 2, short[1] // 2
        pixels = F.pad(pixels, (left, short[1] - left, top, short[0] - top))
    top, left = ((have - side) // 2 for side, have in zip(sides, pixels.shape[-2:], strict=True))
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
    """Yield each image with its feature, None where the image could not be read; images of one size go together."""
    device = next(backbone.parameters()).device
    waiting: list[tuple[ProbeImage, Tensor]] = []

    def flush() -> Iterator[tuple[ProbeImage, np.ndarray]]:
        if waiting:
            counts = [len(each) for _, each in waiting]
            inputs = torch.cat([each for _, each in waiting]).to(device)
            found = torch.cat([tokens_to_feature(backbone, part, settings) for part in inputs.split(256)]).cpu()
            for (image, _), rows in zip(waiting, found.split(counts), strict=True):
                row = rows if settings.channels == "each" else rows.flatten()
                yield image, row.numpy()
            waiting.clear()

    for image in images:
        if image.pixels is None:
            yield from flush()
            yield image, None
            continue
        inputs = to_input(image, backbone, settings)
        if waiting and (waiting[0][1].shape != inputs.shape or len(waiting) >= settings.batch_size):
            yield from flush()
        waiting.append((image, inputs))
    yield from flush()


def extract(
    backbone: VisionTransformer,
    images: ImageSet,
    settings: FeatureSettings,
    *,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Extract the features of a set, or of its first ``limit`` images, into main memory.

    Raises
    ------
    DinocellError
        If no image can be read, or they do not have the same number of channels.
    """
    stop = len(images) if limit is None else min(limit, len(images))
    rows: list[np.ndarray] = []
    found: list[ProbeImage] = []
    problems: list[str] = []
    names: tuple[str, ...] = ()
    for number, (image, row) in enumerate(feature_rows(backbone, images.images(0, stop), settings), start=1):
        progress(number)
        if row is None:
            problems.append(f"{image.id}: {image.problem}")
            continue
        if rows and row.shape != rows[0].shape:
            raise DinocellError(_other_channels(images, image, names))
        rows.append(row)
        found.append(image)
        names = names or image.channel_names
    return _features(images, np.stack(rows) if rows else None, found, names, problems)


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
    """Extract the features of a set to a folder, or read those that are there; what was begun is finished.

    ::

        features.npy       (n d) or (n c d), float32 or float16, mapped into memory when read
        rows.csv           a line an image: its id, and what is known about it
        extraction.json    weights, set and settings: a folder of others is refused

    Parameters
    ----------
    weights
        Where the backbone comes from, for the record; a file's content counts, not its name.
    half
        Keep float16.
    world
        Ranks that share the images; each calls this, and all return the same.
    progress
        Called with the number of images that this rank has done.

    Raises
    ------
    DinocellError
        If the folder holds the features of something else, or as ``extract``.
    """
    world = world or World()
    facts = {
        "weights": _fingerprint(weights),
        "images": images.name,
        "num_images": len(images),
        "settings": {key: value for key, value in asdict(settings).items() if key != "batch_size"},
        "dtype": "float16" if half else "float32",
    }
    _claim(folder, facts, world)
    path, part = folder / "features.npy", folder / f".features-{world.rank}-of-{world.size}.jsonl"
    if not (folder / "rows.csv").exists():
        start, stop = (len(images) * (world.rank + each) // world.size for each in (0, 1))
        _extract_part(part, backbone, images, settings, (start, stop), half=half, progress=progress)
        barrier()
        if world.is_main:
            _join(folder, images, world.size, half=half)
        barrier()
    return read_features(path.parent)


def _claim(folder: Path, facts: Mapping[str, object], world: World) -> None:
    said = folder / "extraction.json"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if said.exists():
            before = json.loads(said.read_text(encoding="utf-8"))
            differing = [key for key, value in facts.items() if before.get(key) != json.loads(json.dumps(value))]
            if differing:
                raise DinocellError(
                    f"{folder} holds features with other {', '.join(differing)}; remove it, or choose another folder"
                )
        write_atomically(said, json.dumps(facts, indent=1) + "\n")
    barrier()


def _extract_part(
    part: Path,
    backbone: VisionTransformer,
    images: ImageSet,
    settings: FeatureSettings,
    span: tuple[int, int],
    *,
    half: bool,
    progress: Callable[[int], None],
) -> None:
    """Append a line and a row for each image to this rank's part, after what an earlier start left whole."""
    rows_path = part.with_suffix(".rows")
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True) if part.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    done = len(whole)
    size = sum(json.loads(line)["bytes"] for line in whole)
    dtype = np.float16 if half else np.float32
    with part.open("w", encoding="utf-8") as said, rows_path.open("ab") as rows:
        said.writelines(whole)
        rows.truncate(size)
        start = span[0] + done
        for number, (image, row) in enumerate(
            feature_rows(backbone, images.images(start, span[1]), settings), start=done + 1
        ):
            content = b"" if row is None else np.ascontiguousarray(row, dtype).tobytes()
            rows.write(content)
            rows.flush()
            line = {"id": image.id, "labels": dict(image.labels), "problem": image.problem, "bytes": len(content)}
            line |= {"shape": [] if row is None else list(row.shape), "channels": list(image.channel_names)}
            said.write(json.dumps(line) + "\n")
            said.flush()
            progress(number)


def _join(folder: Path, images: ImageSet, size: int, *, half: bool) -> None:
    parts = [folder / f".features-{rank}-of-{size}.jsonl" for rank in range(size)]
    lines = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    good = [line for line in lines if line["bytes"]]
    if not good:
        raise DinocellError(f"{images.name}: no image could be read; the first: {lines[0]['problem']}")
    shape = good[0]["shape"]
    other = next((line for line in good if line["shape"] != shape), None)
    if other is not None:
        raise DinocellError(
            f"{images.name}: {other['id']} has the channels {', '.join(other['channels'])}, the first image has "
            f"{', '.join(good[0]['channels'])}; features of a set must be of one shape"
        )
    for line in lines:
        if not line["bytes"]:
            _log.warning("%s: left out: %s", line["id"], line["problem"])
    values = np.concatenate(
        [
            np.fromfile(part.with_suffix(".rows"), np.float16 if half else np.float32).reshape(-1, *shape)
            for part in parts
        ]
    )
    temporary = folder / ".features.npy"
    np.save(temporary, values)
    temporary.rename(folder / "features.npy")
    columns = sorted({key for line in good for key in line["labels"]})
    table = folder / ".rows.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *columns])
        for line in good:
            writer.writerow([line["id"], *(line["labels"].get(column, "") for column in columns)])
    write_atomically(folder / "channels.json", json.dumps(good[0]["channels"]))
    problems = [f"{line['id']}: {line['problem']}" for line in lines if not line["bytes"]]
    write_atomically(folder / "problems.txt", "".join(f"{line}\n" for line in problems))
    table.rename(folder / "rows.csv")
    for part in folder.glob(".features-*"):  # those that a start with another number of ranks left, too
        part.unlink()


def read_features(folder: Path) -> Features:
    """Read what `extract_to` wrote, values mapped into memory.

    Raises
    ------
    DinocellError
        If the folder holds no features, or they were not finished.
    """
    if not (folder / "rows.csv").exists():
        raise DinocellError(f"{folder}: holds no features (rows.csv is missing); extract them with 'dinocell features'")
    with (folder / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ids = tuple(row.pop("id") for row in rows)
    return Features(
        values=np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False),
        ids=ids,
        labels=tuple(rows),
        channel_names=tuple(json.loads((folder / "channels.json").read_text(encoding="utf-8"))),
        problems=tuple((folder / "problems.txt").read_text(encoding="utf-8").splitlines()),
    )


def _features(
    images: ImageSet,
    values: np.ndarray | None,
    found: Sequence[ProbeImage],
    names: tuple[str, ...],
    problems: Sequence[str],
) -> Features:
    if values is None:
        raise DinocellError(f"{images.name}: no image could be read" + (f"; {problems[0]}" if problems else ""))
    return Features(
        values=values,
        ids=tuple(image.id for image in found),
        labels=tuple(image.labels for image in found),
        channel_names=names,
        problems=tuple(problems),
    )


def _other_channels(images: ImageSet, image: ProbeImage, names: Sequence[str]) -> str:
    return (
        f"{images.name}: {image.id} has the channels {', '.join(image.channel_names)}, the first image has "
        f"{', '.join(names)}; features of a set must be of one shape"
    )


def _fingerprint(weights: str) -> str:
    path = Path(weights)
    if not path.is_file():
        return weights
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
