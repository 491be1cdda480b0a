"""Files that are never half written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; it is renamed to ``path`` if the block ends well, else removed."""
    temporary = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:  # the content reaches the disk before the name does
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds the old or the new content, never a part of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
