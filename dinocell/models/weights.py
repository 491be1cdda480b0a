"""Read weights in every checkpoint format. Stages exchange models only through these files.

The other stages call `load_backbone`; `read_weights` and `fit_weights` are its steps, `save_weights` (from
`dinocell.models.export`) writes. `dinocell.models.locate` finds a file, `dinocell.models.checkpoint_files` opens it
without running code from it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinocell.configs.schema import MisfitError, fit
from dinocell.errors import WeightsError
from dinocell.models.checkpoint_files import RawWeights, read_raw
from dinocell.models.config import LICENCES, UNKNOWN_LICENCE, InputSettings, WeightsCard
from dinocell.models.export import SCHEMA_VERSION, Layout, Weights, save_weights
from dinocell.models.formats import MAX_PATCH, Recognised, recognise
from dinocell.models.layers import AttentionKernel
from dinocell.models.locate import locate, require
from dinocell.models.positions import TrainingNoise
from dinocell.models.resample import Convention, convert_channels, resize_patch_weight
from dinocell.models.vit import VARIANTS, VisionTransformer, ViTConfig

__all__ = ["Layout", "Weights", "fit_weights", "load_backbone", "read_weights", "save_weights"]


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

    Raises
    ------
    WeightsError
        One line: expected, found, what to do. It is a `ValueError`.
    """
    weights = read_weights(source, sha256=sha256, allow_missing=allow_missing, allow_unexpected=allow_unexpected)
    if variant is not None:
        _check_variant(weights.config, variant, str(source))
    # Convert to the model's precision first: new filters rounded to half precision are off by 1 in 500.
    filters = {
        name: tensor.to(torch.promote_types(tensor.dtype, dtype))
        for name, tensor in weights.tensors.items()
        if name.startswith("patch_embed.")
    }
    weights = dataclasses.replace(weights, tensors={**weights.tensors, **filters})
    try:
        weights = fit_weights(weights, patch_size=patch_size, in_channels=in_channels, input=input)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    _check_finite(weights.tensors, str(source))
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
    try:
        metadata = _fit_metadata(raw.metadata or raw.sidecar)
        recognised = recognise(raw.tensors, raw.hub_config, metadata[0] if metadata else None)
        tensors, notes = _check_tensors(recognised, allow_missing, allow_unexpected)
    except WeightsError as error:
        described = " (described by its .card.json)" if raw.sidecar and not raw.metadata else ""
        raise WeightsError(f"{path}{described}: {' '.join(str(error).split())}") from error
    card, source_format = (metadata[1], "DINOCell") if metadata else _foreign_card(raw, recognised, path)
    card = dataclasses.replace(card, derived_from=(*card.derived_from, *notes))
    return Weights(
        config=recognised.config, tensors=tensors, card=card, heads=recognised.heads, source_format=source_format
    )


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
    require(
        1 <= patch_size <= MAX_PATCH and in_channels >= 1,
        f"expected a patch size from 1 to {MAX_PATCH} and at least 1 channel, got {patch_size} and {in_channels}",
    )
    target: Convention = source if input is None else input
    if input is None and source == "imagenet" and in_channels != 3:
        target = "standardised"
    notes = []
    weight, bias = (weights.tensors[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
    if patch_size != config.patch_size:
        weight = resize_patch_weight(weight, patch_size)
        notes.append(f"patch {config.patch_size} -> {patch_size}")
    if (in_channels, target) != (config.in_channels, source):
        try:
            weight, bias = convert_channels(weight, bias, in_channels=in_channels, source=source, target=target)
        except ValueError as error:
            raise WeightsError(str(error)) from error
        notes.append(f"input {config.in_channels} x {source} -> {in_channels} x {target}")
    card = dataclasses.replace(
        weights.card,
        derived_from=(*weights.card.derived_from, *notes),
        input=dataclasses.replace(weights.card.input, convention=target),
    )
    tensors = {**weights.tensors, "patch_embed.proj.weight": weight, "patch_embed.proj.bias": bias}
    config = dataclasses.replace(config, patch_size=patch_size, in_channels=in_channels)
    return dataclasses.replace(weights, config=config, tensors=tensors, card=card)


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
        raise WeightsError(f"its configuration is damaged: {error}") from error
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
    require(not parts, f"tensors do not fit a {_outline(recognised.config)}: {', '.join(parts)}")
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


def _outline(config: ViTConfig) -> str:
    return (
        f"ViT of width {config.width}, {config.depth} blocks, patch {config.patch_size}, "
        f"{config.in_channels} channel(s), {config.positions} positions"
    )


def _check_variant(config: ViTConfig, variant: str, source: str) -> None:
    require(variant in VARIANTS, f"unknown variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    sizes = ("width", "depth", "heads", "mlp", "mlp_hidden")
    expected, got = ({name: getattr(c, name) for name in sizes} for c in (VARIANTS[variant], config))
    if expected != got:
        differing = [name for name in sizes if expected[name] != got[name]]
        first, second = (", ".join(f"{n} {values[n]}" for n in differing) for values in (expected, got))
        raise WeightsError(f"{source}: expected a {variant} model ({first}), got {second}")


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    names = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    require(not names, f"{source}: NaN or infinite values in {_some(names)}; the file is damaged or its run diverged")
