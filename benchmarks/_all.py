"""Run every benchmark in its short form and write one table of ratios: ``make bench``.

    python benchmarks/_all.py                 # all; writes benchmarks/results/summary.md
    python benchmarks/_all.py reading scores  # only these; prints the table

A ratio is a cell such as ``3.85 (3.03 to 4.39)`` of the tables that a script prints, in a column whose head says so:
the median of alternated rounds and their range. A script that fails is named in the table; the others still run, and
the exit code is 1.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
_RATIO = re.compile(r"(?:^|.*[ :])\d[\d.,]* \(\d[\d.,]* to \d[\d.,]*\)")
# What the head of a column of ratios says; scores with intervals look the same.
_OF_RATIOS = re.compile(r"ratio|times| / ")
_LIMIT_S = 900


class Row(NamedTuple):
    """A line of the table."""

    question: str
    ratio: str


class Outcome(NamedTuple):
    """What a script printed, or why it failed."""

    script: Path
    rows: list[Row]
    problem: str
    seconds: float


def run(script: Path) -> Outcome:
    """Run a script with ``--quick``, in an empty folder."""
    start = time.monotonic()
    root = str(HERE.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                [sys.executable, str(script), "--quick"],
                cwd=scratch,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return Outcome(script, [], f"took more than {_LIMIT_S} s", time.monotonic() - start)
    problem = ""
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        problem = f"exit code {done.returncode}: {said[-1].strip() if said else 'nothing was said'}"
    return Outcome(script, list(ratios(done.stdout)), problem, time.monotonic() - start)


def ratios(text: str) -> Iterator[Row]:
    """Find the ratios in the Markdown tables of a script's output."""
    heading, columns = "", [""]
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:].strip()
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = []
        elif not columns:
            columns = cells
        pairs = zip(columns, cells, strict=False)
        found = [(column, cell) for column, cell in pairs if _OF_RATIOS.search(column) and _RATIO.fullmatch(cell)]
        for column, ratio in found:
            of_many = column if len(found) > 1 else ""
            yield Row(", ".join(filter(None, (heading, cells[0], of_many))), ratio)


def table(outcomes: Sequence[Outcome], results: Path) -> str:
    """Return the table; a script's full results are looked for in ``results``."""
    lines = ["| benchmark | question | ratio, short form | full result |", "|---|---|---|---|"]
    for outcome in outcomes:
        stem = outcome.script.stem
        names = sorted(path.name for path in results.glob(f"{stem}*.md"))
        full = ", ".join(f"[{name}]({name})" for name in names) or "none yet"
        summary = (ast.get_docstring(ast.parse(outcome.script.read_text(encoding="utf-8"))) or stem).splitlines()[0]
        if outcome.problem:
            problem = outcome.problem.replace("|", "\\|")
            lines.append(f"| {stem} | {summary} | **failed**: {problem} | {full} |")
        elif not outcome.rows:
            lines.append(f"| {stem} | {summary} | ran; it measures no ratio | {full} |")
        else:
            lines.extend(f"| {stem} | {row.question} | {row.ratio} | {full} |" for row in outcome.rows)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, folder: Path = HERE) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="scripts, without .py (all)")
    options = parser.parse_args(arguments)
    scripts = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
    unknown = sorted(set(options.names) - {path.stem for path in scripts})
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(path.stem for path in scripts)}")
    outcomes = []
    for script in scripts:
        if options.names and script.stem not in options.names:
            continue
        outcomes.append(run(script))
        state = f"FAILED, {outcomes[-1].problem}" if outcomes[-1].problem else f"{len(outcomes[-1].rows)} ratios"
        print(f"{script.stem}: {state}, {outcomes[-1].seconds:.0f} s", flush=True)
    text = table(outcomes, folder / "results")
    print(text)
    if not options.names:
        print(write_summary(text, folder / "results"))
    return int(any(outcome.problem for outcome in outcomes))


def write_summary(text: str, results: Path) -> Path:
    """Write ``summary.md`` with the hardware, the versions and the date."""
    from _harness import measured_on

    note = (
        "Short forms: small inputs, few rounds, on a machine that others may have used, too. Claims take the full form."
    )
    path = results / "summary.md"
    path.write_text(f"# Every benchmark in its short form\n\n{note}\n\n{text}\n\n{measured_on(['torch', 'numpy'])}\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
