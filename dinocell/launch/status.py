"""The status of a launched run: the states of its jobs, its progress, its logs."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dinocell.errors import DinocellError
from dinocell.launch.slurm import RECORD

_POLL_S = 1.0
# The error line of a command, or the last line of a traceback.
_ERROR_LINE = re.compile(r"dinocell: |[\w.]+(Error|Exception|Interrupt)\b")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job: its ID, SLURM's state (``UNKNOWN`` if SLURM no longer lists it), why it is pending, nodes and restarts."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: str = ""
    line: str = ""
    folder: Path = Path()

    @property
    def has_ended(self) -> bool:
        """Whether the job will not run again."""
        return self.state.startswith(_ENDED)

    @property
    def error(self) -> str:
        """The last error line in the logs of a failed job; empty if there is none."""
        if not self.state.startswith("FAILED"):
            return ""
        logs = self.folder.glob(f"{self.job}_*_log.out")
        texts = sorted(path.read_text(encoding="utf-8", errors="replace") for path in logs)
        lines = [line for text in texts for line in text.splitlines() if _ERROR_LINE.match(line)]
        return lines[-1] if lines else ""

    def __str__(self) -> str:
        state = f"{self.state} ({self.reason})" if self.reason else self.state
        restarts = f"{self.restarts} restarts" if self.restarts not in ("", "0") else ""
        details = ", ".join(filter(None, (self.nodes, restarts)))
        return "  ".join(filter(None, (self.job, state, details, self.line)))


def launches(run: Path) -> list[Path]:
    """Return the records of a run's launches, oldest first; raise :class:`DinocellError` if there is none."""
    records = sorted({*run.glob(RECORD), *run.rglob(f"launch/**/{RECORD}")}, key=lambda path: path.stat().st_mtime)
    if not records:
        raise DinocellError(f"{run}: nothing was launched into this folder (it contains no {RECORD})")
    return records


def states(run: Path) -> list[JobState]:
    """Return the state of every job of a run."""
    jobs: list[JobState] = []
    for record in launches(run):
        content = json.loads(record.read_text(encoding="utf-8"))
        jobs += [_state(job, content["line"], record.parent) for job in content["jobs"]]
    return jobs


def _state(job: str, line: str, folder: Path) -> JobState:
    description = _query("scontrol", "show", "job", "-o", job)
    if "JobState=" in description:
        fields = dict(word.split("=", 1) for word in description.split() if "=" in word)
        return JobState(
            job=job,
            state=fields["JobState"],
            reason=fields.get("Reason", "").replace("None", "") if fields["JobState"] == "PENDING" else "",
            nodes=fields.get("NodeList", "").replace("(null)", ""),
            restarts=fields.get("Restarts", ""),
            line=line,
            folder=folder,
        )
    # scontrol lists a job only for some minutes after its end; the accounting database, if there is one, keeps it.
    rows = _query("sacct", "-j", job, "-X", "-n", "-P", "-o", "State,NodeList").splitlines()
    if rows and "|" in rows[0]:
        state, nodes = rows[0].split("|", 1)
        return JobState(job=job, state=state, nodes=nodes, line=line, folder=folder)
    return JobState(job=job, state="UNKNOWN", line=line, folder=folder)


def _query(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return result.stdout if result.returncode == 0 else ""


def last_step(run: Path) -> str:
    """Return the latest step and losses of the run as text; empty if there are none."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
        except ValueError:
            continue
        # Non-finite losses are stored as strings, which float() parses.
        losses = [f"{name} {float(value):.4g}" for name, value in metrics.items() if name.startswith("loss/")]
        if losses:
            return "  ".join([f"step {metrics.get('step', '?')}", *losses])
    return ""


def log_of(run: Path, rank: int = 0) -> Path:
    """Return the latest log of a rank; raise :class:`DinocellError` if there is none yet."""
    # Exclude the probes that the run itself has submitted.
    own = [record.parent for record in launches(run) if "probes" not in record.relative_to(run).parts]
    logs = [path for folder in own for path in folder.glob(f"*_{rank}_log.out")]
    if not logs:
        raise DinocellError(f"{run}: there is no log of rank {rank} yet")
    return max(logs, key=lambda path: path.stat().st_mtime)


def follow(run: Path, rank: int = 0) -> Iterator[str]:
    """Yield a rank's log as it grows, until no job of the run is pending or running."""
    path = log_of(run, rank)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            if text := file.read():
                yield text
                continue
            if all(state.has_ended or state.state == "UNKNOWN" for state in states(run)):
                yield file.read()
                return
            time.sleep(_POLL_S)
