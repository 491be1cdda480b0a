"""Classification of images by probes: targets from label columns, and macro F1, accuracy and top-k accuracy.

The F1 scores are those of Cell-DINO's evaluation (torchmetrics' macro averages): for class labels, a class that neither
occurs nor is predicted is excluded; for multi-label rows it counts as 0.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import ConfigError, DinocellError
from dinocell.eval.probes.image_sets import labels_of

PROTEIN, CELL_TYPE = "PROTEIN_LOCALIZATION", "CELL_TYPE"
MULTILABEL, MULTICLASS = "mean_per_class_multilabel_f1", "mean_per_class_multiclass_f1"

# Parts of the location names of the Human Protein Atlas; its tables also have one column per cell line.
_PLACES = (
    "nucle", "cyto", "golgi", "mitochond", "mitotic", "vesicle", "plasma", "centr", "actin", "tubule", "aggresome",
    "filament", "reticulum", "peroxi", "endosome", "lysosome", "lipid", "staining", "negative", "rods", "junction",
    "focal", "spindle", "midbody", "chromosome", "body", "bodies", "multi-location", "unspecific",
)  # fmt: skip
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0", "")


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Targets of two sets: class indices, (n,), or rows of zeros and ones, (n c).

    Unlabelled images of either set are excluded; the masks select the labelled ones.
    """

    classes: tuple[str, ...]
    train: Tensor
    test: Tensor
    train_kept: Tensor
    test_kept: Tensor
    multilabel: bool


def make_task(
    name: str,
    train: Sequence[Mapping[str, LabelValue]],
    test: Sequence[Mapping[str, LabelValue]],
    *,
    train_name: str,
    test_name: str,
    columns: Sequence[str] = (),
) -> Task:
    """Read the targets of a task from the label columns of two sets.

    A DinocellError if a column is missing or has invalid values.

    Parameters
    ----------
    name
        A column of classes; or ``PROTEIN_LOCALIZATION``: the boolean columns that are named after cell compartments; or
        ``CELL_TYPE``: the column ``cell_type``, else the other boolean columns, one of which is true. Images without a
        true compartment are unlabelled.
    columns
        For several labels per image: their columns, with any names; ``name`` is then only the name of the task.
    """
    sets, set_names = (train, test), (train_name, test_name)
    multilabel = bool(columns) or name == PROTEIN
    if multilabel:
        classes = list(columns) or [column for column in _boolean_columns(train) if _is_place(column)]
        rows = [_rows(labels, classes, where) for labels, where in zip(sets, set_names, strict=True)]
        # In the Human Protein Atlas an image without a location is not annotated. Columns selected by the caller
        # may all be false.
        kept = [torch.ones(len(row), dtype=torch.bool) if columns else row.bool().any(1) for row in rows]
        targets = [row[labelled] for row, labelled in zip(rows, kept, strict=True)]
        lacking = "has a true boolean column named after a cell compartment; select columns with --columns"
    else:
        named = [_classes(name, labels, where) for labels, where in zip(sets, set_names, strict=True)]
        classes = sorted({label for labels in named for label in labels if label})
        index_of = {label: index for index, label in enumerate(classes)}
        kept = [torch.tensor([bool(label) for label in labels]) for labels in named]
        targets = [torch.tensor([index_of[label] for label in labels if label]) for labels in named]
        lacking = f"has a label {name!r}"
    for target, where in zip(targets, set_names, strict=True):
        if not len(target):
            raise DinocellError(f"{where}: no image {lacking}")
    return Task(
        classes=tuple(classes),
        train=targets[0],
        test=targets[1],
        train_kept=kept[0],
        test_kept=kept[1],
        multilabel=multilabel,
    )


def _classes(name: str, rows: Sequence[Mapping[str, LabelValue]], where: str) -> list[str]:
    if name != CELL_TYPE or any(name in row for row in rows):
        return labels_of(rows, name, where)
    columns = [column for column in _boolean_columns(rows) if not _is_place(column)]
    if not columns or any("cell_type" in row for row in rows):
        return labels_of(rows, "cell_type", where)
    classes = []
    for index, row in enumerate(rows):
        true = [column for column in columns if _is_true(row.get(column, ""), column, where)]
        if len(true) > 1:
            raise DinocellError(f"{where}: image {index + 1} has several cell types: {', '.join(true)}")
        classes.append(true[0] if true else "")
    return classes


