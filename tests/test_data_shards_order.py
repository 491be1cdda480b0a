"""The order of samples: each once an epoch, mixed within blocks, found without counting through."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinocell.data_shards.order import EpochOrder, Mixture
from dinocell.errors import ShardError

SIZES = [3, 1, 7, 4, 4, 2, 9]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    seed=st.integers(0, 3),
    block_shards=st.integers(1, 14),
    shuffle=st.booleans(),
)
def test_every_epoch_holds_every_sample_once(sizes: list[int], seed: int, block_shards: int, shuffle: bool) -> None:
    order = EpochOrder(sizes, seed=seed, block_shards=block_shards, shuffle=shuffle)
    total = sum(sizes)
    first = np.concatenate([[0], np.cumsum(sizes)])
    for epoch in (0, 1, 5):
        places = [order(epoch * total + position) for position in range(total)]
        assert sorted(place.sample for place in places) == list(range(total))
        assert {place.epoch for place in places} == {epoch}
        assert all(first[place.shard] + place.number == place.sample for place in places)
        assert all(0 <= place.number < sizes[place.shard] for place in places)


def test_the_order_of_a_position_does_not_depend_on_earlier_calls() -> None:
    order = EpochOrder(SIZES, seed=1, block_shards=2)
    backwards = [order(position) for position in reversed(range(3 * len(order)))]
    forwards = [EpochOrder(SIZES, seed=1, block_shards=2)(position) for position in range(3 * len(order))]
    assert backwards[::-1] == forwards


def test_epochs_and_seeds_differ_and_unshuffled_order_is_sequential() -> None:
    def samples(seed: int, epoch: int, **options: bool) -> list[int]:
        order = EpochOrder([50, 50, 50], seed=seed, block_shards=2, **options)
        return [order(epoch * 150 + position).sample for position in range(150)]

    assert len({tuple(samples(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert samples(0, 3, shuffle=False) == list(range(150))


def test_a_block_has_samples_of_its_shards_only() -> None:
    order = EpochOrder([10] * 12, seed=0, block_shards=3)
    for block in range(4):
        positions = range(30 * block, 30 * block + 30)
        shards = {order(position).shard for position in positions}
        assert shards == set(order.shards_of(0, block))
        assert len(shards) == 3
        assert {order.block_of(position) for position in positions} == {(0, block)}
    assert order.shards_of(0, 4) == order.shards_of(1, 0)


def test_samples_of_a_block_are_shuffled() -> None:
    order = EpochOrder([100] * 8, seed=0, block_shards=8)
    shards = [order(position).shard for position in range(800)]
    for start in range(0, 800, 80):
        assert len(set(shards[start : start + 80])) == 8


def test_a_far_position_costs_no_more_than_the_first() -> None:
    order = EpochOrder([256] * 1000, seed=0)
    assert order(10**12).epoch == 10**12 // 256_000


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [0.5, 0.3, 0.2], [1, 1e-3], [7, 5, 1e6]])
def test_a_mixture_keeps_its_shares_and_leaves_no_gap(weights: list[float]) -> None:
    if weights == [7, 5, 1e6]:
        with pytest.raises(ShardError, match=r"less than 1/10000 of all, got \[7, 5, "):
            Mixture(weights)
        return
    mixture = Mixture(weights, seed=3)
    pairs = [mixture(position) for position in range(25_000)]
    shares = np.array(weights) / sum(weights)
    for number, share in enumerate(shares):
        within = [position for owner, position in pairs if owner == number]
        assert within == list(range(len(within)))
        assert len(within) / 25_000 == pytest.approx(share, abs=0.005)
        assert sum(owner == number for owner, _ in pairs[:1000]) / 1000 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_invalid_weights_are_rejected(weights: list[float]) -> None:
    with pytest.raises(ShardError, match="positive numbers"):
        Mixture(weights)


def test_an_empty_order_is_rejected() -> None:
    for sizes in ([], [0], [3, 0]):
        with pytest.raises(ValueError, match="expected shards with samples"):
            EpochOrder(sizes)
