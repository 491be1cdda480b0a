"""Output of probes: scores (JSON, CSV, Markdown), figures, and an entry in the TensorBoard of the run."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from dinocell.eval.probes.classification import ClassScores
from dinocell.eval.report import to_json
from dinocell.images.read import read_image
from dinocell.runtime.files import replacing, write_atomically, write_table


def write_scores(
    folder: Path,
    name: str,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    note: str = "",
) -> list[Path]:
    """Write ``NAME.json``, ``NAME.csv`` and ``NAME.md`` and return their paths.

    Parameters
    ----------
    about
        Description of the measurement.
    rows
        The table, one mapping per row, all with the same keys.
    note
        A sentence under the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "csv", "md")]
    content = {"about": dict(about), "rows": [dict(row) for row in rows], "note": note}
    write_atomically(paths[0], to_json(content))
    columns = list(rows[0]) if rows else []
    write_table(paths[1], [columns, *([row[column] for column in columns] for row in rows)])
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_shown(row[column]) for column in columns)} |" for row in rows]
    write_atomically(paths[2], "\n".join([*lines, *(["", note] if note else [])]) + "\n")
    return paths


def write_classes(
    folder: Path, name: str, classes: Sequence[str], scores: ClassScores, table: Int[np.ndarray, "c c"] | None
) -> dict[str, Path]:
    """Write the F1 of each class as ``NAME_classes.csv`` and as a figure, and the confusion matrix as a figure.

    ``table`` has the images by true and predicted class; None for multi-label targets. Returns the paths of the
    figures, by content.
    """
    f1, support = scores.f1, scores.support.tolist()
    values = ["" if math.isnan(value) else f"{value:.6f}" for value in f1.tolist()]
    write_table(
        folder / f"{name}_classes.csv", [("class", "f1", "images"), *zip(classes, values, support, strict=True)]
    )
    figures = {"classes": folder / f"{name}_classes.png"}
    figure = Figure(figsize=(7, 1 + 0.24 * len(classes)), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(np.nan_to_num(f1, nan=-1.0))
    axes.barh(range(len(order)), np.nan_to_num(f1[order]), color="#3b6ea5")
    axes.set_yticks(range(len(order)), [f"{classes[k]} ({support[k]})" for k in order], fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1 (in brackets: images of the class)")
    axes.margins(y=0.01)
    _save(figure, figures["classes"])
    if table is not None:
        figures["confusion"] = folder / f"{name}_confusion.png"
        shares = table / np.maximum(table.sum(1, keepdims=True), 1)  # of each true class
        numbers = table if len(classes) <= 20 else None
        _draw_matrix(figures["confusion"], shares, classes, ("true", "predicted"), numbers)
    return figures


def draw_pairs(path: Path, names: Sequence[str], values: Float[np.ndarray, "c c"], title: str) -> None:
    """Draw a matrix with one number per pair of channels."""
    _draw_matrix(path, values, names, ("query channel", "reference channel"), np.round(values, 2), title)


def _draw_matrix(
    path: Path,
    values: np.ndarray,
    names: Sequence[str],
    labels: tuple[str, str],
    numbers: np.ndarray | None,
    title: str = "",
) -> None:
    """Draw a square matrix whose rows and columns have the same names, labelled (rows, columns)."""
    side = max(3.0, 1.6 + 0.42 * len(names))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="Blues", vmin=min(0.0, float(np.nanmin(values))), vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    axes.set_title(title, fontsize=10)
    if numbers is not None:
        for row, column in np.ndindex(numbers.shape):
            colour = "white" if values[row, column] > 0.6 else "black"
            axes.text(column, row, str(numbers[row, column]), ha="center", va="center", fontsize=7, color=colour)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def log_to_run(weights: str, numbers: Mapping[str, float], figures: Mapping[str, Path]) -> Path | None:
    """Add numbers and PNG files to the TensorBoard of the run that exported a teacher, at the step of the export.

    A teacher is in ``RUN/eval/training_STEP/``. Returns the folder of the events, or None for weights without a run.
    """
    match = re.search(r"^(.*)/eval/training_(\d+)/[^/]+$", str(Path(weights).absolute()))
    if match is None or not (Path(match[1]) / "tensorboard").is_dir():
        return None
    from torch.utils.tensorboard.writer import SummaryWriter

    folder = Path(match[1]) / "tensorboard"
    with SummaryWriter(str(folder), filename_suffix=".probe") as writer:
        for name, value in numbers.items():
            writer.add_scalar(name, value, int(match[2]))
        for name, path in figures.items():
            writer.add_image(name, read_image(path).pixels, int(match[2]), dataformats="CHW")
    return folder


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
