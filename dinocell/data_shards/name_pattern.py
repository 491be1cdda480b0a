"""Patterns of file names with named fields, such as ``{plate}/{well}_s{site}_w{channel}.tif``."""

import re
import unicodedata
from dataclasses import dataclass

from dinocell.errors import ImageError


@dataclass(frozen=True)
class NamePattern:
    """A pattern, ready to be matched against relative paths.

    ``{name}`` stands for a part of one folder or file name, at least one character and as few as fit, and for the same
    text wherever it occurs again. ``*`` stands for any such part that does not matter, also an empty one. ``**/`` at
    the start stands for any folders, also none; they are kept apart (under the name ``""``). Everything else is
    itself, upper and lower case apart.

    Attributes
    ----------
    names
        Of the fields, in the order of the pattern.
    """

    text: str
    names: tuple[str, ...]
    regex: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> "NamePattern":
        """Compile a pattern.

        Raises
        ------
        ImageError
            If a brace has no partner, a name is no name, or no field is in it.
        """
        rest = unicodedata.normalize("NFC", text).removeprefix("./")  # as names are listed
        parts = []
        if rest.startswith("**/"):
            parts.append("(?P<folders>(?:[^/]+/)*)")
            rest = rest.removeprefix("**/")
        if "**" in rest:
            raise ImageError(f"pattern {text!r}: '**/' may only stand at the start")
        if rest.startswith("/") or "://" in rest:
            raise ImageError(
                f"pattern {text!r}: expected a path relative to the input, such as {{well}}_{{channel}}.tif"
            )
        names: list[str] = []
        for part in re.split(r"(\{[^{}]*\}|\*)", rest):
            if part == "*":
                parts.append("[^/]*")
            elif part.startswith("{") and part.endswith("}"):
                name = part[1:-1]
                if not re.fullmatch(r"[^\W\d]\w*", name):
                    raise ImageError(f"pattern {text!r}: {part} is no field; expected a name such as {{well}}")
                parts.append(f"(?P=f{names.index(name)})" if name in names else f"(?P<f{len(names)}>[^/]+?)")
                if name not in names:
                    names.append(name)
            elif "{" in part or "}" in part:
                raise ImageError(f"pattern {text!r}: a brace without its partner; expected fields such as {{well}}")
            else:
                parts.append(re.escape(part))
        if not names:
            raise ImageError(f"pattern {text!r}: no field in it; expected some such as {{well}} and {{channel}}")
        return cls(text=text, names=tuple(names), regex=re.compile("".join(parts), re.DOTALL))

    def match(self, name: str) -> dict[str, str] | None:
        """Return the fields of a relative path, folders first; None where it does not fit."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        folders = match.groupdict().get("folders")
        values = {"": folders.rstrip("/")} if folders else {}
        return values | {name: match[f"f{number}"] for number, name in enumerate(self.names)}
