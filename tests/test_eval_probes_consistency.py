"""Channel consistency against plain loops and cases whose answer is known."""

import itertools

import numpy as np
import pytest
import torch

from dinocell.eval.probes.consistency import channel_consistency, consistency_by_field


@pytest.mark.parametrize("centre", [True, False])
def test_scores_are_those_of_plain_loops(centre: bool) -> None:
    features = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)) + 1
    result = channel_consistency(features, centre=centre)
    rows = features.double().numpy()
    rows = rows - rows.mean((0, 1)) * centre
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    same, different, hits = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3))
    for one, other in itertools.product(range(3), repeat=2):
        cosine = np.array([[rows[a, one] @ rows[b, other] for b in range(7)] for a in range(7)])
        same[one, other] = np.mean([cosine[a, a] for a in range(7)])
        different[one, other] = np.mean([cosine[a, b] for a in range(7) for b in range(7) if a != b])
        hits[one, other] = np.mean(cosine.argmax(1) == np.arange(7))
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(result.same_field_pairs.numpy(), same, atol=1e-5)
    np.testing.assert_allclose(result.different_field_pairs.numpy(), different, atol=1e-5)
    np.testing.assert_allclose(result.retrieval_pairs.numpy(), hits, atol=1e-6)
    assert result.same_field == pytest.approx(same[off].mean(), abs=1e-5)
    assert result.different_field == pytest.approx(different.mean(), abs=1e-5)
    assert result.margin == pytest.approx(same[off].mean() - different.mean(), abs=1e-5)
    assert result.retrieval == pytest.approx(hits[off].mean(), abs=1e-6)


def test_a_backbone_that_sees_the_field_alone_is_perfect() -> None:
    field = torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(0))
    result = channel_consistency(field.expand(6, 4, 8))
    assert result.same_field == pytest.approx(1, abs=1e-5)
    assert result.retrieval == 1
    assert result.margin > 0.5


def test_a_backbone_that_sees_the_channel_alone_finds_nothing() -> None:
    channel = torch.eye(4)  # exact in any order of summation, so that all fields are equally near
    result = channel_consistency(channel.expand(6, 4, 4), centre=False)
    assert result.retrieval == 0
    assert result.same_field == 0
    assert result.different_field == pytest.approx(1 / 4)


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 1, 4)])
def test_nothing_to_compare_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="two or more fields and channels"):
        channel_consistency(torch.ones(shape))


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        channel_consistency(torch.full((2, 2, 2), torch.inf))


def test_the_mean_over_fields_is_the_whole() -> None:
    features = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(0))
    whole, by_field = channel_consistency(features), consistency_by_field(features).mean(0)
    wanted = torch.tensor([whole.same_field, whole.different_field, whole.margin, whole.retrieval])
    torch.testing.assert_close(by_field, wanted)
