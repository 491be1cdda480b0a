"""Which rows of the residual stream belong to whom, when a block computes only some of them.

Two reasons: drop path (some sequences skip a branch) and the last block's short cut (only some tokens will be read).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinocell.models.attention import Segment


class WantedRows(NamedTuple):
    """The rows of a block's output that somebody will read, and the sequence that each belongs to.

    ``among_queries`` indexes the query rows of the block's segments (see `Segment.queries`), ``rows`` all rows.
    """

    rows: Int[Tensor, " m"]
    among_queries: Int[Tensor, " m"]
    sequence: Int[Tensor, " m"]


KeptSequences = Sequence[Int[Tensor, " _"]]
"""For each segment, the sequences that take a branch (the others skip it: drop path)."""


class Subset(NamedTuple):
    """The rows of the kept sequences, and the factors that keep the branch's expectation."""

    rows: Int[Tensor, " k"]
    segments: list[Segment]
    factors: list[float]

    @classmethod
    def of(cls, segments: Sequence[Segment], kept: KeptSequences) -> "Subset":
        """Find the rows of the kept sequences of all segments."""
        rows, start = [], 0
        for segment, sequences in zip(segments, kept, strict=True):
            tokens = torch.arange(segment.tokens, device=sequences.device)
            rows.append((start + sequences[:, None] * segment.tokens + tokens).flatten())
            start += segment.batch * segment.tokens
        smaller = [segment._replace(batch=len(sequences)) for segment, sequences in zip(segments, kept, strict=True)]
        factors = [segment.batch / len(sequences) for segment, sequences in zip(segments, kept, strict=True)]
        return cls(torch.cat(rows), smaller, factors)

    def add(self, rows: Float[Tensor, "n d"], branch: Float[Tensor, "k d"]) -> Float[Tensor, "n d"]:
        """Return all rows with the scaled branch added to the kept ones."""
        sizes = [segment.batch * segment.tokens for segment in self.segments]
        parts = [part * factor for part, factor in zip(branch.split(sizes), self.factors, strict=True)]
        return rows.index_add(0, self.rows, torch.cat(parts).to(rows.dtype))


def branch_factors(segments: Sequence[Segment], kept: KeptSequences, like: Tensor) -> Float[Tensor, " s"]:
    """Return for every sequence of every segment 0 (skips the branch) or batch / kept."""
    factors = []
    for segment, sequences in zip(segments, kept, strict=True):
        factor = like.new_zeros(segment.batch)
        factors.append(factor.index_fill(0, sequences, segment.batch / len(sequences)))
    return torch.cat(factors)


def draw_kept_sequences(
    segments: Sequence[Segment],
    depth: int,
    drop_path: float,
    *,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> list[tuple[KeptSequences, KeptSequences]]:
    """Draw for every block and branch the ``max(1, floor(batch * (1 - drop_path)))`` sequences that take it.

    The count is fixed, so shapes are static and the saving is real; each sequence is kept with the same probability.
    """
    drawn = []
    for segment in segments:
        count = max(1, int(segment.batch * (1 - drop_path)))
        order = torch.rand(depth, 2, segment.batch, generator=generator, device=device).argsort(dim=-1)
        drawn.append(order[..., :count])
    return [([d[i, 0] for d in drawn], [d[i, 1] for d in drawn]) for i in range(depth)]


def num_output_rows(segment: Segment, select: Int[Tensor, " m"] | None, num_prefix: int) -> int:
    """Return how many rows of a segment leave the last block, given its selected patches."""
    return segment.batch * segment.tokens if select is None else segment.batch * num_prefix + len(select)


def find_wanted_rows(
    segments: list[Segment], select: Sequence[Tensor | None], num_prefix: int, device: torch.device
) -> tuple[list[Segment], WantedRows]:
    """Translate selected patches into rows; segments that want none ask attention for their prefix only."""
    rows, among, sequences, shrunk = [], [], [], []
    start = start_among = start_sequence = 0
    for segment, chosen in zip(segments, select, strict=True):
        sequence = torch.arange(segment.batch, device=device)
        queries = num_prefix if chosen is not None and len(chosen) == 0 else segment.tokens
        leading = segment.tokens if chosen is None else num_prefix
        owner = sequence.repeat_interleave(leading)
        token = torch.arange(leading, device=device).repeat(segment.batch)
        if chosen is not None and len(chosen):
            num_patches = segment.tokens - num_prefix
            owner = torch.cat((owner, chosen // num_patches))
            token = torch.cat((token, num_prefix + chosen % num_patches))
        rows.append(start + owner * segment.tokens + token)
        among.append(start_among + owner * queries + token)
        sequences.append(start_sequence + owner)
        shrunk.append(segment._replace(queries=queries))
        start += segment.batch * segment.tokens
        start_among += segment.batch * queries
        start_sequence += segment.batch
    return shrunk, WantedRows(torch.cat(rows), torch.cat(among), torch.cat(sequences))
