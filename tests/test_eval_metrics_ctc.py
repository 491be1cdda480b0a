"""The challenge's scores against worked cases, py-ctcmetrics, and the challenge's own program on a real sequence."""

import json
import math
import re
import stat
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell.errors import DinocellError, ImageError
from dinocell.eval.metrics.ctc import (
    CTCScore,
    OfficialScores,
    ctc_score,
    ctc_score_from,
    official_scores,
    official_scores_of,
    write_reference,
    write_results,
)
from dinocell.eval.metrics.overlaps import contingency_table
from helpers.ctc import score_sequence

SHARED = Path(__file__).parents[2] / "shared"
NAN = math.nan

# Rows of reference and prediction, then SEG, DET, OP_CSB, splits, missed, spurious. By hand from the definitions.
CASES = {
    "shifted by a pixel": ("110000/110000/000022/000022", "011000/110000/000022/000022", 0.8, 1, 0.9, 0, 0, 0),
    "half is not a match": ("111100/000000", "110000/000000", 0, 0, 0, 0, 1, 1),
    "half beside a perfect one": ("111100/000022", "110000/000022", 0.5, 0.45, 0.475, 0, 1, 1),
    "cut in halves": ("1111/1111/0000/2222", "1155/1155/0000/2222", 0.5, 0.4, 0.45, 0, 1, 2),
    "cut unequally": ("1111/1111/0000/2222", "1115/1155/0000/2222", 0.8125, 0.95, 0.88125, 0, 0, 1),
    "two merged": ("1122/1122/0000/3300", "7777/7777/0000/3300", 2 / 3, 5 / 6, 0.75, 1, 0, 0),
    "three merged": ("1122330/1122330/0000000", "9999990/9999990/0000000", 1 / 3, 2 / 3, 0.5, 2, 0, 0),
    "two merged in part": ("11220/11220/00000", "77700/77770/00000", (4 / 7 + 3 / 8) / 2, 0.75, 0.611607, 1, 0, 0),
    "empty prediction": ("1102/1102", "0000/0000", 0, 0, 0, 0, 2, 0),
    "one floods all": ("10203/00000/40500", "77777/77777/77777", 1 / 15, 0.6, 1 / 3, 4, 0, 0),
    "reference without background": ("1122/1122/3344", "1120/1122/3344", 0.9375, 1, 0.96875, 0, 0, 0),
    "prediction without background": ("1100/1100/0022", "1133/1133/3322", 1, 0.95, 0.975, 0, 0, 1),
    "a cell in two pieces is one": ("11011", "11033", 0, 0, 0, 0, 1, 2),
    "empty reference": ("0000", "1020", NAN, NAN, NAN, 0, 0, 2),
    "both empty": ("0000", "0000", NAN, NAN, NAN, 0, 0, 0),
}


def labels(rows: str) -> np.ndarray:
    return np.array([[int(digit) for digit in row] for row in rows.split("/")])


def numbers(score: CTCScore) -> tuple[float, ...]:
    return (score.seg, score.det, score.op_csb, score.num_splits, score.num_missed, score.num_spurious)


@pytest.mark.parametrize("name", CASES)
def test_worked_case(name: str) -> None:
    reference, prediction, *expected = CASES[name]
    score = ctc_score(labels(reference), labels(prediction))
    assert numbers(score) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_worked_cases_of_the_reference_file() -> None:
    path = SHARED / "reference" / "ctc_cases.json"
    if not path.exists():
        pytest.skip("no ../shared/reference/ctc_cases.json")
    cases = json.loads(path.read_text())["cases"]
    assert len(cases) >= 20
    for case in cases:
        score = ctc_score([np.array(frame) for frame in case["ref"]], [np.array(frame) for frame in case["pred"]])
        expected = [case["expected"][name] for name in ("SEG", "DET", "OP_CSB", "NS", "FN", "FP", "n_ref", "n_pred")]
        got = (*numbers(score), score.num_reference, score.num_predicted)
        expected = [NAN if number is None else number for number in expected]
        assert got == pytest.approx(expected, abs=1e-11, nan_ok=True), case["name"]


