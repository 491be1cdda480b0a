"""The segmenter: its maps, a frozen backbone, and its file."""

import json
from pathlib import Path

import pytest
import torch

from dinocell.errors import WeightsError
from dinocell.finetune.model import DINOCell, create_dinocell_model, replace_settings
from dinocell.finetune.targets import DistancePostprocessing


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
