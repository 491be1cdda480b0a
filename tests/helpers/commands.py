"""Commands as a user types them."""

from dinocell.cli import main


def segment(*words: object) -> int:
    """Run ``dinocell segment`` with these words and return the exit code, whichever way it ends."""
    try:
        return main(["segment", *map(str, words)])
    except SystemExit as exit_:
        return 1 if isinstance(exit_.code, str) else int(exit_.code or 0)
