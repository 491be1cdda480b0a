"""The segmenter: a vision transformer and a decoder that predicts distance maps or flows.

``DINOCell.from_pretrained(path)`` reads a file of ``save_pretrained``; `create_dinocell_model` adds a new decoder to a
backbone.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dinocell.configs.schema import diff_configs
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.finetune.segmenter_file import SegmenterFile, read_segmenter, write_segmenter
from dinocell.finetune.targets import TARGETS, TargetName
from dinocell.models.config import WeightsCard
from dinocell.models.locate import require
from dinocell.models.vit import VARIANTS, VisionTransformer, variant_config
from dinocell.models.weights import load_backbone

_LETTERS = {
    "p": "pico",
    "n": "nano",
    "t": "tiny",
    "s": "small",
    "splus": "small_plus",
    "b": "base",
    "l": "large",
    "hplus": "huge_plus",
    "g": "giant",
    "7b": "7b",
}
# Blocks that feed the decoder, by depth: as in SAMCell and DINOv2 for dense tasks.
_BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}


class DINOCell(nn.Module):
    """A vision transformer and a decoder.

    Parameters
    ----------
    backbone_name
        Variant and patch size, such as ``vits8``, ``vitb16``, ``vitt8``.
    backbone_weights
        Any source of `dinocell.models.weights.load_backbone`; its patch embedding is resampled to the patch size and
        folded to one grey channel.
    pretrained
        False starts from random weights, on purpose. True without ``backbone_weights`` loads Meta's DINOv3 release of
        that size; it is an error if that is not found, never a random backbone.
    freeze_backbone
        Do not train the backbone: eval mode, no gradient, no activations stored.
    blocks
        Four blocks whose tokens the decoder uses, counted from 0; by default spread over the depth.
    target
        ``distance``: one map in [0, 1], 1 in the middle of cells. ``flows``: flow along rows and columns and the cell
        probability.
    settings
        Overrides the defaults that follow from the backbone and ``target``.

    Attributes
    ----------
    settings
        Preprocessing and postprocessing; see `SegmenterSettings`.
    card
        Provenance and licence.
    """

    def __init__(
        self,
        backbone_name: str = "vits8",
        *,
        backbone_weights: str | Path | None = None,
        pretrained: bool = True,
        freeze_backbone: bool = True,
        blocks: Sequence[int] | None = None,
        target: TargetName = "distance",
        settings: SegmenterSettings | None = None,
    ) -> None:
        super().__init__()
        variant, patch_size = _parse(backbone_name)
        if not pretrained and backbone_weights is not None:
            raise ValueError("pretrained=False means random weights: remove backbone_weights, or pretrained=False")
        if pretrained:
            # Meta's releases all have patch size 16; `load_backbone` resamples it.
            source = backbone_weights or "dinov3_" + re.sub(r"\d+$", "16", backbone_name)
            backbone = load_backbone(source, patch_size=patch_size, in_channels=1, variant=variant)
        else:
            backbone = VisionTransformer(variant_config(variant, patch_size=patch_size, in_channels=1))
        self._assemble(backbone, blocks, target, settings, freeze_backbone)

    def _assemble(
        self,
        backbone: VisionTransformer,
        blocks: Sequence[int] | None,
        target: TargetName,
        settings: SegmenterSettings | None,
        freeze_backbone: bool,
    ) -> None:
        depth = backbone.config.depth
        spread = tuple(depth * (index + 1) // 4 - 1 for index in range(4))
        self.blocks = tuple(blocks) if blocks is not None else _BLOCKS.get(depth, spread)
        convention = backbone.card.input.convention
        self.settings = settings or SegmenterSettings(
            convention="unit" if convention == "unit" else "standardised",
            target=target,
            pixel_size_um=backbone.card.input.pixel_size_um,
        )
        require(
            len(self.blocks) == 4 and sorted({-1, *self.blocks, depth}) == [-1, *self.blocks, depth],
            f"blocks: expected four ascending numbers below {depth}, got {list(self.blocks)}",
        )
        require(
            self.settings.convention == convention,
            f"the backbone expects {convention} input; load it with in_channels=1, without settings",
        )
        require(self.settings.target == target, f"target: got {target} and settings for {self.settings.target}")
        self.backbone = backbone
        self.decoder = Decoder(backbone.config.width, out_channels=TARGETS[target].num_maps)
        assert self.decoder.head.bias is not None
        nn.init.constant_(self.decoder.head.bias, TARGETS[target].initial_logit)
        self.card: WeightsCard = backbone.card
        self.set_frozen(freeze_backbone)

    def set_frozen(self, frozen: bool) -> None:
        """Freeze or unfreeze the backbone; parameters that do not affect the maps never get a gradient."""
        self.freeze_backbone = frozen
        self.requires_grad_(True)
        self.backbone.requires_grad_(not frozen)
        unused = [*self.backbone.blocks[self.blocks[-1] + 1 :], self.backbone.cls_norm, self.backbone.local_cls_norm]
        for module in filter(None, unused):
            module.requires_grad_(False)
        self.backbone.mask_token.requires_grad_(False)
        self.train()

    @property
    def target(self) -> TargetName:
        """The kind of maps: ``distance`` or ``flows``."""
        return self.settings.target

    def train(self, mode: bool = True) -> "DINOCell":
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b k h w"]:
        """Return maps of the images' size, in the units of the target: distances and probabilities in [0, 1].

        Images are prepared by `dinocell.finetune.preprocess.prepare`, and of any size: sides that the patch does not
        divide are padded by reflection and the maps cropped.
        """
        return TARGETS[self.target].activate(self.forward_logits(images))

    def forward_logits(self, images: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b k h w"]:
        """Return the maps before the activation, for losses that are written in logits."""
        height, width = images.shape[-2:]
        logits: Tensor = self.decoder(self.tokens(images), self._whole_patches(images))
        return logits[..., :height, :width]

    def tokens(self, images: Float[Tensor, "b 1 h w"]) -> list[Float[Tensor, "b d rows columns"]]:
        """Return the backbone's token maps for the decoder, the shallowest first."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self.backbone.forward_maps(self._whole_patches(images), self.blocks)

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Pad images on the lower and right border to whole patches."""
        height, width = images.shape[-2:]
        patch = self.backbone.config.patch_size
        rows, columns = -height % patch, -width % patch
        if rows == 0 and columns == 0:
            return images
        mode: Literal["reflect", "replicate"] = "reflect" if rows < height and columns < width else "replicate"
        return F.pad(images, (0, columns, 0, rows), mode=mode)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "DINOCell":
        """Load a segmenter, in eval mode, from a file, a folder, ``hf://owner/name`` or a URL.

        WeightsError if there is none, it is damaged, or it is another kind of file.
        """
        file = read_segmenter(source)
        with torch.device("meta"):
            backbone = VisionTransformer(file.vit)
            backbone.card = file.card
            model = cls.__new__(cls)
            nn.Module.__init__(model)
            model._assemble(backbone, file.blocks, file.settings.target, file.settings, freeze_backbone=True)
        model._load(file, source)
        return model.eval()

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write tensors, settings and card to one file, and return its path.

        ``path`` ends in ``.pt``, ``.pth`` or ``.safetensors``; any other name is a folder, for ``model.safetensors`` in
        it. ``dtype=torch.float16`` halves the file; computation is in float32 all the same.
        """
        path = Path(path)
        if path.suffix not in (".pt", ".pth", ".safetensors"):
            path = path / "model.safetensors"
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.state_dict().items()}
        vit, blocks, settings, card = self.backbone.config, self.blocks, self.settings, self.card
        write_segmenter(path, SegmenterFile(vit=vit, blocks=blocks, settings=settings, card=card, tensors=tensors))
        return path

    def fingerprint(self) -> str:
        """Return eight hexadecimal digits that identify a segmenter by its tensors and settings."""
        digest = hashlib.sha256(repr(self.settings).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).data)
        return digest.hexdigest()[:8]

    def save_weights(self, path: str | Path) -> None:
        """Write the model to one file; the same as `save_pretrained`."""
        self.save_pretrained(path)

    def load_weights(self, path: str | Path) -> None:
        """Load tensors, settings and card from the file of a segmenter of the same architecture.

        WeightsError if the architecture differs; the model is unchanged then.
        """
        file = read_segmenter(path)
        self._load(file, path)
        self.settings, self.card = file.settings, file.card

    def _load(self, file: SegmenterFile, source: str | Path) -> None:
        ours = {"backbone": dataclasses.asdict(self.backbone.config), "blocks": self.blocks, "target": self.target}
        theirs = {"backbone": dataclasses.asdict(file.vit), "blocks": file.blocks, "target": file.settings.target}
        differing = diff_configs(ours, theirs)
        require(
            not differing,
            f"{source}: the architecture differs from this model's ({'; '.join(differing)}); "
            "use DINOCell.from_pretrained",
        )
        tensors = file.tensors
        shapes, expected = (
            {name: tuple(tensor.shape) for name, tensor in named.items()} for named in (tensors, self.state_dict())
        )
        problems = diff_configs(expected, shapes) or [
            f"{name} has values that are not finite" for name, tensor in tensors.items() if not tensor.isfinite().all()
        ]
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        require(not problems, f"{source}: its tensors are damaged or do not fit: {'; '.join(problems[:3])}{more}")
        if self.decoder.head.weight.is_meta:
            copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
            self.load_state_dict(copies, assign=True)
            self.set_frozen(self.freeze_backbone)
        else:
            self.load_state_dict(tensors)


