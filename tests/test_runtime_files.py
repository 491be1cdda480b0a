"""Files that are never half written."""

from pathlib import Path

import pytest

from dinocell.runtime.files import replacing, write_atomically


def test_text_is_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
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
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
