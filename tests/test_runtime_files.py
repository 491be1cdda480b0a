"""Atomic writes and folder locks."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinocell.runtime import files
from dinocell.runtime.files import folder_lock, replacing, write_atomically


def test_text_is_written_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "Zelle \u00fc")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Zelle \u00fc"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file_and_no_part(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_locked_until_it_is_released(tmp_path: Path) -> None:
    with folder_lock(tmp_path, wait=False) as first:
        assert first
        with folder_lock(tmp_path, wait=False) as second:
            assert not second
    with folder_lock(tmp_path, wait=True) as again:
        assert again


def test_a_file_system_without_locks_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with folder_lock(tmp_path, wait=True) as is_locked:
        assert is_locked
    assert f"{tmp_path}: cannot be locked (Operation not supported)" in caplog.text


def test_segmentation_imports_on_windows() -> None:
    program = """
import sys
import cv2, imagecodecs, numba, rich.console, scipy.ndimage, skimage.measure, tifffile, torch
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
sys.platform = "win32"
import dinocell.cli, dinocell.eval.segmentation.pipeline, dinocell.eval.segmentation.batch, dinocell.commands.segment
"""
    subprocess.run([sys.executable, "-c", program], check=True)
