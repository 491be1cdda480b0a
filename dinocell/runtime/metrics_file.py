"""``metrics.jsonl``: one JSON object a line, ``{"step": 120, "time": <seconds since 1970>, "loss/dino": 8.91, ...}``.

Numbers that JSON cannot hold are the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which
Python's ``float()`` reads.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinocell.runtime.atomic import write_atomically

_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class MetricsFile:
    """The open file; every record is on disk, as far as this process can tell, once :meth:`write` returns.

    Opening keeps the records of steps 1 to ``resume_step`` and drops the others, because they will
    be computed again. ``num_unreadable`` lines were broken: a process that is killed while it writes
    leaves half a line behind.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.num_unreadable = _truncate(path, resume_step) if path.exists() else 0
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append the record of a step; the names ``step`` and ``time`` are taken."""
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in numbers.items():
            record[name] = value if math.isfinite(value) else _NOT_FINITE[str(value)]
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _truncate(path: Path, resume_step: int) -> int:
    kept, num_unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            keep = 0 < int(json.loads(line)["step"]) <= resume_step
        except (ValueError, KeyError, TypeError):
            num_unreadable += 1
        else:
            kept += [line + "\n"] if keep else []
    write_atomically(path, "".join(kept))
    return num_unreadable
