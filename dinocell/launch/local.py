"""A command in several processes on this machine: the same as on a cluster, without one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from pathlib import Path

from dinocell.runtime.distributed import RENDEZVOUS
from dinocell.runtime.preemption import ignores_interrupt

_POLL_S = 0.2
# For the others to leave by themselves when one has died.
_GRACE_S = 10.0


def run_here(arguments: Sequence[str], processes: int, folder: Path, *, env: Mapping[str, str] | None = None) -> int:
    """Run ``dinocell`` with these arguments in ``processes`` processes and return the worst exit code.

    The main one writes here, and all into ``folder/rank_N.log``. If one dies, the others are ended. Ctrl-C and SIGTERM
    reach all of them, so that they save together. If SIGINT is ignored here, as in the background of a script, they
    inherit that; SIGTERM always reaches them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "rendezvous" / f"local-{os.getpid()}"
    # Of a start that was killed: in a container, process numbers come again.
    place.unlink(missing_ok=True)
    shared = {**os.environ, **(env or {}), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", RENDEZVOUS: str(place)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logs: list[BufferedWriter] = []
    running: list[subprocess.Popen[bytes]] = []
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if not ignores_interrupt(number)]
    previous = {number: signal.getsignal(number) for number in handled}

    def pass_on(number: int, _frame: object) -> None:
        for each in running:
            if each.poll() is None:
                each.send_signal(number)

    try:
        for number in previous:
            signal.signal(number, pass_on)
        for rank in range(processes):
            log = (folder / f"rank_{rank}.log").open("ab")
            logs.append(log)
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dinocell", *arguments],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=None if rank == 0 else log,
                    stderr=None if rank == 0 else subprocess.STDOUT,
                    start_new_session=True,  # the terminal's Ctrl-C comes through us, once
                )
            )
        return _wait(running)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for log in logs:
            log.close()
        place.unlink(missing_ok=True)


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one ends badly give the others a little time, then end them."""
    deadline: float | None = None
    while any(each.poll() is None for each in running):
        codes = [each.returncode for each in running if each.returncode is not None]
        if any(codes) and deadline is None:
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            for each in running:
                if each.poll() is None:
                    each.kill()
        time.sleep(_POLL_S)
    codes = [each.returncode for each in running]
    # What a signal ended counts as in a shell: 128 and its number.
    return max(128 - code if code < 0 else code for code in codes)
