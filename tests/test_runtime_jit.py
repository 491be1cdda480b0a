"""Kernels are compiled once per machine, with one log line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_compiling_is_logged_once_and_not_repeated_in_the_next_process(tmp_path: Path) -> None:
    first, second = run(NUMBA_CACHE_DIR=str(tmp_path)), run(NUMBA_CACHE_DIR=str(tmp_path))
    assert first == "INFO compiling kernels, a few seconds, once per machine\n1\n"
    assert second == "1\n"
    assert list(tmp_path.rglob("*.nbi"))


@pytest.mark.slow
def test_kernels_work_where_no_cache_folder_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = run(NUMBA_CACHE_DIR=str(tmp_path / "file"), NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator")
    assert output.startswith("WARNING compiling kernels, a few seconds in every process")
    assert "NUMBA_CACHE_DIR" in output
    assert output.endswith("\n1\n")


@pytest.mark.slow
def test_an_installation_that_cannot_be_written_uses_the_cache_of_the_user(tmp_path: Path) -> None:
    run(XDG_CACHE_HOME=str(tmp_path), NUMBA_CACHE_LOCATOR_CLASSES="UserWideCacheLocator")
    assert list(tmp_path.rglob("*.nbi"))


def test_importing_dinocell_does_not_load_numba() -> None:
    script = "import sys, dinocell, dinocell.cli; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
