"""Compile kernels with Numba, once per machine.

Only modules with kernels import this one, and they are imported when a kernel is called: importing Numba takes a third
of a second, which ``import dinocell`` and most commands need not pay.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core import event

_log = logging.getLogger(__name__)

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def compiled(function: _Kernel) -> _Kernel:
    """Compile a function when it is first called. It releases the interpreter's lock, so threads can share the work.

    Numba stores compiled code in the first of these folders that can be written: ``NUMBA_CACHE_DIR``, ``__pycache__``
    next to the module, the user's cache folder.
    """
    plain = inspect.unwrap(function)  # without the wrapper that checks annotations in the tests
    try:
        kernel = numba.njit(nogil=True, cache=True)(plain)
        _announcer.kernels[kernel] = True
    except (RuntimeError, OSError):  # no such folder
        kernel = numba.njit(nogil=True)(plain)
        _announcer.kernels[kernel] = False
    return cast("_Kernel", kernel)


def inlined(function: _Kernel) -> _Kernel:
    """Compile a helper into each kernel that calls it, as if written there."""
    return cast("_Kernel", numba.njit(nogil=True, inline="always")(inspect.unwrap(function)))


class _Announcer(event.Listener):
    """Logs one line per process when a kernel is compiled instead of loaded."""

    def __init__(self) -> None:
        self.kernels: dict[Any, bool] = {}  # kernel -> whether its compiled code is stored
        self.has_logged = False

    def on_start(self, event: Any) -> None:
        kernel = event.data.get("dispatcher")
        if self.has_logged or kernel not in self.kernels:
            return
        self.has_logged = True
        if self.kernels[kernel]:
            _log.info("compiling kernels, a few seconds, once per machine")
        else:
            _log.warning("compiling kernels, a few seconds in every process; set NUMBA_CACHE_DIR to a writable folder")

    def on_end(self, event: Any) -> None:
        pass


_announcer = _Announcer()
event.register("numba:compile", _announcer)  # type: ignore[no-untyped-call]
