"""What an evaluation leaves on the disk: tables (CSV, JSON, Markdown), the search's heat map, and one HTML page.

The page holds its pictures itself, so that it can be sent and opened anywhere.
"""

import base64
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dinocell.eval.evaluate import Evaluation
from dinocell.eval.metrics.summary import SCORE_NAMES, PooledScores, Scores
from dinocell.runtime.files import replacing, write_atomically

HEAT_MAP, GRID = "threshold_search.png", "threshold_search.csv"

# What a table for people shows; the files have everything.
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
    "num_reference": "cells",
    "num_predicted": "found",
    "num_missed": "missed",
    "num_spurious": "spurious",
    "num_splits": "merged",
}
_ALL = tuple(field.name for field in fields(Scores))
_OFFICIAL = ("seg_official", "det_official")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:93%;font-variant-numeric:tabular-nums}"
    "th,td{padding:.3rem .45rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}"
    "td:first-child{white-space:normal}small{color:#666}td small{font-size:72%}"
    "img{max-width:100%}figure{margin:1.5rem 0}.false{color:#c81e1e}.missed{color:#2255dd}"
    ".right{color:#2e8b2e}.table{overflow-x:auto}"
)


def write_report(folder: Path, evaluation: Evaluation, *, about: dict[str, str]) -> list[Path]:
    """Write every file of an evaluation to an existing folder and return their paths, ``report.html`` the last.

    Parameters
    ----------
    about
        What was evaluated, for the reader: shown above the tables as it is.

    Raises
    ------
    OSError
        If a file cannot be written; each is whole or not there.
    """
    written = [folder / name for name in ("scores.csv", "scores_per_image.csv", "scores.json", "scores.md")]
    _write_pooled(written[0], evaluation)
    _write_images(written[1], evaluation)
    write_atomically(written[2], json.dumps(_plain(evaluation, about), indent=1, allow_nan=False) + "\n")
    write_atomically(written[3], to_markdown(evaluation, about=about))
    for name in (HEAT_MAP, GRID):
        (folder / name).unlink(missing_ok=True)  # of an earlier evaluation: it would contradict this one's tables
    if evaluation.threshold_search is not None:
        evaluation.threshold_search.write_csv(folder / GRID)
        evaluation.threshold_search.write_heat_map(folder / HEAT_MAP)
        written += [folder / GRID, folder / HEAT_MAP]
    heat_map = (folder / HEAT_MAP).read_bytes() if evaluation.threshold_search is not None else None
    written.append(folder / "report.html")
    write_atomically(written[-1], _to_html(evaluation, about, heat_map))
    return written


def to_markdown(evaluation: Evaluation, *, about: dict[str, str]) -> str:
    """Return the pooled tables, one a set, with 95 % intervals, and what they mean."""
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
    notes = ["Scores are pooled: all cells of all images count alike. In parentheses: 95 % bootstrap intervals."]
    if "cells" in drawn:
        notes.append(
            "Where there are fewer than 12 images the bootstrap draws cells, not images: such an interval says nothing "
            "about other images."
        )
    if evaluation.threshold_search is not None:
        notes.append(
            "Thresholds found here are fitted to the images that they are scored on: that row is too good for a "
            "comparison. Score them on images that the search has not seen."
        )
    if any(pooled.official is not None for pooled in evaluation.pooled):
        notes.append(
            "Official: by the Cell Tracking Challenge's own SEGMeasure and DETMeasure, on the same masks, each set as "
            "one sequence."
        )
    notes.append("Crowd regions count as background. Missed, spurious and merged are the Cell Tracking Challenge's.")
    return notes


