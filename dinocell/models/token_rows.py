"""Bookkeeping of the rows of the residual stream when a block computes only some of them.

There are two reasons: drop path (some sequences skip a branch) and the short cut of the last block (only some tokens
are needed). None of the classes is a tuple or dataclass, because FSDP2 searches those for gradients at every block.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinocell.models.positions import RotaryTable


class NeededRows:
    """The rows of a block's output that are needed, and the sequence of each.

    ``among_queries`` indexes the query rows of the block's segments (see `Segment.queries`), ``rows`` all rows.
    """

    def __init__(self, rows: Int[Tensor, " m"], among_queries: Int[Tensor, " m"], sequence: Int[Tensor, " m"]) -> None:
        self.rows, self.among_queries, self.sequence = rows, among_queries, sequence


class Segment:
    """Consecutive rows that hold ``batch`` sequences of ``tokens`` tokens each, and their rotation.

    ``queries`` limits attention to the first tokens of each sequence (the last block of a pass that needs only CLS);
    ``None`` means all.
    """

    def __init__(self, batch: int, tokens: int, rotary: RotaryTable | None, queries: int | None = None) -> None:
        self.batch, self.tokens, self.rotary, self.queries = batch, tokens, rotary, queries


class Subset:
    """The sequences that take a branch; the others skip it (drop path).

    ``segments`` hold the kept sequences only, ``rows`` and ``sequences`` are their indices among all rows and all
    sequences. ``factors``, one per segment, keep the branch's expectation.
    """

    def __init__(
        self, rows: Int[Tensor, " k"], sequences: Int[Tensor, " s"], segments: list[Segment], factors: list[float]
    ) -> None:
        self.rows, self.sequences, self.segments, self.factors = rows, sequences, segments, factors

    def add(self, rows: Float[Tensor, "n d"], branch: Float[Tensor, "k d"]) -> Float[Tensor, "n d"]:
        """Return all rows with the scaled branch added to the kept ones."""
        sizes = [segment.batch * segment.tokens for segment in self.segments]
        parts = [part * factor for part, factor in zip(branch.split(sizes), self.factors, strict=True)]
        return rows.index_add(0, self.rows, torch.cat(parts).to(rows.dtype))

    def factor_of_sequences(self, num_sequences: int, like: Tensor) -> Float[Tensor, " s"]:
        """Return for every sequence of every segment 0 (skips the branch) or batch / kept."""
        sizes = [segment.batch for segment in self.segments]
        factors = [like.new_full((size,), factor) for size, factor in zip(sizes, self.factors, strict=True)]
        return like.new_zeros(num_sequences).index_copy(0, self.sequences, torch.cat(factors))


def draw_kept_sequences(
    batches: Sequence[int],
    depth: int,
    drop_path: float,
    *,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> list[Int[Tensor, "depth 2 _"]]:
    """Draw for each segment the ``max(1, floor(batch * (1 - drop_path)))`` sequences that take each branch of a block.

    The number is fixed, so shapes are static; each sequence is kept with the same probability.
    """
    drawn = []
    for batch in batches:
        count = max(1, int(batch * (1 - drop_path)))
        order = torch.rand(depth, 2, batch, generator=generator, device=device).argsort(dim=-1)
        drawn.append(order[..., :count])
    return drawn


def find_subsets(segments: Sequence[Segment], kept: Sequence[Int[Tensor, "depth 2 _"]]) -> list[tuple[Subset, Subset]]:
    """Return the subsets of attention branch and MLP branch of every block; ``kept`` has one tensor per segment.

    All blocks are computed at once, because the indices of one branch take a dozen small operations.
    """
    rows, numbers, smaller, factors = [], [], [], []
    first_row = first = 0
    for segment, sequences in zip(segments, kept, strict=True):
        # Rows of a kept sequence: its offset in the segment, plus the segment's own rows 0..tokens.
        tokens = torch.arange(first_row, first_row + segment.tokens, device=sequences.device)
        rows.append((sequences[..., None] * segment.tokens + tokens).flatten(2))
        numbers.append(sequences + first)
        smaller.append(Segment(sequences.shape[-1], segment.tokens, segment.rotary))
        factors.append(segment.batch / sequences.shape[-1])  # 1 / share of kept sequences
        first_row += segment.batch * segment.tokens
        first += segment.batch
    # (depth, 2 branches, _) -> one subset per block and branch, attention and MLP alternating.
    pairs = zip(torch.cat(rows, 2).flatten(0, 1), torch.cat(numbers, 2).flatten(0, 1), strict=True)
    subsets = [Subset(*pair, smaller, factors) for pair in pairs]
    return list(zip(subsets[::2], subsets[1::2], strict=True))


def num_output_rows(segment: Segment, select: Int[Tensor, " m"] | None, num_prefix: int) -> int:
    """Return the number of rows of a segment after the last block, given its selected patches."""
    return segment.batch * segment.tokens if select is None else segment.batch * num_prefix + len(select)


def find_needed_rows(
    segments: list[Segment], select: Sequence[Tensor | None], num_prefix: int, device: torch.device
) -> tuple[list[Segment], NeededRows]:
    """Return the rows of selected patches; in segments without any, attention computes the prefix only."""
    rows, among, sequences, shrunk = [], [], [], []
    start = start_among = start_sequence = 0
    for segment, chosen in zip(segments, select, strict=True):
        sequence = torch.arange(segment.batch, device=device)
        # Without selected patches, attention needs the queries of the prefix tokens only.
        queries = num_prefix if chosen is not None and len(chosen) == 0 else segment.tokens
        leading = segment.tokens if chosen is None else num_prefix
        # (sequence, token) of every needed row: first the prefix (or all tokens), then the selected patches.
        owner = sequence.repeat_interleave(leading)
        token = torch.arange(leading, device=device).repeat(segment.batch)
        if chosen is not None and len(chosen):
            num_patches = segment.tokens - num_prefix
            owner = torch.cat((owner, chosen // num_patches))
            token = torch.cat((token, num_prefix + chosen % num_patches))
        rows.append(start + owner * segment.tokens + token)
        among.append(start_among + owner * queries + token)
        sequences.append(start_sequence + owner)
        shrunk.append(Segment(segment.batch, segment.tokens, segment.rotary, queries))
        start += segment.batch * segment.tokens
        start_among += segment.batch * queries
        start_sequence += segment.batch
    return shrunk, NeededRows(torch.cat(rows), torch.cat(among), torch.cat(sequences))
