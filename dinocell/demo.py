"""`dinocell demo`: the road on generated data, as far as it stands.

Today: generate multi-channel fields, turn their masks into distance maps, write a checkpoint as Meta would release
it (RGB, patch 16), load it into the patch-8 one-channel model, look at each stain alone through it, and draw what came
out.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from dinocell.data_shards.distance import labels_to_distance
from dinocell.data_shards.synthetic import SyntheticConfig, SyntheticField, make_field
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import Weights, load_backbone, save_weights
from dinocell.runtime.run import Run

_PATCH = 8


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo.

    ``weights`` names a backbone to look through (any source of `load_backbone`); without it, one of size ``variant``
    with random weights is written in the layout of a DINOv3 release and loaded like one.
    """

    output: Path = Path("demo")
    seed: int = 0
    num_fields: int = 4
    weights: str | None = None
    variant: str = "tiny"
    field: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        if self.num_fields < 2:
            raise ValueError(f"num_fields: expected at least 2 (fields are compared), got {self.num_fields}")
        if any(length % _PATCH for length in self.field.size):
            raise ValueError(f"field.size: expected multiples of the patch size {_PATCH}, got {self.field.size}")


def run_demo(config: DemoConfig) -> str:
    """Run the demo and return a summary that ends with the path of its picture."""
    with Run.start(config.output, config, total_steps=config.num_fields, log_every=1, batch_size=1) as run:
        vit = _backbone(config)
        run.note(f"backbone: {' | '.join(vit.card.derived_from)}")
        fields, tokens = [], []
        for number in range(config.num_fields):
            fields.append(make_field(config.seed + number, config.field))
            tokens.append(_through_every_channel(vit, fields[-1]))
            metrics = {"data/cells": float(fields[-1].labels.max())}
            if number == config.num_fields - 1:
                same, different = channel_consistency(torch.stack([views[1:].mean(1) for views in tokens]))
                metrics |= {"consistency/same_field": same, "consistency/different_field": different}
            run.log(number + 1, metrics)
        colours = _principal_colours(torch.stack(tokens))
        rows = [_draw_row(made, views) for made, views in zip(fields, colours, strict=True)]
        picture = _draw(rows, fields[0].channel_names)
        run.image(config.num_fields, "demo", picture)
        path = config.output / "demo.png"
        Image.fromarray(picture).save(path)
    licence = f"licence of the backbone: {vit.card.licence}\n" if config.weights else ""
    return (
        f"{config.num_fields} fields, {len(fields[0].channel_names)} stains, a backbone of {_millions(vit)}\n"
        f"cosine of features, same field through two stains {same:.3f}, two fields {different:.3f}: "
        f"margin {same - different:.3f}{'' if config.weights else ' (random weights)'}\n"
        f"{licence}numbers: tensorboard --logdir {config.output}\n"
        f"picture: {path}"
    )


def channel_consistency(features: Float[Tensor, "b c d"]) -> tuple[float, float]:
    """Return the mean cosine of one field's features through two channels, and of two fields' through any two.

    Features are centred on their mean first, so that what all images share counts for nothing.
    """
    num_fields, num_channels, _ = features.shape
    flat = torch.nn.functional.normalize((features - features.mean((0, 1))).flatten(0, 1), dim=-1)
    owner = torch.arange(num_fields).repeat_interleave(num_channels)
    cosine = flat @ flat.T
    same = (owner[:, None] == owner) & ~torch.eye(len(owner), dtype=torch.bool)
    return float(cosine[same].mean()), float(cosine[owner[:, None] != owner].mean())


def _backbone(config: DemoConfig) -> VisionTransformer:
    if config.weights is not None:
        return load_backbone(config.weights, patch_size=_PATCH)
    torch.manual_seed(config.seed)
    released = VisionTransformer(variant_config(config.variant, patch_size=16, in_channels=3))
    path = config.output / "random_vit16_rgb.pth"
    save_weights(path, Weights.of(released), layout="meta-flat")
    return load_backbone(path, patch_size=_PATCH, in_channels=1)


@torch.no_grad()
def _through_every_channel(vit: VisionTransformer, made: SyntheticField) -> Float[Tensor, "v p d"]:
    """Return the patch features of the mean image, then those of each channel alone."""
    pixels = torch.from_numpy(made.pixels.astype(np.float32))
    views = torch.cat((pixels.mean(0, keepdim=True), pixels))[:, None]
    views = (views - views.mean((2, 3), keepdim=True)) / (views.std((2, 3), keepdim=True) + 1e-7)
    patches: Tensor = vit(views).patches
    return patches


def _principal_colours(tokens: Float[Tensor, "b v p d"]) -> UInt8[np.ndarray, "b v p 3"]:
    """Paint the first three principal components of all patch features together as red, green and blue.

    One basis for all fields and stains, so that equal features get equal colours.
    """
    flat = tokens.flatten(0, 2)
    centred = flat - flat.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending: the largest three are the last
    scores = centred @ directions[:, -3:].flip(1)
    low, high = (torch.quantile(scores[:: max(1, len(scores) // 100_000)], share, dim=0) for share in (0.02, 0.98))
    colours = ((scores - low) / (high - low + 1e-7)).clamp(0, 1).mul(255).byte().numpy()
    return np.asarray(colours).reshape(*tokens.shape[:3], 3)


def _draw_row(made: SyntheticField, colours: UInt8[np.ndarray, "v p 3"]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Return the pictures of one field: its stains together, distance map, features of the mean and of each stain."""
    height, width = made.labels.shape
    maps = [
        np.asarray(
            Image.fromarray(view.reshape(height // _PATCH, width // _PATCH, 3)).resize(
                (width, height), Image.Resampling.NEAREST
            )
        )
        for view in colours
    ]
    greys = [_grey(channel) for channel in made.pixels]
    composite = np.stack((greys[-1], greys[len(greys) // 2], greys[0]), axis=-1)
    distance = np.repeat((labels_to_distance(made.labels) * 255).astype(np.uint8)[..., None], 3, axis=-1)
    stains = [np.repeat(grey[..., None], 3, axis=-1) for grey in greys]
    return [composite, distance, maps[0], *(part for pair in zip(stains, maps[1:], strict=True) for part in pair)]


def _grey(channel: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    low, high = np.percentile(channel, (0.5, 99.8))
    scaled = (channel.astype(np.float32) - low) / max(high - low, 1e-7)
    grey: np.ndarray = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return grey


def _draw(rows: list[list[np.ndarray]], channel_names: tuple[str, ...]) -> UInt8[np.ndarray, "h w 3"]:
    """Lay the pictures out under their captions."""
    captions = ["stains", "distance map", "mean: features"]
    captions += [text for name in channel_names for text in (name, f"{name}: features")]
    gap, top = 4, 18
    height, width, _ = rows[0][0].shape
    sheet = Image.new("RGB", (len(captions) * (width + gap) + gap, top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        left = gap + column * (width + gap)
        draw.text((left, 3), caption, fill="black")
        for row, pictures in enumerate(rows):
            sheet.paste(Image.fromarray(pictures[column]), (left, top + row * (height + gap)))
    return np.asarray(sheet)


def _millions(vit: VisionTransformer) -> str:
    return f"{sum(parameter.numel() for parameter in vit.parameters()) / 1e6:.1f} M parameters"
