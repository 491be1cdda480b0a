"""Progress on the console: a live bar in a terminal, plain lines in a log file.

`start_progress` is for loops over steps that log metrics, `task_progress` for commands that work through a list.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

# Prefixes of the metrics that the console shows; the others are in TensorBoard only.
_SHOWN = ("loss/", "probe/", "score/")


def start_progress(
    console: Console, *, total_steps: int | None = None, done_steps: int = 0, batch_size: int | None = None
) -> "LiveProgress | PlainProgress":
    """Return a live bar if ``console`` is a terminal, else plain lines without control characters.

    ``total_steps`` is the index of the last step (None if unknown), ``done_steps`` those of an earlier start; with
    ``batch_size``, the number of images per step, the rate is in images/s instead of steps/s.
    """
    rate = Rate(total_steps=total_steps, images_per_step=batch_size)
    if _is_live(console):
        return LiveProgress(console, rate, total_steps=total_steps, done_steps=done_steps)
    return PlainProgress(console, rate, total_steps=total_steps)


def _is_live(console: Console) -> bool:
    # isatty too, because FORCE_COLOR makes rich treat a pipe as a terminal.
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


@contextmanager
def task_progress(*, stderr: bool = False, transient: bool = False) -> Iterator[Callable[..., None]]:
    """Yield a function of (task, done, total, note="") that draws one bar per task in a terminal.

    Elsewhere it prints one line when a task is complete. ``total`` is None as long as it is unknown; ``note`` follows
    the bar; ``transient`` removes the bars at the end.
    """
    console = Console(stderr=stderr)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=transient)
    tasks: dict[str, TaskID] = {}
    is_live = _is_live(console)

    def report(task: str, done: int, total: int | None, note: str = "") -> None:
        if is_live:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total, note=note)
            bars.update(tasks[task], completed=done, total=total, note=note)
        elif done == total:
            _print(console, f"{task} {done} of {total}  {note}".rstrip())

    with bars if is_live else nullcontext():
        yield report


class Rate:
    """Steps per second since the first step of this process, which is a warm-up and not counted."""

    def __init__(self, *, total_steps: int | None, images_per_step: int | None) -> None:
        self._total_steps, self._images_per_step = total_steps, images_per_step
        self._first: tuple[int, float] | None = None
        self._steps_per_s = 0.0
        self._step = 0

    def update(self, step: int) -> None:
        """Record that ``step`` is done now."""
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
        rate, unit = self._steps_per_s * (self._images_per_step or 1), "img" if self._images_per_step else "steps"
        return f"{rate:.3g} {unit}/s" if rate < 1000 else f"{rate:.0f} {unit}/s"

    def eta_text(self) -> str:
        """Return ``ETA h:mm:ss``; empty if the end or the rate is unknown."""
        if self._total_steps is None or self._steps_per_s == 0.0:
            return ""
        return f"ETA {timedelta(seconds=round(max(0, self._total_steps - self._step) / self._steps_per_s))}"


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


class LiveProgress:
    """A bar with step, rate, remaining time and losses."""

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
        _print(self._bar.console, message)

    def close(self) -> None:
        """Draw the final bar."""
        self._bar.stop()


class PlainProgress:
    """One line per log step, for SLURM logs, CI and pipes."""

    def __init__(self, console: Console, rate: Rate, *, total_steps: int | None) -> None:
        self._console = console
        self._rate = rate
        self._total = "" if total_steps is None else f"/{total_steps}"

    def advance(self, step: int) -> None:
        """Count the step without printing."""
        self._rate.update(step)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a log step."""
        self._rate.update(step)
        parts = [f"step {step}{self._total}", _losses(metrics), self._rate.speed_text(), self._rate.eta_text()]
        self.note("  ".join(part for part in parts if part))

    def note(self, message: str) -> None:
        """Print a line."""
        _print(self._console, message)
        self._console.file.flush()

    def close(self) -> None:
        """Do nothing: there is no bar."""


def _losses(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:#.4g}" for name, value in metrics.items() if name.startswith(_SHOWN))
