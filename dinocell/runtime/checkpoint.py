"""Training state: everything that a run needs to go on as if it had never stopped, on any number of ranks.

::

    checkpoints/step_00001200/     one folder a checkpoint, of torch.distributed.checkpoint
        state.json                 step, ranks, names of the random states, plain values; written last
        *.distcp, .metadata        tensors, each rank its part
    checkpoints/.step_.../         one that is being written; renamed as soon as all ranks are done

Tensors are copied to main memory at once and written while the training goes on. These folders are for the machine
that wrote them: unlike exported weights they are trusted like code, so none is ever taken from elsewhere.
"""

import json
import logging
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save as save_state_later
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from dinocell.errors import DinocellError
from dinocell.runtime.distributed import barrier, from_main, is_alone
from dinocell.runtime.files import write_atomically

_log = logging.getLogger(__name__)
_PREFIX = "step_"


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was read back: its step, and the plain values that were saved with it."""

    step: int
    values: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of a run.

    Every method is called by all ranks together.

    Parameters
    ----------
    folder
        ``checkpoints`` of the run folder; on a disk that all ranks see.
    keep_last
        Newest checkpoints that stay.
    keep_every
        Besides, those whose step this divides stay for good; 0: none.
    is_async
        Write in the background. Each save first waits for the one before.
    timeout_s
        How long ranks wait for one another while they write.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 2, keep_every: int = 0, is_async: bool = True, timeout_s: float = 1800.0
    ) -> None:
        if keep_last < 1 or keep_every < 0:
            raise ValueError(f"expected keep_last >= 1 and keep_every >= 0, got {keep_last} and {keep_every}")
        self._folder = folder
        self._keep_last, self._keep_every = keep_last, keep_every
        self._is_async = is_async
        self._pending: tuple[Future[Any], Path] | None = None
        self._writer: ThreadPoolExecutor | None = None
        # Once for the process, not around each call: a block of one thread undoes that of another.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # there is one process: we know
        # Background writing talks between ranks while the training does: it needs a group of its own, on the host.
        self._group = None if is_alone() else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def save(self, step: int, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Save a state.

        Parameters
        ----------
        step
            Steps done.
        tensors
            Nested dictionaries of tensors, sharded ones (DTensor) among them.
        values
            Plain data, the same on all ranks; it must go through JSON.
        """
        self.wait()
        part, final = self._folder / f".{_PREFIX}{step:08d}", self._folder / f"{_PREFIX}{step:08d}"
        if self._is_main:
            # This one's, and those of starts that were killed while they wrote.
            for left_behind in self._folder.glob(f".{_PREFIX}*"):
                shutil.rmtree(left_behind, ignore_errors=True)
            with _writing(final):
                part.mkdir(parents=True)
        barrier()
        random = random_states()
        state = {"tensors": dict(tensors), "random": {f"rank_{self._rank}": random}}
        about = {"step": step, "ranks": self._size, "random": list(random), "values": dict(values)}
        description = json.dumps(about, indent=1)
        if self._is_async:
            self._pending = (self._write_later(_copied(state), part, final, description), final)
        else:
            with _writing(final):
                _write(state, part, self._group)
                self._finish(part, final, description)
            barrier()

    def _write_later(self, state: dict[str, Any], part: Path, final: Path, description: str) -> "Future[Any]":
        """Write and finish in the background: a state that waited for the next one would be lost in between."""
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if is_alone():
            written = self._writer.submit(_write, state, part, None)
        else:
            later = save_state_later(state, checkpoint_id=part, process_group=self._group)
            assert isinstance(later, Future)
            written = later

        def finish() -> None:
            written.result()
            self._finish(part, final, description)

        return self._writer.submit(finish) if self._is_main else written

    def wait(self) -> None:
        """Wait until what is being written is whole.

        Raises
        ------
        DinocellError
            If it cannot be written: the disk is full or gone.
        """
        if self._pending is None:
            return
        future, final = self._pending
        self._pending = None
        with _writing(final):
            future.result()
        barrier()

    def restore(self, tensors: dict[str, Any]) -> Restored | None:
        """Read the newest whole checkpoint into ``tensors``, in place; None if there is none.

        A damaged one is reported and passed over. The random states come back too, if the number of ranks is the same:
        those that were saved and that there are here (a run may go on on another kind of device).

        Raises
        ------
        DinocellError
            If every checkpoint is damaged.
        """
        self.wait()
        found = [path for path in self.steps() if path is not None]
        for path in reversed(found):
            try:
                description = json.loads((path / "state.json").read_text(encoding="utf-8"))
                restored = Restored(step=description["step"], values=description["values"])
                self._read(path, tensors, description)
            except (CheckpointException, OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError) as error:
                _log.warning("%s: damaged (%s); taking the one before", path, _cause(error))
                continue
            return restored
        if found:
            raise DinocellError(f"{self._folder}: every checkpoint is damaged; move the folder away to start anew")
        return None

    def steps(self) -> list[Path]:
        """Return the folders of whole checkpoints, oldest first; the main rank's view, on every rank."""
        paths = from_main(self._whole() if self._is_main else [])
        assert isinstance(paths, list)
        return paths

    def close(self) -> None:
        """Wait for what is being written."""
        self.wait()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def _read(self, path: Path, tensors: dict[str, Any], description: Mapping[str, Any]) -> None:
        state: dict[str, Any] = {"tensors": tensors}
        same_ranks = description["ranks"] == self._size
        if same_ranks:
            here = random_states()
            saved = description.get("random", list(here))  # checkpoints did not always say it
            state["random"] = {f"rank_{self._rank}": {name: here[name] for name in here if name in saved}}
        load_state(state, checkpoint_id=path, process_group=self._group, no_dist=is_alone())
        if same_ranks:
            set_random_states(state["random"][f"rank_{self._rank}"])

    def _finish(self, part: Path, final: Path, description: str) -> None:
        """Make a state whole that all ranks have written, which the main rank is the last to know."""
        if self._is_main:
            write_atomically(part / "state.json", description)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            self._drop_old()

    def _whole(self) -> list[Path]:
        """Return the folders of whole checkpoints, oldest first; a copy under another name is not ours."""
        found = (path.parent for path in self._folder.glob(f"{_PREFIX}*/state.json"))
        return sorted(path for path in found if path.name.removeprefix(_PREFIX).isdecimal())

    def _drop_old(self) -> None:
        for path in self._whole()[: -self._keep_last]:
            step = int(path.name.removeprefix(_PREFIX))
            if not self._keep_every or step % self._keep_every:
                shutil.rmtree(path, ignore_errors=True)

    @property
    def _rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def _size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def _is_main(self) -> bool:
        return self._rank == 0


