"""What a command is told by the job that it runs in; light, for the command line imports it always."""

from collections.abc import Callable, Sequence
from pathlib import Path

Main = Callable[[Sequence[str]], int]
"""Takes the arguments of a command line and returns the exit code."""

Check = Callable[[Sequence[str], bool], None]
"""Refuses a command line that cannot be run, without running it: its words and, if so told, its recipe and settings."""

_export_hook: Callable[[Path], None] | None = None


def set_export_hook(hook: Callable[[Path], None] | None) -> None:
    """Let ``hook`` be called with each exported teacher of this process; None takes it away."""
    global _export_hook
    _export_hook = hook


def exported(checkpoint: Path) -> None:
    """Call the hook, if there is one: what the command hands to the pretraining."""
    if _export_hook is not None:
        _export_hook(checkpoint)
