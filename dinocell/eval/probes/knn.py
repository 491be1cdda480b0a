"""Nearest neighbours in feature space: what a backbone is worth before anything is trained on it.

The protocol of DINO (Caron et al. 2021) and Cell-DINO: features of unit length, cosine similarity, and the ``k``
nearest training images vote with the weight exp(cosine / temperature), normalised to sum to one. A vote is a class, or
for multi-label sets the row of zeros and ones of all classes.

Of training images whose cosines are equal, the one that stands first counts first, so that equal numbers give equal
results, whatever ``topk`` of the device prefers and however the images are cut into chunks or shared among ranks.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from dinocell.runtime.distributed import World, gather, max_over_ranks

TEMPERATURE = 0.07


@torch.no_grad()
def knn_scores(
    train: Float[Tensor, "part d"],
    labels: Int[Tensor, "train"] | Float[Tensor, "train classes"],
    queries: Float[Tensor, "queries d"],
    *,
    ks: Sequence[int],
    num_classes: int | None = None,
    temperature: float = TEMPERATURE,
    query_chunk: int = 1024,
    train_chunk: int = 16384,
    world: World | None = None,
) -> dict[int, Float[Tensor, "queries classes"]]:
    """Return, for every ``k``, the share of votes of each class among the ``k`` nearest training images.

    A ValueError if a ``k`` is not between 1 and the number of training images, if the temperature or a chunk is not
    positive, if a class number is outside ``num_classes``, if a feature is not finite, or if the numbers of features
    and labels differ.

    Parameters
    ----------
    train, queries
        Features at any scale; they are normalised to unit length here, chunk by chunk. With several ranks, ``train``
        is the part of this rank, `World.part`.
    labels
        Class index of each training image, or for multi-label sets a row of zeros and ones; of all ranks.
    num_classes
        Number of classes, for class indices only. Default: the maximum index plus one.
    query_chunk, train_chunk
        Size of the similarity matrix in memory: at most ``query_chunk`` x ``train_chunk``.
    world
        Ranks over which the training images are distributed; each calls this with all labels and queries, and all
        return the same.
    """
    world = world or World()
    positive = (temperature, query_chunk, train_chunk)
    _check(train, labels, queries, ks=ks, num_classes=num_classes, positive=positive, world=world)
    if labels.ndim == 1 and num_classes is None:
        num_classes = int(labels.max()) + 1
    scores: dict[int, list[Tensor]] = {k: [] for k in ks}
    for chunk in queries.split(query_chunk):
        cosine, index = _nearest(train, _unit(chunk), count=max(ks), train_chunk=train_chunk)
        if world.size > 1:
            cosine, index = _of_all_ranks(cosine, index + world.part(len(labels)).start, max(ks), world)
        weight = torch.exp((cosine - cosine[:, :1]) / temperature)
        voters = labels[index]
        votes = one_hot(voters, num_classes or -1).float() if labels.ndim == 1 else voters
        for k in scores:
            share = weight[:, :k] / weight[:, :k].sum(1, keepdim=True)
            scores[k].append(torch.einsum("qk,qkc->qc", share, votes[:, :k]))
    return {k: torch.cat(chunks) for k, chunks in scores.items()}


def _nearest(train: Tensor, queries: Tensor, *, count: int, train_chunk: int) -> tuple[Tensor, Tensor]:
    """Return cosine and index of the ``count`` nearest, nearest first; ties are broken by index."""
    best = queries.new_empty((len(queries), 0))
    where = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)
    for start in range(0, len(train), train_chunk):
        cosine = queries @ _unit(train[start : start + train_chunk]).T
        part, position = _first_largest(cosine, min(count, cosine.shape[1]))
        # Earlier chunks come first and have lower indices, so a stable sort keeps the order of ties.
        both, both_where = torch.cat([best, part], 1), torch.cat([where, position + start], 1)
        best, order = both.sort(dim=1, descending=True, stable=True)
        best, where = best[:, :count], both_where.gather(1, order)[:, :count]
    return best, where


def _of_all_ranks(cosine: Tensor, where: Tensor, count: int, world: World) -> tuple[Tensor, Tensor]:
    """Return the ``count`` nearest among the nearest of each rank."""
    missing = count - cosine.shape[1]  # if the part of a rank is smaller
    cosine, where = pad(cosine, (0, missing), value=-torch.inf), pad(where, (0, missing))
    # float64 represents both exactly, so one exchange suffices.
    gathered = gather(torch.cat((cosine.double(), where.double()), 1)).unflatten(0, (world.size, len(cosine)))
    every, every_where = gathered.transpose(0, 1).unflatten(2, (2, count)).transpose(1, 2).flatten(2).unbind(1)
    # Parts are in the order of ranks, so a stable sort keeps the order of ties.
    best, order = every.sort(dim=1, descending=True, stable=True)
    return best[:, :count].to(cosine.dtype), every_where.gather(1, order[:, :count]).long()


def _first_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest of each row and their indices; ties are broken by index."""
    top, position = values.topk(count, dim=1)
    limit = top[:, -1:]
    tied = (values == limit).sum(1) > (top == limit).sum(1)  # topk chooses freely among equal values
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
    world: World,
) -> None:
    part, number = world.part(len(labels)), len(labels)
    classes = (labels.min(), labels.max()) if labels.ndim == 1 and number else (0, 0)
    broken = ~(train.isfinite().all() & queries.isfinite().all())
    if world.size > 1:  # all ranks raise, not only the one with the broken part
        broken = max_over_ranks(broken.int()).bool()
    for is_wrong, problem in (
        (
            len(train) != part.stop - part.start,
            f"{part.stop - part.start} training features for {number} labels and {world.size} ranks, got {len(train)}",
        ),
        (
            not ks or min(ks) < 1 or max(ks) > number,
            f"every k from 1 to {number} (the training images), got {list(ks)}",
        ),
        (min(positive) <= 0, f"temperature and chunks above 0, got {positive}"),
        (
            classes[0] < 0 or (num_classes is not None and classes[1] >= num_classes),
            f"class indices from 0 to below {num_classes}, got {classes[0]} to {classes[1]}",
        ),
        (broken, "finite features, got NaN or infinity: the backbone or its input is broken"),
    ):
        if is_wrong:
            raise ValueError(f"expected {problem}")
