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
from jaxtyping import Float32, Int32, Real, UInt8
from matplotlib.figure import Figure
from PIL import Image

from dinocell._version import __version__
from dinocell.configs.load import read_mapping
from dinocell.data_shards.inspect import preview
from dinocell.demo.data import DemoConfig, DemoData
from dinocell.eval.export.writers import overlay
from dinocell.eval.metrics.ctc import ctc_score
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
ends below it, and one as short as this hardly does. The margin is the similarity of two channels of one field
minus that of two fields; the kNN accuracy is the share of fields whose cell class is predicted from a single
channel. The gain from pretraining is the difference to random weights.</p>"""
_SCORES = """
<p>SEG: overlap of reference cells with predicted ones. DET: detected, missed, split and false cells.
OP_CSB: the mean of both (measures of the Cell Tracking Challenge); 0 to 1, 1 is perfect.
Otsu + watershed is a baseline without training. Outlines are yellow.</p>"""


class Result(NamedTuple):
    """A held-out image with its reference, the prediction and the baseline."""

    name: str
    image: Real[np.ndarray, "h w"]
    reference: Int32[np.ndarray, "h w"]
    labels: Int32[np.ndarray, "h w"]
    distance: Float32[np.ndarray, "h w"]
    baseline: Int32[np.ndarray, "h w"]


def write_report(
    path: Path,
    folder: Path,
    config: DemoConfig,
    data: DemoData,
    probes: Mapping[str, tuple[float | None, float | None]],
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
        _probe_table(probes),
        "<h2>Fine-tuning</h2>",
        _curves(folder / "finetune", ("loss/train", "loss/validation"), unit="mean squared error of distance maps"),
        "<h2>Segmentation of unseen images</h2>",
    ]
    parts += (
        [_SCORES, _score_table(results), *(_row(result) for result in results[:_SHOWN])]
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _figure(Image.open(buffer), f"losses of {run.name}")


def _probe_table(probes: Mapping[str, tuple[float | None, float | None]]) -> str:
    rows = [(name, _number(margin), _number(accuracy)) for name, (margin, accuracy) in probes.items()]
    return _table(("features", "margin of channel consistency", "kNN accuracy of the cell class (5 neighbours)"), rows)


def _score_table(results: Sequence[Result]) -> str:
    references = [result.reference for result in results]
    rows = []
    for name, labels in (
        ("DINOCell", [r.labels for r in results]),
        ("Otsu + watershed", [r.baseline for r in results]),
    ):
        score = ctc_score(references, labels)
        rows.append((name, _number(score.seg), _number(score.det), _number(score.op_csb), str(score.num_predicted)))
    rows.append(("reference", "", "", "", str(sum(len(np.unique(labels)) - 1 for labels in references))))
    return _table(("method", "SEG", "DET", "OP_CSB", "cells"), rows)


def _row(result: Result) -> str:
    figures = [
        _figure(np.moveaxis(overlay(result.image, labels), 0, 2), caption)
        for labels, caption in (
            (result.reference, f"{result.name}: reference"),
            (result.labels, "DINOCell"),
            (result.baseline, "Otsu + watershed"),
        )
    ]
    distance = (np.clip(result.distance, 0, 1) * 255).astype(np.uint8)
    return f'<div class="row">{"".join(figures)}{_figure(distance, "distance map: black 0, white 1")}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
