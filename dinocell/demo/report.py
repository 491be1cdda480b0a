"""The report of the demo: one self-contained HTML file."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Real, UInt8
from matplotlib.figure import Figure
from PIL import Image

from dinocell._version import __version__
from dinocell.configs.load import read_mapping
from dinocell.data_shards.inspect import preview
from dinocell.demo.data import DemoConfig, DemoData
from dinocell.eval.export.writers import overlay
from dinocell.runtime.files import write_atomically

_SHOWN = 6
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1,h2{line-height:1.2} table{border-collapse:collapse;margin:1em 0}
td,th{padding:.3em .9em;border-bottom:1px solid #ddd}
td:not(:first-child),th:not(:first-child){text-align:right}
figure{margin:0} figcaption{font-size:85%;color:#555}
.row{display:grid;grid-template-columns:repeat(4,1fr);gap:8px;margin-bottom:14px} img{max-width:100%}
"""
_PRETRAINING = """
<p>At the dashed line (ln K) the targets are uniform over the prototypes: a run that learns from the DINO losses
ends below it.</p>"""
_FEATURES = """
<p>Margin: similarity of two channels of one field minus that of two fields. Retrieval: share of fields whose nearest
field in another channel is the field itself. kNN: share of fields whose cell class is predicted from a single channel,
among the channel means of the fields that were pretrained on. Patch R2: how much of the distance map a linear readout
of the patch tokens predicts on unseen images. The gain from pretraining is the difference to random weights.</p>"""
_SCORES = """
<p>Both segmenters have the same decoder, trained on the same labelled images; their frozen backbones differ.
SEG: overlap of reference cells with predicted ones. DET: detected, missed, split and false cells.
OP_CSB: the mean of both (measures of the Cell Tracking Challenge); 0 to 1, 1 is perfect.
Otsu + watershed is a baseline without training. Outlines are yellow.</p>"""
NAMES = {"pretrained": "pretrained", "random": "random weights", "otsu": "Otsu + watershed"}
"""Names of the compared methods on the page, by their names in ``summary.json``."""
_COLOURS = {"pretrained": "tab:blue", "random": "tab:gray", "otsu": "tab:orange"}


class FeatureScores(NamedTuple):
    """Accuracy of kNN, margin and retrieval of channel consistency, R2 of patches; None where it cannot be measured."""

    knn: float | None
    margin: float | None
    retrieval: float | None
    patch_r2: float | None


class SegmentationScores(NamedTuple):
    """Measures of the Cell Tracking Challenge, each 0 to 1."""

    seg: float
    det: float
    op_csb: float


class Summary(NamedTuple):
    """The results of a demo, by method; no segmentations without masks. ``minutes`` of the last call."""

    features: Mapping[str, FeatureScores]
    segmentation: Mapping[str, SegmentationScores]
    minutes: float

    def to_json(self) -> str:
        """Return the contents of ``summary.json``."""
        scores = {
            part: {name: row._asdict() for name, row in getattr(self, part).items()}
            for part in ("features", "segmentation")
        }
        return json.dumps({**scores, "minutes": self.minutes}, indent=1) + "\n"

    def lines(self, num_images: int) -> list[str]:
        """Return one line per backbone and per method, for the terminal."""
        labels = {"knn": "kNN", "margin": "margin", "retrieval": "retrieval", "patch_r2": "patch R2"}
        lines = []
        for name, row in self.features.items():
            numbers = [f"{labels[key]} {value:.3f}" for key, value in row._asdict().items() if value is not None]
            if numbers:
                lines.append(f"features, {NAMES[name]}: {', '.join(numbers)}")
        for name, scores in self.segmentation.items():
            numbers = [f"SEG {scores.seg:.3f}", f"DET {scores.det:.3f}", f"OP_CSB {scores.op_csb:.3f}"]
            lines.append(f"segmentation, {NAMES[name]}: {', '.join(numbers)} on {num_images} images")
        return lines

    def sentence(self) -> str:
        """Return in one sentence what pretraining changed."""
        before, after = self.features["random"], self.features["pretrained"]
        parts = [
            f"{words} from {getattr(before, key):.2f} to {getattr(after, key):.2f}"
            for key, words in (
                ("knn", "the accuracy of the cell class through a single channel"),
                ("margin", "the margin of channel consistency"),
                ("patch_r2", "the R2 of patch tokens"),
            )
            if getattr(before, key) is not None
        ]
        if self.segmentation:
            scores = [self.segmentation[name].op_csb for name in ("random", "pretrained")]
            parts.append(f"the score OP_CSB of the segmenter from {scores[0]:.2f} to {scores[1]:.2f}")
        return f"From random weights to pretrained ones: {', '.join(parts)}." if parts else ""


class Result(NamedTuple):
    """A held-out image with its reference and the labels of each method."""

    name: str
    image: Real[np.ndarray, "h w"]
    reference: Int32[np.ndarray, "h w"]
    labels: Mapping[str, Int32[np.ndarray, "h w"]]


