"""A run folder says what was run where, and lets no other run in."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from dinocell.configs.load import load_config
from dinocell.errors import ConfigError, DinocellError
from dinocell.runtime.run_folder import claim


@dataclass(frozen=True, kw_only=True)
class Compute:
    num_workers: int = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 1e-3
    blocks: tuple[int, ...] = (2, 5)
    compute: Compute = field(default_factory=Compute)


def test_a_claim_writes_the_config_and_adds_the_environment(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    config = Config(lr=1e-5)
    for _ in range(2):
        claim(folder, config, ())
    assert load_config(Config, folder / "config.yaml") == config
    starts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 2
    assert starts[0]["argv"] == sys.argv
    assert starts[0]["packages"]["torch"] == torch.__version__
    assert starts[0]["started"].endswith("+00:00")
    assert not list(folder.glob(".*"))  # no temporary files


def test_another_config_is_refused_but_other_compute_is_not(tmp_path: Path) -> None:
    claim(tmp_path, Config(), ("compute",))
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path, Config(lr=0.5, blocks=(1,)), ("compute",))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "lr: 0.001 -> 0.5; blocks: [2, 5] -> [1]" in message
    assert "\n" not in message
    claim(tmp_path, Config(compute=Compute(num_workers=0)), ("compute",))
    claim(tmp_path, Config(lr=0.5), ("compute", "lr"))


def test_a_broken_environment_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DinocellError, match=r"environment\.json: expected"):
        claim(tmp_path, Config(), ())
