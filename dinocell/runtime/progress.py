"""Progress of a long loop on the console: a live bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

# Numbers that the console shows, by how their names begin; the others are in TensorBoard.
_SHOWN = ("loss/", "probe/", "score/")


def start_progress(
    console: Console, *, total_steps: int | None = None, done_steps: int = 0, batch_size: int | None = None
) -> LiveProgress | PlainProgress:
    """Return a live bar if ``console`` is a terminal, plain lines (no control characters) if it is not.

    Parameters
    ----------
    console
        Where to write.
    total_steps
        Number of the last step; None if it is not known.
    done_steps
        Steps that an earlier start has done.
    batch_size
        Images a step; the rate is shown in images/s instead of steps/s.
    """
    rate = Rate(total_steps=total_steps, images_per_step=batch_size)
    # isatty as well: FORCE_COLOR makes rich take a pipe for a terminal.
    if console.is_terminal and not console.is_dumb_terminal and console.file.isatty():
        return LiveProgress(console, rate, total_steps=total_steps, done_steps=done_steps)
    return PlainProgress(console, rate, total_steps=total_steps)


class Rate:
    """Steps a second since the first step of this process, which itself is not counted: it warms up."""

    def __init__(self, *, total_steps: int | None, images_per_step: int | None) -> None:
        self._total_steps = total_steps
        self._images_per_step = images_per_step
        self._first: tuple[int, float] | None = None
        self._steps_per_s = 0.0
        self._step = 0

    def update(self, step: int) -> None:
        """Note that ``step`` is done now."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        elif step > self._first[0] and now > self._first[1]:
            self._steps_per_s = (step - self._first[0]) / (now - self._first[1])
        self._step = step

    def speed_text(self) -> str:
        """Return ``3.2 img/s`` or ``0.4 steps/s``; empty before the second step."""
        if self._steps_per_s == 0.0:
            return ""
        if self._images_per_step is None:
            return f"{_rounded(self._steps_per_s)} steps/s"
        return f"{_rounded(self._steps_per_s * self._images_per_step)} img/s"

    def eta_text(self) -> str:
        """Return ``ETA h:mm:ss``; empty if the end or the rate is not known."""
        if self._total_steps is None or self._steps_per_s == 0.0:
            return ""
        return f"ETA {timedelta(seconds=round(max(0, self._total_steps - self._step) / self._steps_per_s))}"


class LiveProgress:
    """A bar with step, rate, time left and losses, redrawn in place."""

    def __init__(self, console: Console, rate: Rate, *, total_steps: int | None, done_steps: int) -> None:
        self._rate = rate
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[eta]}"),
            TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=done_steps, rate="", eta="", losses="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        self._rate.update(step)
        self._bar.update(self._task, completed=step, rate=self._rate.speed_text(), eta=self._rate.eta_text())

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar and show the losses."""
        self.advance(step)
        self._bar.update(self._task, losses=_losses(metrics))

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(message, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Draw the bar for the last time."""
        self._bar.stop()


class PlainProgress:
    """One line a log step: for SLURM logs, CI and pipes."""

    def __init__(self, console: Console, rate: Rate, *, total_steps: int | None) -> None:
        self._console = console
        self._rate = rate
        self._total = "" if total_steps is None else f"/{total_steps}"

    def advance(self, step: int) -> None:
        """Count the step, print nothing."""
        self._rate.update(step)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a log step."""
        self._rate.update(step)
        parts = [f"step {step}{self._total}", _losses(metrics), self._rate.speed_text(), self._rate.eta_text()]
        self.note("  ".join(part for part in parts if part))

    def note(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._console.file.flush()

    def close(self) -> None:
        """Nothing to restore."""


def _losses(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:#.4g}" for name, value in metrics.items() if name.startswith(_SHOWN))


def _rounded(rate: float) -> str:
    return f"{rate:.3g}" if rate < 1000 else f"{rate:.0f}"
