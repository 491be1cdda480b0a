"""Checkpoints: everything that a run needs to resume as if it had never stopped, on any number of ranks.

::

    checkpoints/step_00001200/     one folder per checkpoint, by torch.distributed.checkpoint
        state.json                 step, ranks, plain values; written last
        *.distcp, .metadata        tensors, from each rank its shards
    checkpoints/.step_.../         one that is being written; renamed when all ranks have finished

Tensors are copied to main memory and written while the training continues. No step draws from a global random
generator, so random states are not saved. Unlike exported weights, checkpoints are trusted like code: use only those
that you wrote.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save as save_state_later
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from dinocell.errors import DinocellError
from dinocell.runtime.distributed import barrier, from_main, is_alone, rank, world_size
from dinocell.runtime.files import write_atomically

_log = logging.getLogger(__name__)
_PREFIX = "step_"


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Step and plain values of a checkpoint that was read."""

    step: int
    values: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of a run; all ranks call every method together.

    ``folder`` is ``checkpoints`` of the run folder, on a file system that all ranks share. The newest ``keep_last``
    checkpoints are kept, and those of steps that are multiples of ``keep_every`` (0: none). With ``is_async`` they are
    written in the background, and each save first waits for the previous one. ``timeout_s`` is how long ranks wait for
    one another while they write.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 2, keep_every: int = 0, is_async: bool = True, timeout_s: float = 1800.0
    ) -> None:
        self._folder = folder
        self._keep_last, self._keep_every = keep_last, keep_every
        self._is_async = is_async
        self._pending: tuple[Future[Any], Path] | None = None
        self._writer: ThreadPoolExecutor | None = None
        # Once for the process: filters around the calls of two threads would undo one another.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # with one process
        # Ranks communicate in the background while the training does too: this needs a separate group, on the host.
        self._group = None if is_alone() else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def save(self, step: int, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Save a checkpoint after ``step`` steps.

        ``tensors`` are nested dictionaries of tensors, also sharded ones (DTensor); ``values`` are plain data for JSON,
        the same on all ranks.
        """
        self.wait()
        part, final = self._folder / f".{_PREFIX}{step:08d}", self._folder / f"{_PREFIX}{step:08d}"
        if rank() == 0:
            # This one, and those of starts that were killed while writing.
            for unfinished in self._folder.glob(f".{_PREFIX}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            with _writing(final):
                part.mkdir(parents=True)
        barrier()
        state = {"tensors": dict(tensors)}
        description = json.dumps({"step": step, "ranks": world_size(), "values": dict(values)}, indent=1)
        if self._is_async:
            self._pending = (self._write_later(_copied(state), part, final, description), final)
        else:
            with _writing(final):
                _write(state, part, self._group)
                self._finish(part, final, description)
            barrier()

    def _write_later(self, state: dict[str, Any], part: Path, final: Path, description: str) -> "Future[Any]":
        """Write and rename in the background, without waiting for the next save."""
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if is_alone():
            written = self._writer.submit(_write, state, part, None)
        else:
            later = save_state_later(state, checkpoint_id=part, process_group=self._group)
            written = cast("Future[Any]", later)

        def finish() -> None:
            written.result()
            self._finish(part, final, description)

        return self._writer.submit(finish) if rank() == 0 else written

    def wait(self) -> None:
        """Wait until the checkpoint is complete; raise :class:`DinocellError` if it cannot be written."""
        if self._pending is None:
            return
        (future, final), self._pending = self._pending, None
        with _writing(final):
            future.result()
        barrier()

    def restore(self, tensors: dict[str, Any]) -> Restored | None:
        """Read the newest complete checkpoint into ``tensors``, in place; return None if there is none.

        Damaged checkpoints are skipped with a warning; it is a :class:`DinocellError` if there is no other.
        """
        self.wait()
        paths = self.steps()
        for path in reversed(paths):
            try:
                description = json.loads((path / "state.json").read_text(encoding="utf-8"))
                restored = Restored(step=description["step"], values=description["values"])
                load_state({"tensors": tensors}, checkpoint_id=path, process_group=self._group, no_dist=is_alone())
                return restored
            except (CheckpointException, OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError) as error:
                _log.warning("%s: damaged (%s); using the previous one", path, _cause(error))
        if paths:
            raise DinocellError(f"{self._folder}: every checkpoint is damaged; move the folder away to start over")
        return None

    def steps(self) -> list[Path]:
        """Return the folders of complete checkpoints, oldest first, as the main rank sees them."""
        return cast("list[Path]", from_main(self._complete() if rank() == 0 else []))

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self.wait()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def _finish(self, part: Path, final: Path, description: str) -> None:
        """Complete a checkpoint that all ranks have written, and delete old ones."""
        if rank() != 0:
            return
        write_atomically(part / "state.json", description)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for path in self._complete()[: -self._keep_last]:
            step = int(path.name.removeprefix(_PREFIX))
            if not self._keep_every or step % self._keep_every:
                shutil.rmtree(path, ignore_errors=True)

    def _complete(self) -> list[Path]:
        """Return the folders of complete checkpoints, oldest first, without copies under other names."""
        paths = (path.parent for path in self._folder.glob(f"{_PREFIX}*/state.json"))
        return sorted(path for path in paths if path.name.removeprefix(_PREFIX).isdecimal())


def _write(state: dict[str, Any], part: Path, group: dist.ProcessGroup | None) -> None:
    save_state(state, checkpoint_id=part, process_group=group, no_dist=is_alone())


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise DinocellError(f"{final}: cannot be written ({_cause(error)})") from error


def _cause(error: BaseException) -> str:
    """Return the system's message, such as that the disk is full, or else the last line of torch's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        failed = list(cause.failures.values()) if isinstance(cause, CheckpointException) else []
        cause = failed[0][0] if failed else cause.__cause__ or cause.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]


def _copied(state: Any) -> Any:
    """Return a copy of nested tensors, because the training changes its own while they are written."""
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [_copied(value) for value in state]
    if not isinstance(state, Tensor):
        return state
    if state.device.type == "cpu":
        return state.detach().clone()
    # With one process, copy from the device here; with several, torch does, also for sharded tensors.
    return state.detach().cpu() if is_alone() else state.detach()
