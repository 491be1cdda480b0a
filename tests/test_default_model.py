"""The default model: small, readable, and useful on images that it was not trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from dinocell import DINOCell, DINOCellPipeline
from dinocell.cli import main
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.finetune.segmenter_file import DEFAULT_MODEL, DEFAULT_MODEL_NOTICE
from dinocell.images.read import read_image
from dinocell.images.write import write_tiff
from dinocell.labelled.masks import read_labels

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "stardist_2d" / "data"


@pytest.fixture(scope="module")
def pipeline() -> DINOCellPipeline:
    return DINOCellPipeline(DINOCell.from_pretrained(DEFAULT_MODEL))


def nuclei(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw blurred discs with noise on a dark ground."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((192, 192), np.int32)
    rows, columns = np.mgrid[:192, :192]
    for label, (row, column) in enumerate(((r, c) for r in range(24, 192, 36) for c in range(24, 192, 36)), start=1):
        labels[(rows - row) ** 2 + (columns - column) ** 2 < generator.uniform(9, 14) ** 2] = label
    light = ndimage.gaussian_filter((labels > 0) * generator.uniform(300, 900, labels.max() + 1)[labels], 1.0)
    return labels, (light + generator.normal(100, 15, labels.shape)).clip(0).astype(np.uint16)


def test_the_default_model_is_small_and_states_its_provenance() -> None:
    model = DINOCell.from_pretrained(DEFAULT_MODEL)
    assert DEFAULT_MODEL.stat().st_size < 20e6
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert model.settings.trained_on == ("BBBC038", "BBBC039", "Usiigaci")
    assert "CC0" in (model.card.licence or "")
    card = (DEFAULT_MODEL.parent / "README.md").read_text()
    assert all(name in card for name in model.settings.trained_on)


def test_the_default_model_finds_synthetic_nuclei(pipeline: DINOCellPipeline) -> None:
    labels, image = nuclei()
    score = ctc_score(labels, pipeline.run(image))
    assert score.det > 0.9
    assert score.seg > 0.7


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the shared images are not here")
def test_the_default_model_finds_real_nuclei_of_another_source(pipeline: DINOCellPipeline) -> None:
    """StarDist's sample image: SEG .70, DET .92 when the model was added to the package."""
    labels = pipeline.run(read_image(DATA / "img2d.tif").pixels[0])
    score = ctc_score(read_labels(DATA / "mask2d.tif"), labels)
    assert score.seg > 0.65
    assert score.det > 0.87


def test_segment_without_a_model_uses_the_default_model_and_reports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, image = nuclei()
    write_tiff(tmp_path / "image.tif", image)
    main(["segment", str(tmp_path / "image.tif"), "--output", str(tmp_path / "out")])
    assert DEFAULT_MODEL_NOTICE in capsys.readouterr().err
    predicted = read_labels(tmp_path / "out" / "image_labels.tif")
    assert ctc_score(labels, predicted).det > 0.9


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_and_gpu_find_the_same_nuclei() -> None:
    _, image = nuclei()
    results = [
        DINOCellPipeline(DINOCell.from_pretrained(DEFAULT_MODEL), device=name).run(image) for name in ("cpu", "cuda")
    ]
    assert ctc_score(results[0], results[1]).op_csb > 0.95
