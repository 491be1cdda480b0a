"""Parsers of commands and of their numbers."""

import argparse
import difflib
import re
from collections.abc import Callable
from typing import Any, NoReturn

# A setting, not a recipe: a path may contain "=" too, but only after a slash.
_SETTING = re.compile(r"[\w.]+=")


def add_command(subparsers: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Add a command or a subcommand with a summary and an example."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def whole_number(lowest: int) -> Callable[[str], int]:
    """Return the argparse type of an integer of at least ``lowest``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {lowest}, got {text!r}")
        return int(text)

    return read


class CommandParser(argparse.ArgumentParser):
    """An argument parser with errors of one line, and suggestions for misspelt words.

    In commands with a recipe, ``key=value`` settings may be anywhere: before the recipe, before and after options.
    """

    _is_mixing = False

    # Not annotated like its parent, which typeshed overloads on the kind of namespace.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        takes_settings = any(action.dest == "overrides" for action in self._get_positional_actions())
        if self._is_mixing or not takes_settings:
            return super().parse_known_args(args, namespace)
        self._is_mixing = True  # Python 3.11's intermixed parsing calls this method again, twice
        try:
            parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_mixing = False
        words = [word for word in (parsed.recipe, *parsed.overrides) if word is not None]
        recipes = [word for word in words if not _SETTING.match(word)]
        if len(recipes) > 1:
            self.error(f"expected one recipe, and settings as key=value; got {', '.join(map(repr, recipes))}")
        if recipes:
            parsed.recipe = recipes[0]
        elif self.get_default("recipe_is_optional"):
            parsed.recipe = None
        else:
            self.error("expected a recipe: the name of a shipped one, or a YAML file")
        parsed.overrides = [word for word in words if _SETTING.match(word)]
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message:
            got, choices = message.split("invalid choice: ", 1)[1].split(" (choose from ", 1)
            near = difflib.get_close_matches(got.strip("'"), [k.strip(" ')") for k in choices.split(",")], n=1)
            message = f"unknown command or choice {got}" + (f"; did you mean '{near[0]}'?" if near else f" ({choices}")
        # Intermixed parsing reports the list of settings as missing, although it may be empty.
        message = message.replace("required: recipe, key=value", "required: recipe")
        self.exit(2, f"{self.prog}: {message} (see '{self.prog} --help')\n")
