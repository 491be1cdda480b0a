"""Files of an evaluation: tables (CSV, JSON, Markdown), the search's heat map, and a self-contained HTML page.

`render_page`, `to_png` and `to_json` serve other reports too.
"""

import base64
import io
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment
from matplotlib.figure import Figure

from dinocell.eval.evaluate import Evaluation
from dinocell.eval.metrics.summary import SCORE_NAMES, PooledScores, Scores
from dinocell.runtime.files import write_atomically, write_table

HEAT_MAP, GRID = "threshold_search.png", "threshold_search.csv"

# Columns of the tables for people; the files have all scores.
_SHOWN = {
    "seg": "SEG",
    "det": "DET",
    "op_csb": "OP_CSB",
    "ap_50": "AP@0.5",
    "mean_ap": "AP@0.5:0.95",
    "f1": "F1@0.5",
    "panoptic_quality": "PQ",
}
_COUNTS = {
    "num_reference": "reference cells",
    "num_predicted": "predicted cells",
    "num_missed": "missed",
    "num_spurious": "spurious",
    "num_splits": "merged",
}
_ALL = tuple(field.name for field in fields(Scores))


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:93%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .45rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal} td small{font-size:72%} small{color:#666}
img{max-width:100%} figure{margin:1.5rem 0} figcaption{font-size:90%;color:#555} .table{overflow-x:auto}
.row{display:grid;grid-template-columns:repeat(4,1fr);gap:8px} .row figure{margin:.3rem 0}
.false{color:#c81e1e} .missed{color:#2255dd} .right{color:#2e8b2e}
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>{{ style | safe }}</style></head>
<body>
<h1>{{ title }}</h1>
{{ body | safe }}
</body></html>
"""
_MACROS = """
{%- macro facts(items) -%}
<ul>{% for name, value in items.items() %}<li><b>{{ name }}</b>: {{ value }}</li>{% endfor %}</ul>
{%- endmacro -%}
{%- macro figure(png, caption) -%}
<figure><img alt="{{ caption }}" src="{{ png | data_uri }}"><figcaption>{{ caption }}</figcaption></figure>
{%- endmacro -%}
{%- macro table(header, rows) -%}
<div class="table"><table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}{% set parts = cell.split(" (", 1) %}<td>{{ parts[0] }}
{%- if parts[1] is defined %}<br><small>({{ parts[1] }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{%- endmacro -%}
"""
_EVALUATION = """
{{ facts(about) }}
<h2>Methods</h2>
{{ facts(evaluation.methods) }}
{% for dataset, rows in tables.items() %}
<h2>{{ dataset }}</h2>
{{ table(rows[0], rows[1:]) }}
{% endfor %}
{% for note in notes %}<p><small>{{ note }}</small></p>
{% endfor %}
{% if heat_map %}
<h2>Threshold search</h2>
{{ figure(heat_map, "Best: " ~ best ~ ".") }}
{% endif %}
{% if evaluation.worst %}
<h2>Worst images of {{ evaluation.worst[0].method }}</h2>
<p><b class="false">Red: false cells.</b> <b class="missed">Blue: missed cells.</b>
<b class="right">Green: outlines of the correct cells</b> (matched at an IoU of 0.5).</p>
{% for error in evaluation.worst %}
{{ figure(to_png(error.image_rgb), "%s: %s. F1 %.3f, %d cells." | format(error.dataset, error.image,
   error.scores.f1, error.scores.num_reference)) }}
{% endfor %}
{% endif %}
"""


def render_page(title: str, template: str, **values: Any) -> str:
    """Render a self-contained HTML page from the Jinja2 template of its body.

    The template may call ``table(header, rows)``, ``figure(png, caption)`` and ``facts(items)`` (name to value). In
    table cells, text in parentheses is put on a line of its own in small print. Values are escaped.
    """
    environment = Environment(autoescape=True)
    environment.filters["data_uri"] = _data_uri
    body = environment.from_string(_MACROS + template).render(**values)
    return environment.from_string(_PAGE).render(title=title, style=_STYLE, body=body)


def to_png(image: UInt8[np.ndarray, "3 h w"] | UInt8[np.ndarray, "h w"] | Figure) -> bytes:
    """Return an RGB or grey image, or a matplotlib figure, as PNG."""
    if isinstance(image, Figure):
        buffer = io.BytesIO()
        image.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()
    import imagecodecs

    return bytes(imagecodecs.png_encode(np.ascontiguousarray(image if image.ndim == 2 else np.moveaxis(image, 0, 2))))


def to_json(value: Any) -> str:
    """Return indented JSON, in which numbers that are not finite are null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def write_report(folder: Path, evaluation: Evaluation, *, about: dict[str, str]) -> list[Path]:
    """Write every file of an evaluation to an existing folder and return their paths, ``report.html`` the last.

    An OSError if a file cannot be written; each is written atomically.

    Parameters
    ----------
    about
        Facts about the evaluation, by name; shown above the tables.
    """
    written = [folder / name for name in ("scores.csv", "scores_per_image.csv", "scores.json", "scores.md")]
    _write_pooled(written[0], evaluation)
    images = [
        [row.dataset, row.image, row.method, *(_shown(getattr(row.scores, name)) for name in _ALL)]
        for row in evaluation.images
    ]
    write_table(written[1], [["dataset", "image", "method", *_ALL], *images])
    write_atomically(written[2], to_json(_to_dict(evaluation, about)))
    write_atomically(written[3], to_markdown(evaluation, about=about))
    for name in (HEAT_MAP, GRID):
        (folder / name).unlink(missing_ok=True)  # of an earlier evaluation: it would contradict these tables
    if evaluation.threshold_search is not None:
        evaluation.threshold_search.write_csv(folder / GRID)
        evaluation.threshold_search.write_heat_map(folder / HEAT_MAP)
        written += [folder / GRID, folder / HEAT_MAP]
    heat_map = (folder / HEAT_MAP).read_bytes() if evaluation.threshold_search is not None else None
    written.append(folder / "report.html")
    write_atomically(written[-1], _to_html(evaluation, about, heat_map))
    return written


def to_markdown(evaluation: Evaluation, *, about: dict[str, str]) -> str:
    """Return the pooled tables, one per set, with 95 % intervals and notes."""
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in about.items())]
    lines += [f"- {name}: {how}" for name, how in evaluation.methods.items()]
    for dataset in _datasets(evaluation):
        rows = _rows(evaluation, dataset)
        lines += ["", f"## {dataset}", ""]
        lines += [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * 2 + ["---:"] * (len(rows[0]) - 2), *rows[1:])]
    return "\n".join([*lines, "", *_notes(evaluation), ""])


def _datasets(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(pooled.dataset for pooled in evaluation.pooled))


def _rows(evaluation: Evaluation, dataset: str) -> list[list[str]]:
    """Return a header and a row for each method, as text."""
    chosen = [pooled for pooled in evaluation.pooled if pooled.dataset == dataset]
    is_official = any(pooled.official is not None for pooled in chosen)
    official = ["SEG official", "DET official"] if is_official else []
    rows = [["method", "images", *_SHOWN.values(), *official, *_COUNTS.values()]]
    for pooled in chosen:
        scores = [_with_interval(pooled, name) for name in _SHOWN]
        if pooled.official is not None:
            scores += [f"{pooled.official.seg:.3f}", f"{pooled.official.det:.3f}"]
        rows.append(
            [pooled.method, str(pooled.num_images), *scores, *(str(getattr(pooled.scores, n)) for n in _COUNTS)]
        )
    return rows


def _with_interval(pooled: PooledScores, name: str) -> str:
    value, interval = getattr(pooled.scores, name), pooled.intervals.get(name)
    if math.isnan(value):
        return "undefined"
    if interval is None or math.isnan(interval.low):
        return f"{value:.3f}"
    return f"{value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _notes(evaluation: Evaluation) -> list[str]:
    drawn = {pooled.drawn for pooled in evaluation.pooled}
    notes = ["Scores are pooled: all cells of all images have equal weight. In parentheses: 95 % bootstrap intervals."]
    if "cells" in drawn:
        notes.append(
            "With fewer than 12 images the bootstrap resamples cells, not images: such an interval does not generalise "
            "to other images."
        )
    if evaluation.threshold_search is not None:
        notes.append(
            "Thresholds found here are fitted to the images that they are scored on, so that row is too optimistic for "
            "a comparison. Score them on images that were not used for the search."
        )
    if any(pooled.official is not None for pooled in evaluation.pooled):
        notes.append(
            "Official: by the Cell Tracking Challenge's own SEGMeasure and DETMeasure, on the same masks, each set as "
            "one sequence."
        )
    notes.append("Crowd regions count as background. Missed, spurious and merged are the Cell Tracking Challenge's.")
    return notes


def _write_pooled(path: Path, evaluation: Evaluation) -> None:
    bounded = list(evaluation.pooled[0].intervals)
    bounds = [f"{name}_{end}" for name in bounded for end in ("low", "high")]
    means = [f"{name}_mean_over_images" for name in SCORE_NAMES]
    rows: list[list[object]] = [
        [
            "dataset",
            "method",
            "num_images",
            *_ALL,
            *bounds,
            *means,
            "interval_drawn_over",
            "seg_official",
            "det_official",
        ]
    ]
    for row in evaluation.pooled:
        ends = [end for name in bounded for end in (row.intervals[name].low, row.intervals[name].high)]
        averaged = [row.mean_over_images[name] for name in SCORE_NAMES]
        values = [*(getattr(row.scores, name) for name in _ALL), *ends, *averaged]
        official = (row.official.seg, row.official.det) if row.official is not None else (math.nan, math.nan)
        shown = [*map(_shown, values), row.drawn, *map(_shown, official)]
        rows.append([row.dataset, row.method, row.num_images, *shown])
    write_table(path, rows)


def _shown(value: int | float) -> object:
    """Return integers as they are, other numbers with six decimals, undefined ones empty."""
    if isinstance(value, int):
        return value
    return "" if math.isnan(value) else f"{value:.6f}"


def _to_dict(evaluation: Evaluation, about: dict[str, str]) -> dict[str, Any]:
    search = evaluation.threshold_search
    return {
        "about": about,
        "methods": evaluation.methods,
        "pooled": [
            asdict(pooled) | {"intervals": {name: ends._asdict() for name, ends in pooled.intervals.items()}}
            for pooled in evaluation.pooled
        ],
        "images": [asdict(image) for image in evaluation.images],
        "threshold_search": search and {**search.best_point, "metric": search.metric, "score": search.best_score},
    }


def _to_html(evaluation: Evaluation, about: dict[str, str], heat_map: bytes | None) -> str:
    best = list(evaluation.threshold_search.best_point.items())[:2] if evaluation.threshold_search else []
    return render_page(
        "Evaluation",
        _EVALUATION,
        about=about,
        evaluation=evaluation,
        tables={dataset: _rows(evaluation, dataset) for dataset in _datasets(evaluation)},
        notes=_notes(evaluation),
        heat_map=heat_map,
        best=", ".join(f"{name} {value:.3g}" for name, value in best),
        to_png=to_png,
    )
