"""The segmenter: its maps, a frozen backbone, its file, and its decoder."""

import json
from pathlib import Path

import pytest
import torch

from dinocell.errors import WeightsError
from dinocell.finetune.model import ChannelNorm, Decoder, DINOCell, create_dinocell_model, replace_settings
from dinocell.finetune.targets import DistancePostprocessing

WIDTH = 24  # of the decoder's token maps


def tiny(**options: object) -> DINOCell:
    torch.manual_seed(0)
    return DINOCell("vitt8", pretrained=False, **options)


def test_distance_maps_have_the_images_size_if_the_patch_does_not_divide_it() -> None:
    model = tiny().eval()
    for height, width in ((32, 40), (33, 47), (5, 24)):
        with torch.no_grad():
            maps = model(torch.randn(2, 1, height, width))
        assert maps.shape == (2, 1, height, width)
        assert ((maps > 0) & (maps < 1)).all()


def test_flows_are_three_maps_with_a_sigmoid_on_the_probability_only() -> None:
    model = tiny(target="flows").eval()
    images = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        maps, logits = model(images), model.forward_logits(images)
    torch.testing.assert_close(maps[:, :2], logits[:, :2])
    torch.testing.assert_close(maps[:, 2:], logits[:, 2:].sigmoid())


def test_a_frozen_backbone_gets_no_gradient_and_stays_in_eval_mode() -> None:
    model = tiny().train()
    assert not model.backbone.training
    assert model.decoder.training
    assert not any(maps.requires_grad for maps in model.tokens(torch.randn(1, 1, 32, 32)))
    model(torch.randn(1, 1, 32, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


def test_an_unfrozen_backbone_gets_gradients() -> None:
    model = tiny(freeze_backbone=False)
    assert model.backbone.training
    torch.nn.init.normal_(model.decoder.head.weight)
    model(torch.randn(1, 1, 32, 32)).sum().backward()
    gradients = [parameter.grad for parameter in model.backbone.parameters()]
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("name", ["cells.pt", "cells.safetensors", "folder"])
def test_a_file_gives_the_same_maps_settings_and_card(tmp_path: Path, name: str) -> None:
    model = tiny().eval()
    replace_settings(model, cells_max=0.6, trained_on=("ours",))
    model.save_pretrained(tmp_path / name)
    again = DINOCell.from_pretrained(tmp_path / name)
    assert (again.settings, again.card, again.training) == (model.settings, model.card, False)
    images = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_weights_of_another_target_are_refused_and_change_nothing(tmp_path: Path) -> None:
    tiny(target="flows").save_weights(tmp_path / "flows.pt")
    model = tiny()
    before = model.decoder.head.weight.clone()
    with pytest.raises(WeightsError, match=r"flows.pt: .* \(target: 'distance' -> "):
        model.load_weights(tmp_path / "flows.pt")
    DINOCell("vitt16", pretrained=False).save_weights(tmp_path / "coarse.pt")
    with pytest.raises(WeightsError, match=r"\(backbone.patch_size: 8 -> 16\)"):
        model.load_weights(tmp_path / "coarse.pt")
    assert torch.equal(model.decoder.head.weight, before)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.decoder.head.weight.fill_(float("nan"))
    model.save_weights(tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match="not finite"):
        DINOCell.from_pretrained(tmp_path / "bad.pt")


def test_unknown_names_sizes_and_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="backbone_name: expected"):
        DINOCell("resnet50", pretrained=False)
    with pytest.raises(ValueError, match="model_size: expected one of"):
        create_dinocell_model("enormous", pretrained=False)
    with pytest.raises(ValueError, match="four ascending"):
        tiny(blocks=(3, 2, 1, 0))
    with pytest.raises(ValueError, match="random weights"):
        tiny(backbone_weights="somewhere.pt")


def test_info_describes_a_segmenter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dinocell.cli import main

    DINOCell("vitt8", pretrained=False).save_pretrained(tmp_path / "cells.pt", dtype=torch.float16)
    assert main(["info", "--json", str(tmp_path / "cells.pt")]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines["format"] == "DINOCell segmenter"
    assert "decoder (float16)" in lines["parameters"]
    assert lines["cells"] == str(DistancePostprocessing())


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
