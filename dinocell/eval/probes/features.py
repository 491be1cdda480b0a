"""Features of images from a frozen backbone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import ConfigError, DinocellError
from dinocell.eval.probes.image_sets import ImageSet, ProbeImage
from dinocell.models.vit import VisionTransformer

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
        # Population standard deviation and epsilon 1e-7 as in Cell-DINO: a blank channel becomes 0.
        std, mean = torch.std_mean(pixels, dim=(-2, -1), keepdim=True, correction=0)
        return (pixels - mean) / (std + 1e-7)
    if convention == "unit":
        return pixels
    raise DinocellError(f"the model expects {convention} input; load it with input='standardised' or 'unit'")


def _stacked(image: ProbeImage, pixels: Tensor, backbone: VisionTransformer) -> Float[Tensor, "c h w"]:
    expected, names = backbone.card.input.channel_names, image.channel_names
    if expected and set(expected) <= set(names):
        return pixels[[names.index(name) for name in expected]]
    if len(names) != backbone.config.in_channels:
        raise DinocellError(
            f"{image.id}: has the channels {', '.join(names)}, the model takes {backbone.config.in_channels}"
            + (f" ({', '.join(expected)})" if expected else "")
        )
    return pixels


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

    Raises
    ------
    DinocellError
        If no image can be read, or the numbers of channels differ.
    """
    stop = len(images) if limit is None else min(limit, len(images))
    rows: list[np.ndarray] = []
    extracted: list[ProbeImage] = []
    problems: list[str] = []
    names: tuple[str, ...] = ()
    for done, (image, row) in enumerate(feature_rows(backbone, images.images(0, stop), settings), start=1):
        progress(done)
        if row is None:
            problems.append(f"{image.id}: {image.problem}")
            continue
        if rows and row.shape != rows[0].shape:
            raise DinocellError(other_channels(images, image.id, image.channel_names, names))
        rows.append(row)
        extracted.append(image)
        names = names or image.channel_names
    return _features(images, np.stack(rows) if rows else None, extracted, names, problems)


def _features(
    images: ImageSet,
    values: np.ndarray | None,
    extracted: Sequence[ProbeImage],
    names: tuple[str, ...],
    problems: Sequence[str],
) -> Features:
    if values is None:
        raise DinocellError(f"{images.name}: no image could be read" + (f"; {problems[0]}" if problems else ""))
    return Features(
        values=values,
        ids=tuple(image.id for image in extracted),
        labels=tuple(image.labels for image in extracted),
        channel_names=names,
        problems=tuple(problems),
    )


def other_channels(images: ImageSet, image_id: str, channels: Sequence[str], first: Sequence[str]) -> str:
    """Return the error message for an image with other channels than the first one of its set."""
    return (
        f"{images.name}: {image_id} has the channels {', '.join(channels)}, the first image has {', '.join(first)}; "
        "all features of a set must have the same shape"
    )
