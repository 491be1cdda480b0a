"""Patterns of file names with named fields, such as ``{plate}/{well}_s{site}_w{channel}.tif``."""

import re
import unicodedata
from dataclasses import dataclass

from dinocell.errors import ImageError


@dataclass(frozen=True)
class NamePattern:
    """A compiled pattern for relative paths.

    ``{name}`` matches a part of one folder or file name, at least one character and as few as possible; if it occurs
    again, it matches the same text. ``*`` matches any part of a name that does not matter, also an empty one. ``**/``
    at the start matches any folders, also none; they are returned under the name ``""``. All other characters are
    literal and case-sensitive.

    Attributes
    ----------
    names
        Field names, in the order of the pattern.
    num_literal
        Number of literal characters: if two patterns match a path, the one with more of them is the more specific.
    """

    text: str
    names: tuple[str, ...]
    num_literal: int
    regex: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> "NamePattern":
        """Compile a pattern.

        Raises
        ------
        ImageError
            If it is not a relative path, has no field, an invalid field name, an unpaired brace, or ``**`` elsewhere.
        """
        rest = unicodedata.normalize("NFC", text).removeprefix("./")  # the form of listed names
        regex, num_literal = "", 0
        names: list[str] = []
        if rest.startswith("**/"):
            regex, rest = "(?P<folders>(?:[^/]+/)*)", rest.removeprefix("**/")
        for part in re.split(r"(\{[^\W\d]\w*\}|\*)", rest):
            if part == "*":
                regex += "[^/]*"
            elif part.startswith("{") and part.endswith("}"):
                if (name := part[1:-1]) in names:
                    regex += f"(?P=f{names.index(name)})"
                else:
                    regex += f"(?P<f{len(names)}>[^/]+?)"
                    names.append(name)
            else:
                regex += re.escape(part)
                num_literal += len(part)
        literal = re.sub(r"\{[^\W\d]\w*\}", "", rest)
        for is_wrong, problem in (
            ("**" in rest, "'**/' is only allowed at the start"),
            (
                rest.startswith("/") or "://" in rest,
                "expected a path relative to the input, such as {well}_{channel}.tif",
            ),
            (
                "{" in literal or "}" in literal,
                "expected fields such as {well}: letters, digits and _ in a pair of braces",
            ),
            (not names, "no field; expected at least one, such as {well} or {name}"),
        ):
            if is_wrong:
                raise ImageError(f"pattern {text!r}: {problem}")
        return cls(text=text, names=tuple(names), num_literal=num_literal, regex=re.compile(regex))

    def match(self, name: str) -> dict[str, str] | None:
        """Return the fields of a relative path, folders first; None if it does not match."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        folders = match.groupdict().get("folders")
        values = {"": folders.rstrip("/")} if folders else {}
        return values | {name: match[f"f{index}"] for index, name in enumerate(self.names)}
