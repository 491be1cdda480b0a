"""Channel consistency: does a backbone know a field again when it sees it through another channel.

A backbone that reads one channel at a time should say of one field much the same through every stain. Cosines of one
field's features through two channels are compared with those of two different fields, and each field is looked up by
what another channel shows of it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


class ChannelConsistency(NamedTuple):
    """How alike one field is to itself, and to others, through different channels.

    ``same_field`` is the mean cosine of one field through two different channels; ``different_field`` that of two
    fields through any two channels; ``margin`` is the former minus the latter. ``retrieval`` is how often the nearest
    of all fields through another channel is the field itself, mean over ordered channel pairs; chance is one over the
    number of fields. An equally near other field counts as a miss, so features that are all the same find nothing.

    The matrices are per pair of channels: rows are the channel that asks, columns the one that is searched. The
    diagonals of ``same_field_pairs`` and ``retrieval_pairs`` compare an image with itself and are 1 by definition (0
    for features that are zero).
    """

    same_field: float
    different_field: float
    margin: float
    retrieval: float
    same_field_pairs: Float[Tensor, "c c"]
    different_field_pairs: Float[Tensor, "c c"]
    retrieval_pairs: Float[Tensor, "c c"]


@torch.no_grad()
def channel_consistency(features: Float[Tensor, "b c d"], *, centre: bool = True) -> ChannelConsistency:
    """Compare the features of fields, each seen through every channel.

    Parameters
    ----------
    features
        One row for each field and channel.
    centre
        Subtract the mean of all features first, so that what all images share counts for nothing.

    Raises
    ------
    ValueError
        If there are fewer than two fields or channels, or a feature is not finite.
    """
    fields, channels, _ = features.shape
    if fields < 2 or channels < 2:
        raise ValueError(f"expected two or more fields and channels to compare, got {fields} and {channels}")
    if not features.isfinite().all():
        raise ValueError("expected finite features, got NaN or infinity: the backbone or its input is broken")
    features = features.float()
    if centre:
        features = features - features.mean((0, 1))
    by_channel = normalize(features, dim=-1).transpose(0, 1)
    same, different, found = (features.new_zeros(channels, channels) for _ in range(3))
    for asking in range(channels):
        for searched in range(channels):
            cosine = by_channel[asking] @ by_channel[searched].T
            itself = cosine.diagonal().clone()
            same[asking, searched] = itself.mean()
            different[asking, searched] = (cosine.sum() - itself.sum()) / (fields * (fields - 1))
            best_other = cosine.fill_diagonal_(-torch.inf).amax(1)
            found[asking, searched] = (itself > best_other).float().mean()
    pairs = ~torch.eye(channels, dtype=torch.bool, device=features.device)
    same_field, different_field = float(same[pairs].mean()), float(different.mean())
    return ChannelConsistency(
        same_field=same_field,
        different_field=different_field,
        margin=same_field - different_field,
        retrieval=float(found[pairs].mean()),
        same_field_pairs=same,
        different_field_pairs=different,
        retrieval_pairs=found,
    )


@torch.no_grad()
def consistency_by_field(features: Float[Tensor, "b c d"], *, centre: bool = True) -> Float[Tensor, "b 4"]:
    """Return for each field what `channel_consistency` averages over fields, for intervals.

    Columns: mean cosine to itself through other channels, mean cosine to other fields through any channel, their
    difference, and the share of ordered channel pairs in which it is found. The means over fields are the whole's
    ``same_field``, ``different_field``, ``margin`` and ``retrieval``.
    """
    fields, channels, _ = features.shape
    features = features.float()
    if centre:
        features = features - features.mean((0, 1))
    by_channel = normalize(features, dim=-1).transpose(0, 1)
    same, different, found = (features.new_zeros(fields) for _ in range(3))
    for asking in range(channels):
        for searched in range(channels):
            cosine = by_channel[asking] @ by_channel[searched].T
            itself = cosine.diagonal().clone()
            different += (cosine.sum(1) - itself) / (fields - 1) / channels**2
            if asking != searched:
                best_other = cosine.fill_diagonal_(-torch.inf).amax(1)
                same += itself / (channels * (channels - 1))
                found += (itself > best_other).float() / (channels * (channels - 1))
    return torch.stack((same, different, same - different, found), dim=1)
