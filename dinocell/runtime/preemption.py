"""Graceful shutdown: stop requests by the user, or by the cluster before a time limit or for preemption.

A signal handler only sets a flag. Every rank calls `StopRequest.agreed` once per step, which compares the flags, so
that all ranks stop after the same step and save together. The launcher registers with `on_stop` what follows the save,
such as requeuing the job.

========  ==================================================================
SIGINT    Ctrl-C: stop after this step; a second one stops immediately
SIGTERM   the cluster or the user stops the job: the same
SIGUSR1   and SIGUSR2, the cluster's warning before a time limit: the same
========  ==================================================================

A shell starts the background jobs of a script with SIGINT ignored, so that Ctrl-C stops only the job in the foreground.
Such a run keeps ignoring SIGINT; ``kill PID`` (SIGTERM) stops it and saves. The other three signals are always handled,
even if they were inherited as ignored, because a scheduler or a user sends them to this run on purpose. Time limits are
read from the clock and need no signal.
"""

import math
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
# Exchanged between ranks by index; if ranks differ, the largest index wins.
_REASONS = ("", CTRL_C, TIME_LIMIT, "SIGUSR1", "SIGUSR2", "SIGTERM")


def ignores_interrupt(number: int) -> bool:
    """Return whether the signal is SIGINT and this process ignores it, as a background job of a script does."""
    return number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


class RunStopped(KeyboardInterrupt):
    """A run has stopped on request and saved; the message explains how to resume it."""


_on_stop: Callable[[str], None] | None = None


def on_stop(callback: Callable[[str], None] | None) -> None:
    """Set the function that is called with the reason, on the main rank, after a stopped run has saved; None: none."""
    global _on_stop
    _on_stop = callback


class StopRequest:
    """Whether this run has been requested to stop; use it in a ``with`` block around the loop.

    Under SLURM the end of the job (``SLURM_JOB_END_TIME``) minus ``margin_s`` is a time limit.
    """

    def __init__(self, *, margin_s: float = 120.0) -> None:
        self._reason: str | None = None
        self._previous: dict[int, Any] = {}
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        deadline = int(end) - margin_s if end.isdecimal() else 0.0
        # A job shorter than the margin is not stopped before it begins.
        self._deadline = deadline if deadline > time.time() else math.inf

    @property
    def reason(self) -> str | None:
        """Why this rank, or after `agreed` any rank, stops: one of `_REASONS`; None if it does not."""
        return self._reason

    def _request(self, reason: str) -> None:
        """Request all ranks to stop after this step."""
        self._reason = reason if self._reason is None else max(reason, self._reason, key=_REASONS.index)

    def agreed(self) -> bool:
        """Return whether any rank has a stop request; every rank calls it after every step."""
        if time.time() >= self._deadline:
            self._request(TIME_LIMIT)
        # On the CPU, through gloo, without waiting for the device.
        reason = int(max_over_ranks(torch.tensor(float(_REASONS.index(self._reason or "")))))
        self._reason = _REASONS[reason] or None
        return reason > 0

    def finish(self) -> None:
        """Call the function of `on_stop` on the main rank, while the other ranks wait."""
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
