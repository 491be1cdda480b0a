"""Evaluation: pooled scores, threshold search, predictions found by name, reports and the command."""

import base64
import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dinocell.cli import main
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.eval.evaluate import (
    CORRECT,
    FALSE,
    FOUND,
    MISSED,
    OURS,
    PLAIN,
    draw_errors,
    score,
    search_methods,
    segmenter_methods,
    tool_method,
)
from dinocell.eval.evaluation_sets import EvaluationSet, find_predictions
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.metrics.matching import matching_score
from dinocell.eval.metrics.overlaps import contingency_table
from dinocell.eval.report import write_report
from dinocell.eval.segmentation.pipeline import DINOCellPipeline, threshold_values
from dinocell.eval.segmentation.watershed import distance_to_labels
from dinocell.finetune.model import DINOCell
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.finetune.segmenter_file import read_segmenter
from dinocell.images.write import write_labels
from dinocell.labelled.dataset import LabelledSet, open_labelled
from dinocell.labelled.distance import labels_to_distance

CONFIG = SyntheticConfig(size=(72, 80), num_cells=(6, 9), cell_radius_px=9.0)
GRID = {
    "cells_max": threshold_values("cells_max", 0.3, 0.6, 3),
    "cell_fill": threshold_values("cell_fill", 0.05, 0.2, 3),
}


class MapInImage(DINOCellPipeline):
    """A pipeline without a network: the image shows the distance map to predict."""

    def __init__(self) -> None:
        settings = SegmenterSettings(min_area_px=12)
        self.model = SimpleNamespace(settings=settings)  # type: ignore[assignment]
        self.parameters = settings.postprocessing
        self.seen: list[float | int | None] = []

    def maps(self, image: np.ndarray, *, pixel_size_um: float | int | None = None, **_: object) -> np.ndarray:
        self.seen.append(pixel_size_um)
        return np.asarray(image[0], np.float32) / 255


def make_set(folder: Path, *, seed: int = 0, num_images: int = 3) -> LabelledSet:
    """Write images that show a blurred, noisy distance map of their labels."""
    rng = np.random.default_rng(seed)
    labels = [make_field(seed * 100 + number, CONFIG).labels for number in range(num_images)]
    maps = [labels_to_distance(each) + rng.normal(0, 0.04, each.shape) for each in labels]
    folder.mkdir(parents=True)
    np.save(folder / "imgs.npy", np.round(np.clip(maps, 0, 1) * 255).astype(np.uint8))
    np.save(folder / "anns.npy", np.array(labels, np.int16))
    return open_labelled(folder)


def write_predictions(folder: Path, data: LabelledSet, *, ending: str = "") -> list[np.ndarray]:
    """Write the references as another tool's results, shifted by three columns."""
    folder.mkdir(parents=True)
    shifted = [np.roll(np.asarray(data[index].labels), 3, axis=1).astype(np.int32) for index in range(len(data))]
    for name, labels in zip(data.names, shifted, strict=True):
        write_labels(folder / f"{name}{ending}.tif", labels)
    return shifted


