"""The challenge's folders: round trips, and the real sequence in this layout."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell.errors import ImageError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.metrics.ctc_files import score_sequence, write_reference, write_results

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


def test_written_and_scored_is_what_ctc_score_gives(tmp_path: Path) -> None:
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


def test_tracked_cells_keep_their_ids_and_lives(tmp_path: Path) -> None:
    first, second = np.array([[1, 0, 4]]), np.array([[1, 7, 0]])
    write_reference(tmp_path, "02", [first, second, second], tracked=True)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "02_GT" / "TRA" / "man_track001.tif"), second)
    assert (tmp_path / "02_GT" / "TRA" / "man_track.txt").read_text() == "1 0 2 0\n4 0 0 0\n7 1 2 0\n"
    with pytest.raises(ImageError, match="cell 4 is in frame 0 and again in frame 2, not between"):
        write_reference(tmp_path, "03", [first, second, first], tracked=True)


@pytest.mark.slow
def test_real_sequence_scores_as_the_challenges_own_log_says() -> None:
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
    with pytest.raises(ValueError, match="truth: expected gold or silver, got 'bronze'"):
        inspect.unwrap(score_sequence)(tmp_path, "01", truth="bronze")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    image = frames(1)[0]
    write_reference(tmp_path, "01", [image, image])
    write_results(tmp_path, "01", [image])
    with pytest.raises(ImageError, match=r"01_RES: no mask of frame 1, which .*man_seg001.tif is the reference of"):
        score_sequence(tmp_path, "01")
    tifffile.imwrite(tmp_path / "01_RES" / "mask001.tif", image[:-1].astype(np.uint16))
    with pytest.raises(ImageError, match=r"mask001.tif is \(15, 24\), .*man_seg001.tif \(16, 24\)"):
        score_sequence(tmp_path, "01")
    tifffile.imwrite(tmp_path / "01_RES" / "mask0001.tif", image.astype(np.uint16))
    with pytest.raises(ImageError, match=r"mask001.tif: frame 1 twice, also as mask0001.tif"):
        score_sequence(tmp_path, "01")
    tifffile.imwrite(tmp_path / "01_GT" / "SEG" / "man_seg_000_003.tif", image.astype(np.uint16))
    with pytest.raises(ImageError, match="three-dimensional sequences are not scored"):
        score_sequence(tmp_path, "01")


def test_what_16_bits_or_three_digits_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"id 65536 in frame 0; .* expected ids up to 65535"):
        write_results(tmp_path, "01", [np.array([[65536]])])
    write_results(tmp_path, "02", [np.array([[65535]])])
    with pytest.raises(ImageError, match="more frames than 1 digits can number"):
        write_results(tmp_path, "03", [np.array([[1]])] * 11, num_digits=1)
    with pytest.raises(ImageError, match=r"mask000.tif: frames of an earlier run"):
        write_results(tmp_path, "02", [np.array([[1]])])
