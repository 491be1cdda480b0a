"""The page of all settings is that of the schemas."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "make_configuration.py"))


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inside.

    Attributes
    ----------
    first, second
        Two
        lines.
    """

    first: int
    second: str = "a|b"


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Of ``all``."""

    size: float = 0.5
    inner: Inner = field(default_factory=lambda: Inner(first=1))


def test_keys_types_defaults_and_meanings_are_in_the_table() -> None:
    text = SCRIPT["reference"](Outer)
    assert "Of `all`." in text
    assert "| `size` | a number | 0.5 |  |" in text
    assert "| `inner.first` | an integer | required | `first`, `second`: Two lines. |" in text
    assert "| `inner.second` | text | 'a\\|b' | `first`, `second`: Two lines. |" in text


def test_the_page_in_docs_is_up_to_date() -> None:
    expected = SCRIPT["document"](SCRIPT["INTRODUCTION"], SCRIPT["SCHEMAS"])
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == expected, "run: python docs/make_configuration.py"