def test_pooled_scores_are_those_of_the_scores_own_functions(tmp_path: Path) -> None:
    first, second = make_set(tmp_path / "one"), make_set(tmp_path / "two", seed=1, num_images=2)
    write_predictions(tmp_path / "tool" / "one", first)
    write_predictions(tmp_path / "tool" / "two", second, ending="_cp_masks")
    pipeline = MapInImage()
    sets: dict[str, EvaluationSet] = {"one": first, "two": second}
    found = score(sets, [*segmenter_methods(sets, pipeline), tool_method("Tool", tmp_path / "tool", sets)])
    assert list(found.methods) == [OURS, PLAIN, "Tool"]
    assert [(each.dataset, each.method) for each in found.pooled] == [
        (dataset, method) for dataset in ("one", "two", "all") for method in found.methods
    ]
    images = [data[index] for data in (first, second) for index in range(len(data))]
    references = [np.ascontiguousarray(image.labels) for image in images]
    maps = [np.asarray(image.pixels[0], np.float32) / 255 for image in images]
    rules = {OURS: {"min_area_px": 12}, PLAIN: {"merge_px": None, "restore_border": False}}
    labels = {name: [distance_to_labels(each, **rule) for each in maps] for name, rule in rules.items()}
    labels["Tool"] = [np.roll(each, 3, axis=1) for each in references]
    assert not np.array_equal(labels[OURS][0], labels[PLAIN][0])
    for row in found.pooled[-3:]:
        ctc, matching = (scorer(references, labels[row.method]) for scorer in (ctc_score, matching_score))
        half = matching.at[0]
        assert (row.num_images, row.drawn) == (5, "cells")
        assert (row.scores.seg, row.scores.det, row.scores.op_csb) == (ctc.seg, ctc.det, ctc.op_csb)
        assert (row.scores.ap_50, row.scores.f1) == (half.average_precision, half.f1)
        assert (row.scores.panoptic_quality, row.scores.aji) == (half.panoptic_quality, matching.aji)
        assert row.mean_over_images["seg"] == pytest.approx(ctc.mean_over_images.seg)
        assert row.intervals["seg"].low < row.scores.seg < row.intervals["seg"].high
        assert row.intervals["ap_50"].value == pytest.approx(row.scores.ap_50)
    assert len(pipeline.seen) == 5, "the network sees every image once"
    one = next(row for row in found.images if (row.dataset, row.image, row.method) == ("two", "000001", "Tool"))
    assert one.scores.seg == ctc_score(references[4], labels["Tool"][4]).seg


def test_search_adds_a_method_that_is_at_least_as_good_on_these_images(tmp_path: Path) -> None:
    data, pipeline = make_set(tmp_path / "one"), MapInImage()
    pipeline.parameters = pipeline.parameters.with_thresholds(cells_max=0.6, cell_fill=0.2)  # a point of the grid
    reports: list[tuple[str, int, int]] = []

    def report(*counts: Any) -> None:
        reports.append(counts)

    methods, search = search_methods({"one": data}, pipeline, tmp_path / "maps", axes=GRID, progress=report)
    rows = {row.method: row.scores for row in score({"one": data}, methods, progress=report).pooled}
    assert list(rows) == [OURS, PLAIN, FOUND]
    assert rows[FOUND].op_csb == pytest.approx(search.best_score)
    assert rows[FOUND].op_csb >= rows[OURS].op_csb
    assert len(pipeline.seen) == 3
    assert {what for what, done, total in reports if done == total} == {"predicted", "searched", "scored"}


def test_intervals_draw_images_where_there_are_enough(tmp_path: Path) -> None:
    sets = {"one": make_set(tmp_path / "one", num_images=12)}
    found = score(sets, segmenter_methods(sets, MapInImage()))
    assert {row.drawn for row in found.pooled} == {"images"}


def test_worst_images_come_first_and_perfect_ones_not_at_all(tmp_path: Path) -> None:
    data = make_set(tmp_path / "one")
    labels = write_predictions(tmp_path / "tool", data)
    write_labels(tmp_path / "tool" / "000002.tif", np.asarray(data[2].labels).astype(np.int32))
    write_labels(tmp_path / "tool" / "000001.tif", np.zeros_like(labels[1]))
    methods = [tool_method("Tool", tmp_path / "tool", {"one": data})]
    found = score({"one": data}, methods)
    assert found.worst[0].image == "000001"
    assert "000002" not in [error.image for error in found.worst]
    few = score({"one": data}, methods, num_worst=1)
    assert [error.image for error in few.worst] == ["000001"]


def test_errors_are_drawn_in_their_colours() -> None:
    reference, predicted = np.zeros((2, 40, 60), np.int32)
    reference[5:15, 5:15], predicted[5:15, 5:15] = 1, 9  # correct
    reference[25:35, 5:15] = 2  # missed
    predicted[5:15, 40:50] = 4  # false
    drawn = draw_errors(np.zeros((40, 60)), reference, predicted, contingency_table(reference, predicted))
    assert tuple(drawn[:, 5, 10]) == CORRECT
    assert tuple(drawn[:, 25, 10]) == MISSED
    assert tuple(drawn[:, 5, 45]) == FALSE
    assert np.array_equal(drawn[:, 30, 10], np.round(0.4 * np.array(MISSED)))
    assert not drawn[:, 20, 30].any()
    assert not drawn[:, 10, 10].any(), "a correct cell is only an outline"


