"""Convert released weights to another patch size, number of channels or input convention.

All three change the patch embedding only, and are exact where possible:

- patch 16 -> 8 gives the token of the image enlarged 2x (FlexiViT's pseudo-inverse),
- RGB -> one grey channel gives the output of the RGB model for the replicated grey image.
"""

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Convention = Literal["unit", "standardised", "imagenet"]
"""Pixel values that a model expects.

``unit``: values in [0, 1]. ``standardised``: zero mean and unit variance per image and channel.
``imagenet``: RGB in [0, 1], normalised with the ImageNet mean and standard deviation (the released RGB models).
"""

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

    Raises
    ------
    ValueError
        Between ``unit`` and ``standardised``, because fixed weights cannot undo a normalisation per image. For
        ``imagenet`` with other than 3 channels.
    """
    if {source, target} == {"unit", "standardised"}:
        raise ValueError(f"a model for {source!r} input cannot be converted to {target!r} input")
    for convention, channels in ((target, in_channels), (source, weight.shape[1] if target == "unit" else 3)):
        if convention == "imagenet" and channels != 3:
            raise ValueError(f"ImageNet normalisation is defined for 3 channels, got {channels}")
    dtype = weight.dtype
    if (source, target) == ("imagenet", "unit"):
        wide, shift = weight.double(), bias.double()
        mean, std = _rgb_statistics(wide)
        wide = wide / std
        shift = shift - (wide.sum((2, 3), keepdim=True) * mean).sum((1, 2, 3))
        weight, bias = _spread(wide, in_channels), shift
    elif (source, target) == ("unit", "imagenet"):
        wide = _spread(weight.double(), in_channels)
        mean, std = _rgb_statistics(wide)
        shift = bias.double() + (wide.sum((2, 3), keepdim=True) * mean).sum((1, 2, 3))
        weight, bias = wide * std, shift
    elif in_channels != weight.shape[1]:
        weight = _spread(weight.double(), in_channels)
    return weight.to(dtype), bias.to(dtype)


def _spread(weight: Tensor, in_channels: int) -> Tensor:
    if weight.shape[1] == in_channels:
        return weight
    return (weight.sum(1, keepdim=True) / in_channels).repeat(1, in_channels, 1, 1)


def _rgb_statistics(weight: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=weight.dtype)[..., None, None]
    return mean, std