def _write(state: dict[str, Any], part: Path, group: dist.ProcessGroup | None) -> None:
    save_state(state, checkpoint_id=part, process_group=group, no_dist=is_alone())


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise DinocellError(f"{final}: cannot be written ({_cause(error)})") from error


def _cause(error: BaseException) -> str:
    """Return what the system said, such as that the disk is full, or the last line of what torch tells in many."""
    within: BaseException | None = error
    while within is not None:
        if isinstance(within, OSError) and within.strerror:
            return within.strerror
        failed = list(within.failures.values()) if isinstance(within, CheckpointException) else []
        within = failed[0][0] if failed else within.__cause__ or within.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def _copied(state: Any) -> Any:
    """Return nested states whose tensors in main memory are copies: the training goes on changing its own."""
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [_copied(value) for value in state]
    if not isinstance(state, Tensor):
        return state
    if state.device.type == "cpu":
        return state.detach().clone()
    # Alone, tensors of a device are fetched here; among ranks torch does that, sharded ones included.
    return state.detach().cpu() if is_alone() else state.detach()


# --- random_states -------------------------------------------------------------------------------------------------
#
# The random states of this process: torch's on the CPU and the device, NumPy's global one, Python's.


def random_states() -> dict[str, Tensor]:
    """Return all of them as tensors whose shapes are always the same."""
    _, words, position, has_gauss, cached = np.random.get_state()
    version, numbers, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*(int(word) for word in words), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "python": torch.tensor([version, *numbers, gauss is not None], dtype=torch.int64),
        "python_gauss": torch.tensor(gauss or 0.0, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    *words, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), position, has_gauss, float(states["numpy_gauss"])))
    version, *numbers, has_gauss = states["python"].tolist()
    state: Any = (version, tuple(numbers), float(states["python_gauss"]) if has_gauss else None)
    random.setstate(state)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
