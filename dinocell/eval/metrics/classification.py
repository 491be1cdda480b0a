"""Scores of classifiers over a whole set: macro F1, accuracy and top-k accuracy.

The F1 scores are those of Cell-DINO's evaluation (torchmetrics' macro averages): for class labels, a class that neither
occurs nor is predicted is excluded; for multi-label rows it counts as 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from dinocell.errors import ConfigError

MULTILABEL, MULTICLASS = "mean_per_class_multilabel_f1", "mean_per_class_multiclass_f1"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassScores:
    """A score, and the F1 (NaN if excluded) and the number of true images of each class."""

    value: float
    f1: Float[np.ndarray, " c"]
    support: Int[np.ndarray, " c"]


def multiclass_f1(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> ClassScores:
    """Return the macro F1 of the highest score of each row."""
    return _macro(confusion(scores, labels))


def _macro(table: Int[np.ndarray, "c c"]) -> ClassScores:
    right = np.diag(table)
    both = table.sum(0) + table.sum(1)
    f1 = np.divide(2 * right, both, out=np.full(len(table), np.nan), where=both > 0)
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
    if len(labels) == 0:
        return ClassScores(
            value=float("nan"), f1=np.full(scores.shape[1], np.nan), support=np.zeros(scores.shape[1], int)
        )
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    value = float((best == labels[:, None]).any(1).double().mean())
    detail = multiclass_f1(scores, labels)
    return ClassScores(value=value, f1=detail.f1, support=detail.support)


def confusion(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Int[np.ndarray, "c c"]:
    """Count images by true class (rows) and predicted class (columns)."""
    classes = scores.shape[1]
    cells = labels.cpu().numpy() * classes + scores.argmax(1).cpu().numpy()
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


Metric = Callable[[Tensor, Tensor], ClassScores]


def metric_of(name: str, *, multilabel: bool, logits: bool = False) -> Metric:
    """Return a metric by name: one of the two F1, ``accuracy``, or ``top-5`` and the like.

    Parameters
    ----------
    logits
        Whether scores are logits rather than probabilities. It cannot be inferred from their range: shares of votes may
        exceed 1 by rounding, and the logits of a weak classifier may all be between 0 and 1.

    Raises
    ------
    ConfigError
        If there is no such metric for these labels.
    """
    if multilabel:
        if name != MULTILABEL:
            raise ConfigError(f"--metric: expected {MULTILABEL} for multi-label rows, got {name}")
        return (lambda scores, rows: multilabel_f1(scores.double().sigmoid(), rows)) if logits else multilabel_f1
    if name == MULTICLASS:
        return multiclass_f1
    if name == "accuracy":
        return accuracy
    if name.startswith("top-") and name[4:].isdecimal() and int(name[4:]) > 0:
        return lambda scores, labels: accuracy(scores, labels, k=int(name[4:]))
    raise ConfigError(f"--metric: expected {MULTICLASS}, accuracy or top-K for class labels, got {name}")


def _mean(values: Sequence[float] | np.ndarray) -> float:
    numbers = np.asarray(values, float)
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if numbers.size else float("nan")
