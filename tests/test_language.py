"""The words of the project: standard terms of microscopy and machine learning, no private vocabulary."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What is not used, and what is: a pattern over prose in lower case, and the standard term.
FORBIDDEN = {
    r"\bin the box\b|\bthe box\b(?! filter)": "the default model",
    r"\b(whole|the|same) road\b": "pipeline",
    r"\bmend(s|ed|ing)?\b": "fix, refine, post-process",
    r"\b(yours|theirs|the user's) to \w+": "user error, invalid input",
    r"\bpictures?\b": "image, figure",
    r"\bchance of a cell\b|\bchances\b": "cell probability",
    r"(?<!standard )\bdeviations?\b": "standard deviation (std)",
    r"\bgo(es|ing)? on\b|\bwent on\b": "resume, continue",
    r"\b(comes?|coming) back( by itself)?\b": "is requeued automatically",
    r"\banew\b": "again, recomputed",
    r"\b(is|are|was|were|be|it|them|what is) left out\b|\bleav(e|es|ing) (it|them) out\b": "skipped, excluded",
    r"\bsearched all through\b": "searched recursively",
    r"\bancestry\b": "provenance",
    r"\bwhatever (its|their) files? says?\b": "overrides the metadata",
    r"\b(was|is|were|being) asked (for|of|about)\b|\bnever asked\b": "query, requested",
    r"\btold to stop\b": "interrupted, receives SIGTERM",
    r"\bwhole or not (there|at all)\b": "atomic",
    r"\bhidden patch(es)?\b|\bhides patches\b": "masked patches",
    r"\bsays (whether|so|what|how|why|which)\b|\bsay (whether|so)\b": "returns, reports",
    r"\bl(ies|ay|ie) (beside|in|below|next|there|on|under)\b": "is in, is next to",
    r"\b(searches|one line|one number|one row|one integer|numbers?, one) a (cell|channel|file|image|line)\b": "per",
    r"\bbytes a (sample|crop|pixel)\b": "bytes per sample",
    r"\bspoilt\b": "corrupted, non-finite",
    r"\bforerunners?\b": "previous version",
    r"\bstraw man\b": "weak baseline",
    r"\bbent cells?\b": "non-convex cells",
    r"\bthe brake\b": "bottleneck",
    r"\bno opinion\b": "uniform, chance level",
    r"\bas it is now\b": "current",
    r"\brests? at first\b|\bat rest\b": "is frozen during warm-up",
    r"\btraining states?\b": "checkpoint",
    r"\bnewest whole\b": "latest complete",
    r"\b(is|are|was) there already\b|\bwhat is there\b": "exists",
    r"\bknows? (no|nothing|it|them|a field)\b": "(no personified files)",
    r"\ba first look\b": "smoke test",
    r"\bones?'s own\b|\bof ones own\b": "custom",
    r"\ball that lies\b": "everything in",
    r"\brooms?\b": "module, layer, space",
    r"\bhouse\b": "(no metaphors)",
}
# Public names that were replaced.
FORBIDDEN_NAMES = {
    "mend": "refine",
    "Mending": "Refinement",
    "Picture": "Image",
    "chance": "probability",
    "KeptFeatures": "FeatureCache",
    "Mistakes": "ErrorImages",
    "find_overlaps": "contingency_table",
    "update_teacher": "update_ema",
    "take_gram_teacher": "update_gram_teacher",
    "BadSteps": "NonfiniteSteps",
}


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and prose: of Markdown what is no code, of Python docstrings, messages and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"```.*?```", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
        text = re.sub(r"`[^`\n]*`|\]\([^)]*\)", " ", text)
        yield from enumerate(text.splitlines(), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT) and " " in token.string:
            plain = re.sub(r"``?[^`\n]*``?", " ", token.string)
            yield from enumerate(plain.splitlines(), start=token.start[0])


def found_in(path: Path) -> list[str]:
    problems = []
    for number, line in prose_of(path):
        for pattern, term in FORBIDDEN.items():
            if match := re.search(pattern, line.lower()):
                problems.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r}, use: {term}")
    return problems


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "dinocell").glob("*/README.md"))
SOURCES = sorted((ROOT / "dinocell").rglob("*.py"))
RECIPES = sorted((ROOT / "dinocell" / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("path", [*PAGES, *CARDS], ids=lambda path: path.name)
def test_pages_use_the_terms_of_the_field(path: Path) -> None:
    assert found_in(path) == []


def test_messages_docstrings_and_comments_use_the_terms_of_the_field() -> None:
    assert [problem for path in SOURCES for problem in found_in(path)] == []


def test_recipes_use_the_terms_of_the_field() -> None:
    problems = []
    for path in RECIPES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            comment = line.partition("#")[2].lower()
            problems += [f"{path.name}:{number}: {p}" for p in FORBIDDEN if re.search(p, comment)]
    assert problems == []


def test_public_names_are_the_standard_ones() -> None:
    problems = []
    for path in SOURCES:
        problems += [
            f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in FORBIDDEN_NAMES
        ]
    assert problems == []


@pytest.mark.parametrize(
    "text", ["# goes on after a stop", '"""Mend the labels."""', 'x = "the picture is left out"', "# what is there"]
)
def test_a_forbidden_word_is_reported(text: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(text + "\n")
    assert [line for _, line in prose_of(path) if any(re.search(p, line.lower()) for p in FORBIDDEN)]