def create_dinocell_model(
    model_size: str = "small",
    *,
    freeze_backbone: bool = True,
    pretrained: bool = True,
    backbone_weights: str | Path | None = None,
    patch_size: int = 8,
    blocks: Sequence[int] | None = None,
    target: TargetName = "distance",
) -> DINOCell:
    """Build a segmenter with a new decoder; ``model_size`` is a key of `dinocell.models.vit.VARIANTS`.

    WeightsError if ``pretrained`` and no weights are found, with where to get them; ValueError for an unknown size.
    """
    if model_size not in VARIANTS:
        raise ValueError(f"model_size: expected one of {', '.join(VARIANTS)}, got {model_size!r}")
    letter = next(letter for letter, name in _LETTERS.items() if name == model_size)
    return DINOCell(
        f"vit{letter}{patch_size}",
        backbone_weights=backbone_weights,
        pretrained=pretrained,
        freeze_backbone=freeze_backbone,
        blocks=blocks,
        target=target,
    )


def replace_settings(model: DINOCell, **changes: Any) -> None:
    """Change settings of a model, such as thresholds found on validation images."""
    model.settings = dataclasses.replace(model.settings, **changes)


def _parse(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"vit(7b|[a-z]+?(?:plus)?)(\d+)", name)
    if not match or match[1] not in _LETTERS:
        names = ", ".join(f"vit{letter}8" for letter in _LETTERS)
        raise ValueError(f"backbone_name: expected variant and patch size, such as {names}, got {name!r}")
    return _LETTERS[match[1]], int(match[2])


