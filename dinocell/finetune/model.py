"""The segmenter: a vision transformer and a decoder that predicts distance maps or flows.

``DINOCell.from_pretrained(path)`` reads a file of ``save_pretrained``; `create_dinocell_model` adds a new decoder to a
backbone.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dinocell.configs.schema import diff_configs
from dinocell.errors import WeightsError
from dinocell.finetune.decoder import Decoder
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.finetune.segmenter_file import SegmenterFile, read_segmenter, write_segmenter
from dinocell.finetune.targets import TARGETS, TargetName
from dinocell.models.config import WeightsCard
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
        is_ascending = sorted(set(self.blocks)) == list(self.blocks)
        if len(self.blocks) != 4 or not is_ascending or not 0 <= self.blocks[0] <= self.blocks[-1] < depth:
            raise ValueError(f"blocks: expected four ascending numbers below {depth}, got {list(self.blocks)}")
        convention = backbone.card.input.convention
        if convention == "imagenet" or (settings is not None and settings.convention != convention):
            raise WeightsError(f"the backbone expects {convention} input; load it with in_channels=1, without settings")
        if settings is None:
            pixel_size_um = backbone.card.input.pixel_size_um
            settings = SegmenterSettings(convention=convention, target=target, pixel_size_um=pixel_size_um)
        if settings.target != target:
            raise ValueError(f"target: got {target} and settings for {settings.target}")
        self.settings = settings
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
        for unused in (
            *self.backbone.blocks[self.blocks[-1] + 1 :],
            self.backbone.cls_norm,
            self.backbone.local_cls_norm,
        ):
            if unused is not None:
                unused.requires_grad_(False)
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

        Parameters
        ----------
        images
            Prepared by `dinocell.finetune.preprocess.prepare`; of any size: sides that the patch does not divide are
            padded by reflection and the maps cropped.
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

        Raises
        ------
        WeightsError
            If there is none, it is damaged, or it is another kind of file.
        """
        file = read_segmenter(source)
        with torch.device("meta"):
            backbone = VisionTransformer(file.vit)
            backbone.card = file.card
            model = cls.__new__(cls)
            nn.Module.__init__(model)
            model._assemble(backbone, file.blocks, file.settings.target, file.settings, freeze_backbone=True)
        model._load(file.tensors, str(source))
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
        write_segmenter(
            path,
            SegmenterFile(
                vit=self.backbone.config, blocks=self.blocks, settings=self.settings, card=self.card, tensors=tensors
            ),
        )
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

        Raises
        ------
        WeightsError
            If the architecture differs; the model is unchanged then.
        """
        file = read_segmenter(path)
        ours = {"backbone": dataclasses.asdict(self.backbone.config), "blocks": self.blocks, "target": self.target}
        theirs = {"backbone": dataclasses.asdict(file.vit), "blocks": file.blocks, "target": file.settings.target}
        differing = diff_configs(ours, theirs)
        if differing:
            raise WeightsError(
                f"{path}: the architecture differs from this model's ({'; '.join(differing)}); "
                "use DINOCell.from_pretrained"
            )
        self._load(file.tensors, str(path))
        self.settings, self.card = file.settings, file.card

    def _load(self, tensors: dict[str, Tensor], source: str) -> None:
        expected = self.state_dict()
        problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
        problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
        for name in sorted(expected.keys() & tensors.keys()):
            shape, got = tuple(expected[name].shape), tuple(tensors[name].shape)
            if shape != got:
                problems.append(f"{name}: expected shape {shape}, got {got}")
            elif not bool(tensors[name].isfinite().all()):
                problems.append(f"{name} has values that are not finite")
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise WeightsError(f"{source}: its tensors are damaged or do not fit: {'; '.join(problems[:3])}{more}")
        if self.decoder.head.weight.is_meta:
            self.load_state_dict(
                {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True
            )
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

    Raises
    ------
    WeightsError
        If ``pretrained`` and no weights are found; the message tells where to get them.
    ValueError
        For an unknown size.
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
