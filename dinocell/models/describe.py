"""Description of a checkpoint for ``dinocell info``."""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dinocell.models.config import ViTConfig, variant_of
from dinocell.models.vit import VisionTransformer
from dinocell.models.weights import Weights


def describe(weights: Weights, *, image_size: int = 224) -> dict[str, str]:
    """Return a description of a checkpoint as names and values in reading order.

    ``image_size`` is the side, in pixels, of the image for which the cost of a forward pass is given.
    """
    config, card = weights.config, weights.card
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()})
    names = f" ({', '.join(card.input.channel_names)})" if card.input.channel_names else ""
    return {
        "format": weights.source_format,
        "architecture": f"ViT {variant_of(config) or 'of another size'}: width {config.width}, "
        f"{config.depth} blocks, {config.heads} heads, {config.mlp} MLP of {config.mlp_hidden}",
        "patch": f"{config.patch_size} px",
        "channels": f"{config.in_channels}{names}",
        "positions": _positions(config),
        "registers": str(config.registers),
        "parameters": f"{weights.num_parameters:,} ({', '.join(dtypes)})",
        "cost": _cost(config, image_size),
        "heads": _heads(weights),
        "input": _input(weights),
        "derived from": " | ".join(card.derived_from) or "trained from random weights",
        "licence": card.licence or "not stated",
    }


def forward_gflop(config: ViTConfig, *, image_size: int) -> float:
    """Return the cost of the forward pass of one image in GFLOP, traced by fvcore on the meta device.

    fvcore counts multiply-accumulates, which are two operations each, and needs a count for fused attention.
    """
    with torch.device("meta"):
        vit = VisionTransformer(config).eval()
        images = torch.empty(1, config.in_channels, image_size, image_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # fvcore's import uses TorchScript; the tracer warns about every shape
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(_Traceable(vit), images)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
        analysis.tracer_warnings("none")
        logging.getLogger("fvcore").setLevel(logging.ERROR)
        return 2 * float(analysis.total()) / 1e9


class _Traceable(nn.Module):
    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.vit(images)
        return out.cls, out.patches


def _attention_macs(inputs: list[Any], _outputs: list[Any]) -> int:
    """Count the two matrix products of attention: queries x keys and weights x values."""
    (batch, heads, queries, width), (_, _, keys, _) = (value.type().sizes() for value in inputs[:2])
    return int(2 * batch * heads * queries * keys * width)


def _cost(config: ViTConfig, image_size: int) -> str:
    size = max(config.patch_size, image_size // config.patch_size * config.patch_size)
    return f"{forward_gflop(config, image_size=size):.1f} GFLOP per image of {size} x {size}"


def _positions(config: ViTConfig) -> str:
    if config.positions == "rope":
        rope = config.rope
        if rope.min_period is None:
            return f"rotary, base {rope.base:g}"
        return f"rotary, periods {rope.min_period:g} to {rope.max_period:g}"
    learned = config.learned
    how = f"offset {learned.offset:g}" + (", antialiased" if learned.antialias else "")
    return f"learned for {learned.grid_rows} x {learned.grid_columns} patches, resized with {how}"


def _heads(weights: Weights) -> str:
    heads = [f"{name} ({sum(t.numel() for t in own.values()):,} parameters)" for name, own in weights.heads.items()]
    return ", ".join(heads) or "none"


def _input(weights: Weights) -> str:
    settings = weights.card.input
    meaning = {
        "unit": "unit (values in [0, 1])",
        "standardised": "standardised (zero mean, unit variance per image and channel)",
        "imagenet": "imagenet (RGB in [0, 1], normalised with ImageNet mean and standard deviation)",
    }[settings.convention]
    extras = [
        settings.channel_policy and f"channel policy {settings.channel_policy}",
        settings.percentiles and "percentiles {:g} to {:g}".format(*settings.percentiles),
        settings.pixel_size_um and f"{settings.pixel_size_um:g} um per pixel",
    ]
    return ", ".join([meaning, *(extra for extra in extras if extra)])
