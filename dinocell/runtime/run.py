"""The run folder and everything that a run logs.

::

    config.yaml, environment.json    see dinocell.runtime.run_folder
    metrics.jsonl      {"step": 120, "time": <seconds since 1970>, "loss/dino": 8.91, ...}, one line per log step
    log.txt            notes with their time (UTC)
    tensorboard/       the same numbers, plus images, histograms and texts

Steps count from 1. A start that resumes at step ``n`` continues ``metrics.jsonl`` and TensorBoard after step ``n`` and
drops later records, because those steps are computed again. Only the main rank writes; on the other ranks every method
does nothing.
"""

import json
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat, TextIO

import numpy as np
from jaxtyping import Float, UInt8
from rich.console import Console

from dinocell.errors import DinocellError, one_line
from dinocell.runtime.files import write_atomically
from dinocell.runtime.progress import LiveProgress, PlainProgress, start_progress
from dinocell.runtime.run_folder import check_same, claim

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

# JSON has no such numbers; ``float()`` reads these texts.
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class MetricsFile:
    """``metrics.jsonl``, open for appending; every record is flushed.

    Opening keeps the records of steps 1 to ``resume_step``. ``num_unreadable`` counts broken lines: a process that is
    killed while writing leaves half a line.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.num_unreadable = _truncate(path, resume_step) if path.exists() else 0
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append the record of a step."""
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


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    tensorboard: "SummaryWriter"
    metrics: MetricsFile
    log: TextIO
    progress: LiveProgress | PlainProgress
    closing: ExitStack


