"""The demo, as `make demo` runs it, on smaller fields."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocell.demo.old import DemoConfig, channel_consistency


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dinocell", "demo", "quick", f"output={folder}", "num_fields=2", "field.size=[64,96]"]
    return subprocess.run([*line, *overrides], capture_output=True, text=True, check=False, env=dict(os.environ))


def test_demo_ends_with_a_picture_and_scores_and_can_be_run_again(tmp_path: Path) -> None:
    first, again = run(tmp_path / "demo"), run(tmp_path / "demo")
    for result in (first, again):
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"picture: {tmp_path / 'demo' / 'demo.png'}"
    picture = np.asarray(Image.open(tmp_path / "demo" / "demo.png"))
    assert picture.shape == (18 + 2 * 68, 13 * 100 + 4, 3)
    assert picture.std() > 20
    last = json.loads((tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(-1 <= last[f"consistency/{which}_field"] <= 1 for which in ("same", "different"))


def test_demo_refuses_fields_that_the_patch_does_not_divide(tmp_path: Path) -> None:
    result = run(tmp_path / "demo", "field.size=[60,64]")
    assert result.returncode == 2
    assert "multiples of the patch size 8" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_demo_looks_through_a_given_checkpoint(tmp_path: Path) -> None:
    assert run(tmp_path / "demo").returncode == 0
    result = run(tmp_path / "other", f"weights={tmp_path / 'demo' / 'random_vit16_rgb.pth'}")
    assert result.returncode == 0, result.stderr
    assert "licence of the backbone" in result.stdout


def test_consistency_of_features_that_ignore_the_channel_is_1() -> None:
    fields = torch.randn(5, 1, 64).expand(5, 3, 64)
    same, different = channel_consistency(fields)
    assert same == pytest.approx(1, abs=1e-5)
    assert different < 0.1


def test_consistency_equals_a_plain_loop() -> None:
    features = torch.randn(3, 2, 8, dtype=torch.float64)
    centred = (features - features.mean((0, 1))).reshape(6, 8).numpy()
    pairs = {True: [], False: []}
    for i in range(6):
        for j in range(6):
            if i != j:
                cosine = centred[i] @ centred[j] / np.linalg.norm(centred[i]) / np.linalg.norm(centred[j])
                pairs[i // 2 == j // 2].append(cosine)
    assert channel_consistency(features) == pytest.approx((np.mean(pairs[True]), np.mean(pairs[False])))


def test_one_field_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="num_fields"):
        DemoConfig(num_fields=1)
