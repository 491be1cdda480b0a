"""Scores of classifiers against torchmetrics, and the hand example of absent classes."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torchmetrics.functional.classification import multiclass_f1_score, multilabel_f1_score

from dinocell.errors import ConfigError
from dinocell.eval.probes.classification import (
    MULTILABEL,
    accuracy,
    confusion,
    metric_of,
    multiclass_f1,
    multilabel_f1,
)
from dinocell.eval.probes.knn import knn_scores


@pytest.mark.parametrize("seed", range(8))
def test_macro_f1_equals_torchmetrics(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, classes = 40, 3 + seed
    scores = torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, max(2, classes - 2), (count,), generator=generator)  # the last classes do not occur
    expected = multiclass_f1_score(scores, labels, classes, average="macro")
    assert multiclass_f1(scores, labels).value == pytest.approx(float(expected), abs=1e-6)
    rows = (torch.rand(count, classes, generator=generator) < 0.2).float()
    rows[:, -1] = 0
    scores[:, -1] = -1
    expected = multilabel_f1_score(scores, rows.int(), classes, average="macro", threshold=0.5)
    for given, logits in ((scores, True), (scores.sigmoid(), False)):
        metric = metric_of(MULTILABEL, multilabel=True, logits=logits)
        assert metric(given, rows).value == pytest.approx(float(expected), abs=1e-6)


def test_shares_of_votes_slightly_above_one_are_not_taken_as_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(200, 16, generator=generator), torch.randn(50, 16, generator=generator)
    rows = (torch.rand(200, 5, generator=generator) < 0.6).float()
    rows[:, 0] = 1  # the label of every neighbour: the share is their sum, 1 and a rounding error
    shares = knn_scores(train, rows, queries, ks=[20])[20]
    assert 1 < shares.max() < 1 + 1e-5
    expected = (torch.rand(50, 5, generator=generator) < 0.6).float()
    truth = f1_score(expected.numpy(), shares.numpy() > 0.5, average="macro")
    metric = metric_of(MULTILABEL, multilabel=True)
    assert metric(shares, expected).value == pytest.approx(truth)


def test_logits_between_zero_and_one_are_not_taken_as_probabilities() -> None:
    metric = metric_of(MULTILABEL, multilabel=True, logits=True)
    assert metric(torch.tensor([[0.1, 0.3]]), torch.ones(1, 2)).value == 1.0


def test_an_absent_class_is_excluded_or_counts_zero() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    alone = multiclass_f1(scores, torch.tensor([0, 1]))
    assert alone.value == 1.0
    assert np.isnan(alone.f1[2])
    rows = multilabel_f1(scores, torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    assert rows.value == pytest.approx(2 / 3)
    assert rows.support.tolist() == [1, 1, 0]


def test_accuracy_and_confusion() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    labels = torch.tensor([0, 1, 2])
    assert accuracy(scores, labels).value == pytest.approx(2 / 3)
    assert accuracy(scores, labels, k=2).value == 1.0
    assert confusion(scores, labels).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert metric_of("top-2", multilabel=False)(scores, labels).value == 1.0


def test_a_metric_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected mean_per_class_multilabel_f1 for multi-label rows, got accuracy"):
        metric_of("accuracy", multilabel=True)
    with pytest.raises(ConfigError, match="got mean_per_class_multilabel_f1"):
        metric_of("mean_per_class_multilabel_f1", multilabel=False)
    with pytest.raises(ConfigError, match="got top-0"):
        metric_of("top-0", multilabel=False)
