"""Scores of classifiers over a whole set: F1, accuracy, top-k, with what happens to absent classes said.

The two F1 are those of Cell-DINO's evaluation (torchmetrics' macro averages): for class numbers, a class that neither
occurs nor is predicted is left out; for multi-label rows it counts as 0.
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
    """A score, and what it is made of; ``f1`` is NaN for classes that do not count, ``support`` their true images."""

    value: float
    f1: Float[np.ndarray, " c"]
    support: Int[np.ndarray, " c"]


def multiclass_f1(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> ClassScores:
    """Return the macro F1 of the best class of each row."""
    return _macro(confusion(scores, labels))


def _macro(table: Int[np.ndarray, "c c"]) -> ClassScores:
    right = np.diag(table)
    both = table.sum(0) + table.sum(1)
    f1 = np.divide(2 * right, both, out=np.full(len(table), np.nan), where=both > 0)
    return ClassScores(value=_mean(f1), f1=f1, support=table.sum(1))


def multilabel_f1(scores: Float[Tensor, "n c"], labels: Float[Tensor, "n c"], *, threshold: float = 0.5) -> ClassScores:
    """Return the macro F1 of all classes whose score, a chance from 0 to 1, is above the threshold."""
    said, true = scores.cpu().numpy() > threshold, labels.cpu().numpy() > 0.5
    right = (said & true).sum(0)
    both = said.sum(0) + true.sum(0)
    f1 = np.divide(2 * right, both, out=np.zeros(len(both)), where=both > 0)
    return ClassScores(value=_mean(f1), f1=f1, support=true.sum(0))


def accuracy(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"], *, k: int = 1) -> ClassScores:
    """Return how often the true class is among the ``k`` best; ``f1`` is that of the best."""
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
    found = labels.cpu().numpy() * classes + scores.argmax(1).cpu().numpy()
    return np.bincount(found, minlength=classes * classes).reshape(classes, classes)


Metric = Callable[[Tensor, Tensor], ClassScores]


def metric_of(name: str, *, multilabel: bool, logits: bool = False) -> Metric:
    """Return the metric of a name: the two F1, ``accuracy``, or ``top-5`` and the like.

    Parameters
    ----------
    logits
        The scores will be logits, not chances. It is said, never told from their range: shares of votes add up to a
        rounding error more than 1, and the logits of a weak classifier may all lie between 0 and 1.

    Raises
    ------
    ConfigError
        If there is none of the name, or it is not for such labels.
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
    raise ConfigError(
        f"--metric: expected {MULTICLASS}, accuracy or top-K for class labels"
        + (" (that one is for multi-label rows)" if name == MULTILABEL else "")
        + f", got {name}"
    )


def _mean(values: Sequence[float] | np.ndarray) -> float:
    numbers = np.asarray(values, float)
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if numbers.size else float("nan")
