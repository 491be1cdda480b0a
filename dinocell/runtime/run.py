"""The run folder: what was run, where, and every number that came out of it.

::

    config.yaml, environment.json    see dinocell.runtime.run_folder
    metrics.jsonl      one line a log step, see dinocell.runtime.run
    log.txt            notes with their time (UTC)
    tensorboard/       the same numbers, plus images, histograms and texts

Steps count from 1. A start that resumes at step ``n`` continues ``metrics.jsonl`` and TensorBoard
after step ``n``: what an earlier attempt logged beyond its last checkpoint is computed again, so it
is dropped; a start from step 0 drops it all. Only the main rank writes; on the others every method
does nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat, TextIO, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from rich.console import Console

from dinocell.errors import DinocellError
from dinocell.runtime.progress import LiveProgress, PlainProgress, start_progress
from dinocell.runtime.run_folder import check_same, claim

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


import json
import math

from dinocell.runtime.files import write_atomically

# --- metrics_file --------------------------------------------------------------------------------------------------
#
# ``metrics.jsonl``: one JSON object a line, ``{"step": 120, "time": <seconds since 1970>, "loss/dino": 8.91, ...}``.
#
# Numbers that JSON cannot hold are the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which
# Python's ``float()`` reads.

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


@runtime_checkable
class SupportsArray(Protocol):
    """A NumPy array or a tensor on any device."""

    def __array__(self) -> Any:
        """Return the values as a NumPy array."""


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    tensorboard: SummaryWriter
    metrics: MetricsFile
    log: TextIO
    progress: LiveProgress | PlainProgress
    closing: ExitStack


class Run:
    """An open run folder; make one with :meth:`start`, use it in a ``with`` block."""

    def __init__(
        self,
        folder: Path,
        outputs: _Outputs | None,
        *,
        total_steps: int | None,
        resume_step: int,
        log_every: int,
        batch_size: int | None,
    ) -> None:
        self.folder = folder
        self._outputs = outputs
        self._total_steps = total_steps
        self._first_step = resume_step + 1
        self._log_every = log_every
        self._batch_size = batch_size
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
    ) -> Run:
        """Open ``folder``, new or of an earlier start with the same configuration.

        Parameters
        ----------
        folder
            The run folder; made if it does not exist.
        config
            Configuration object (a dataclass), written to ``config.yaml``.
        total_steps
            Number of the last step; None if it is not known.
        resume_step
            Steps done by earlier starts, as the checkpoint says; 0 starts from the beginning.
        log_every
            Numbers are written every so many steps, and at the first and the last one.
        batch_size
            Images a step over all ranks; turns steps/s into images/s.
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
            If the folder cannot be written, or another process is at work in it.
        ValueError
            If ``log_every`` is below 1 or ``resume_step`` below 0.
        """
        if log_every < 1 or resume_step < 0:
            raise ValueError(f"expected log_every >= 1 and resume_step >= 0, got {log_every} and {resume_step}")
        outputs = None
        if is_main:
            with _writing(folder):
                log = claim(folder, config, ignore)
                progress = start_progress(
                    console or Console(), total_steps=total_steps, done_steps=resume_step, batch_size=batch_size
                )
                outputs = _open(folder, resume_step, log, progress)
        run = cls(
            folder,
            outputs,
            total_steps=total_steps,
            resume_step=resume_step,
            log_every=log_every,
            batch_size=batch_size,
        )
        if outputs is not None and outputs.metrics.num_unreadable:
            run.note(f"metrics.jsonl: dropped {outputs.metrics.num_unreadable} broken line(s) of an earlier start")
        return run

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self._outputs is not None

    @staticmethod
    def check(folder: Path, config: object, *, ignore: Collection[str] = ("compute",)) -> None:
        """Refuse a folder that holds a run with another configuration, before anything is built or read; as `start`.

        Raises
        ------
        ConfigError
            If it does.
        """
        check_same(folder, config, ignore)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def is_log_step(self, step: int) -> bool:
        """Say whether :meth:`log` writes the numbers of ``step``; the same answer on every rank."""
        return step % self._log_every == 0 or step in (self._first_step, self._total_steps)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat], *, always: bool = False) -> None:
        """Write the numbers of a step that is done; call it every step.

        On steps that are no log step only the progress moves, and no tensor is read. On log steps all
        tensors of one device come to the host together, with one synchronisation. Added by itself,
        from the second log step on: ``speed/steps_per_s`` and, with a batch size,
        ``speed/images_per_s``, measured since the log step before.

        Parameters
        ----------
        step
            Number of the step, counted from 1.
        metrics
            Name (``group/name``) to number or one-element tensor. Names starting with ``loss/``,
            ``probe/`` or ``score/`` show on the console.
        always
            Write them even if this is no log step: what is measured rarely, such as a validation error.

        Raises
        ------
        ValueError
            If a tensor has more than one element, or a metric is called ``step`` or ``time``.
        DinocellError
            If the folder cannot be written: the disk is full.
        """
        if self._outputs is None:
            return
        if not (always or self.is_log_step(step)):
            self._outputs.progress.advance(step)
            return
        reserved = {"step", "time"} & set(metrics)
        if reserved:
            raise ValueError(
                f"a metric cannot be called {' or '.join(sorted(reserved))}; use a group, as in 'loss/dino'"
            )
        numbers = _to_floats(metrics)  # before the clock is read: until here the device may still be at work
        numbers = {**self._speed(step), **numbers}
        with _writing(self.folder):
            self._outputs.metrics.write(step, numbers)
            for name, value in numbers.items():
                self._outputs.tensorboard.add_scalar(name, value, step)
        self._outputs.progress.report(step, numbers)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w *rgb"] | Float[np.ndarray, "h w *rgb"]) -> None:
        """Write an image to TensorBoard.

        Parameters
        ----------
        step, name
            Where it appears.
        image
            ``(h w)`` or ``(h w 3)``; 8 bit, or float in [0, 1].

        Raises
        ------
        ValueError
            If the shape or the range is another one.
        """
        if self._outputs is None:
            return
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"image '{name}': expected (h, w) or (h, w, 3), got {image.shape}")
        if image.dtype != np.uint8 and not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"image '{name}': expected values in [0, 1], got {image.min():.4g} to {image.max():.4g}")
        self._outputs.tensorboard.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")

    def histogram(self, step: int, name: str, values: SupportsArray) -> None:
        """Write the distribution of the finite ones of ``values`` (any shape) to TensorBoard, if there are any."""
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
        """Print a line on the console, and append it with its time to ``log.txt``."""
        if self._outputs is not None:
            with _writing(self.folder):
                self._outputs.log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}\n")
                self._outputs.log.flush()
            self._outputs.progress.note(message)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
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
    except BrokenPipeError:  # the console's reader has left: no matter of the folder
        raise
    except OSError as error:
        raise DinocellError(f"run folder {folder}: cannot be written: {error.strerror or error}") from error


def _to_floats(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """Return the numbers of ``metrics``, the tensors of each device brought over together."""
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
        stack.enter_context(log)  # closed last: it keeps other processes out
        stack.callback(progress.close)
        metrics = MetricsFile(folder / "metrics.jsonl", resume_step=resume_step)
        stack.callback(metrics.close)
        events = folder / "tensorboard"
        purge_step = None if not events.exists() else resume_step + 1 if resume_step else 0
        tensorboard = SummaryWriter(str(events), purge_step=purge_step, flush_secs=30)
        stack.callback(tensorboard.close)
        return _Outputs(tensorboard=tensorboard, metrics=metrics, log=log, progress=progress, closing=stack.pop_all())