def write_report(
    path: Path,
    folder: Path,
    config: DemoConfig,
    data: DemoData,
    summary: Summary,
    results: Sequence[Result],
) -> Path:
    """Write the report and return its path."""
    sheet = folder / "shards.png"
    preview(data.shards[0], sheet, num_samples=3)
    parts = [
        "<h1>DINOCell demo: the full pipeline</h1>",
        f"<p>{html.escape(_source(config))}: {len(data.channels)} channels "
        f"({html.escape(', '.join(data.channels))}). Pretrained without labels, fine-tuned on labelled images, "
        "evaluated on held-out images.</p>",
        "<h2>What pretraining is worth</h2>",
        f"<p>{html.escape(summary.sentence())}</p>",
        _bars(summary),
        "<h2>Images</h2>",
        _figure(
            Image.open(sheet),
            "one field per row, one channel per column; black and white are percentiles 0.1 and 99.9 of the channel",
        ),
        "<h2>Pretraining</h2>",
        _curves(
            folder / "pretrain",
            ("loss/total", "loss/dino_global", "loss/dino_local", "loss/ibot"),
            unit="loss (nats)",
            uniform=_num_prototypes(folder / "pretrain"),
        ),
        _PRETRAINING,
        _FEATURES,
        _feature_table(summary),
        "<h2>Fine-tuning</h2>",
        _curves(folder / "finetune", ("loss/train", "loss/validation"), unit="mean squared error of distance maps"),
        "<h2>Segmentation of unseen images</h2>",
    ]
    parts += (
        [_SCORES, _score_table(summary, results), *(_row(result) for result in results[:_SHOWN])]
        if results
        else ["<p>No masks.</p>"]
    )
    parts.append(f"<p>dinocell {__version__}</p>")
    body = "\n".join(parts)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>DINOCell demo</title><style>{_STYLE}</style>"
    write_atomically(path, f"{head}\n{body}\n</html>\n")
    return path


def _source(config: DemoConfig) -> str:
    return f"Images of {config.data}" if config.data is not None else f"Generated fields, seed {config.seed}"


def _figure(picture: Image.Image | UInt8[np.ndarray, "..."], caption: str) -> str:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _num_prototypes(run: Path) -> int | None:
    """Return the number of prototypes of a pretraining run; None if there was none."""
    recipe = run / "config.yaml"
    return int(read_mapping(recipe)["heads"]["num_prototypes"]) if recipe.exists() else None


def _curves(run: Path, names: Sequence[str], *, unit: str, uniform: int | None = None) -> str:
    """Draw numbers of a run over its steps, and where so many prototypes are all the same to it."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return "<p>Not run here: a given backbone was used.</p>"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes: Any = figure.subplots()
    for name in names:
        points = [(row["step"], float(row[name])) for row in rows if name in row]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=name.removeprefix("loss/"), marker="." if len(points) < 20 else ""
            )
    if uniform is not None:
        label = f"ln {uniform}: uniform targets"
        axes.axhline(math.log(uniform), color="grey", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    figure.legend(loc="outside right upper")
    return _drawn(figure, f"losses of {run.name}")


def _drawn(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _figure(Image.open(buffer), caption)


def _bars(summary: Summary) -> str:
    """Draw the numbers that pretraining is to improve, as bars for each method."""
    labels = {"knn": "kNN accuracy", "margin": "margin", "patch_r2": "patch R2"}
    groups = [(word, {n: getattr(r, key) for n, r in summary.features.items()}) for key, word in labels.items()]
    groups.append(("OP_CSB", {name: scores.op_csb for name, scores in summary.segmentation.items()}))
    groups = [(word, values) for word, values in groups if values and None not in values.values()]
    if not groups:
        return ""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes: Any = figure.subplots()
    for number, name in enumerate(NAMES):
        bars = [(place, values[name]) for place, (_, values) in enumerate(groups) if name in values]
        if bars:
            at, heights = zip(*bars, strict=True)
            drawn = axes.bar(np.array(at) + 0.27 * (number - 1), heights, 0.25, label=NAMES[name], color=_COLOURS[name])
            axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(groups)), [word for word, _ in groups])
    axes.set_ylim(top=1.05)
    figure.legend(loc="outside right upper")
    return _drawn(figure, "features and segmentation with pretrained and with random weights; 1 is perfect")


def _feature_table(summary: Summary) -> str:
    rows = [(NAMES[name], *map(_number, row)) for name, row in summary.features.items()]
    return _table(("features", "kNN accuracy (5 neighbours)", "margin", "retrieval", "patch R2"), rows)


def _score_table(summary: Summary, results: Sequence[Result]) -> str:
    def num_cells(labels: Sequence[Int32[np.ndarray, "h w"]]) -> str:
        return str(sum(len(np.unique(image[image > 0])) for image in labels))

    rows = [
        (NAMES[name], *map(_number, scores), num_cells([result.labels[name] for result in results]))
        for name, scores in summary.segmentation.items()
    ]
    rows.append(("reference", "", "", "", num_cells([result.reference for result in results])))
    return _table(("method", "SEG", "DET", "OP_CSB", "cells"), rows)


def _row(result: Result) -> str:
    outlines = {f"{result.name}: reference": result.reference} | {
        NAMES[name]: labels for name, labels in result.labels.items()
    }
    figures = [
        _figure(np.moveaxis(overlay(result.image, labels), 0, 2), caption) for caption, labels in outlines.items()
    ]
    return f'<div class="row">{"".join(figures)}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
