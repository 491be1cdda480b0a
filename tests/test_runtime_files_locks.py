"""One process at a time; where the system has no such locks, segmenting goes on without."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinocell.runtime import files as locks
from dinocell.runtime.files import folder_lock


def test_a_folder_is_one_processs_until_it_lets_go(tmp_path: Path) -> None:
    with folder_lock(tmp_path, wait=False) as first:
        assert first
        with folder_lock(tmp_path, wait=False) as second:
            assert not second
    with folder_lock(tmp_path, wait=True) as again:
        assert again


def test_a_disk_without_locks_is_taken_as_it_is_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with folder_lock(tmp_path, wait=True) as ours:
        assert ours
    assert f"{tmp_path}: cannot be locked (Operation not supported)" in caplog.text


def test_segmenting_loads_where_the_system_is_no_unix() -> None:
    program = """
import sys
import cv2, imagecodecs, numba, rich.console, scipy.ndimage, skimage.measure, tifffile, torch
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
sys.platform = "win32"
import dinocell.cli, dinocell.eval.segmentation.pipeline, dinocell.eval.segmentation.batch, dinocell.commands.segment
"""
    subprocess.run([sys.executable, "-c", program], check=True)
