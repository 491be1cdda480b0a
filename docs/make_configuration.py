"""Write docs/configuration.md from the schemas: ``python docs/make_configuration.py``. A test says when it is due.

Every key of a schema becomes a row of a Markdown table: accepted values, default, meaning. The meanings come from the
``Attributes`` in the docstrings of the schemas, the introduction of a section from the text before them. A description
of several keys begins with their names.
"""

import inspect
import re
from pathlib import Path
from typing import Any

from dinocell.configs import schema as schemas
from dinocell.configs.schema import describe, join
from dinocell.demo.data import DemoConfig
from dinocell.finetune.config import FinetuneConfig
from dinocell.ssl.config import PretrainConfig

INTRODUCTION = """# Configuration

A command's settings are a frozen dataclass (the schema), with defaults. A recipe holds what differs; the command line
adds `key=value`:

```
dinocell demo quick seed=3 field.photons=200.0
```

- A recipe is the bare name of a shipped one (`dinocell/configs/<command>/<name>.yaml`) or the path of a YAML file.
- Every value is checked where it is written, and nothing is converted on a guess: `3.0` is no integer, `1` no boolean.
  Of a list of texts, one alone needs no brackets: `data.shards=shards/jump`.
- `${key}` refers to another key, `${oc.env:NAME}` to an environment variable; `???` marks what its user
  sets.
- Mistakes are one line and exit code 2:

```text
dinocell: override 'field.fotons=200': field.fotons: unknown key; did you mean 'field.photons'?
```

What was resolved is written to `config.yaml` in the run folder, and can be given back as a recipe.
"""

SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "demo": DemoConfig}

_ATTRIBUTE = re.compile(r"^(\w+(?:, \w+)*)$")


def reference(schema: type) -> str:
    """Return the sections of a schema, outermost first, as Markdown under headings of level 3."""
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
    sections = [(prefix, schema)]
    for name, annotation in schemas.field_types(schema).items():
        inner = schemas.section(annotation)
        if inner is not None:
            sections += _sections(inner, join(prefix, name))
    return sections


def _docstring(section: type) -> tuple[str, dict[str, str]]:
    """Return the introduction of a docstring as one paragraph, and the description of each attribute."""
    paragraph, meanings = "", dict[str, str]()
    for schema in reversed(section.__mro__[:-1]):  # a section that extends a shared one describes its own keys only
        before, _, after = (inspect.getdoc(schema) or "").partition("Attributes\n----------\n")
        paragraph = " ".join(line for line in before.split("\n") if not line.startswith("=")).strip()
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
    """Replace the double backticks of docstrings by Markdown's single ones."""
    return text.replace("``", "`")


def document(introduction: str, commands: dict[str, Any]) -> str:
    """Return the page: an introduction, then one chapter per command."""
    chapters = [f"## {command}\n\n{reference(schema)}" for command, schema in commands.items()]
    return introduction.rstrip() + "\n\n" + "\n".join(chapters)


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(document(INTRODUCTION, SCHEMAS), encoding="utf-8")
