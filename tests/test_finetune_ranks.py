"""Fine-tuning on two ranks gives the losses and the weights of one process. Real processes, on this machine."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocell.configs.load import to_yaml
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.finetune.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimConfig,
)
from dinocell.finetune.model import DINOCell
from dinocell.finetune.train import finetune
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.layouts import folder_pairs
from helpers.ranks import run_ranks

FIELD = SyntheticConfig(size=(48, 56), channels=("AGP",), num_cells=(4, 6), cell_radius_px=9.0)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(5):
        made = make_field(number, FIELD)
        write_tiff(tmp_path / "images" / f"f{number}.tif", made.pixels)
        write_labels(tmp_path / "masks" / f"f{number}.tif", made.labels)
    build_labelled(folder_pairs(tmp_path, images="images/{name}.tif", masks="masks/{name}.tif"), tmp_path / "set")
    return tmp_path / "set"


def config_of(labelled: Path, output: Path, target: str, *, frozen: bool) -> FinetuneConfig:
    return FinetuneConfig(
        output=output,
        data=DataConfig(sets=(str(labelled),), validation_share=0.4, crops_per_image=4),
        epochs=2,
        batch_size=4,
        target=target,  # type: ignore[arg-type]
        model=ModelConfig(size="nano", pretrained=False, freeze_backbone=frozen),
        augment=AugmentConfig(crop=32),
        optim=OptimConfig(learning_rate=1e-3, backbone_learning_rate=1e-4, ema=0.5),
        log_every=1,
        compute=ComputeConfig(device="cpu", workers=0),
    )


def numbers(output: Path, name: str) -> list[float]:
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in lines if name in row]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "frozen"), [("distance", False), ("flows", True)])
def test_two_ranks_give_the_losses_of_one_process(labelled: Path, tmp_path: Path, target: str, frozen: bool) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finetune(config_of(labelled, alone, target, frozen=frozen))
    (tmp_path / "shared.yaml").write_text("# test\n" + to_yaml(config_of(labelled, shared, target, frozen=frozen)))
    run_ranks(["finetune", str(tmp_path / "shared.yaml")], 2)
    for name in ("loss/train", "loss/validation", "gradient_norm/decoder"):
        assert len(numbers(alone, name)) == (2 if name == "loss/validation" else 6)
        np.testing.assert_allclose(numbers(shared, name), numbers(alone, name), rtol=1e-4, err_msg=name)
    ours, expected = (DINOCell.from_pretrained(run / "last.pt").state_dict() for run in (shared, alone))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=2e-4, msg=name)
