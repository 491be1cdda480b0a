"""A segmenter with target flows: pipeline, scores, search, evaluation and commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from dinocell.cli import main
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.segmentation.flows import flows_to_labels
from dinocell.eval.segmentation.pipeline import DINOCellPipeline, Segmentation
from dinocell.eval.threshold_search import score_segmenter, search_parameters
from dinocell.finetune.model import DINOCell, replace_settings
from dinocell.finetune.targets import FlowPostprocessing, labels_to_flows
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.dataset import LabelledImage
from dinocell.labelled.layouts import folder_pairs
from dinocell.models.config import VARIANTS, variant_config

FIELD = make_field(7, SyntheticConfig(size=(100, 130), channels=("AGP",), num_cells=(8, 12), cell_radius_px=12.0))
SIDE = 64


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> DINOCell:
    monkeypatch.setitem(VARIANTS, "tiny", variant_config("tiny", width=32, depth=4, heads=2, mlp_hidden=64))
    torch.manual_seed(0)
    built = DINOCell("vitt8", pretrained=False, target="flows")
    replace_settings(built, clahe_clip=0.0, percentiles=(0.0, 100.0), convention="unit")
    return built


@pytest.fixture
def knowing(model: DINOCell, monkeypatch: pytest.MonkeyPatch) -> DINOCell:
    """Return a model that knows the flows of the pixel that a grey level stands for, in a picture of its number."""
    flows = torch.from_numpy(labels_to_flows(FIELD.labels)).flatten(1)
    flows[2] = torch.logit(flows[2].clamp(0.01, 0.99))
    largest = flows.shape[1] - 1

    def look_up(images: torch.Tensor) -> torch.Tensor:
        numbers = (images[:, 0].clamp(0, 1) * largest).round().long()
        return flows[:, numbers].transpose(0, 1)

    monkeypatch.setattr(model, "forward_logits", look_up)
    return model


def pipeline_of(model: DINOCell, monkeypatch: pytest.MonkeyPatch, **options: float) -> DINOCellPipeline:
    # 8-bit grey levels cannot number the pixels: hand them on as they are.
    monkeypatch.setattr(
        "dinocell.eval.segmentation.pipeline.prepare",
        lambda image, _settings, **_: (image / np.float64(image.max())).astype(np.float32),
    )
    return DINOCellPipeline(model, device="cpu", crop_size=128, **options)


PICTURE = np.arange(FIELD.labels.size, dtype=np.int32).reshape(FIELD.labels.shape)


def labelled() -> LabelledImage:
    return LabelledImage(
        pixels=np.zeros((1, *FIELD.labels.shape), np.uint8),
        labels=FIELD.labels,
        distance=None,
        crowd=None,
        name="a",
        pixel_size_um=None,
    )


def test_a_network_with_perfect_flows_gives_the_cells(knowing: DINOCell, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pipeline_of(knowing, monkeypatch).run(PICTURE, return_dist_map=True)
    assert isinstance(found, Segmentation)
    assert found.maps.shape == (3, *FIELD.labels.shape)
    np.testing.assert_allclose(found.maps[:2], labels_to_flows(FIELD.labels)[:2], atol=1e-5)
    assert ctc_score(FIELD.labels, found.labels).op_csb > 0.98
    np.testing.assert_array_equal(pipeline_of(knowing, monkeypatch).run(PICTURE), found.labels)


def test_thresholds_default_to_the_models(knowing: DINOCell, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_settings(knowing, probability=0.995)
    assert pipeline_of(knowing, monkeypatch).run(PICTURE).max() == 0
    pipeline = pipeline_of(knowing, monkeypatch, probability=0.5)
    assert pipeline.run(PICTURE).max() > 5
    assert pipeline.cells(pipeline.maps(PICTURE), probability=0.995, flow_error=4.0).max() == 0


def test_thresholds_of_the_other_target_are_refused(model: DINOCell) -> None:
    with pytest.raises(DinocellError, match=r"cells_max: .* probability and flow_error"):
        DINOCellPipeline(model, device="cpu", cells_max=0.4)
    with pytest.raises(DinocellError, match=r"cell_fill: .* probability and flow_error"):
        DINOCellPipeline(model, device="cpu").run(np.eye(40), cell_fill=0.1)
    with pytest.raises(DinocellError, match=r"flow_error: .* cells_max and cell_fill"):
        DINOCellPipeline(DINOCell("vitt8", pretrained=False), device="cpu", flow_error=0.4)
    with pytest.raises(DinocellError, match="no distance map"):
        DINOCellPipeline(model, device="cpu").distance(np.eye(40))


def test_scoring_finds_thresholds_that_are_at_least_as_good(model: DINOCell, monkeypatch: pytest.MonkeyPatch) -> None:
    flows = labels_to_flows(FIELD.labels)
    flows[2] *= 0.95
    monkeypatch.setattr(DINOCellPipeline, "maps", lambda _self, _image, **_: flows)
    assert score_segmenter(model, [labelled()], True).settings == {}
    replace_settings(model, probability=0.97)
    assert score_segmenter(model, [labelled()], False).metrics["score/seg"] == 0
    found = score_segmenter(model, [labelled()], True)
    assert set(found.settings) == {"probability", "flow_error"}
    assert found.metrics["score/op_csb"] > 0.98
    assert model.settings.probability == 0.97, "the model stays as it is"
    replace_settings(model, **found.settings)
    assert score_segmenter(model, [labelled()], False).metrics == found.metrics


def test_the_search_scores_what_the_thresholds_give(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    flows = [labels_to_flows(FIELD.labels) + generator.normal(0, 0.3, (3, 100, 130)).astype(np.float32)] * 2
    flows[1] = np.ascontiguousarray(flows[1][:, ::-1]) * np.array([-1, 1, 1], np.float32)[:, None, None]
    references = [FIELD.labels, np.ascontiguousarray(FIELD.labels[::-1])]
    axes = {"probability": (0.4, 0.7), "flow_error": (0.15, 0.2, 4.0)}
    found = search_parameters(flows, references, FlowPostprocessing(min_area_px=30), axes)
    for row, probability in enumerate(found.axes["probability"]):
        for column, error in enumerate(found.axes["flow_error"]):
            labels = [
                flows_to_labels(each, probability=probability, flow_error=error, min_area_px=30) for each in flows
            ]
            score = ctc_score(references, labels)
            assert found.scores["op_csb"][row, column] == pytest.approx(score.op_csb)
            assert found.scores["seg"][row, column] == pytest.approx(score.seg)
    assert len(np.unique(found.scores["op_csb"])) > 2
    assert found.best_score == found.scores["op_csb"].max()
    found.write_csv(tmp_path / "grid.csv")
    found.write_heat_map(tmp_path / "grid.png")
    assert (tmp_path / "grid.csv").read_text().splitlines()[0].startswith("probability,flow_error,op_csb")
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_a_search_without_a_reference_cell_or_map_is_an_error() -> None:
    flows, parameters = [labels_to_flows(FIELD.labels)], FlowPostprocessing()
    found = search_parameters(flows, [np.zeros_like(FIELD.labels)], parameters, {"probability": (0.5,)})
    with pytest.raises(DinocellError, match="undefined everywhere"):
        _ = found.best
    with pytest.raises(DinocellError, match="as many maps as references, got 1 and 0"):
        search_parameters(flows, [], parameters)


@pytest.fixture
def file(model: DINOCell, tmp_path: Path) -> Path:
    replace_settings(model, convention="standardised")
    torch.nn.init.normal_(model.decoder.head.weight, std=1.0)
    return model.save_pretrained(tmp_path / "model.pt")


def test_segment_writes_flows_and_their_labels(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiff(tmp_path / "a.tif", FIELD.pixels)
    words = ["segment", str(tmp_path / "a.tif"), "--model", str(file), "--output", str(tmp_path / "out")]
    assert main([*words, "--save-dist-map", "--flow-error", "4", "--probability", "0.3"]) == 0
    flows = tifffile.imread(tmp_path / "out" / "a_flows.tif")
    assert flows.shape == (3, *FIELD.labels.shape)
    labels = tifffile.imread(tmp_path / "out" / "a_labels.tif")
    np.testing.assert_array_equal(labels, flows_to_labels(flows, probability=0.3, flow_error=4))
    capsys.readouterr()
    assert main([*words, "--save-dist-map"]) == 2
    assert "probability 0.3, flow error 4, stride 192, not with model" in capsys.readouterr().err
    assert main([*words, "--save-dist-map", "--flow-error", "4", "--probability", "0.3"]) == 0
    assert "skipped" in capsys.readouterr().out
    assert main([*words, "--cells-max", "0.4"]) == 2
    assert "cells_max: not a threshold of this segmenter" in capsys.readouterr().err


def test_the_evaluate_command_searches_and_stores_thresholds_of_flows(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    write_tiff(tmp_path / "images" / "a.tif", FIELD.pixels)
    write_labels(tmp_path / "masks" / "a.tif", FIELD.labels)
    build_labelled(folder_pairs(tmp_path, images="images/{name}.tif", masks="masks/{name}.tif"), tmp_path / "set")
    words = ["evaluate", "--model", str(file), "--dataset", str(tmp_path / "set"), "--output", str(tmp_path / "out")]
    words += ["--threshold-search"]
    assert main([*words, "--save-to-model"]) == 0
    output = capsys.readouterr().out
    assert "best thresholds: --probability" in output
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["threshold_search"]
    assert {"probability", "flow_error"} < set(found)
    settings = DINOCell.from_pretrained(file).settings
    is_stored = "stored in" in output
    assert (
        settings.probability == found["probability"] and settings.flow_error == found["flow_error"]
    ) or not is_stored
    assert "probability" in (tmp_path / "out" / "report.html").read_text()
    assert main([*words, "--cells-max-range", "0.1", "0.2"]) == 2
    assert "cells_max" in capsys.readouterr().err


def test_info_reports_the_postprocessing_of_flows(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", str(file)]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert (lines["target"], lines["cells"]) == ("flows", str(FlowPostprocessing()))
