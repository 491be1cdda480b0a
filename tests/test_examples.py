"""The examples run, as their readers would start them; the notebook from top to bottom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# nbclient has threads and sockets of its own: in a process of its own it meets none of this suite's rules.
RUN_NOTEBOOK = """
import sys, nbformat, nbclient
book = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(book, timeout=240, kernel_name="python3").execute()
nbformat.write(book, "executed.ipynb")
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DINOCELL_QUICK": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


def test_there_are_three_scripts_and_a_notebook() -> None:
    assert len(SCRIPTS) == 3
    assert [path.name for path in NOTEBOOKS] == ["Tutorial.ipynb"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("segment_folder.py", "1.tif: 0 cells"),  # random weights find nothing
        ("pretrain_and_probe.py", "pretrained:     "),
        ("finetune_on_pairs.py", "OP_CSB "),
    ],
)
def test_a_script_runs_in_its_quick_form(script: str, said: str, tmp_path: Path) -> None:
    result = run(tmp_path, str(EXAMPLES / script), "--quick")
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
    assert not list(tmp_path.iterdir()), "the quick form leaves nothing behind"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    result = run(tmp_path, "-c", RUN_NOTEBOOK, str(NOTEBOOKS[0]))
    assert result.returncode == 0, result.stderr
    executed = json.loads((tmp_path / "executed.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in executed["cells"] for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert "DINOCell: SEG " in printed


def test_the_notebook_is_kept_small() -> None:
    assert NOTEBOOKS[0].stat().st_size < 200_000
    book = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    assert all(output["output_type"] != "error" for cell in book["cells"] for output in cell.get("outputs", []))
