"""Being told to stop: by the user, by the cluster before a time limit, by a job that matters more.

A handler only sets a flag; every rank asks `StopRequest.agreed` once a step, which compares the flags, so that all
ranks stop after the same step, save together, and nothing is lost. What happens then, such as putting the job back into
the queue, is the launcher's: it hands a function to `on_stop`, which is called with the reason, on the main rank, after
the save.

========  ==================================================================
SIGINT    Ctrl-C: stop after this step; a second one ends at once
SIGTERM   the cluster ends the job, or the user does: the same
SIGUSR1   and SIGUSR2: the cluster's warning before a time limit: the same
========  ==================================================================

A shell starts the background jobs of a script with SIGINT ignored, so that Ctrl-C stops only the job in the foreground.
Such a run keeps ignoring SIGINT; ``kill PID`` (SIGTERM) stops it and saves. The other three signals are always handled,
even where they were inherited as ignored, because a scheduler or a user sends them to this run on purpose. Time limits
are read from the clock and need no signal.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch

from dinocell.runtime.distributed import barrier, max_over_ranks, rank

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
CTRL_C, TIME_LIMIT = "Ctrl-C", "time limit"
# What ranks tell one another, by number; where they differ the last one of these counts.
_REASONS = ("", CTRL_C, TIME_LIMIT, "SIGUSR1", "SIGUSR2", "SIGTERM")


def ignores_interrupt(number: int) -> bool:
    """Return whether the signal is SIGINT and this process ignores it, as a background job of a script does."""
    return number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


class RunStopped(KeyboardInterrupt):
    """A run was told to stop, has saved, and can be continued; the message says how."""


_on_stop: Callable[[str], None] | None = None


def on_stop(callback: Callable[[str], None] | None) -> None:
    """Let ``callback`` be called with the reason, on the main rank, after a run was told to stop and has saved.

    There is one; None takes it away.
    """
    global _on_stop
    _on_stop = callback


class StopRequest:
    """Whether this run has been told to stop; use it in a ``with`` block around the loop.

    Parameters
    ----------
    time_limit_s
        Stop so many seconds after the start of the block; None: no limit. Under SLURM the job's own end
        (``SLURM_JOB_END_TIME``) counts as well, less ``margin_s``.
    """

    def __init__(self, *, time_limit_s: float | None = None, margin_s: float = 120.0) -> None:
        self._reason: str | None = None
        self._previous: dict[int, Any] = {}
        self._deadline = None if time_limit_s is None else time.time() + time_limit_s
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if end.isdecimal() and int(end) > 0:
            job_end = int(end) - margin_s
            # A job shorter than the margin is not stopped before it began.
            if job_end > time.time():
                self._deadline = job_end if self._deadline is None else min(self._deadline, job_end)

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop, and once all agreed, why they all do; None if it does not.

        ``Ctrl-C``, ``time limit``, ``SIGUSR1``, ``SIGUSR2`` or ``SIGTERM``.
        """
        return self._reason

    def _request(self, reason: str) -> None:
        """Ask all ranks to stop after this step; what comes last counts."""
        self._reason = reason if self._reason is None else max(reason, self._reason, key=_REASONS.index)

    def agreed(self) -> bool:
        """Say whether any rank wants to stop; every rank calls it after every step and gets the same answer."""
        if self._deadline is not None and time.time() >= self._deadline:
            self._request(TIME_LIMIT)
        # In main memory, through gloo: the device is not waited for.
        reason = int(max_over_ranks(torch.tensor(float(_REASONS.index(self._reason or "")))))
        self._reason = _REASONS[reason] or None
        return reason > 0

    def finish(self) -> None:
        """Call what the launcher left for after the save, on the main rank; the others wait for it."""
        if rank() == 0 and _on_stop is not None:
            _on_stop(self._reason or "")
        barrier()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if not ignores_interrupt(number):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason == CTRL_C:
            raise KeyboardInterrupt
        self._request(CTRL_C if number == signal.SIGINT else signal.Signals(number).name)