class Run:
    """An open run folder; open one with :meth:`start` in a ``with`` block."""

    def __init__(
        self,
        folder: Path,
        outputs: _Outputs | None,
        total_steps: int | None,
        resume_step: int,
        log_every: int,
        batch_size: int | None,
    ) -> None:
        self.folder, self._outputs = folder, outputs
        self._first_step, self._total_steps = resume_step + 1, total_steps
        self._log_every, self._batch_size = log_every, batch_size
        self._last_logged: tuple[int, float] | None = None

    @classmethod
    def start(
        cls,
        folder: Path,
        config: object,
        *,
        total_steps: int | None = None,
        resume_step: int = 0,
        log_every: int = 10,
        batch_size: int | None = None,
        is_main: bool = True,
        ignore: Collection[str] = ("compute",),
        console: Console | None = None,
    ) -> "Run":
        """Open ``folder``, new or of an earlier start with the same configuration.

        Parameters
        ----------
        config
            Configuration object (a dataclass), written to ``config.yaml``.
        total_steps
            Index of the last step; None if unknown.
        resume_step
            Steps done by earlier starts, from the checkpoint; 0 starts from the beginning.
        log_every
            Steps between log steps; the first and the last step are log steps too.
        batch_size
            Images per step over all ranks; turns steps/s into images/s.
        is_main
            Whether this process writes; true on one rank only.
        ignore
            Dotted keys or sections of the configuration that may differ from the earlier start.
        console
            Where progress is shown; standard output by default.

        Raises
        ------
        ConfigError
            If the folder holds a run with another configuration.
        DinocellError
            If the folder cannot be written, or another process uses it.
        """
        outputs = None
        if is_main:
            with _writing(folder):
                log = claim(folder, config, ignore)
                progress = start_progress(
                    console or Console(), total_steps=total_steps, done_steps=resume_step, batch_size=batch_size
                )
                outputs = _open(folder, resume_step, log, progress)
        run = cls(folder, outputs, total_steps, resume_step, log_every, batch_size)
        if outputs is not None and outputs.metrics.num_unreadable:
            run.note(f"metrics.jsonl: dropped {outputs.metrics.num_unreadable} broken line(s) of an earlier start")
        return run

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self._outputs is not None

    @staticmethod
    def check(folder: Path, config: object, *, ignore: Collection[str] = ("compute",)) -> None:
        """Raise :class:`ConfigError` if a folder holds a run with another configuration, as `start` does."""
        check_same(folder, config, ignore)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def is_log_step(self, step: int) -> bool:
        """Return whether :meth:`log` writes the numbers of ``step``; the same on every rank."""
        return step % self._log_every == 0 or step in (self._first_step, self._total_steps)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat], *, always: bool = False) -> None:
        """Write the numbers of a finished step; call it every step, counted from 1.

        Between log steps only the progress moves, and no tensor is read. On log steps all tensors of a device are read
        with one synchronisation. From the second log step on, ``speed/steps_per_s`` and, with a batch size,
        ``speed/images_per_s`` are added, measured since the previous log step.

        Parameters
        ----------
        metrics
            Name (``group/name``) to number or one-element tensor. Names starting with ``loss/``, ``probe/`` or
            ``score/`` appear on the console.
        always
            Write them even if this is not a log step: rare measurements, such as a validation error.

        Raises
        ------
        ValueError
            If a tensor has more than one element, or a metric is called ``step`` or ``time``.
        DinocellError
            If the folder cannot be written.
        """
        if self._outputs is None:
            return
        if not (always or self.is_log_step(step)):
            self._outputs.progress.advance(step)
            return
        if reserved := {"step", "time"} & set(metrics):
            raise ValueError(f"a metric cannot be called {' or '.join(reserved)}; use a group, as in 'loss/dino'")
        numbers = _to_floats(metrics)  # this waits for the device, so it comes before the clock is read
        numbers = self._speed(step) | numbers
        with _writing(self.folder):
            self._outputs.metrics.write(step, numbers)
            for name, value in numbers.items():
                self._outputs.tensorboard.add_scalar(name, value, step)
        self._outputs.progress.report(step, numbers)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w *rgb"] | Float[np.ndarray, "h w *rgb"]) -> None:
        """Write an image to TensorBoard: ``(h w)`` or ``(h w 3)``; 8 bit, or float in [0, 1]."""
        if self._outputs is None:
            return
        if image.dtype != np.uint8 and not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"image '{name}': expected values in [0, 1], got {image.min():.4g} to {image.max():.4g}")
        self._outputs.tensorboard.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Write the distribution of the finite ``values`` (any array or tensor) to TensorBoard, if there are any."""
        if self._outputs is None:
            return
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(values, torch.Tensor):
            values = values.detach().float().cpu().numpy()
        numbers = np.asarray(values, dtype=np.float64)
        numbers = numbers[np.isfinite(numbers)]
        if numbers.size:
            self._outputs.tensorboard.add_histogram(name, numbers, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Write a text to TensorBoard."""
        if self._outputs is not None:
            self._outputs.tensorboard.add_text(name, markdown, step)

    def note(self, message: str) -> None:
        """Print a line on the console, and append it to ``log.txt`` with its time."""
        if self._outputs is not None:
            with _writing(self.folder):
                self._outputs.log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}\n")
                self._outputs.log.flush()
            self._outputs.progress.note(message)

    def close(self) -> None:
        """Flush and close all outputs; a second call does nothing."""
        if self._outputs is not None:
            with _writing(self.folder):
                self._outputs.closing.close()

    def _speed(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        before, self._last_logged = self._last_logged, (step, now)
        if before is None or step <= before[0] or now <= before[1]:
            return {}
        steps_per_s = (step - before[0]) / (now - before[1])
        speed = {"speed/steps_per_s": steps_per_s}
        return speed if self._batch_size is None else speed | {"speed/images_per_s": steps_per_s * self._batch_size}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # of the console, not the folder
            raise
        raise DinocellError(f"run folder {folder}: cannot be written: {one_line(error)}") from error


def _to_floats(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """Return the metrics as floats, reading the tensors of each device together."""
    torch = sys.modules.get("torch")
    by_device: dict[Any, dict[str, Any]] = {}
    for name, value in metrics.items():
        if torch is not None and isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(f"metric '{name}': expected a number, got a tensor of shape {tuple(value.shape)}")
            by_device.setdefault(value.device, {})[name] = value.detach().reshape(())
    fetched: dict[str, float] = {}
    for device, tensors in by_device.items():
        assert torch is not None
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no 64-bit floats
        values = torch.stack([tensor.to(dtype) for tensor in tensors.values()]).tolist()
        fetched |= dict(zip(tensors, values, strict=True))
    return {name: fetched[name] if name in fetched else float(value) for name, value in metrics.items()}


def _open(folder: Path, resume_step: int, log: TextIO, progress: LiveProgress | PlainProgress) -> _Outputs:
    from torch.utils.tensorboard.writer import SummaryWriter

    with ExitStack() as stack:
        stack.enter_context(log)  # closed last, because it locks the folder
        stack.callback(progress.close)
        metrics = MetricsFile(folder / "metrics.jsonl", resume_step=resume_step)
        stack.callback(metrics.close)
        events = folder / "tensorboard"
        purge_step = None if not events.exists() else resume_step + 1 if resume_step else 0
        tensorboard = SummaryWriter(str(events), purge_step=purge_step, flush_secs=30)
        stack.callback(tensorboard.close)
        return _Outputs(tensorboard=tensorboard, metrics=metrics, log=log, progress=progress, closing=stack.pop_all())
