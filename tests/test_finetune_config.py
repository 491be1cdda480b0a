"""The schema of a fine-tuning recipe: conflicting and invalid values are one line that names the key."""

from pathlib import Path

import pytest

from dinocell.configs.load import load_config
from dinocell.errors import ConfigError
from dinocell.finetune.config import FinetuneConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sets=[a]", "data.images=b", "data.masks=c"], "sets, or images and masks"),
        (["data.images=b"], "images and masks"),
        (["data.sets=[a]", "model.weights=w", "model.pretrained=false"], "pretrained"),
        (["data.sets=[a]", "data.weights=[1,2]"], "weights: expected one per set"),
        (["data.sets=[a,b]", "data.weights=[1,0]"], "weights: expected more than 0"),
        (["data.sets=[a]", "model.patch_size=0"], "patch_size: expected at least 1"),
        (["data.sets=[a]", "model.blocks=[0,1,2,99]"], "blocks: .* from 0 to 11 for size tiny"),
        (["data.sets=[a]", "model.blocks=[3,2,1,0]"], "blocks: .*ascending"),
        (["data.sets=[a]", "model.segmenter=s", "model.blocks=[0,1,2,3]"], "segmenter: "),
        (["data.sets=[a]", "optim.learning_rate=0"], "learning_rate: expected"),
        (["data.sets=[a]", "optim.clip=0"], "clip: expected more than 0"),
        (["data.sets=[a]", "optim.betas=[2,3]"], "betas: "),
        (["data.sets=[a]", "optim.layer_decay=0"], "layer_decay"),
        (["data.sets=[a]", "optim.warmup_steps=-3"], "warmup_steps: expected at least 0"),
        (["data.sets=[a]", "stopping.patience=-1"], "patience: expected at least 0"),
        (["data.sets=[a]", "augment.rotation_deg=-5"], "rotation_deg: expected .*180"),
        (["data.sets=[a]", "augment.blur_px=11"], "blur_px: expected .*10"),
        (["data.sets=[a]", "augment.noise=-0.1"], "noise: expected"),
        (["data.sets=[a]", "augment.scale=[1.2,0.8]"], "scale: expected"),
        (["data.sets=[a]", "data.validation_share=1"], "validation_share: expected"),
        (["data.sets=[a]", "loss.gradient_weight=1", "target=flows"], "gradient_weight"),
        (["data.sets=[a]", "compute.workers=-1"], "workers: expected at least 0"),
        (["data.sets=[a]", "seed=-1"], "seed: expected at least 0"),
    ],
)
def test_impossible_combinations_are_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, None, [f"output={tmp_path}", "model.size=tiny", *overrides])
