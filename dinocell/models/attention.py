"""Self-attention over rows: the tokens of all sequences, of any resolutions, below one another in one matrix.

Linear layers see only rows and need not know where a sequence ends. Attention does: it is told by `Segment`s, one a
resolution, and computed by one of four kernels that give the same result:

============  ==========================================================================================
``sdpa``      one ``scaled_dot_product_attention`` call a resolution. Runs everywhere; the default.
``varlen``    all sequences in one call of torch's variable-length flash attention. CUDA, bf16 or fp16.
``xformers``  the same through xformers' block-diagonal mask. CUDA; needs a build for the installed torch.
``dense``     one call with a dense block-diagonal mask: quadratic in all tokens, the oracle of the tests.
============  ==========================================================================================
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dinocell.errors import DinocellError
from dinocell.models.positions import RotaryTable, split_rotated
from dinocell.models.scale import LayerScale, scaled_linear

AttentionKernel = Literal["sdpa", "varlen", "xformers", "dense"]


class Segment:
    """Consecutive rows that hold ``batch`` sequences of ``tokens`` tokens each, and how to rotate them.

    ``queries`` limits attention to the first tokens of each sequence (the last block of a pass that wants CLS only);
    ``None`` means all.

    Neither a tuple nor a dataclass: FSDP2 looks for gradients inside of those, at every block.
    """

    def __init__(self, batch: int, tokens: int, rotary: RotaryTable | None, queries: int | None = None) -> None:
        self.batch, self.tokens, self.rotary, self.queries = batch, tokens, rotary, queries


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Parameters
    ----------
    width, heads
        Width of a token and number of heads; ``width / heads`` must be a multiple of 4 for rotary positions.
    qkv_bias, key_bias
        Whether the projection has a bias, and whether its key part counts. DINOv3 holds the key bias at zero:
        with a plain softmax it has no effect, with rotary positions it would.
    kernel
        See the module's table.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool, key_bias: bool, kernel: AttentionKernel) -> None:
        super().__init__()
        self.width, self.heads, self.key_bias, self.kernel = width, heads, key_bias, kernel
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(
        self, rows: Float[Tensor, "n d"], segments: Sequence[Segment], scale: LayerScale | None = None
    ) -> Float[Tensor, "q d"]:
        """Return the projected and scaled attention of every query row, segment after segment."""
        return self.project(self.mix(self.queries_keys_values(rows), segments), scale)

    def queries_keys_values(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 3 k e"]:
        """Return the first projection of every row."""
        return F.linear(rows, self.qkv.weight, self._bias()).view(len(rows), 3, self.heads, self.width // self.heads)

    def project(self, mixed: Float[Tensor, "q d"], scale: LayerScale | None = None) -> Float[Tensor, "q d"]:
        """Return the output projection of rows that `mix` gave, scaled."""
        return scaled_linear(self.proj, mixed, scale)

    def mix(self, qkv: Float[Tensor, "n 3 k e"], segments: Sequence[Segment]) -> Float[Tensor, "q d"]:
        """Return the attention-weighted values of every query row, before the output projection; uses ``qkv`` up."""
        parts: Sequence[Tensor] = [qkv]
        if len(segments) > 1:
            # Each part is rotated in place, which autograd forbids to the parts of a plain split: they count as views.
            parts = torch.unsafe_split_with_sizes(qkv, [segment.batch * segment.tokens for segment in segments])
        triples = [_rotated(part, segment) for part, segment in zip(parts, segments, strict=True)]
        if self.kernel == "sdpa":
            mixed = [_attend(*triple, segment.queries) for triple, segment in zip(triples, segments, strict=True)]
            return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).flatten(1)
        query, key, value = (torch.cat([x.flatten(0, 1) for x in each]) for each in zip(*triples, strict=True))
        lengths = [segment.tokens for segment in segments for _ in range(segment.batch)]
        return _first_queries(_PACKED[self.kernel](query, key, value, lengths).flatten(1), segments)

    def cls_weights(self, rows: Float[Tensor, "n d"], segment: Segment) -> Float[Tensor, "b k t"]:
        """Return the weights that the first token of each sequence gives to all of its tokens, by head."""
        query, key, _ = _rotated(self.queries_keys_values(rows), segment)
        products = torch.einsum("bke,btke->bkt", query[:, 0], key) * query.shape[-1] ** -0.5
        return torch.softmax(products, -1)

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = self.qkv.bias
        if bias is None or self.key_bias:
            return bias
        query, key, value = bias.chunk(3)
        return torch.cat((query, torch.zeros_like(key), value))


def _rotated(qkv: Float[Tensor, "n 3 k e"], segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries, rotated keys and values of a segment, each (b t k e)."""
    sequences = qkv.unflatten(0, (segment.batch, segment.tokens))
    if segment.rotary is not None:
        return split_rotated(sequences, segment.rotary)
    # Not slices: the gradient of a slice is a matrix of zeros of the full size, and their sum.
    query, key, value = sequences.unbind(2)
    return query, key, value


def _attend(query: Tensor, key: Tensor, value: Tensor, num_queries: int | None) -> Float[Tensor, "q k e"]:
    if num_queries is not None:
        query = query[:, :num_queries]
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return mixed.transpose(1, 2).flatten(0, 1)


def _first_queries(rows: Float[Tensor, "n d"], segments: Sequence[Segment]) -> Float[Tensor, "q d"]:
    """Drop the rows that no segment asked for (the packed kernels compute them all)."""
    if all(segment.queries is None for segment in segments):
        return rows
    parts = rows.split([segment.batch * segment.tokens for segment in segments])
    return torch.cat(
        [
            p.unflatten(0, (s.batch, s.tokens))[:, : s.queries].flatten(0, 1)
            for p, s in zip(parts, segments, strict=True)
        ]
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = _ends(tuple(lengths), query.device), max(lengths)
    mixed = varlen_attn(query, key, value, ends, ends, longest, longest)
    assert isinstance(mixed, Tensor)
    return mixed


@lru_cache(maxsize=64)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each sequence ends; kept, because every block of every step asks for the same few."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _xformers(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(lengths)
    try:
        mixed: Tensor = memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]
    except NotImplementedError as error:  # it says so in forty lines
        raise DinocellError(
            f"attention kernel xformers: this build of it has no kernel for {query.dtype} on {query.device.type} with "
            f"torch {torch.__version__}; use varlen (CUDA, bfloat16) or sdpa"
        ) from error
    return mixed


def _dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    sequence = torch.repeat_interleave(torch.tensor(lengths, device=query.device))
    same = sequence[:, None] == sequence[None, :]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=same)[0].transpose(0, 1)


_PACKED = {"varlen": _varlen, "xformers": _xformers, "dense": _dense}
