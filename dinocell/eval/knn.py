"""Nearest neighbours in feature space: what a backbone is worth before anything is trained on it.

The protocol of DINO (Caron et al. 2021) and Cell-DINO: features of unit length, cosine similarity, and the ``k``
nearest training images vote with the weight exp(cosine / temperature), normalised to sum to one. A vote is a class, or
for multi-label sets the row of zeros and ones of all classes.

Of training images whose cosines are equal, the one that stands first counts first, so that equal numbers give equal
results, whatever ``topk`` of the device prefers and however the images are cut into chunks.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

TEMPERATURE = 0.07


@torch.no_grad()
def knn_scores(
    train: Float[Tensor, "train d"],
    labels: Int[Tensor, "train"] | Float[Tensor, "train classes"],
    queries: Float[Tensor, "queries d"],
    *,
    ks: Sequence[int],
    num_classes: int | None = None,
    temperature: float = TEMPERATURE,
    query_chunk: int = 1024,
    train_chunk: int = 16384,
) -> dict[int, Float[Tensor, "queries classes"]]:
    """Return for every ``k`` the share of the votes that each class gets from the ``k`` nearest training images.

    Parameters
    ----------
    train, queries
        Features in any scale; they are brought to unit length here, a chunk at a time.
    labels
        A class number for each training image, or for multi-label sets a row of zeros and ones.
    num_classes
        Classes there are; for class numbers only. Default: the largest number plus one.
    query_chunk, train_chunk
        Similarities held at a time: at most ``query_chunk`` x ``train_chunk``.

    Raises
    ------
    ValueError
        If a ``k`` is not between 1 and the number of training images, if the temperature or a chunk is not positive, if
        a class number is outside ``num_classes``, or if a feature is not finite.
    """
    _check(train, labels, queries, ks=ks, num_classes=num_classes, positive=(temperature, query_chunk, train_chunk))
    if labels.ndim == 1 and num_classes is None:
        num_classes = int(labels.max()) + 1
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for chunk in queries.split(query_chunk):
        cosine, index = _nearest(train, _unit(chunk), count=max(ks), train_chunk=train_chunk)
        weight = torch.exp((cosine - cosine[:, :1]) / temperature)
        voters = labels[index]
        votes = one_hot(voters, num_classes or -1).float() if labels.ndim == 1 else voters
        for k in found:
            share = weight[:, :k] / weight[:, :k].sum(1, keepdim=True)
            found[k].append(torch.einsum("qk,qkc->qc", share, votes[:, :k]))
    return {k: torch.cat(scores) for k, scores in found.items()}


def _nearest(train: Tensor, queries: Tensor, *, count: int, train_chunk: int) -> tuple[Tensor, Tensor]:
    """Return cosine and position of the ``count`` nearest, nearest first; equally near ones by position."""
    best = queries.new_empty((len(queries), 0))
    where = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)
    for start in range(0, len(train), train_chunk):
        cosine = queries @ _unit(train[start : start + train_chunk]).T
        part, position = _first_largest(cosine, min(count, cosine.shape[1]))
        # What was found earlier stands first and has the lower positions, so a stable sort keeps the order of ties.
        both, both_where = torch.cat([best, part], 1), torch.cat([where, position + start], 1)
        best, order = both.sort(dim=1, descending=True, stable=True)
        best, where = best[:, :count], both_where.gather(1, order)[:, :count]
    return best, where


def _first_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest of each row and their positions; of equal ones those that stand first."""
    top, position = values.topk(count, dim=1)
    limit = top[:, -1:]
    tied = (values == limit).sum(1) > (top == limit).sum(1)  # an equal one was left out: which, topk chose freely
    if tied.any():
        position[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :count]
    position = position.sort(dim=1).values
    top, order = values.gather(1, position).sort(dim=1, descending=True, stable=True)
    return top, position.gather(1, order)


def _unit(features: Tensor) -> Tensor:
    return normalize(features.float(), dim=1)


def _check(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    ks: Sequence[int],
    num_classes: int | None,
    positive: tuple[float | int, ...],
) -> None:
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise ValueError(f"expected every k from 1 to {len(train)} (the training images), got {list(ks)}")
    if min(positive) <= 0:
        raise ValueError(f"expected temperature and chunks above 0, got {positive}")
    if labels.ndim == 1 and (labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes)):
        raise ValueError(f"expected class numbers from 0 to below {num_classes}, got {labels.min()} to {labels.max()}")
    if not (train.isfinite().all() and queries.isfinite().all()):
        raise ValueError("expected finite features, got NaN or infinity: the backbone or its input is broken")
