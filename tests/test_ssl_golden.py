"""Golden losses of ten steps: a change of these numbers must be intended."""

import json
from pathlib import Path

import numpy as np
import pytest

from dinocell.runtime.schedules import Freeze, Schedule
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    PretrainConfig,
    Schedules,
    ViewsConfig,
)
from dinocell.ssl.train import pretrain

# float32 on a CPU; other processors round differently, and ten steps carry that on.
GOLDEN: dict[str, dict[str, list[float]]] = {
    "sinkhorn": {
        "loss/dino_global": [6.2996, 6.29164, 6.06461, 5.88157, 5.55522, 5.51722, 5.37581, 5.29472, 5.30916, 5.27135],
        "loss/dino_local": [6.28694, 6.26597, 6.02902, 5.85026, 5.60679, 5.44569, 5.34159, 5.31156, 5.27187, 5.24533],
        "loss/ibot": [3.10688, 3.05592, 2.92019, 2.76448, 2.67711, 2.59773, 2.6803, 2.5217, 2.53704, 2.59219],
        "loss/koleo": [0.54174, 0.61594, 0.56705, 0.7869, 0.93244, 1.30951, 1.47254, 1.43616, 1.5055, 1.19507],
    },
    "softmax": {
        "loss/dino_global": [3.72801, 3.9267, 3.03629, 2.05435, 1.67353, 1.44233, 1.36367, 1.41932, 1.50228, 1.70211],
        "loss/dino_local": [3.44209, 3.92668, 2.97848, 2.04778, 1.66201, 1.4502, 1.35754, 1.41558, 1.50385, 1.7059],
        "loss/ibot": [3.20258, 3.23091, 2.72949, 2.25219, 2.00909, 1.74346, 2.51713, 1.28155, 2.15154, 2.24517],
        "loss/koleo": [0.54174, 0.61594, 0.71323, 1.12272, 1.41297, 1.86554, 2.0564, 2.04239, 2.02792, 1.83606],
    },
}


@pytest.mark.parametrize("centring", ["sinkhorn", "softmax"])
def test_ten_steps_give_the_golden_losses(shard_set: Path, tmp_path: Path, centring: str) -> None:
    config = PretrainConfig(
        output=tmp_path / "run",
        data=DataConfig(shards=(str(shard_set),)),
        steps=10,
        batch_size=6,
        views=ViewsConfig(global_size=32, local_size=16, num_local=4),
        model=ModelConfig(variant="tiny", layer_scale=0.3, drop_path=0.1),
        heads=HeadsConfig(num_prototypes=128, hidden=64, bottleneck=32, weight_norm=True),
        losses=LossConfig(centring=centring),  # type: ignore[arg-type]
        schedules=Schedules(
            learning_rate=Schedule(peak=0.005, end=1e-4, warmup=3),
            teacher_temperature=Schedule(peak=0.03),
            teacher_momentum=Schedule(peak=0.9, end=1.0),
            last_layer=Freeze(freeze=1),
        ),
        log_every=1,
        image_every=1000,
        compute=ComputeConfig(workers=0),
    )
    pretrain(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name, wanted in GOLDEN[centring].items():
        found = [row[name] for row in rows]
        np.testing.assert_allclose(found, wanted, rtol=2e-3, err_msg=f"{name}: {[round(each, 5) for each in found]}")
