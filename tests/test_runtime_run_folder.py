"""A run folder stores what was run where, and keeps other runs out."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
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


RENAMED_KEYS = {"learning_rate": "lr"}


def test_a_claim_writes_the_config_and_adds_the_environment(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    config = Config(lr=1e-5)
    for _ in range(2):
        claim(folder, config, ()).close()
    assert load_config(Config, folder / "config.yaml") == config
    starts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 2
    assert starts[0]["argv"] == sys.argv
    assert starts[0]["packages"]["torch"] == torch.__version__
    assert starts[0]["started"].endswith("+00:00")
    assert not list(folder.glob(".*"))  # no temporary files


def test_another_config_is_refused_but_other_compute_is_not(tmp_path: Path) -> None:
    claim(tmp_path, Config(), ("compute",)).close()
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path, Config(lr=0.5, blocks=(1,)), ("compute",))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "lr: 0.001 -> 0.5; blocks: [2, 5] -> [1]" in message
    assert "\n" not in message
    claim(tmp_path, Config(compute=Compute(num_workers=0)), ("compute",)).close()
    claim(tmp_path, Config(lr=0.5), ("compute", "lr")).close()


def test_a_run_whose_stored_config_lacks_a_new_key_or_has_a_former_one_is_resumed(tmp_path: Path) -> None:
    claim(tmp_path, Config(lr=0.5), ()).close()
    (tmp_path / "config.yaml").write_text("learning_rate: 0.5\ncompute: {}\n")
    claim(tmp_path, Config(lr=0.5), ()).close()
    with pytest.raises(ConfigError, match="blocks"):
        claim(tmp_path, Config(lr=0.5, blocks=(1,)), ())


@pytest.mark.parametrize("content", ["[]", '{"starts": 5}', "{"])
def test_a_broken_environment_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content, encoding="utf-8")
    with pytest.raises(DinocellError, match=r"environment\.json: expected"):
        claim(tmp_path, Config(), ())


def test_one_process_at_a_time_and_the_next_after_a_killed_one(tmp_path: Path) -> None:
    """A second start would throw away what the first one writes from then on."""
    at_work = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from test_runtime_run_folder import Config, claim\n"
        "log = claim(Path(sys.argv[1]), Config(), ())\n"
        "worker = os.fork()\n"  # outlives it, as a loader's may
        "print(worker, flush=True) if worker else None\ntime.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", at_work, tmp_path], stdout=subprocess.PIPE, cwd=Path(__file__).parent
    ) as first:
        assert first.stdout is not None
        worker = int(first.stdout.readline())
        with pytest.raises(DinocellError, match=str(tmp_path)):
            claim(tmp_path, Config(), (), patience_s=0.1)
        assert len(json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))["starts"]) == 1
        # A job that comes back may meet what is left of its start before, for a while.
        threading.Timer(0.3, first.kill).start()
        claim(tmp_path, Config(), ()).close()
        first.wait()
        os.kill(worker, signal.SIGTERM)


def test_a_file_system_without_locks_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    claim(tmp_path, Config(), ()).close()
    assert "log.txt: cannot be locked (No locks available)" in caplog.text
