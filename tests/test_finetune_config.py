"""The schema of a fine-tuning recipe: what does not go together is one line."""

from pathlib import Path

import pytest

from dinocell.configs.load import load_config
from dinocell.errors import ConfigError
from dinocell.finetune.config import FinetuneConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sets=[a]", "data.images=b", "data.masks=c"], "got both"),
        (["data.images=b"], "go together"),
        (["data.sets=[a]", "model.weights=w", "model.pretrained=false"], "random weights"),
        (["data.sets=[a]", "data.weights=[1,2]"], "expected one a set"),
        (["data.sets=[a,b]", "data.weights=[1,0]"], "above 0"),
        (["data.sets=[a]", "model.patch_size=0"], "patch_size: expected at least 1"),
        (["data.sets=[a]", "model.blocks=[0,1,2,99]"], "from 0 to 11 for size tiny"),
        (["data.sets=[a]", "model.blocks=[3,2,1,0]"], "ascending"),
        (["data.sets=[a]", "model.segmenter=s", "model.blocks=[0,1,2,3]"], "leave out weights and blocks"),
        (["data.sets=[a]", "optim.learning_rate=0"], "learning_rate: expected more than 0"),
        (["data.sets=[a]", "optim.clip=0"], "clip: expected more than 0"),
        (["data.sets=[a]", "optim.betas=[2,3]"], "less than 1"),
        (["data.sets=[a]", "optim.layer_decay=0"], "layer_decay"),
        (["data.sets=[a]", "optim.warmup_steps=-3"], "warmup_steps: expected at least 0"),
        (["data.sets=[a]", "stopping.patience=-1"], "patience: expected at least 0"),
        (["data.sets=[a]", "augment.rotation_deg=-5"], "rotation_deg: expected 0 to 180"),
        (["data.sets=[a]", "augment.blur_px=11"], "blur_px: expected 0 to 10 pixels"),
        (["data.sets=[a]", "augment.noise=-0.1"], "noise: expected a share of the grey range"),
        (["data.sets=[a]", "compute.workers=-1"], "workers: expected at least 0"),
        (["data.sets=[a]", "seed=-1"], "seed: expected at least 0"),
    ],
)
def test_impossible_combinations_are_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, None, [f"output={tmp_path}", "model.size=tiny", *overrides])
