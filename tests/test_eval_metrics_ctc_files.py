"""Folders of the Cell Tracking Challenge: round trips, a real sequence, and stand-ins for the official programs."""

import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell.errors import DinocellError, ImageError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.metrics.ctc_files import (
    OfficialScores,
    official_scores,
    official_scores_of,
    write_reference,
    write_results,
)
from helpers.ctc import score_sequence

REAL_SEQUENCE = Path(__file__).parents[2] / "shared" / "data" / "ctc_layout_ipsc"


def frames(count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Label images of one size; ids 1 to 5, and a different one missing in each."""
    generator = np.random.default_rng(seed)
    images = []
    for number in range(count):
        image = np.kron(np.arange(6).reshape(2, 3), np.ones((8, 8), int))
        image[image == number % 5 + 1] = 0
        images.append(np.roll(image, generator.integers(0, 3), 1))
    return images


def test_a_written_sequence_scores_as_its_arrays(tmp_path: Path) -> None:
    references, predictions = frames(4), frames(4, seed=1)
    write_reference(tmp_path, "01", references)
    write_results(tmp_path, "01", iter(predictions))
    score, expected = score_sequence(tmp_path, "01"), ctc_score(references, predictions)
    assert score.segmentation == score.detection == expected
    assert (score.seg, score.det, score.op_csb) == (expected.seg, expected.det, expected.op_csb)
    assert 0 < score.seg < 1
    assert sorted(path.name for path in (tmp_path / "01_RES").iterdir()) == [f"mask00{k}.tif" for k in range(4)]
    mask = tifffile.imread(tmp_path / "01_RES" / "mask002.tif")
    assert mask.dtype == np.uint16
    np.testing.assert_array_equal(mask, predictions[2])


def test_cells_of_single_images_get_ids_of_their_own(tmp_path: Path) -> None:
    references = frames(3)
    write_reference(tmp_path, "01", references, num_digits=4)
    ids: list[int] = []
    for number, reference in enumerate(references):
        mask = tifffile.imread(tmp_path / "01_GT" / "SEG" / f"man_seg{number:04d}.tif")
        np.testing.assert_array_equal(mask, tifffile.imread(tmp_path / "01_GT" / "TRA" / f"man_track{number:04d}.tif"))
        assert ctc_score(reference, mask).op_csb == 1
        ids += np.unique(mask[mask > 0]).tolist()
    assert ids == list(range(1, 13))
    tracks = np.loadtxt(tmp_path / "01_GT" / "TRA" / "man_track.txt", int)
    np.testing.assert_array_equal(tracks, [(label, (label - 1) // 4, (label - 1) // 4, 0) for label in ids])


@pytest.mark.slow
def test_a_real_sequence_scores_as_in_the_challenges_log() -> None:
    if not REAL_SEQUENCE.exists():
        pytest.skip("no ../shared/data/ctc_layout_ipsc")
    score = score_sequence(REAL_SEQUENCE, "02")
    assert score.det == pytest.approx(0.936992, abs=5e-7)  # DET_log.txt
    assert score.segmentation.num_reference == 4482


def test_seg_and_det_come_from_their_own_references(tmp_path: Path) -> None:
    image = frames(1)[0]
    write_reference(tmp_path, "01", [image, image])
    write_results(tmp_path, "01", [image, np.zeros_like(image)])
    (tmp_path / "01_GT" / "SEG" / "man_seg001.tif").unlink()  # gold masks of one frame only
    marker = image * (np.add.outer(np.arange(16), np.arange(24)) % 8 == 4)
    tifffile.imwrite(tmp_path / "01_GT" / "TRA" / "man_track000.tif", marker.astype(np.uint16))
    score = score_sequence(tmp_path, "01")
    assert (score.seg, score.det, score.op_csb) == (1, 0.5, 0.75)
    assert (score.segmentation.num_reference, score.detection.num_reference) == (4, 8)


def test_silver_truth_and_missing_markers(tmp_path: Path) -> None:
    image = frames(1)[0]
    (tmp_path / "01_ST" / "SEG").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "01_ST" / "SEG" / "man_seg000.tif", image.astype(np.uint16))
    write_results(tmp_path, "01", [image])
    score = score_sequence(tmp_path, "01", truth="silver")
    assert score.op_csb == 1
    assert score.detection is score.segmentation
    with pytest.raises(ImageError, match=r"01_GT.SEG: no man_seg\*.tif"):
        score_sequence(tmp_path, "01")


def test_frames_that_do_not_fit_are_named(tmp_path: Path) -> None:
    image = frames(1)[0]
    write_reference(tmp_path, "01", [image, image])
    write_results(tmp_path, "01", [image])
    with pytest.raises(ImageError, match=r"01_RES: no mask of frame 1, which .*man_seg001.tif is the reference of"):
        score_sequence(tmp_path, "01")
    tifffile.imwrite(tmp_path / "01_RES" / "mask001.tif", image[:-1].astype(np.uint16))
    with pytest.raises(ImageError, match=r"mask001.tif is \(15, 24\), .*man_seg001.tif \(16, 24\)"):
        score_sequence(tmp_path, "01")
    tifffile.imwrite(tmp_path / "01_RES" / "mask0001.tif", image.astype(np.uint16))
    with pytest.raises(ImageError, match=r"mask001.tif: expected one .* per frame"):
        score_sequence(tmp_path, "01")
    tifffile.imwrite(tmp_path / "01_GT" / "SEG" / "man_seg_000_003.tif", image.astype(np.uint16))
    with pytest.raises(ImageError, match=r"man_seg_000_003.tif: expected one two-dimensional"):
        score_sequence(tmp_path, "01")


def test_ids_above_16_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"expected ids up to 65535 .* got 65536 in frame 0"):
        write_results(tmp_path, "01", [np.array([[65536]])])
    write_results(tmp_path, "02", [np.array([[65535]])])


def program(folder: Path, name: str, body: str) -> None:
    """Write a small Python program in place of an official one."""
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
    assert official_scores(data, "01", binary_path=binaries, num_digits=4) == OfficialScores(seg=0.849343, det=1.0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs programs that start by their first line")
def test_arrays_reach_the_programs_in_the_challenges_layout(tmp_path: Path) -> None:
    score = f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom helpers.ctc import score_sequence\n"
    score += "score = score_sequence(Path(sys.argv[1]), sys.argv[2])"
    for name in ("SEG", "DET"):
        program(tmp_path, f"{name}Measure", f"{score}\nprint(f'{name} measure: {{score.{name.lower()}:.6f}}')")
    references, predictions = frames(3), frames(3, seed=2)
    expected = ctc_score(references, predictions)
    official = official_scores_of(references, predictions, binary_path=tmp_path)
    assert (official.seg, official.det) == pytest.approx((expected.seg, expected.det), abs=5e-7)


@pytest.mark.skipif(sys.platform == "win32", reason="needs programs that start by their first line")
def test_programs_without_a_score_are_named(tmp_path: Path) -> None:
    write_reference(tmp_path, "01", frames(1))

    def run() -> OfficialScores:
        return official_scores(tmp_path, "01", binary_path=tmp_path)

    with pytest.raises(DinocellError, match="SEGMeasure: no such program"):
        run()
    (tmp_path / "SEGMeasure").write_text("not a program")
    with pytest.raises(DinocellError, match=r"SEGMeasure: cannot be run \("):
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