class Decoder(nn.Module):
    """Turn token maps from four depths and the image into maps of the image's size (logits, no sigmoid).

    A U-Net whose encoder is the vision transformer. All token maps have the resolution of the patches: the deeper ones
    enter at the coarse levels of the decoder, the shallower ones at the fine levels. A shallow convolutional branch
    adds from the image what patches do not resolve, the exact position of edges.

    Parameters
    ----------
    width
        Channels of the token maps. The decoder has as many at 1/8 of the resolution, at most 512; they decrease to a
        half, a sixth and a sixteenth towards the full resolution, where convolutions are expensive.
    out_channels
        Number of output maps.
    """

    def __init__(self, width: int, *, out_channels: int = 1) -> None:
        super().__init__()
        widths = [max(8, -(-min(width, 512) // share // 4) * 4) for share in (1, 2, 6, 16)]
        fine = [max(8, channels // 2) for channels in widths[1:]]  # of the image branch at 1/4, 1/2 and 1
        # Before upsampling, each token map is projected to the width of the level that it joins, the deepest first.
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for channels in (widths[0], *widths[:3]))
        self.stem = nn.ModuleList(
            [
                _convolutions(1, fine[2], 1),
                nn.Sequential(nn.Conv2d(fine[2], fine[1], 3, stride=2, padding=1), nn.GELU(approximate="tanh")),
                nn.Sequential(nn.Conv2d(fine[1], fine[0], 3, stride=2, padding=1), nn.GELU(approximate="tanh")),
            ]
        )
        self.narrow = nn.ModuleList(nn.Conv2d(wide, narrow, 1) for wide, narrow in pairwise(widths))
        self.merge = nn.ModuleList(
            [
                _convolutions(2 * widths[0], widths[0], 4),
                _convolutions(2 * widths[1] + fine[0], widths[1]),
                _convolutions(2 * widths[2] + fine[1], widths[2]),
                _convolutions(widths[3] + fine[2], widths[3]),
            ]
        )
        self.head = nn.Conv2d(widths[3], out_channels, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise convolutions by He's normal distribution, biases to 0, norms to the identity, the head near 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(
        self, tokens: Sequence[Float[Tensor, "b d rows columns"]], images: Float[Tensor, "b 1 h w"]
    ) -> Float[Tensor, "b k h w"]:
        """Return the maps; ``tokens`` are four maps, the shallowest first, of any resolution (patch 8, 14, 16)."""
        images = images.contiguous(memory_format=torch.channels_last)
        full = self.stem[0](images)
        half = self.stem[1](full)
        quarter = self.stem[2](half)
        height, width = images.shape[-2:]
        eighth = (-(-height // 8), -(-width // 8))
        lateral = [layer(maps) for layer, maps in zip(self.lateral, reversed(tokens), strict=True)]
        # Coarse to fine: upsample, then fuse with the token map and the image branch of that level.
        x = self.merge[0](_resize_and_stack(eighth, *lateral[:2]))
        x = self.merge[1](_resize_and_stack(quarter.shape[-2:], self.narrow[0](x), lateral[2], quarter))
        x = self.merge[2](_resize_and_stack(half.shape[-2:], self.narrow[1](x), lateral[3], half))
        x = self.merge[3](_resize_and_stack((height, width), self.narrow[2](x), full))
        maps: Tensor = self.head(x)
        return maps


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel.

    It has no statistics over the batch, which would be unreliable for a batch of 1 or 4, and none over the image, which
    would make the map of a cell depend on the rest of its tile.
    """

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _convolutions(inputs: int, outputs: int, count: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(count):
        layers += [
            nn.Conv2d(inputs if index == 0 else outputs, outputs, 3, padding=1, bias=False),
            ChannelNorm(outputs),
            nn.GELU(approximate="tanh"),
        ]
    return nn.Sequential(*layers)


def _resize_and_stack(size: Sequence[int], *maps: Tensor) -> Tensor:
    """Resize maps bilinearly to one size and stack their channels."""
    size = tuple(size)
    resized = [
        x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps
    ]
    return torch.cat(resized, dim=1)
