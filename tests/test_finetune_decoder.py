"""The decoder: sizes for every patch size, independence of samples, and a limited receptive field."""

import pytest
import torch

from dinocell.finetune.decoder import ChannelNorm, Decoder
from dinocell.finetune.model import DINOCell, create_dinocell_model

WIDTH = 24


def tokens_of(batch: int, rows: int, columns: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, WIDTH, rows, columns, generator=generator) for _ in range(4)]


def decoder(**options: int) -> Decoder:
    torch.manual_seed(0)
    built = Decoder(WIDTH, **options)
    torch.nn.init.normal_(built.head.weight)
    return built


@pytest.mark.parametrize(("patch", "side"), [(8, 64), (14, 56), (16, 64)])
@pytest.mark.parametrize("outputs", [1, 3])
def test_maps_have_the_images_size_for_every_patch_size(patch: int, side: int, outputs: int) -> None:
    images = torch.randn(2, 1, side, side + patch)
    maps = decoder(out_channels=outputs)(tokens_of(2, side // patch, side // patch + 1), images)
    assert maps.shape == (2, outputs, side, side + patch)


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_a_window_of_256_pixels_gives_a_map_of_256(patch: int) -> None:
    model = DINOCell(f"vitt{patch}", pretrained=False).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 256, 256)).shape == (1, 1, 256, 256)


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_a_sample_alone_gives_its_row_of_the_batch_in_train_mode_too(patch: int) -> None:
    built = decoder().train()
    side = 4 * patch
    images, tokens = torch.randn(3, 1, side, side), tokens_of(3, 4, 4)
    together = built(tokens, images)
    for row in range(3):
        alone = built([each[row : row + 1] for each in tokens], images[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)


def test_the_norm_is_that_of_each_pixel_by_itself() -> None:
    maps = torch.randn(3, 16, 5, 6) * 4 + 2
    norm = ChannelNorm(16)
    found = norm(maps)
    torch.testing.assert_close(found.mean(1), torch.zeros(3, 5, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std(1, correction=0), torch.ones(3, 5, 6), rtol=0, atol=1e-3)
    pixel = maps[1:2, :, 3:4, 2:3]
    torch.testing.assert_close(norm(pixel), found[1:2, :, 3:4, 2:3])
    assert not list(norm.buffers())  # no running statistics


def test_every_token_map_and_the_image_matter() -> None:
    built = decoder()
    images, tokens = torch.randn(1, 1, 32, 32), tokens_of(1, 4, 4)
    before = built(tokens, images)
    for number in range(4):
        changed = list(tokens)
        changed[number] = changed[number] + torch.randn_like(changed[number])
        assert (built(changed, images) - before).abs().max() > 1e-3, number
    assert (built(tokens, images + torch.randn_like(images)) - before).abs().max() > 1e-3


def test_an_edge_of_one_pixel_in_the_image_reaches_the_map() -> None:
    built = decoder()
    images, tokens = torch.zeros(1, 1, 64, 64), tokens_of(1, 8, 8)
    edge = images.clone()
    edge[..., 32:] = 1
    difference = (built(tokens, edge) - built(tokens, images))[0, 0].abs().mean(0)
    assert difference.diff().abs().argmax() in range(26, 38)  # columns; a patch is 8 wide


def test_untrained_maps_start_near_the_head_s_bias() -> None:
    torch.manual_seed(0)
    maps = Decoder(WIDTH)(tokens_of(2, 8, 8), torch.randn(2, 1, 64, 64))
    assert maps.abs().max() < 0.5


def test_a_small_backbone_s_decoder_has_about_nine_million_parameters() -> None:
    model = create_dinocell_model("small", pretrained=False)
    count = sum(parameter.numel() for parameter in model.decoder.parameters()) / 1e6
    assert 7 < count < 11


def test_another_number_of_token_maps_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        decoder()(tokens_of(1, 4, 4)[:3], torch.randn(1, 1, 32, 32))
