"""Nearest neighbours against plain NumPy, ties included."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dinocell.eval.probes.knn import knn_scores


def plain(train: np.ndarray, votes: np.ndarray, queries: np.ndarray, k: int, temperature: float) -> np.ndarray:
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, queries)]
    cosine = unit[1] @ unit[0].T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    weight = np.exp(np.take_along_axis(cosine, order, 1) / temperature)
    return np.einsum("qk,qkc->qc", weight / weight.sum(1, keepdims=True), votes[order])


def features(count: int, seed: int) -> torch.Tensor:
    """One of 24 axis directions each: a dozen training images are exactly as near as the next."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    return torch.eye(12)[torch.randint(0, 12, (count,), generator=generator)] * signs[:, None]


@pytest.mark.parametrize("chunks", [(1024, 16384), (7, 13), (1, 1)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multilabel", [True, False])
def test_scores_are_those_of_plain_numpy(chunks: tuple[int, int], tied: bool, multilabel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = features if tied else lambda count, seed: torch.randn(count, 12, generator=generator)
    train, queries = draw(150, 1), draw(20, 2)
    labels = torch.randint(0, 5, (150,), generator=generator)
    votes = torch.eye(5)[labels]
    if multilabel:
        votes = torch.randint(0, 2, (150, 5), generator=generator).float()
    scores = knn_scores(
        train,
        votes if multilabel else labels,
        queries,
        ks=[1, 10, 150],
        num_classes=None if multilabel else 5,
        query_chunk=chunks[0],
        train_chunk=chunks[1],
    )
    for k in (1, 10, 150):
        expected = plain(train.double().numpy(), votes.numpy(), queries.double().numpy(), k, 0.07)
        np.testing.assert_allclose(scores[k].numpy(), expected, atol=1e-5)


def test_classes_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(3)
    train, queries = torch.randn(200, 8, generator=generator), torch.randn(50, 8, generator=generator)
    labels = torch.randint(0, 4, (200,), generator=generator)
    scores = knn_scores(train, labels, queries, ks=[20], temperature=0.2)[20]
    oracle = KNeighborsClassifier(
        20, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2)
    ).fit(train.numpy(), labels.numpy())
    np.testing.assert_allclose(scores.numpy(), oracle.predict_proba(queries.numpy()), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ks": [11]}, "from 1 to 10"),
        ({"ks": []}, "from 1 to 10"),
        ({"ks": [1], "temperature": 0.0}, "above 0"),
        ({"ks": [1], "num_classes": 2}, "below 2"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], says: str) -> None:
    labels = torch.arange(10) % 3
    with pytest.raises(ValueError, match=says):
        knn_scores(torch.ones(10, 2), labels, torch.ones(1, 2), **options)


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        knn_scores(torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.long), torch.ones(1, 2), ks=[1])
