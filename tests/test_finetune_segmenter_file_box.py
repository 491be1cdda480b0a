"""The segmenter in the box: small, readable, and of use on images that it has not seen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from dinocell import DINOCell, DINOCellPipeline
from dinocell.cli import main
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.finetune.segmenter_file import NOTICE, SEGMENTER
from dinocell.images.read import read_image
from dinocell.images.write import write_tiff
from dinocell.labelled.masks import read_labels

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "stardist_2d" / "data"


@pytest.fixture(scope="module")
def pipeline() -> DINOCellPipeline:
    return DINOCellPipeline(DINOCell.from_pretrained(SEGMENTER))


def nuclei(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw blurred discs with noise on a dark ground."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((192, 192), np.int32)
    rows, columns = np.mgrid[:192, :192]
    for number, (row, column) in enumerate(((r, c) for r in range(24, 192, 36) for c in range(24, 192, 36)), start=1):
        labels[(rows - row) ** 2 + (columns - column) ** 2 < generator.uniform(9, 14) ** 2] = number
    light = ndimage.gaussian_filter((labels > 0) * generator.uniform(300, 900, labels.max() + 1)[labels], 1.0)
    return labels, (light + generator.normal(100, 15, labels.shape)).clip(0).astype(np.uint16)


def test_it_is_small_and_says_where_it_comes_from() -> None:
    model = DINOCell.from_pretrained(SEGMENTER)
    assert SEGMENTER.stat().st_size < 20e6
    assert sum(each.numel() for each in model.parameters()) <= 4_000_000
    assert model.settings.trained_on == ("BBBC038", "BBBC039", "Usiigaci")
    assert "CC0" in (model.card.licence or "")
    card = (SEGMENTER.parent / "README.md").read_text()
    assert all(name in card for name in model.settings.trained_on)


def test_it_finds_nuclei(pipeline: DINOCellPipeline) -> None:
    labels, image = nuclei()
    score = ctc_score(labels, pipeline.run(image))
    assert score.det > 0.9
    assert score.seg > 0.7


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the shared images are not here")
def test_it_finds_real_nuclei_of_another_source(pipeline: DINOCellPipeline) -> None:
    """StarDist's sample image: SEG .70, DET .92 when the model was put into the box."""
    found = pipeline.run(read_image(DATA / "img2d.tif").pixels[0])
    score = ctc_score(read_labels(DATA / "mask2d.tif"), found)
    assert score.seg > 0.65
    assert score.det > 0.87


def test_the_command_takes_it_without_a_model_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, image = nuclei()
    write_tiff(tmp_path / "image.tif", image)
    main(["segment", str(tmp_path / "image.tif"), "--output", str(tmp_path / "out")])
    assert NOTICE in capsys.readouterr().err
    found = read_labels(tmp_path / "out" / "image_labels.tif")
    assert ctc_score(labels, found).det > 0.9


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_nuclei_of_the_cpu() -> None:
    _, image = nuclei()
    found = [DINOCellPipeline(DINOCell.from_pretrained(SEGMENTER), device=name).run(image) for name in ("cpu", "cuda")]
    assert ctc_score(found[0], found[1]).op_csb > 0.95
