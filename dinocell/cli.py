"""The command line: ``dinocell COMMAND``, ``python -m dinocell COMMAND`` or ``python -m dinocell.cli COMMAND``.

Parsers are built from the standard library alone; each command imports its stage when it runs. Exit codes: 0 done,
1 a bug (with traceback) or some images failed (listed), 2 invalid input (one line), 130 interrupted.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from dinocell._version import __version__
from dinocell.commands import (
    consistency,
    dataset,
    demo,
    evaluate,
    features,
    finetune,
    launch,
    pretrain,
    probes,
    profiles,
    segment,
    shards,
    weights,
)
from dinocell.commands._parser import CommandParser
from dinocell.errors import DinocellError

# Errors of the operating system that are not bugs: a name that is too long, no permission, a full or broken disk.
_OS_ERRORS = {
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except DinocellError as error:
        print(f"dinocell: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dinocell info FILE | head` has closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _OS_ERRORS:
            raise
        print(f"dinocell: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:  # an interrupted run reports how to resume it
        print(f"dinocell: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog="dinocell",
        description="From unlabelled multi-channel microscopy to a cell segmentation model.",
        epilog="'dinocell COMMAND --help' describes a command, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dinocell {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, shards, dataset, pretrain, finetune, segment, evaluate):
        command.register(commands)
    for command in (features, probes, consistency, profiles):
        command.register(commands)
    launch.register(commands, main=main, check=_check)
    weights.register(commands)
    return parser


def _check(arguments: Sequence[str], with_recipe: bool) -> None:
    """Validate the arguments of a command without running it, ``with_recipe`` also its recipe and settings.

    Raises SystemExit if the arguments are not valid, ConfigError if the recipe or a setting is not.
    """
    options = build_parser().parse_args(arguments)
    configure = vars(options).get("configure")
    if configure is not None and with_recipe:
        configure(options)


if __name__ == "__main__":
    sys.exit(main())
