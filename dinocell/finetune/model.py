"""The segmenter: a vision transformer and a decoder that regresses per-cell distance maps or flows, in one file.

``DINOCell.from_pretrained(path)`` reads what ``save_pretrained`` wrote; `create_dinocell_model` starts a new one from a
backbone.
"""

import dataclasses
import hashlib
import math
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
from dinocell.finetune.preprocess import SegmenterSettings, Target
from dinocell.finetune.segmenter_file import SegmenterFile, read_segmenter, write_segmenter
from dinocell.models.config import WeightsCard
from dinocell.models.vit import VARIANTS, VisionTransformer, variant_config
from dinocell.models.weights import load_backbone

_LETTERS = {
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
# Where blocks are tapped, by depth: SAMCell's and DINOv2's habit for dense tasks.
_TAPPED = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
_OUTPUTS: dict[Target, int] = {"distance": 1, "flows": 3}
# A typical mean of distance maps: the untrained decoder starts from it instead of from 0.5 everywhere.
_FIRST_GUESS = 0.1


class DINOCell(nn.Module):
    """A vision transformer and a decoder.

    Parameters
    ----------
    backbone_name
        Variant and patch size, as ``vits8``, ``vitb16``, ``vitt8``.
    backbone_weights
        Any source of `dinocell.models.weights.load_backbone`; its patch embedding is resampled to the patch size and
        folded to one grey channel.
    pretrained
        False starts from random weights, on purpose. True without ``backbone_weights`` takes Meta's DINOv3 release of
        that size; where that cannot be found it is an error, never a random backbone.
    freeze_backbone
        The backbone never changes: eval mode, no gradient, nothing kept of its forward pass.
    blocks
        Four blocks whose tokens the decoder gets, counted from 0; by default spread over the depth.
    target
        ``distance``: one map in [0, 1], 1 in the middle of cells. ``flows``: flow along rows and columns and the chance
        of a cell.
    settings
        Overrides what follows from the backbone and ``target``.

    Attributes
    ----------
    settings
        How images are prepared and maps become cells; see `SegmenterSettings`.
    card
        Ancestry and terms.
    """

    def __init__(
        self,
        backbone_name: str = "vits8",
        *,
        backbone_weights: str | Path | None = None,
        pretrained: bool = True,
        freeze_backbone: bool = True,
        blocks: Sequence[int] | None = None,
        target: Target = "distance",
        settings: SegmenterSettings | None = None,
    ) -> None:
        super().__init__()
        variant, patch_size = _parse(backbone_name)
        if not pretrained and backbone_weights is not None:
            raise ValueError("pretrained=False means random weights: leave out backbone_weights, or pretrained=False")
        if pretrained:
            source = backbone_weights or f"dinov3_{_release(backbone_name)}"
            backbone = load_backbone(source, patch_size=patch_size, in_channels=1, variant=variant)
        else:
            backbone = VisionTransformer(variant_config(variant, patch_size=patch_size, in_channels=1))
        self._assemble(backbone, blocks, target, settings, freeze_backbone)

    def _assemble(
        self,
        backbone: VisionTransformer,
        blocks: Sequence[int] | None,
        target: Target,
        settings: SegmenterSettings | None,
        freeze_backbone: bool,
    ) -> None:
        depth = backbone.config.depth
        self.blocks = tuple(blocks) if blocks is not None else _TAPPED.get(depth, _spread(depth))
        if len(self.blocks) != 4 or sorted(set(self.blocks)) != list(self.blocks) or self.blocks[0] < 0:
            raise ValueError(f"blocks: expected four ascending numbers, got {list(self.blocks)}")
        if self.blocks[-1] >= depth:
            raise ValueError(f"blocks: expected numbers below {depth}, the backbone's depth, got {list(self.blocks)}")
        convention = backbone.card.input.convention
        if convention == "imagenet":
            raise WeightsError("the backbone expects ImageNet normalisation: load it with in_channels=1")
        if settings is None:
            settings = SegmenterSettings(
                convention=convention, target=target, pixel_size_um=backbone.card.input.pixel_size_um
            )
        if settings.convention != convention:
            raise WeightsError(
                f"the backbone expects {convention} input, the settings say {settings.convention}; leave it out"
            )
        if settings.target != target:
            raise ValueError(f"target: got {target} and settings for {settings.target}")
        self.settings = settings
        self.backbone = backbone
        self.decoder = Decoder(backbone.config.width, out_channels=_OUTPUTS[target])
        if target == "distance":
            assert self.decoder.head.bias is not None
            nn.init.constant_(self.decoder.head.bias, math.log(_FIRST_GUESS / (1 - _FIRST_GUESS)))
        self.card: WeightsCard = backbone.card
        self.set_frozen(freeze_backbone)

    def set_frozen(self, frozen: bool) -> None:
        """Freeze the backbone or let it learn; what the maps do not depend on never gets a gradient."""
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
    def target(self) -> Target:
        """What the maps are."""
        return self.settings.target

    def train(self, mode: bool = True) -> "DINOCell":
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(
        self, images: Float[Tensor, "b 1 h w"], tokens: Sequence[Float[Tensor, "b d rows columns"]] | None = None
    ) -> Float[Tensor, "b k h w"]:
        """Return maps of the images' size, in the units of the target: distances and chances in [0, 1].

        Parameters
        ----------
        images
            Prepared by `dinocell.finetune.preprocess.prepare`; of any size: sides that the patch does not divide are
            mirrored up and the maps cut back.
        tokens
            What `tokens` returned for these images, where that is known.
        """
        logits = self.forward_logits(images) if tokens is None else self._decoded(images, tokens)
        if self.target == "distance":
            return logits.sigmoid()
        # In float32: under autocast a chance above 0.998 would round to 1, whose cross entropy has no gradient.
        return torch.cat((logits[:, :2].float(), logits[:, 2:].float().sigmoid()), dim=1)

    def forward_logits(self, images: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b k h w"]:
        """Return the maps before the sigmoid, for losses that are written in logits."""
        return self._decoded(images, self.tokens(images))

    def _decoded(self, images: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        logits: Tensor = self.decoder(tokens, self._whole_patches(images))
        return logits[..., :height, :width]

    def tokens(self, images: Float[Tensor, "b 1 h w"]) -> list[Float[Tensor, "b d rows columns"]]:
        """Return the backbone's maps that the decoder gets, the shallowest first."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self.backbone.forward_maps(self._whole_patches(images), self.blocks)

    def _whole_patches(self, images: Tensor) -> Tensor:
        patch = self.backbone.config.patch_size
        return _padded(images, -images.shape[-2] % patch, -images.shape[-1] % patch)

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
        """Write tensors, settings, ancestry and terms to one file (``.pt``, ``.pth`` or ``.safetensors``) or, to
        ``model.safetensors`` in a folder (any other name); return what was written.

        ``dtype=torch.float16`` halves it; such a file is computed in float32 all the same.
        """  # noqa: D205
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
        """Return eight letters that tell a segmenter from others, by its tensors and settings."""
        digest = hashlib.sha256(repr(self.settings).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).data)
        return digest.hexdigest()[:8]

    def save_weights(self, path: str | Path) -> None:
        """Write the model to one file; the same as `save_pretrained`."""
        self.save_pretrained(path)

    def load_weights(self, path: str | Path) -> None:
        """Take tensors, settings, ancestry and terms from a file of a segmenter of the same sizes.

        Raises
        ------
        WeightsError
            If the file is of another architecture; nothing is changed then.
        """
        file = read_segmenter(path)
        ours = {"backbone": dataclasses.asdict(self.backbone.config), "blocks": self.blocks, "target": self.target}
        theirs = {"backbone": dataclasses.asdict(file.vit), "blocks": file.blocks, "target": file.settings.target}
        differing = diff_configs(ours, theirs)
        if differing:
            raise WeightsError(
                f"{path}: of another architecture than this model ({'; '.join(differing)}); "
                "DINOCell.from_pretrained makes a model of the file's own"
            )
        self._load(file.tensors, str(path))
        self.settings, self.card = file.settings, file.card

    def _load(self, tensors: dict[str, Tensor], source: str) -> None:
        expected = self.state_dict()
        missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or unexpected:
            parts = [
                f"{word} {', '.join(names[:3])}"
                for word, names in (("missing", missing), ("unexpected", unexpected))
                if names
            ]
            raise WeightsError(f"{source}: its tensors do not fit its own configuration: {'; '.join(parts)}")
        for name, tensor in expected.items():
            if tensors[name].shape != tensor.shape:
                raise WeightsError(
                    f"{source}: {name}: expected shape {tuple(tensor.shape)}, got {tuple(tensors[name].shape)}"
                )
            if not bool(tensors[name].isfinite().all()):
                raise WeightsError(f"{source}: {name} has values that are not finite; the file is damaged")
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
    target: Target = "distance",
) -> DINOCell:
    """Build a segmenter with a new decoder; ``model_size`` is a key of `dinocell.models.vit.VARIANTS`.

    Raises
    ------
    WeightsError
        If ``pretrained`` and no weights are found: it says where to get them.
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
        known = ", ".join(f"vit{letter}8" for letter in _LETTERS)
        raise ValueError(f"backbone_name: expected variant and patch size, such as {known}, got {name!r}")
    return _LETTERS[match[1]], int(match[2])


def _release(name: str) -> str:
    """Return the name of Meta's release of a size, whatever the patch size: they have patch 16 only."""
    return re.sub(r"\d+$", "16", name)


def _spread(depth: int) -> tuple[int, ...]:
    if depth < 4:
        raise ValueError(f"blocks: the backbone has {depth} blocks, the decoder needs four")
    return tuple(depth * (index + 1) // 4 - 1 for index in range(4))


def _padded(images: Tensor, rows: int, columns: int) -> Tensor:
    if rows == 0 and columns == 0:
        return images
    height, width = images.shape[-2:]
    mode: Literal["reflect", "replicate"] = "reflect" if rows < height and columns < width else "replicate"
    return F.pad(images, (0, columns, 0, rows), mode=mode)
