"""Channel consistency: how similar the features of a field are across its channels.

The features of a backbone that reads one channel at a time should be similar for all channels of a field. Cosines of
two channels of one field are compared with cosines of two different fields, and each field is retrieved by the
features of another channel.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from dinocell.errors import require


class ChannelConsistency(NamedTuple):
    """Similarity of fields to themselves and to others, across channels.

    ``same_field`` is the mean cosine of two different channels of one field; ``different_field`` that of any two
    channels of two fields; ``margin`` is ``same_field`` minus ``different_field``. ``retrieval`` is the share of fields
    whose nearest field in another channel is the field itself, mean over ordered channel pairs; chance level is one
    over the number of fields. Ties count as misses, so constant features give 0.

    The matrices are per pair of channels: rows are query channels, columns reference channels. The
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
    """Compare the features of fields across channels.

    A DinocellError if there are fewer than two fields or channels, or a feature is not finite.

    Parameters
    ----------
    features
        One row per field and channel.
    centre
        Subtract the mean of all features first, which removes what all images have in common.
    """
    fields, channels, _ = features.shape
    got = f"got {fields} and {channels}"
    require(min(fields, channels) > 1, f"expected two or more fields and channels to compare, {got}")
    is_finite = features.isfinite().all()
    require(is_finite, "expected finite features, got NaN or infinity: the backbone or its input is broken")
    same, different, retrieved = _by_pair(features, centre=centre).mean(-1)
    pairs = ~torch.eye(channels, dtype=torch.bool, device=features.device)
    same_field, different_field = float(same[pairs].mean()), float(different.mean())
    return ChannelConsistency(
        same_field=same_field,
        different_field=different_field,
        margin=same_field - different_field,
        retrieval=float(retrieved[pairs].mean()),
        same_field_pairs=same,
        different_field_pairs=different,
        retrieval_pairs=retrieved,
    )


@torch.no_grad()
def consistency_by_field(features: Float[Tensor, "b c d"], *, centre: bool = True) -> Float[Tensor, "b 4"]:
    """Return the values per field that `channel_consistency` averages, for confidence intervals.

    Columns: mean cosine to itself across channels, mean cosine to other fields over all channel pairs, their
    difference, and the share of ordered channel pairs in which the field is retrieved. Their means over fields are
    ``same_field``, ``different_field``, ``margin`` and ``retrieval``.
    """
    by_pair = _by_pair(features, centre=centre)
    pairs = ~torch.eye(features.shape[1], dtype=torch.bool, device=features.device)
    same, different, retrieved = by_pair[0, pairs].mean(0), by_pair[1].mean((0, 1)), by_pair[2, pairs].mean(0)
    return torch.stack((same, different, same - different, retrieved), dim=1)


def _by_pair(features: Float[Tensor, "b c d"], *, centre: bool) -> Float[Tensor, "3 c c b"]:
    """Return for each query channel, reference channel and field: its cosine to itself and to others, and retrieval."""
    fields, channels, _ = features.shape
    features = features.float()
    by_channel = normalize(features - features.mean((0, 1)) if centre else features, dim=-1).transpose(0, 1)
    by_pair = features.new_zeros(3, channels, channels, fields)
    for query in range(channels):
        for reference in range(channels):
            cosine = by_channel[query] @ by_channel[reference].T
            itself = cosine.diagonal().clone()
            others = (cosine.sum(1) - itself) / (fields - 1)
            best_other = cosine.fill_diagonal_(-torch.inf).amax(1)
            by_pair[:, query, reference] = torch.stack((itself, others, (itself > best_other).float()))
    return by_pair
