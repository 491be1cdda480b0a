"""`dinocell demo`: the road on generated data, as far as it stands.

Today: generate multi-channel fields and write them to disk as a microscope would; build a shard set and a labelled set
from the files; write a checkpoint as Meta would release it (RGB, patch 16) and load it into the patch-8 grey model;
read the shards, look at each stain alone through the model, and draw what came out.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from dinocell.data_shards.images import write_labels, write_tiff
from dinocell.data_shards.labelled import LabelledImage, open_labelled
from dinocell.data_shards.labelled_build import build_labelled
from dinocell.data_shards.labelled_sources import folder_pairs
from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.preview import preview
from dinocell.data_shards.read import stream
from dinocell.data_shards.shard import ShardSettings
from dinocell.data_shards.sources_images import MultichannelSource
from dinocell.data_shards.synthetic import SyntheticConfig, make_field
from dinocell.data_shards.tiles import TileSettings
from dinocell.data_shards.write import build
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import Weights, load_backbone, save_weights
from dinocell.runtime.run import Run

_PATCH = 8
# Of the generated images, whose cells are about 36 px across: what a 20x objective gives.
_PIXEL_SIZE_UM = 0.65


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
    names = config.field.channels
    with Run.start(config.output, config, total_steps=config.num_fields, log_every=1, batch_size=1) as run:
        vit = _backbone(config)
        run.note(f"backbone: {' | '.join(vit.card.derived_from)}")
        manifest = _prepare_data(config)
        run.note(
            f"shards: {manifest.num_samples} samples, {manifest.num_bytes / 1e6:.1f} MB, channels {', '.join(names)}"
        )
        labelled_set = open_labelled(config.output / "labelled")
        labelled = {name: labelled_set[number] for number, name in enumerate(labelled_set.names)}
        fields, tokens = [], []
        for number, batch in enumerate(stream(config.output / "shards", batch_size=1, stop=config.num_fields)):
            pixels = batch.tile(0).numpy()
            fields.append((pixels, labelled[Path(batch.infos[0].field).name.removesuffix(".ome.tif")]))
            tokens.append(_through_every_channel(vit, pixels))
            metrics = {"data/cells": float(fields[-1][1].labels.max())}
            if number == config.num_fields - 1:
                same, different = channel_consistency(torch.stack([views[1:].mean(1) for views in tokens]))
                metrics |= {"consistency/same_field": same, "consistency/different_field": different}
            run.log(number + 1, metrics)
        colours = _principal_colours(torch.stack(tokens))
        rows = [_draw_row(*each, views) for each, views in zip(fields, colours, strict=True)]
        picture = _draw(rows, names)
        run.image(config.num_fields, "demo", picture)
        path = config.output / "demo.png"
        Image.fromarray(picture).save(path)
    licence = f"licence of the backbone: {vit.card.licence}\n" if config.weights else ""
    return (
        f"{config.num_fields} fields, {len(names)} stains, a backbone of {_millions(vit)}\n"
        f"cosine of features, same field through two stains {same:.3f}, two fields {different:.3f}: "
        f"margin {same - different:.3f}{'' if config.weights else ' (random weights)'}\n"
        f"{licence}shards: {config.output / 'shards'} (contact sheet: {config.output / 'shards.png'})\n"
        f"labelled set: {config.output / 'labelled'}\n"
        f"numbers: tensorboard --logdir {config.output}\n"
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


def _prepare_data(config: DemoConfig) -> Manifest:
    """Write generated fields as OME-TIFF with label masks, and build a shard set and a labelled set from the files."""
    for name in ("images", "masks", "shards", "labelled"):  # of an earlier demo in this folder
        shutil.rmtree(config.output / name, ignore_errors=True)
    for name in ("images", "masks"):
        (config.output / name).mkdir()
    for number in range(config.num_fields):
        made = make_field(config.seed + number, config.field)
        name = f"field{number:03d}"
        image = config.output / "images" / f"{name}.ome.tif"
        write_tiff(image, made.pixels, channel_names=made.channel_names, pixel_size_um=_PIXEL_SIZE_UM)
        write_labels(config.output / "masks" / f"{name}.tif", made.labels, pixel_size_um=_PIXEL_SIZE_UM)
    settings = ShardSettings(tiles=TileSettings(size=0, min_size=_PATCH, min_structure=0))
    source = MultichannelSource(input=str(config.output / "images"))
    manifest = build(source, config.output / "shards", settings=settings, workers=1)
    assert manifest is not None
    preview(config.output / "shards", config.output / "shards.png", num_samples=config.num_fields)
    pairs = folder_pairs(config.output, images="images/{name}.ome.tif", masks="masks/{name}.tif")
    build_labelled(
        pairs, config.output / "labelled", source="generated", channel=config.field.channels[-1], keep_empty=True
    )
    return manifest


def _backbone(config: DemoConfig) -> VisionTransformer:
    if config.weights is not None:
        return load_backbone(config.weights, patch_size=_PATCH)
    torch.manual_seed(config.seed)
    released = VisionTransformer(variant_config(config.variant, patch_size=16, in_channels=3))
    path = config.output / "random_vit16_rgb.pth"
    save_weights(path, Weights.of(released), layout="meta-flat")
    return load_backbone(path, patch_size=_PATCH, in_channels=1)


@torch.no_grad()
def _through_every_channel(vit: VisionTransformer, pixels: Shaped[np.ndarray, "c h w"]) -> Float[Tensor, "v p d"]:
    """Return the patch features of the mean image, then those of each channel alone."""
    channels = torch.from_numpy(pixels.astype(np.float32))
    views = torch.cat((channels.mean(0, keepdim=True), channels))[:, None]
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


def _draw_row(
    pixels: Shaped[np.ndarray, "c h w"], labelled: LabelledImage, colours: UInt8[np.ndarray, "v p 3"]
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Return the pictures of one field: its stains together, distance map, features of the mean and of each stain."""
    height, width = labelled.labels.shape
    assert labelled.distance is not None
    maps = [
        np.asarray(
            Image.fromarray(view.reshape(height // _PATCH, width // _PATCH, 3)).resize(
                (width, height), Image.Resampling.NEAREST
            )
        )
        for view in colours
    ]
    greys = [_grey(channel) for channel in pixels]
    composite = np.stack((greys[-1], greys[len(greys) // 2], greys[0]), axis=-1)
    distance = np.repeat((labelled.distance * 255).astype(np.uint8)[..., None], 3, axis=-1)
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
