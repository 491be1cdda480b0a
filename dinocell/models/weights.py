"""Read weights of every checkpoint format, fit them to a model, and describe them.

Stages exchange models only through files: `load_backbone` is what they call; `read_weights` and `fit_weights` are its
steps, `save_weights` (from `dinocell.models.export`) writes. `dinocell.models.locate` finds a file,
`dinocell.models.checkpoint_files` opens it without running code from it.
"""

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dinocell.configs.schema import MisfitError, fit
from dinocell.errors import WeightsError
from dinocell.models.checkpoint_files import RawWeights, read_raw
from dinocell.models.config import LICENCES, SIZES, UNKNOWN_LICENCE, Convention, InputSettings, WeightsCard, variant_of
from dinocell.models.export import SCHEMA_VERSION, Layout, Weights, save_weights
from dinocell.models.formats import MAX_PATCH, Recognised, recognise
from dinocell.models.layers import AttentionKernel
from dinocell.models.locate import locate, naming, require
from dinocell.models.positions import TrainingNoise
from dinocell.models.vit import VARIANTS, VisionTransformer, ViTConfig

__all__ = ["Layout", "Weights", "describe", "fit_weights", "load_backbone", "read_weights", "save_weights"]


def load_backbone(
    source: str | Path,
    *,
    patch_size: int | None = 8,
    in_channels: int | None = 1,
    input: Literal["unit", "standardised"] | None = None,  # noqa: A002 (the word users know)
    variant: str | None = None,
    noise: TrainingNoise | None = None,
    kernel: AttentionKernel = "sdpa",
    dtype: torch.dtype = torch.float32,
    sha256: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> VisionTransformer:
    """Load any known checkpoint into our vision transformer, in eval mode.

    Errors are a `WeightsError` (a `ValueError`) of one line: expected, found, what to do.

    Parameters
    ----------
    source
        A path, ``hf://owner/name``, a URL, or a bare name such as ``dinov3_vits16``: see
        `dinocell.models.locate.locate`.
    patch_size, in_channels
        Of the model; ``None`` keeps those of the file. The patch embedding is resampled (FlexiViT) and its channels are
        folded so that a replicated grey image gives the same features.
    input
        Input convention of the model. ``None`` keeps the file's, except that released RGB models, which expect ImageNet
        normalisation, become ``standardised`` if their channels change. ``unit`` and ``standardised`` cannot be
        converted into each other.
    variant
        Required size, one of `VARIANTS`.
    noise, kernel
        Passed to `VisionTransformer`.
    dtype
        Of the parameters, independent of the file.
    sha256
        Expected hash of a downloaded or local file, in hexadecimal.
    allow_missing, allow_unexpected
        Patterns (``mask_token``, ``blocks.11.*``) of tensors that may be missing (then initialised at random) or
        unexpected (then dropped). Without them both are errors.
    """
    weights = read_weights(source, sha256=sha256, allow_missing=allow_missing, allow_unexpected=allow_unexpected)
    if variant is not None:
        _check_variant(weights.config, variant, source)
    # Convert to the model's precision first: new filters rounded to half precision are off by 1 in 500.
    filters = {name: tensor for name, tensor in weights.tensors.items() if name.startswith("patch_embed.")}
    filters = {name: tensor.to(torch.promote_types(tensor.dtype, dtype)) for name, tensor in filters.items()}
    weights = dataclasses.replace(weights, tensors={**weights.tensors, **filters})
    with naming(source):
        weights = fit_weights(weights, patch_size=patch_size, in_channels=in_channels, input=input)
        infinite = [name for name, tensor in weights.tensors.items() if not bool(tensor.isfinite().all())]
        require(not infinite, f"NaN or infinite values in {_some(infinite)}; the file is damaged or its run diverged")
    with torch.device("meta"):
        vit = VisionTransformer(weights.config, noise=noise, kernel=kernel)
    # Copies, because the file may be memory-mapped.
    vit.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in weights.tensors.items()}, assign=True)
    vit.card = weights.card
    return vit.requires_grad_(True).eval()


