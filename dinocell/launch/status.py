"""What became of a launched run: the state of its jobs, how far it is, its logs."""

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
# What a command says when it stops, or the end of Python's traceback.
_COMPLAINT = re.compile(r"dinocell: |[\w.]+(Error|Exception|Interrupt)\b")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job: its number, SLURM's word for its state (``UNKNOWN`` if SLURM has forgotten it), nodes, restarts.

    ``reason`` is SLURM's word for why it waits.
    """

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: str = ""
    line: str = ""
    folder: Path = Path()

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again."""
        return self.state.startswith(_ENDED)

    @property
    def complaint(self) -> str:
        """The last thing that a job that failed said about it: the command's own line, or Python's; empty if none."""
        if not self.state.startswith("FAILED"):
            return ""
        logs = [
            path.read_text(encoding="utf-8", errors="replace") for path in self.folder.glob(f"{self.job}_*_log.out")
        ]
        said = [line for log in sorted(logs) for line in log.splitlines() if _COMPLAINT.match(line)]
        return said[-1] if said else ""

    def __str__(self) -> str:
        state = f"{self.state} ({self.reason})" if self.reason else self.state
        restarts = f"{self.restarts} restarts" if self.restarts not in ("", "0") else ""
        where = ", ".join(filter(None, (self.nodes, restarts)))
        return "  ".join(filter(None, (self.job, state, where, self.line)))


def launches(run: Path) -> list[Path]:
    """Return the records of a run's launches, oldest first.

    Raises
    ------
    DinocellError
        If there is none.
    """
    found = sorted({*run.glob(RECORD), *run.rglob(f"launch/**/{RECORD}")}, key=lambda path: path.stat().st_mtime)
    if not found:
        raise DinocellError(f"{run}: nothing was launched into this folder (no {RECORD} in it)")
    return found


def states(run: Path) -> list[JobState]:
    """Return the state of every job of a run."""
    found = []
    for record in launches(run):
        content = json.loads(record.read_text(encoding="utf-8"))
        found += [_state(job, content["line"], record.parent) for job in content["jobs"]]
    return found


def _state(job: str, line: str, folder: Path) -> JobState:
    shown = _ask("scontrol", "show", "job", "-o", job)
    if "JobState=" in shown:
        known = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        return JobState(
            job=job,
            state=known["JobState"],
            reason=known.get("Reason", "").replace("None", "") if known["JobState"] == "PENDING" else "",
            nodes=known.get("NodeList", "").replace("(null)", ""),
            restarts=known.get("Restarts", ""),
            line=line,
            folder=folder,
        )
    # SLURM forgets a job some minutes after its end; the accounting, where there is one, does not.
    rows = _ask("sacct", "-j", job, "-X", "-n", "-P", "-o", "State,NodeList").splitlines()
    if rows and "|" in rows[0]:
        state, nodes = rows[0].split("|", 1)
        return JobState(job=job, state=state, nodes=nodes, line=line, folder=folder)
    return JobState(job=job, state="UNKNOWN", line=line, folder=folder)


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def last_step(run: Path) -> str:
    """Return the newest losses of the run in words; empty if there are none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        # Losses that are not finite are texts there, which float() reads.
        losses = [f"{name} {float(value):.4g}" for name, value in said.items() if name.startswith("loss/")]
        if losses:
            return "  ".join([f"step {said.get('step', '?')}", *losses])
    return ""


def log_of(run: Path, rank: int = 0) -> Path:
    """Return the newest log of a rank.

    Raises
    ------
    DinocellError
        If it has not written yet, or there is no such rank.
    """
    # Not those of the probes that the run itself has submitted.
    own = [record.parent for record in launches(run) if "probes" not in record.relative_to(run).parts]
    logs = [path for folder in own for path in folder.glob(f"*_{rank}_log.out")]
    if not logs:
        raise DinocellError(f"{run}: rank {rank} has written nothing yet")
    return max(logs, key=lambda path: path.stat().st_mtime)


def follow(run: Path, rank: int = 0) -> Iterator[str]:
    """Yield a rank's log as it grows, until no job of the run is waiting or running any more."""
    path = log_of(run, rank)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            text = file.read()
            if text:
                yield text
                continue
            if all(state.has_ended or state.state == "UNKNOWN" for state in states(run)):
                yield file.read()
                return
            time.sleep(_POLL_S)
