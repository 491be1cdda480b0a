"""The hook by which a job learns of exported teachers; light, because the command line always imports it."""

from collections.abc import Callable, Sequence
from pathlib import Path

Main = Callable[[Sequence[str]], int]
"""Run the arguments of a command line and return the exit code."""

Check = Callable[[Sequence[str], bool], None]
"""Validate a command line without running it: its arguments and, if the flag is true, its recipe and settings."""

_export_hook: Callable[[Path], None] | None = None


def set_export_hook(hook: Callable[[Path], None] | None) -> None:
    """Call ``hook`` with each teacher that this process exports; None removes the hook."""
    global _export_hook
    _export_hook = hook


def exported(checkpoint: Path) -> None:
    """Call the hook, if there is one; pretraining gets this function as its export callback."""
    if _export_hook is not None:
        _export_hook(checkpoint)