def _rows(rows: Sequence[Mapping[str, LabelValue]], columns: Sequence[str], where: str) -> Tensor:
    values = [[float(_is_true(value, column, where)) for value in labels_of(rows, column, where)] for column in columns]
    return torch.tensor(values).reshape(len(columns), len(rows)).T.contiguous()


def _boolean_columns(rows: Sequence[Mapping[str, LabelValue]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [column for column in columns if all(str(row.get(column, "")).lower() in _TRUE + _FALSE for row in rows)]


def _is_true(value: LabelValue, column: str, where: str) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise DinocellError(f"{where}: column {column}: expected true or false, got {value!r}")
    return text in _TRUE


def _is_place(column: str) -> bool:
    return any(word in column.lower() for word in _PLACES)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassScores:
    """A score, and the F1 (NaN if excluded) and the number of true images of each class."""

    value: float
    f1: Float[np.ndarray, " c"]
    support: Int[np.ndarray, " c"]


def multiclass_f1(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> ClassScores:
    """Return the macro F1 of the highest score of each row."""
    table = confusion(scores, labels)
    both = table.sum(0) + table.sum(1)
    f1 = np.divide(2 * np.diag(table), both, out=np.full(len(table), np.nan), where=both > 0)
    return ClassScores(value=_mean(f1), f1=f1, support=table.sum(1))


def multilabel_f1(scores: Float[Tensor, "n c"], labels: Float[Tensor, "n c"], *, threshold: float = 0.5) -> ClassScores:
    """Return the macro F1 of all classes; a class is predicted if its probability is above the threshold."""
    predicted, true = scores.cpu().numpy() > threshold, labels.cpu().numpy() > 0.5
    right = (predicted & true).sum(0)
    both = predicted.sum(0) + true.sum(0)
    f1 = np.divide(2 * right, both, out=np.zeros(len(both)), where=both > 0)
    return ClassScores(value=_mean(f1), f1=f1, support=true.sum(0))


def accuracy(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"], *, k: int = 1) -> ClassScores:
    """Return how often the true class is among the ``k`` highest scores; ``f1`` is that of the highest."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    value = float((best == labels[:, None]).any(1).double().mean())  # NaN without images
    return replace(multiclass_f1(scores, labels), value=value)


def confusion(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Int[np.ndarray, "c c"]:
    """Count images by true class (rows) and predicted class (columns)."""
    classes = scores.shape[1]
    cells = labels.cpu().numpy() * classes + scores.argmax(1).cpu().numpy()
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


Metric = Callable[[Tensor, Tensor], ClassScores]


def metric_of(name: str, *, multilabel: bool, logits: bool = False) -> Metric:
    """Return a metric by name: one of the two F1, ``accuracy``, or ``top-5`` and the like.

    A ConfigError if there is no such metric for these labels.

    Parameters
    ----------
    logits
        Whether scores are logits rather than probabilities. It cannot be inferred from their range: shares of votes may
        exceed 1 by rounding, and the logits of a weak classifier may all be between 0 and 1.
    """
    if multilabel:
        expected = f"{MULTILABEL} for multi-label rows"
        if name == MULTILABEL:
            return (lambda scores, rows: multilabel_f1(scores.double().sigmoid(), rows)) if logits else multilabel_f1
    else:
        expected = f"{MULTICLASS}, accuracy or top-K for class labels"
        if name == MULTICLASS:
            return multiclass_f1
        if name == "accuracy":
            return accuracy
        if re.fullmatch(r"top-0*[1-9]\d*", name, re.ASCII):
            return lambda scores, labels: accuracy(scores, labels, k=int(name[4:]))
    raise ConfigError(f"--metric: expected {expected}, got {name}")


def _mean(values: Float[np.ndarray, " c"]) -> float:
    """Return the mean without NaN."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else np.nan