def random_frames(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Blobs that touch, and a prediction that misses, invents, merges, splits and shifts some; both with background."""
    generator = np.random.default_rng(seed)
    points = generator.uniform(0, 60, (25, 2))
    rows, columns = np.mgrid[:60, :70]
    squared = (rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2
    reference = np.where(squared.min(-1) < generator.uniform(20, 80), squared.argmin(-1) + 1, 0)
    prediction = np.roll(reference, generator.integers(-2, 3, 2), (0, 1))
    for label in range(1, 26):
        fate = generator.integers(7)
        if fate == 0:
            prediction[prediction == label] = 0
        elif fate == 1:
            prediction[prediction == label] = generator.integers(1, 26)
        elif fate in (2, 3):
            prediction[(prediction == label) & (columns > points[label - 1, 1] + fate - 2)] = 30 + label
    prediction[:4, :4] = 60
    reference[-1] = prediction[-1] = 0
    return reference.astype(np.uint16), prediction.astype(np.uint16)


def test_random_sequences_equal_py_ctcmetrics(tmp_path: Path) -> None:
    from ctc_metrics.metrics import det, seg
    from ctc_metrics.utils.representations import count_acyclic_graph_correction_operations, match

    met = np.zeros(3, int)
    for sequence in range(12):
        frames = [random_frames(10 * sequence + number) for number in range(4)]
        matches = []
        for number, (reference, prediction) in enumerate(frames):
            paths = [str(tmp_path / f"{sequence}_{number}_{side}.tif") for side in ("reference", "prediction")]
            tifffile.imwrite(paths[0], reference)
            tifffile.imwrite(paths[1], prediction)
            matches.append(match(*paths))
        ids, others, matched, matching, ious = (list(column) for column in zip(*matches, strict=True))
        counts = count_acyclic_graph_correction_operations(None, None, ids, others, matched, matching)
        score = ctc_score([frame[0] for frame in frames], [frame[1] for frame in frames])
        assert score.seg == pytest.approx(seg(ids, ious), abs=1e-12)
        assert score.det == pytest.approx(det(**counts), abs=1e-12)
        assert numbers(score)[3:] == (counts["NS"], counts["FN"], counts["FP"])
        met += numbers(score)[3:]
    assert (met > 20).all()  # every kind of mistake was there


@pytest.mark.slow
def test_real_sequence_equals_the_challenges_own_program() -> None:
    folder = SHARED / "data" / "ctc_layout_ipsc"
    if not folder.exists():
        pytest.skip("no ../shared/data/ctc_layout_ipsc")
    log = (folder / "02_RES" / "DET_log.txt").read_text()
    sections = re.split(r"-{5,}[^-]+?-{5,}", log)[1:]
    # One line a mistake, with its frame: splits, missed, spurious.
    official_counts = [Counter(map(int, re.findall(r"^T=(\d+) ", section, re.M))) for section in sections]
    official_det = float(re.findall(r"DET measure: ([\d.]+)", log)[0])

    references = [tifffile.imread(path) for path in sorted((folder / "02_GT" / "TRA").glob("*.tif"))]
    predictions = [tifffile.imread(path) for path in sorted((folder / "02_RES").glob("*.tif"))]
    score = ctc_score(references, predictions)
    assert len(references) == 41
    for number, image in enumerate(score.images):
        assert numbers(image)[3:] == tuple(counts[number] for counts in official_counts)
    assert numbers(score)[3:] == tuple(counts.total() for counts in official_counts) == (122, 135, 864)
    assert score.det == pytest.approx(official_det, abs=5e-7)


def test_frames_are_pooled_and_their_own_scores_stand_beside() -> None:
    four, empty = labels("1020/0000/3040"), labels("0000/0000/0000")
    one = labels("0000/0110/0000")
    score = ctc_score([four, one, empty], [four, empty, one])
    assert numbers(score) == (0.8, pytest.approx(1 - 11 / 50), pytest.approx(0.79), 0, 1, 1)
    assert [image.num_reference for image in score.images] == [4, 1, 0]
    assert [image.seg for image in score.images] == pytest.approx([1, 0, NAN], nan_ok=True)
    means = score.mean_over_images
    assert (means.seg, means.det, means.op_csb, means.num_images) == (0.5, 0.5, 0.5, 2)


def test_nothing_to_score_is_undefined_with_its_counts() -> None:
    for score in (ctc_score([], []), ctc_score(np.zeros((0, 0), int), np.zeros((0, 0), int))):
        assert numbers(score) == pytest.approx((NAN, NAN, NAN, 0, 0, 0), nan_ok=True)
        assert math.isnan(score.mean_over_images.op_csb)
        assert score.mean_over_images.num_images == 0


def test_ids_beyond_16_bits_match() -> None:
    reference = labels("1122/1122/0033").astype(np.uint16) * 21_845  # up to 65,535, where py-ctcmetrics wraps
    assert ctc_score(reference, reference.astype(np.int64) * 2**40).op_csb == 1


def test_scores_of_tables_equal_scores_of_images() -> None:
    frames = [random_frames(seed) for seed in range(3)]
    assert ctc_score_from(contingency_table(*pair) for pair in frames) == ctc_score(
        *map(list, zip(*frames, strict=True))
    )


def test_numbering_does_not_matter() -> None:
    reference, prediction = random_frames(5)
    shuffled = np.random.default_rng(0).permutation(200)
    shuffled[shuffled == 0] = 777
    shuffled[0] = 0
    assert ctc_score(shuffled[reference], prediction).op_csb == pytest.approx(ctc_score(reference, prediction).op_csb)


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
    (tmp_path / "SEGMeasure").chmod(0o755)
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
