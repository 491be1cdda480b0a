"""The order of the samples, independent of the number of ranks and loader workers.

Position p of the stream is sample ``order(p)``; positions continue over the epochs. Ranks and loader workers only
divide the positions among themselves, so a stream resumes from its position alone.

In an epoch, shards are shuffled and grouped into blocks; within a block, samples are shuffled. So a reader uses few
shards at a time.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dinocell.errors import ShardError


class Place(NamedTuple):
    """The sample of a position: the epoch, the shard, and the sample's index in the shard and in the set."""

    epoch: int
    shard: int
    number: int
    sample: int


class EpochOrder:
    """The order of one shard set.

    Parameters
    ----------
    shard_sizes
        Samples of each shard.
    seed
        Seed of the shuffling; epochs differ.
    block_shards
        Shards whose samples are shuffled together. Memory is 8 bytes per sample of a block.
    shuffle
        If false, samples are in the order of the files.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, seed: int = 0, block_shards: int = 16, shuffle: bool = True
    ) -> None:
        self._sizes = np.array(shard_sizes, np.int64)
        if not len(self._sizes) or self._sizes.min() < 1 or block_shards < 1:
            raise ValueError(
                f"expected shards with samples and blocks of at least 1, got {shard_sizes}, {block_shards}"
            )
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed, self._block_shards, self._shuffle = seed, block_shards, shuffle
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._block = lru_cache(maxsize=3)(self._make_block)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __call__(self, position: int) -> Place:
        """Return the sample of a position (from 0, over all epochs)."""
        epoch, within = divmod(position, len(self))
        _, starts = self._epoch(epoch)
        block = int(np.searchsorted(starts, within, side="right")) - 1
        index = int(self._block(epoch, block)[within - int(starts[block])])
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return Place(epoch, shard, index - int(self._first[shard]), index)

    def block_of(self, position: int) -> tuple[int, int]:
        """Return epoch and block of a position."""
        epoch, within = divmod(position, len(self))
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], within, side="right")) - 1

    def shards_of(self, epoch: int, block: int) -> list[int]:
        """Return the shards of a block, or of the next epoch's first block after the last of an epoch."""
        shards, starts = self._epoch(epoch)
        if block >= len(starts):
            return self.shards_of(epoch + 1, 0)
        chosen: list[int] = shards[block * self._block_shards :][: self._block_shards].tolist()
        return chosen

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards' order, and the first position of each block."""
        shards = np.arange(len(self._sizes))
        if self._shuffle:
            shards = np.random.default_rng([self._seed, epoch]).permutation(shards)
        ends = np.cumsum(self._sizes[shards])[self._block_shards - 1 :: self._block_shards]
        starts = np.concatenate([[0], ends])
        return shards, starts[: -(-len(shards) // self._block_shards)]

    def _make_block(self, epoch: int, block: int) -> np.ndarray:
        """Return the samples' indices in the set, in the order of the block."""
        shards = self.shards_of(epoch, block)
        indices = np.concatenate([np.arange(self._first[shard], self._first[shard + 1]) for shard in shards])
        if self._shuffle:
            indices = np.random.default_rng([self._seed, epoch, block]).permutation(indices)
        return indices


class Mixture:
    """Assignment of the stream's positions to several sets, by weight; each set has its own epochs.

    Parameters
    ----------
    weights
        One positive number per set; fractions are accurate to 1 in 10,000, in every 10,000 positions.

    Raises
    ------
    ShardError
        If a number is not positive, or so small compared with the others that its set would never be read.
    """

    _PERIOD = 10_000

    def __init__(self, weights: Sequence[int | float], *, seed: int = 0) -> None:
        shares = np.array(weights, np.float64)
        if not len(shares) or not (np.isfinite(shares).all() and (shares > 0).all()):
            raise ShardError(f"weights: expected positive numbers, got {list(weights)}")
        ends = np.rint(np.cumsum(shares) / shares.sum() * self._PERIOD).astype(np.int64)
        self._counts = np.diff(ends, prepend=0)
        if self._counts.min() < 1:
            raise ShardError(
                f"shard sets: the smallest would be less than 1/{self._PERIOD} of all, got {list(weights)} "
                "(their samples, if no weights were given); give it a larger weight, or remove it"
            )
        owner = np.repeat(np.arange(len(shares)), self._counts)
        self._owner = np.random.default_rng([seed, 0x6D6978]).permutation(owner) if len(shares) > 1 else owner
        self._rank = np.empty(self._PERIOD, np.int64)
        for index in range(len(shares)):
            is_owned = self._owner == index
            self._rank[is_owned] = np.arange(is_owned.sum())

    def __call__(self, position: int) -> tuple[int, int]:
        """Return the set of a position, and the position in that set's own stream."""
        period, within = divmod(position, self._PERIOD)
        owner = int(self._owner[within])
        return owner, period * int(self._counts[owner]) + int(self._rank[within])
