"""Fitting a patch embedding to another patch size, number of channels or input convention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinocell.models.export import Weights
from dinocell.models.resample import IMAGENET_MEAN, IMAGENET_STD, convert_channels, resize_patch_weight
from dinocell.models.vit import VisionTransformer, ViTConfig
from dinocell.models.weights import fit_weights

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def embed(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(images, weight, bias, stride=weight.shape[-1])


def bilinear_matrix(old: int, new: int) -> np.ndarray:
    """Return the (new * new, old * old) matrix of a bilinear resize with half-pixel centres and clamped edges."""
    line = np.zeros((new, old))
    for row in range(new):
        centre = min(max((row + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(np.floor(centre)), old - 2)
        line[row, low] += 1 - (centre - low)
        line[row, low + 1] += centre - low
    return np.kron(line, line)


def test_patch_16_to_8_is_the_sum_over_2x2_pixels() -> None:
    weight = random(6, 3, 16, 16, dtype=torch.float64)
    expected = 4 * F.avg_pool2d(weight, 2)
    torch.testing.assert_close(resize_patch_weight(weight, 8), expected, rtol=0, atol=2e-14)


def test_patch_8_token_of_the_halved_image_is_the_patch_16_token_of_2x2_blocks() -> None:
    weight, bias = random(24, 3, 16, 16), random(24, seed=1)
    small = random(2, 3, 24, 40, seed=2)
    blocks = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    got = embed(small, resize_patch_weight(weight, 8), bias)
    torch.testing.assert_close(got, embed(blocks, weight, bias), rtol=1e-4, atol=1e-4)


def test_a_patch_8_model_gives_the_features_of_the_patch_16_model_on_2x2_blocks() -> None:
    vit = VisionTransformer(ViTConfig(width=64, depth=2, heads=2, mlp_hidden=96, patch_size=16, in_channels=3)).eval()
    vit.init_weights(layer_scale=0.5, generator=torch.Generator().manual_seed(0))
    fitted = fit_weights(Weights.of(vit), patch_size=8)
    fine = VisionTransformer(fitted.config).eval()
    fine.load_state_dict(fitted.tensors)
    small = random(2, 3, 24, 40)
    with torch.no_grad():
        expected = vit(small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        got = fine(small)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(16, 8), (14, 8), (8, 16), (14, 16), (16, 14), (8, 7)])
def test_new_filters_are_the_pseudo_inverse_of_the_transposed_resize(old: int, new: int) -> None:
    weight = random(5, 2, old, old, dtype=torch.float64)
    expected = weight.flatten(2).numpy() @ np.linalg.pinv(bilinear_matrix(old, new).T).T
    got = resize_patch_weight(weight, new)
    assert got.shape == (5, 2, new, new)
    np.testing.assert_allclose(got.flatten(2).numpy(), expected, rtol=0, atol=1e-10)


def test_an_enlarged_patch_gives_the_token_of_the_original() -> None:
    # Enlarging loses nothing, so the pseudo-inverse is exact: <B x, w'> = <x, w> for every patch x.
    weight, patches = random(5, 2, 8, 8, dtype=torch.float64), random(3, 2, 8, 8, seed=1, dtype=torch.float64)
    large = F.interpolate(patches, size=(16, 16), mode="bilinear", antialias=False)
    torch.testing.assert_close(embed(large, resize_patch_weight(weight, 16)), embed(patches, weight))


def test_resizing_keeps_the_dtype_and_does_not_change_the_same_size() -> None:
    weight = random(4, 1, 16, 16, dtype=torch.bfloat16)
    assert resize_patch_weight(weight, 8).dtype == torch.bfloat16
    assert resize_patch_weight(weight, 16) is weight


def as_imagenet(grey: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (grey.expand(-1, 3, -1, -1) - mean) / std


WEIGHT, BIAS = random(12, 3, 8, 8), random(12, seed=1)
GREY = torch.rand(2, 1, 16, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_unit_model_equals_the_rgb_model_on_the_normalised_replicated_grey_image(channels: int) -> None:
    weight, bias = convert_channels(WEIGHT, BIAS, in_channels=channels, source="imagenet", target="unit")
    assert weight.shape == (12, channels, 8, 8)
    expected = embed(as_imagenet(GREY), WEIGHT, BIAS)
    got = embed(GREY.expand(-1, channels, -1, -1), weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_standardised_model_equals_the_rgb_model_on_the_replicated_grey_image(channels: int) -> None:
    weight, bias = convert_channels(WEIGHT, BIAS, in_channels=channels, source="imagenet", target="standardised")
    grey = random(2, 1, 16, 24, seed=3)
    expected = embed(grey.expand(-1, 3, -1, -1), WEIGHT, BIAS)
    got = embed(grey.expand(-1, channels, -1, -1), weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(bias, BIAS)


def test_the_weights_of_the_other_convention_give_other_features() -> None:
    expected = embed(as_imagenet(GREY), WEIGHT, BIAS)
    wrong = embed(GREY, *convert_channels(WEIGHT, BIAS, in_channels=1, source="imagenet", target="standardised"))
    assert (wrong - expected).norm() > 0.5 * expected.norm()
    grey = random(2, 1, 16, 24, seed=3)
    expected = embed(grey.expand(-1, 3, -1, -1), WEIGHT, BIAS)
    wrong = embed(grey, *convert_channels(WEIGHT, BIAS, in_channels=1, source="imagenet", target="unit"))
    assert (wrong - expected).norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("convention", ["unit", "standardised"])
@pytest.mark.parametrize(("before", "after"), [(5, 1), (4, 1), (1, 5), (5, 3)])
def test_channels_change_within_a_convention_keeps_the_replicated_token(
    convention: str, before: int, after: int
) -> None:
    weight = random(12, before, 8, 8)
    folded, bias = convert_channels(weight, BIAS, in_channels=after, source=convention, target=convention)
    expected = embed(GREY.expand(-1, before, -1, -1), weight, BIAS)
    got = embed(GREY.expand(-1, after, -1, -1), folded, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_unit_grey_to_imagenet_rgb_is_the_inverse() -> None:
    weight, bias = random(12, 1, 8, 8), random(12, seed=1)
    rgb, shifted = convert_channels(weight, bias, in_channels=3, source="unit", target="imagenet")
    expected = embed(GREY, weight, bias)
    got = embed(as_imagenet(GREY), rgb, shifted)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    back, unshifted = convert_channels(rgb, shifted, in_channels=1, source="imagenet", target="unit")
    torch.testing.assert_close(back, weight, **CLOSE)
    torch.testing.assert_close(unshifted, bias, **CLOSE)


def test_three_channels_to_unit_is_exact_for_colour_images_too() -> None:
    colour = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(4))
    weight, bias = convert_channels(WEIGHT, BIAS, in_channels=3, source="imagenet", target="unit")
    expected = embed(as_imagenet(colour), WEIGHT, BIAS)
    torch.testing.assert_close(embed(colour, weight, bias), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("source", "target"), [("unit", "standardised"), ("standardised", "unit")])
def test_unit_and_standardised_are_never_converted(source: str, target: str) -> None:
    with pytest.raises(ValueError, match=f"'{source}'.*'{target}'"):
        convert_channels(random(12, 1, 8, 8), BIAS, in_channels=1, source=source, target=target)


@pytest.mark.parametrize(("source", "target", "channels"), [("imagenet", "unit", 1), ("unit", "imagenet", 4)])
def test_imagenet_statistics_need_three_channels(source: str, target: str, channels: int) -> None:
    with pytest.raises(ValueError, match="3 channels, got"):
        convert_channels(random(12, 4, 8, 8), BIAS, in_channels=channels, source=source, target=target)


def test_conversion_keeps_the_dtype() -> None:
    weight, bias = WEIGHT.bfloat16(), BIAS.bfloat16()
    for target in ("unit", "standardised"):
        folded, shifted = convert_channels(weight, bias, in_channels=1, source="imagenet", target=target)
        assert folded.dtype == shifted.dtype == torch.bfloat16