def _write_pooled(path: Path, evaluation: Evaluation) -> None:
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        bounded = list(evaluation.pooled[0].intervals)
        bounds = [f"{name}_{end}" for name in bounded for end in ("low", "high")]
        means = [f"{name}_mean_over_images" for name in SCORE_NAMES]
        table.writerow(["dataset", "method", "num_images", *_ALL, *bounds, *means, "interval_drawn_over", *_OFFICIAL])
        for each in evaluation.pooled:
            ends = [end for name in bounded for end in (each.intervals[name].low, each.intervals[name].high)]
            averaged = [each.mean_over_images[name] for name in SCORE_NAMES]
            values = [*(getattr(each.scores, name) for name in _ALL), *ends, *averaged]
            official = (each.official.seg, each.official.det) if each.official is not None else (math.nan, math.nan)
            shown = [*map(_shown, values), each.drawn, *map(_shown, official)]
            table.writerow([each.dataset, each.method, each.num_images, *shown])


def _write_images(path: Path, evaluation: Evaluation) -> None:
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["dataset", "image", "method", *_ALL])
        for each in evaluation.images:
            table.writerow(
                [each.dataset, each.image, each.method, *(_shown(getattr(each.scores, name)) for name in _ALL)]
            )


def _shown(value: int | float) -> object:
    """Whole numbers as they are, others with six decimals, undefined ones empty."""
    if isinstance(value, int):
        return value
    return "" if math.isnan(value) else f"{value:.6f}"


def _plain(evaluation: Evaluation, about: dict[str, str]) -> dict[str, Any]:
    """Return what JSON holds; undefined scores are null."""
    found = evaluation.threshold_search
    pooled = [
        asdict(each) | {"intervals": {name: ends._asdict() for name, ends in each.intervals.items()}}
        for each in evaluation.pooled
    ]
    plain = {
        "about": about,
        "methods": evaluation.methods,
        "pooled": pooled,
        "images": [asdict(each) for each in evaluation.images],
        "threshold_search": None
        if found is None
        else found.best._asdict() | {"metric": found.metric, "score": found.best_score},
    }
    return dict(_without_nan(plain))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _to_html(evaluation: Evaluation, about: dict[str, str], heat_map: bytes | None) -> str:
    parts = ["<h1>Evaluation</h1>", _list(about), "<h2>Methods</h2>", _list(evaluation.methods)]
    for dataset in _datasets(evaluation):
        parts += [f"<h2>{escape(dataset)}</h2>", _table(_rows(evaluation, dataset))]
    parts += [f"<p><small>{escape(note)}</small></p>" for note in _notes(evaluation)]
    if heat_map is not None and evaluation.threshold_search is not None:
        shown = list(evaluation.threshold_search.best._asdict().items())[:2]  # the axes of the picture
        caption = f"Best: {', '.join(f'{name} {value:.3g}' for name, value in shown)}."
        parts += ["<h2>Threshold search</h2>", _figure(heat_map, caption)]
    if evaluation.worst:
        parts += [
            f"<h2>Worst images of {escape(evaluation.worst[0].method)}</h2>",
            '<p><b class="false">Red: false cells.</b> <b class="missed">Blue: missed cells.</b> '
            '<b class="right">Green: outlines of the others</b> (matched at an IoU of 0.5).</p>',
        ]
    for each in evaluation.worst:
        caption = f"{each.dataset}: {each.image}. F1 {each.scores.f1:.3f}, {each.scores.num_reference} cells."
        parts.append(_figure(_png(each.picture), caption))
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _list(items: dict[str, str]) -> str:
    lines = "".join(f"<li><b>{escape(name)}</b>: {escape(value)}</li>" for name, value in items.items())
    return f"<ul>{lines}</ul>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<div class=table><table><tr>{head}</tr>{body}</table></div>"


def _cell(text: str) -> str:
    """Put what stands in parentheses on a line of its own, in small print."""
    value, parenthesis, rest = text.partition(" (")
    return escape(value) + (f"<br><small>({escape(rest)}</small>" if parenthesis else "")


def _figure(png: bytes, caption: str) -> str:
    content = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{content}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _png(picture: UInt8[np.ndarray, "3 h w"]) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.png_encode(np.ascontiguousarray(picture.transpose(1, 2, 0))))
