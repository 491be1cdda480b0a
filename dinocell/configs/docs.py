"""Every key of a schema as a Markdown table: what it takes, its default, what it means.

``docs/configuration.md`` is made from this, and a test holds it against the schemas. The meanings are the
``Attributes`` of the schemas' own docstrings; what a docstring says before them introduces the section. What one
sentence says of several keys begins with their names, in its order.
"""

import inspect
import re
from typing import Any

from dinocell.configs import schema as schemas
from dinocell.configs.schema import describe, join

_ATTRIBUTE = re.compile(r"^(\w+(?:, \w+)*)$")


def reference(schema: type) -> str:
    """Return the sections of a schema, the outermost first, as Markdown below headings of the third level."""
    parts = []
    for prefix, section in _sections(schema):
        summary, meanings = _docstring(section)
        heading = f"### `{prefix}`" if prefix else "### At the top"
        rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
        plain = schemas.defaults(section)
        for name, annotation in schemas.field_types(section).items():
            if schemas.section(annotation) is not None:
                continue
            default = schemas.show(plain[name]) if name in plain else "required"
            cells = (f"`{join(prefix, name)}`", describe(annotation), default, meanings.get(name, ""))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        table = "\n".join(rows) if len(rows) > 2 else ""
        parts.append("\n\n".join(part for part in (heading, summary, table) if part))
    return "\n\n".join(parts) + "\n"


def _sections(schema: type, prefix: str = "") -> list[tuple[str, type]]:
    found = [(prefix, schema)]
    for name, annotation in schemas.field_types(schema).items():
        inner = schemas.section(annotation)
        if inner is not None:
            found += _sections(inner, join(prefix, name))
    return found


def _docstring(section: type) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of the whole, as one paragraph, and of each attribute."""
    text = inspect.getdoc(section) or ""
    before, _, after = text.partition("Attributes\n----------\n")
    paragraph = " ".join(line for line in before.split("\n") if not line.startswith("=")).strip()
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in after.split("\n"):
        heading = _ATTRIBUTE.match(line)
        if heading:
            names = heading.group(1).split(", ")
            together = f"{', '.join(f'`{name}`' for name in names)}:" if len(names) > 1 else ""
            meanings |= dict.fromkeys(names, together)
        elif line.strip():
            for name in names:
                meanings[name] = f"{meanings.get(name, '')} {_code(line.strip())}".strip()
    return _code(re.sub(r"\s+", " ", paragraph)), meanings


def _code(text: str) -> str:
    """Turn the double backticks of docstrings into Markdown's single ones."""
    return text.replace("``", "`")


def document(introduction: str, commands: dict[str, Any]) -> str:
    """Return a whole page: an introduction, then a chapter a command."""
    chapters = [f"## {command}\n\n{reference(schema)}" for command, schema in commands.items()]
    return introduction.rstrip() + "\n\n" + "\n".join(chapters)
