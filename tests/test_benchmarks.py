"""``make bench``: one table of every script's ratios, and one that fails does not hide the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GOOD = '''"""Is it fast?"""
import sys
assert sys.argv[1:] == ["--quick"]
print("# Speed\\n\\n## Small\\n\\n| side | s | ratio |\\n|---|---|---|")
print("| theirs | 3.0 | 2.50 (2.10 to 3.00) |\\n| ours | 1.2 |  |\\n")
print("## Two\\n\\n| what | ratio forward | score | times, both |\\n|---|---|---|---|")
print("| a map | 1.00 (1.00 to 1.00) | 0.5 (0.4 to 0.6) | twice: 12,000.5 (9 to 20) |")
'''


def run(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import _all; from pathlib import Path; "
    code += f"sys.exit(_all.main({list(names)!r}, Path({str(folder)!r})))"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "speed.py").write_text(GOOD)
    (tmp_path / "results" / "speed_cpu.md").write_text("full")
    (tmp_path / "_helper.py").write_text("raise SystemExit('is no benchmark')")
    return tmp_path


def test_every_ratio_becomes_a_row_with_its_question_and_its_file(folder: Path) -> None:
    (folder / "words.py").write_text('"""Does it say anything?"""\nprint("| a | b |\\n|---|---|\\n| 1 | 2 |")')
    result = run(folder)
    assert result.returncode == 0, result.stderr
    summary = (folder / "results" / "summary.md").read_text()
    full = "[speed_cpu.md](speed_cpu.md)"
    assert f"| speed | Small, theirs | 2.50 (2.10 to 3.00) | {full} |" in summary
    assert f"| speed | Two, a map, ratio forward | 1.00 (1.00 to 1.00) | {full} |" in summary
    assert f"| speed | Two, a map, times, both | twice: 12,000.5 (9 to 20) | {full} |" in summary
    assert "| words | Does it say anything? | ran; it measures no ratio | none yet |" in summary
    assert "Measured 20" in summary
    assert "helper" not in summary
    assert "0.4 to 0.6" not in summary, "a score with its interval is no ratio"


def test_a_script_that_fails_is_named_and_the_others_run(folder: Path) -> None:
    (folder / "broken.py").write_text('"""Will it break?"""\nprint("| a |")\nraise ValueError("no | luck")')
    result = run(folder)
    assert result.returncode == 1
    summary = (folder / "results" / "summary.md").read_text()
    assert "| broken | Will it break? | **failed**: exit code 1: ValueError: no \\| luck | none yet |" in summary
    assert "2.50 (2.10 to 3.00)" in summary


def test_a_name_that_is_no_benchmark_is_one_line_and_some_scripts_write_no_summary(folder: Path) -> None:
    result = run(folder, "sped")
    assert result.returncode == 2
    assert "no such benchmark: sped; there are speed" in result.stderr
    assert run(folder, "speed").returncode == 0
    assert not (folder / "results" / "summary.md").exists()


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_has_a_short_form_and_says_what_it_asks(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert '"--quick"' in text
    assert text.startswith('"""')