def read_weights(
    source: str | Path,
    *,
    sha256: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Weights:
    """Find, open and recognise a checkpoint, and check every name and shape; errors as in `load_backbone`."""
    path = locate(source, sha256=sha256)
    raw = read_raw(path)
    with naming(f"{path} (described by its .card.json)" if raw.sidecar and not raw.metadata else path):
        metadata = _fit_metadata(raw.metadata or raw.sidecar)
        recognised = recognise(raw.tensors, raw.hub_config, metadata[0] if metadata else None)
        tensors, notes = _check_tensors(recognised, allow_missing, allow_unexpected)
    card, source_format = (metadata[1], "DINOCell") if metadata else _foreign_card(raw, recognised, path)
    card = dataclasses.replace(card, derived_from=(*card.derived_from, *notes))
    return Weights(
        config=recognised.config, tensors=tensors, card=card, heads=recognised.heads, source_format=source_format
    )


def _fit_metadata(metadata: Mapping[str, Any] | None) -> tuple[ViTConfig, WeightsCard] | None:
    """Return the configuration and card in a file of ours, checked."""
    if metadata is None:
        return None
    schema, kind = metadata.get("schema"), metadata.get("kind")
    require(schema == SCHEMA_VERSION, f"has schema {schema!r}, this version reads {SCHEMA_VERSION}; update dinocell")
    require(kind == "backbone", f"holds a {kind!r}, expected a backbone")
    try:
        config: ViTConfig = fit(ViTConfig, metadata.get("vit"), "vit")
        card: WeightsCard = fit(WeightsCard, metadata.get("card"), "card")
    except (MisfitError, ValueError) as error:
        raise WeightsError(f"its configuration is damaged: {' '.join(str(error).split())}") from error
    return config, card


def _foreign_card(raw: RawWeights, recognised: Recognised, path: Path) -> tuple[WeightsCard, str]:
    """Describe a file of another format, as far as the format determines it."""
    rgb = recognised.config.in_channels == 3
    settings = InputSettings(convention="imagenet" if rgb else "standardised")
    trained = raw.container is not None
    name = recognised.source_format + (f" ({raw.container} of a training run)" if trained else "")
    licence = UNKNOWN_LICENCE if trained else LICENCES[recognised.family]
    return WeightsCard(input=settings, derived_from=(f"{name}: {path.name}",), licence=licence), name


def _check_tensors(
    recognised: Recognised, allow_missing: Sequence[str], allow_unexpected: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Compare names and shapes with the model's; return the tensors to load and notes for the card."""
    with torch.device("meta"):
        expected = VisionTransformer(recognised.config).state_dict()
    tensors = {name: tensor for name, tensor in recognised.tensors.items() if name in expected}
    missing = [name for name in expected if name not in tensors]
    refused = {
        "missing": [name for name in missing if not _matches(name, allow_missing)],
        "unexpected": [n for n in recognised.tensors if n not in expected and not _matches(n, allow_unexpected)],
    }
    parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in refused.items() if names]
    config = recognised.config
    outline = f"ViT of width {config.width}, {config.depth} blocks, patch {config.patch_size}, "
    outline += f"{config.in_channels} channel(s), {config.positions} positions"
    require(not parts, f"tensors do not fit a {outline}: {', '.join(parts)}")
    for name, tensor in tensors.items():
        shape, got = tuple(expected[name].shape), tuple(tensor.shape)
        require(got == shape, f"{name}: expected shape {shape}, got {got}")
        require(tensor.is_floating_point(), f"{name}: expected floating-point numbers, got {tensor.dtype}")
    if not missing:
        return tensors, []
    fresh = VisionTransformer(recognised.config).state_dict()
    return {name: tensors.get(name, fresh[name]) for name in expected}, [f"initialised at random: {_some(missing)}"]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _check_variant(config: ViTConfig, variant: str, source: str | Path) -> None:
    require(variant in VARIANTS, f"unknown variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    sizes = {name: (getattr(VARIANTS[variant], name), getattr(config, name)) for name in SIZES}
    differing = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    expected, got = (", ".join(f"{name} {pair[i]}" for name, pair in differing.items()) for i in (0, 1))
    require(not differing, f"{source}: expected a {variant} model ({expected}), got {got}")


def fit_weights(
    weights: Weights,
    *,
    patch_size: int | None = None,
    in_channels: int | None = None,
    input: Convention | None = None,  # noqa: A002
) -> Weights:
    """Resample the patch embedding to another patch size, number of channels or input convention.

    ``None`` keeps the current value, except that RGB models with ImageNet normalisation become ``standardised`` with
    another number of channels. Each conversion is recorded in the card.
    """
    config, source = weights.config, weights.card.input.convention
    patch_size = config.patch_size if patch_size is None else patch_size
    in_channels = config.in_channels if in_channels is None else in_channels
    is_possible = 1 <= patch_size <= MAX_PATCH and in_channels >= 1
    expected = f"expected a patch size from 1 to {MAX_PATCH} and at least 1 channel"
    require(is_possible, f"{expected}, got {patch_size} and {in_channels}")
    target: Convention = source if input is None else input
    if input is None and source == "imagenet" and in_channels != 3:
        target = "standardised"
    notes = []
    weight, bias = (weights.tensors[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
    if patch_size != config.patch_size:
        weight = resize_patch_weight(weight, patch_size)
        notes.append(f"patch {config.patch_size} -> {patch_size}")
    if (in_channels, target) != (config.in_channels, source):
        weight, bias = convert_channels(weight, bias, in_channels=in_channels, source=source, target=target)
        notes.append(f"input {config.in_channels} x {source} -> {in_channels} x {target}")
    card = dataclasses.replace(
        weights.card,
        derived_from=(*weights.card.derived_from, *notes),
        input=dataclasses.replace(weights.card.input, convention=target),
    )
    tensors = {**weights.tensors, "patch_embed.proj.weight": weight, "patch_embed.proj.bias": bias}
    config = dataclasses.replace(config, patch_size=patch_size, in_channels=in_channels)
    return dataclasses.replace(weights, config=config, tensors=tensors, card=card)


# The channel statistics that DINOv2 and DINOv3 were trained with (their README files).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize_patch_weight(weight: Float[Tensor, "d c p p"], patch_size: int) -> Float[Tensor, "d c q q"]:
    """Resample patch filters so that a resized patch gives the token of the original one (FlexiViT, arXiv 2212.08013).

    With B the matrix that bilinearly resizes a patch, the new filter is the pseudo-inverse of B transposed times the
    old one. For 16 -> 8 this is exactly the sum over 2 x 2 pixels.
    """
    old = weight.shape[-1]
    if old == patch_size:
        return weight
    matrix = _resize_pseudo_inverse(old, patch_size)
    resampled: Tensor = weight.double().flatten(2) @ matrix.T
    return resampled.view(*weight.shape[:2], patch_size, patch_size).to(weight.dtype)


@lru_cache(maxsize=16)
def _resize_pseudo_inverse(old: int, new: int) -> Float[Tensor, "new_pixels old_pixels"]:
    """Return the pseudo-inverse of the transposed bilinear resize matrix (float64), by resizing unit impulses."""
    impulses = torch.eye(old * old, dtype=torch.float64).unflatten(1, (1, old, old))
    resized = F.interpolate(impulses, size=(new, new), mode="bilinear", antialias=False)
    inverse: Tensor = torch.linalg.pinv(resized.flatten(1))
    return inverse


def convert_channels(
    weight: Float[Tensor, "d c p p"],
    bias: Float[Tensor, " d"],
    *,
    in_channels: int,
    source: Convention,
    target: Convention,
) -> tuple[Float[Tensor, "d k p p"], Float[Tensor, " d"]]:
    """Fold a patch embedding to ``in_channels`` channels that follow the ``target`` convention.

    First the convention: between ``imagenet`` and ``unit`` the fixed means and standard deviations are folded into the
    weights; ``standardised`` pixels replace ImageNet-normalised ones without a change of the filters. Then the
    channels: every new one gets the sum of the old filters divided by the new number of channels, so that an image
    that repeats one grey plane gives the same token before and after.

    Impossible are conversions between ``unit`` and ``standardised``, because fixed weights cannot undo a normalisation
    per image, and ``imagenet`` with other than 3 channels.
    """
    is_possible = {source, target} != {"unit", "standardised"}
    require(is_possible, f"a model for {source!r} input cannot be converted to {target!r} input")
    for convention, channels in ((target, in_channels), (source, weight.shape[1] if target == "unit" else 3)):
        fits = convention != "imagenet" or channels == 3
        require(fits, f"ImageNet normalisation is defined for 3 channels, got {channels}")
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float64)[..., None, None]
    wide, shift = weight.double(), bias.double()
    if (source, target) == ("imagenet", "unit"):
        wide = wide / std
        shift = shift - (wide.sum((2, 3), keepdim=True) * mean).sum((1, 2, 3))
    if in_channels != weight.shape[1]:
        wide = (wide.sum(1, keepdim=True) / in_channels).repeat(1, in_channels, 1, 1)
    if (source, target) == ("unit", "imagenet"):
        shift = shift + (wide.sum((2, 3), keepdim=True) * mean).sum((1, 2, 3))
        wide = wide * std
    return wide.to(weight.dtype), shift.to(weight.dtype)


def describe(weights: Weights, *, image_size: int = 224) -> dict[str, str]:
    """Return a description of a checkpoint as names and values in reading order.

    ``image_size`` is the side, in pixels, of the image for which the cost of a forward pass is given.
    """
    config, card = weights.config, weights.card
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()})
    heads = [f"{name} ({sum(t.numel() for t in own.values()):,} parameters)" for name, own in weights.heads.items()]
    size = max(config.patch_size, image_size // config.patch_size * config.patch_size)
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
        "cost": f"{forward_gflop(config, image_size=size):.1f} GFLOP per image of {size} x {size}",
        "heads": ", ".join(heads) or "none",
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

        analysis = FlopCountAnalysis(vit, images)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
        analysis.tracer_warnings("none")
        logging.getLogger("fvcore").setLevel(logging.ERROR)
        return 2 * float(analysis.total()) / 1e9


def _attention_macs(inputs: list[Any], _outputs: list[Any]) -> int:
    """Count the two matrix products of attention: queries x keys and weights x values."""
    (batch, heads, queries, width), (_, _, keys, _) = (value.type().sizes() for value in inputs[:2])
    return int(2 * batch * heads * queries * keys * width)


def _positions(config: ViTConfig) -> str:
    if config.positions == "rope":
        rope = config.rope
        if rope.min_period is None:
            return f"rotary, base {rope.base:g}"
        return f"rotary, periods {rope.min_period:g} to {rope.max_period:g}"
    learned = config.learned
    how = f"offset {learned.offset:g}" + (", antialiased" if learned.antialias else "")
    return f"learned for {learned.grid_rows} x {learned.grid_columns} patches, resized with {how}"


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
