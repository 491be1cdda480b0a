"""How every command introduces itself, and reads its numbers."""

import argparse
from collections.abc import Callable
from typing import Any


def add_command(subparsers: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Add a command, or an action of one, with a summary and an example."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def whole_number(lowest: int) -> Callable[[str], int]:
    """Return what reads an option that counts something; argparse says in one line what is wrong with any other."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {lowest}, got {text!r}")
        return int(text)

    return read
