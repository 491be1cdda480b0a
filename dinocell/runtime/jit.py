"""Compile kernels with Numba once on a machine: kept in the user's cache folder, and said in one line when it happens.

Only modules that hold kernels import this one, and they are imported where a kernel is called: Numba takes a third of a
second to load, which ``import dinocell`` and most commands need not pay.
"""

import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import config, event

_log = logging.getLogger(__name__)

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def cache_folder() -> Path:
    """Return where compiled kernels are kept: ``NUMBA_CACHE_DIR`` if set, else ``dinocell/numba`` in the user's cache.

    The user's cache is ``XDG_CACHE_HOME`` if set, else ``~/.cache``.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dinocell" / "numba"


def compiled(function: _Kernel) -> _Kernel:
    """Compile a function when it is first called. It runs without the interpreter's lock, so threads can share work."""
    folder = cache_folder()
    before = vars(config)["CACHE_DIR"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keep = os.access(folder, os.W_OK)
    except OSError:
        keep = False
    # Where annotations are checked at run time, what arrives here is the checker: Numba needs the function itself.
    # Numba looks for its folder when the function is decorated. Other packages' functions keep theirs.
    vars(config)["CACHE_DIR"] = str(folder) if keep else before
    try:
        kernel = numba.njit(nogil=True, cache=keep)(inspect.unwrap(function))
    finally:
        vars(config)["CACHE_DIR"] = before
    _announcer.kernels.add(kernel)
    _announcer.folder = folder if keep else None
    return cast("_Kernel", kernel)


def inlined(function: _Kernel) -> _Kernel:
    """Compile a helper into each kernel that calls it, as if written there."""
    return cast("_Kernel", numba.njit(nogil=True, inline="always")(inspect.unwrap(function)))


class _Announcer(event.Listener):
    """Logs one line a process when a kernel of ours is compiled rather than loaded."""

    def __init__(self) -> None:
        self.kernels: set[Any] = set()
        self.folder: Path | None = None
        self.has_spoken = False

    def on_start(self, event: Any) -> None:
        if self.has_spoken or event.data.get("dispatcher") not in self.kernels:
            return
        self.has_spoken = True
        if self.folder is None:
            _log.warning(
                "compiling kernels, a few seconds in every process: %s is not writable, set NUMBA_CACHE_DIR to a "
                "folder that is",
                cache_folder(),
            )
        else:
            _log.info("compiling kernels, a few seconds, once on this machine (kept in %s)", self.folder)

    def on_end(self, event: Any) -> None:
        pass


_announcer = _Announcer()
event.register("numba:compile", _announcer)  # type: ignore[no-untyped-call]
