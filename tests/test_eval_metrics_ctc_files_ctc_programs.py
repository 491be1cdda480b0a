"""The challenge's own programs, by stand-ins: what they are given, what is read of what they print."""

import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from dinocell.errors import DinocellError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.metrics.ctc_files import OfficialScores, official_scores, official_scores_of, write_reference


def frames(count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Label images of one size; ids 1 to 5, and a different one missing in each."""
    generator = np.random.default_rng(seed)
    images = []
    for number in range(count):
        image = np.kron(np.arange(6).reshape(2, 3), np.ones((8, 8), int))
        image[image == number % 5 + 1] = 0
        images.append(np.roll(image, generator.integers(0, 3), 1))
    return images


def program(folder: Path, name: str, body: str) -> None:
    """Put a small Python program where the challenge's would be."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(sys.platform == "win32", reason="needs programs that start by their first line")
@pytest.mark.parametrize("place", ["", "Linux"])
def test_official_programs_are_run_and_their_scores_read(tmp_path: Path, place: str) -> None:
    if place and sys.platform != "linux":
        pytest.skip("another system's folder")
    binaries, data = tmp_path / "programs", tmp_path / "data"
    (binaries / place).mkdir(parents=True)
    check = "assert sys.argv[1:] == [str(Path(sys.argv[1]).resolve()), '01', '4'], sys.argv\n"
    program(binaries / place, "SEGMeasure", check + "print('SEG measure: 0.849343')")
    program(binaries / place, "DETMeasure", check + "print('DET measure: 1')")
    write_reference(data, "01", frames(2), num_digits=4)
    assert official_scores(data, "01", binary_path=binaries) == OfficialScores(seg=0.849343, det=1.0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs programs that start by their first line")
def test_arrays_reach_the_programs_in_the_challenges_layout(tmp_path: Path) -> None:
    score = "from dinocell.eval.metrics.ctc_files import score_sequence\n"
    score += "score = score_sequence(Path(sys.argv[1]), sys.argv[2])"
    for name in ("SEG", "DET"):
        program(tmp_path, f"{name}Measure", f"{score}\nprint(f'{name} measure: {{score.{name.lower()}:.6f}}')")
    references, predictions = frames(3), frames(3, seed=2)
    expected = ctc_score(references, predictions)
    official = official_scores_of(references, predictions, binary_path=tmp_path)
    assert (official.seg, official.det) == pytest.approx((expected.seg, expected.det), abs=5e-7)


@pytest.mark.skipif(sys.platform == "win32", reason="needs programs that start by their first line")
def test_programs_that_give_no_score_are_named(tmp_path: Path) -> None:
    write_reference(tmp_path, "01", frames(1))

    def run() -> OfficialScores:
        return official_scores(tmp_path, "01", binary_path=tmp_path)

    with pytest.raises(DinocellError, match="SEGMeasure: no such program; expected the folder that holds SEGMeasure"):
        run()
    (tmp_path / "SEGMeasure").write_text("not a program")
    with pytest.raises(DinocellError, match=r"SEGMeasure: does not run here \("):
        run()
    program(tmp_path, "SEGMeasure", "print('No ground truth object found!')")
    with pytest.raises(
        DinocellError, match=r"expected 'SEG measure: ...', got exit code 0: No ground truth object found!"
    ):
        run()
    program(tmp_path, "SEGMeasure", "print('SEG measure: 0.5', file=sys.stdout)\nsys.exit(3)")
    with pytest.raises(DinocellError, match="got exit code 3"):
        run()
    program(tmp_path, "SEGMeasure", "print('SEG measure: 0.5')")
    program(tmp_path, "DETMeasure", "sys.exit('cannot open\\n the file')")
    with pytest.raises(DinocellError, match=r"DETMeasure: .* got exit code 1: cannot open the file"):
        run()