def test_large_error_images_are_subsampled() -> None:
    labels = np.ones((8, 2400), np.int32)
    assert draw_errors(np.zeros(labels.shape), labels, labels, contingency_table(labels, labels)).shape == (3, 3, 800)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.tif"], "no label image of 1 of the 2 images of one (b)"),
        (["a.tif", "b.tif", "b_cp_masks.png"], "expected one label image of b"),
    ],
)
def test_missing_and_ambiguous_predictions_are_named(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(DinocellError, match=re.escape(message)):
        find_predictions(tmp_path, "one", ["a", "b"])


@pytest.mark.parametrize("file", ["A.1.tif", "A.1_labels.tif", "A.1_cp_masks.png", "A.1.tif_labels.tif"])
def test_predictions_of_images_whose_names_have_an_ending_are_found(tmp_path: Path, file: str) -> None:
    (tmp_path / file).touch()
    (tmp_path / "A.1_seg.npy").touch()  # Cellpose leaves it there, too
    assert find_predictions(tmp_path, "livecell", ["A.1.tif"]) == [tmp_path / file]


def test_predictions_of_another_size_are_named(tmp_path: Path) -> None:
    sets = {"one": make_set(tmp_path / "one", num_images=1)}
    (tmp_path / "tool").mkdir()
    write_labels(tmp_path / "tool" / "000000.tif", np.eye(8, dtype=np.int32))
    with pytest.raises(DinocellError, match=r"000000.tif: expected .* 72 x 80, got 8 x 8"):
        tool_method("Tool", tmp_path / "tool", sets).check(sets)


def test_report_embeds_its_images_and_marks_undefined_scores(tmp_path: Path) -> None:
    data = make_set(tmp_path / "<one>")
    empty = make_set(tmp_path / "empty", num_images=1)
    np.save(tmp_path / "empty" / "anns.npy", np.zeros((1, 72, 80), np.int16))
    empty = open_labelled(tmp_path / "empty")
    sets: dict[str, EvaluationSet] = {"<one>": data, "empty": empty}
    methods, search = search_methods(sets, MapInImage(), tmp_path / "maps", axes=GRID)
    found = replace(score(sets, methods), threshold_search=search)
    output = tmp_path / "out"
    output.mkdir()
    written = write_report(output, found, about={"model": "a & b"})
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in written)
    page = (output / "report.html").read_text(encoding="utf-8")
    images = re.findall(r'src="([^"]*)"', page)
    assert len(images) == len(found.worst) + 1
    for uri in images:
        kind, content = uri.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
    assert "&lt;one&gt;" in page
    assert "a &amp; b" in page
    assert "<one>" not in page
    assert page.count("<small>") == page.count("</small>") > 0
    assert "| DINOCell | 1 | undefined |" in (output / "scores.md").read_text(encoding="utf-8")
    kept = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    row = next(each for each in kept["pooled"] if (each["dataset"], each["method"]) == ("empty", OURS))
    assert row["scores"]["seg"] is None
    with (output / "scores_per_image.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 3
    for line, each in zip(lines, found.images, strict=True):
        for name, value in asdict(each.scores).items():
            assert line[name] == ("" if value != value else line[name])
            assert value != value or float(line[name]) == pytest.approx(value, abs=1e-6)
    # Without a search, the files of the earlier one would contradict the tables.
    write_report(output, score({"<one>": data}, segmenter_methods({"<one>": data}, MapInImage())), about={})
    assert not list(output.glob("threshold_search*"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small untrained segmenter, stored in half precision."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    return DINOCell("vitt16", pretrained=False).save_pretrained(path, dtype=torch.float16)


@pytest.mark.slow
def test_command_scores_a_model_and_stores_the_thresholds_found(
    tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "one", num_images=1)
    write_predictions(tmp_path / "tool", data)
    output, before = tmp_path / "out", read_segmenter(model_file)
    arguments = ["evaluate", "--model", str(model_file), "--dataset", str(tmp_path / "one"), "--output", str(output)]
    arguments += ["--predictions", f"Tool={tmp_path / 'tool'}", "--device", "cpu", "--threshold-search"]
    arguments += ["--cells-max-range", "0.02", "0.06", "--cell-fill-range", "0.01", "0.02", "--save-to-model"]
    assert main(arguments) == 0
    assert "Tool" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == [
        "report.html",
        "scores.csv",
        "scores.json",
        "scores.md",
        "scores_per_image.csv",
        "threshold_search.csv",
        "threshold_search.png",
    ]
    kept = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    scores = {each["method"]: each["scores"]["op_csb"] for each in kept["pooled"]}
    assert scores[FOUND] > scores[OURS], "else nothing would be stored"
    best = kept["threshold_search"]
    after = read_segmenter(model_file)
    assert (after.settings.cells_max, after.settings.cell_fill) == (best["cells_max"], best["cell_fill"])
    assert 0.02 <= after.settings.cells_max <= 0.06
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype == torch.float16
        assert torch.equal(after.tensors[name], tensor)
    # Now the model has the best point: it stays as it is.
    untouched = model_file.read_bytes()
    assert main(arguments) == 0
    assert "keeps its thresholds" in capsys.readouterr().out
    assert model_file.read_bytes() == untouched


def test_command_scores_other_tools_without_a_model(tmp_path: Path) -> None:
    data = make_set(tmp_path / "one")
    write_predictions(tmp_path / "tool", data, ending="_labels")
    arguments = ["evaluate", "--dataset", str(tmp_path / "one"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--predictions", f"Tool={tmp_path / 'tool'}"]) == 0
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert (line["dataset"], line["method"], line["num_images"]) == ("one", "Tool", "3")
    assert float(line["seg_low"]) < float(line["seg"]) < float(line["seg_high"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "nothing to score"),
        (["--predictions", "Tool"], "expected NAME=FOLDER"),
        (["--predictions", "Tool=nowhere"], "nowhere: no label image of 1 of the 1 images of one"),
        (["--predictions", "T=a", "T=b"], "different names, such as Cellpose=results/, got 'T=b'"),
        (["--predictions", "T=a", "--cells-max", "0.4"], "--cells-max: needs --model"),
        (["--predictions", "T=a", "--cells-max", "0"], "--cells-max: needs --model"),
        (["--predictions", "T=a", "--threshold-search"], "--threshold-search: needs --model"),
        (["--model", "m.pt", "--threshold-search", "--save-to-model"], "expected a local model, got m.pt"),
        (
            ["--model", "m.pt", "--threshold-search", "--save-to-model", "--cell-fill", "0.1"],
            "--cell-fill: cannot be used with --save-to-model",
        ),
        (["--model", "m.pt", "--save-to-model"], "--save-to-model: needs --threshold-search"),
        (["--model", "m.pt", "--cell-fill-range", "0", "1"], "--cell-fill-range: needs --threshold-search"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    make_set(tmp_path / "one", num_images=1)
    assert main(["evaluate", "--dataset", str(tmp_path / "one"), "--output", str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err


def test_sets_of_one_folder_name_are_told_apart_by_the_folder_above(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for parent in ("a", "b"):
        write_predictions(tmp_path / "sorted" / parent / "test", make_set(tmp_path / parent / "test", num_images=1))
    write_predictions(tmp_path / "flat", open_labelled(tmp_path / "a/test"))
    arguments = ["evaluate", "--dataset", str(tmp_path / "a/test"), str(tmp_path / "b/test")]
    arguments += ["--output", str(tmp_path / "out")]
    assert main([*arguments, "--predictions", f"Tool={tmp_path / 'sorted'}"]) == 0
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8") as file:
        assert [line["dataset"] for line in csv.DictReader(file)] == ["a/test", "b/test", "all"]
    assert main([*arguments, "--predictions", f"Tool={tmp_path / 'flat'}"]) == 2
    assert "000000.tif: several images have this name" in capsys.readouterr().err
