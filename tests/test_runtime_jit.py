"""Where compiled kernels are kept, and that compiling is said once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinocell.runtime.jit import cache_folder

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
import numpy as np
from dinocell.eval.segmentation.watershed import distance_to_labels
print(int(distance_to_labels(np.eye(9, dtype=np.float32)).max()))
"""


def run(**environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=variables | environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
def test_compiling_is_said_once_and_not_repeated_in_the_next_process(tmp_path: Path) -> None:
    first, second = run(XDG_CACHE_HOME=str(tmp_path)), run(XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / "dinocell" / "numba"
    assert first == f"INFO compiling kernels, a few seconds, once on this machine (kept in {folder})\n1\n"
    assert second == "1\n"
    assert list(folder.rglob("*.nbi"))


@pytest.mark.slow
def test_folder_that_cannot_be_written_is_named_and_the_kernels_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = run(NUMBA_CACHE_DIR=str(tmp_path / "file"))
    assert output.startswith("WARNING compiling kernels, a few seconds in every process")
    assert str(tmp_path / "file") in output
    assert output.endswith("\n1\n")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/dinocell/numba")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "dinocell" / "numba"


def test_importing_dinocell_does_not_load_numba() -> None:
    script = "import sys, dinocell, dinocell.cli; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
