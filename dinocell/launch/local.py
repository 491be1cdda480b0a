"""Run a command in several processes on this machine, as on a cluster."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinocell.runtime.distributed import RENDEZVOUS
from dinocell.runtime.preemption import ignores_interrupt

_POLL_S = 0.2
# Time for the other processes to exit after one has failed.
_GRACE_S = 10.0


def run_here(arguments: Sequence[str], processes: int, folder: Path, *, env: Mapping[str, str] | None = None) -> int:
    """Run ``dinocell`` with these arguments in ``processes`` processes and return the worst exit code.

    Rank 0 writes to this terminal, the others to ``folder/rank_N.log``. If one fails, the others are ended. Ctrl-C and
    SIGTERM are forwarded to all of them, so that they save together. If SIGINT is ignored here, as in the background of
    a script, they inherit that; SIGTERM is always forwarded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = folder / "rendezvous" / f"local-{os.getpid()}"
    # Left by a start that was killed: in a container, process IDs repeat.
    rendezvous.unlink(missing_ok=True)
    shared = {**os.environ, **(env or {}), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", RENDEZVOUS: str(rendezvous)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    running: list[subprocess.Popen[bytes]] = []

    def forward(signal_number: int, _frame: object) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal_number)

    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if not ignores_interrupt(number)]
    previous = {number: signal.signal(number, forward) for number in handled}
    try:
        for rank in range(processes):
            with (folder / f"rank_{rank}.log").open("ab") as log:  # the process has its own copy
                process = subprocess.Popen(
                    [sys.executable, "-m", "dinocell", *arguments],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=None if rank == 0 else log,
                    stderr=None if rank == 0 else subprocess.STDOUT,
                    start_new_session=True,  # the terminal's Ctrl-C is forwarded by this process, once
                )
            running.append(process)
        return _wait(running)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        rendezvous.unlink(missing_ok=True)


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes; if one fails, give the others some seconds, then kill them."""
    deadline: float | None = None
    while any(process.poll() is None for process in running):
        codes = [process.returncode for process in running if process.returncode is not None]
        if any(codes) and deadline is None:
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            for process in running:
                if process.poll() is None:
                    process.kill()
        time.sleep(_POLL_S)
    # As in a shell, the exit code of a process ended by a signal is 128 plus the signal number.
    return max(128 - process.returncode if process.returncode < 0 else process.returncode for process in running)
