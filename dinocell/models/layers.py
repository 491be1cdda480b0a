"""Transformer block and its parts: attention kernels, MLPs, LayerScale, drop path on subsets of the batch.

Blocks work on rows: the tokens of all sequences, of all resolutions, stacked in one matrix. Linear layers take rows;
attention needs the sequences, given by one `Segment` per resolution. Four kernels give the same result:

============  ==========================================================================================
``sdpa``      one ``scaled_dot_product_attention`` call per resolution. Runs everywhere; the default.
``varlen``    all sequences in one call of torch's variable-length flash attention. CUDA, bf16 or fp16.
``xformers``  the same through xformers' block-diagonal mask. CUDA; needs a build for the installed torch.
``dense``     one call with a dense block-diagonal mask: quadratic in all tokens, the oracle of the tests.
============  ==========================================================================================

A block computes only some of the rows for two reasons: drop path (some sequences skip a branch) and the short cut of
the last block (only some tokens are needed).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinocell.errors import DinocellError
from dinocell.models.positions import RotaryTable, split_rotated

AttentionKernel = Literal["sdpa", "varlen", "xformers", "dense"]

# None of the next three classes is a tuple or dataclass, because FSDP2 searches those for gradients at every block.


class Segment:
    """Consecutive rows that hold ``batch`` sequences of ``tokens`` tokens each, and their rotation.

    ``queries`` limits attention to the first tokens of each sequence (the last block of a pass that needs only CLS);
    ``None`` means all.
    """

    def __init__(self, batch: int, tokens: int, rotary: RotaryTable | None, queries: int | None = None) -> None:
        self.batch, self.tokens, self.rotary, self.queries = batch, tokens, rotary, queries


class NeededRows:
    """The rows of a block's output that are needed, and the sequence of each.

    ``among_queries`` indexes the query rows of the block's segments (see `Segment.queries`), ``rows`` all rows.
    """

    def __init__(self, rows: Int[Tensor, " m"], among_queries: Int[Tensor, " m"], sequence: Int[Tensor, " m"]) -> None:
        self.rows, self.among_queries, self.sequence = rows, among_queries, sequence


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


class LayerScale(nn.Module):
    """A learned factor per channel on the output of a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Scale every channel."""
        return rows * self.gamma


def scaled_linear(linear: nn.Linear, rows: Float[Tensor, "n i"], scale: LayerScale | None) -> Float[Tensor, "n o"]:
    """Return ``scale(linear(rows))``, or ``linear(rows)`` without a scale."""
    # ``(W x + b) * g = (W * g) x + b * g``. Scaling the weights costs a few hundred thousand products per block;
    # scaling the rows takes one pass over the largest activations forward and three backward, and keeps them for the
    # gradient of g.
    if scale is None:
        return linear(rows)  # type: ignore[no-any-return]
    bias = None if linear.bias is None else linear.bias * scale.gamma
    return F.linear(rows, linear.weight * scale.gamma[:, None], bias)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    ``width / heads`` must be a multiple of 4 for rotary positions. With ``qkv_bias`` the projection has a bias, whose
    key part is used with ``key_bias``. DINOv3 keeps the key bias at zero: with a plain softmax it has no effect, with
    rotary positions it would.
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
        """Return the scaled output projection of the result of `mix`."""
        return scaled_linear(self.proj, mixed, scale)

    def mix(self, qkv: Float[Tensor, "n 3 k e"], segments: Sequence[Segment]) -> Float[Tensor, "q d"]:
        """Return the attention-weighted values of every query row, before the output projection; modifies ``qkv``."""
        parts: Sequence[Tensor] = [qkv]
        if len(segments) > 1:
            # Parts are rotated in place, which autograd forbids for the views of a plain split.
            parts = torch.unsafe_split_with_sizes(qkv, [segment.batch * segment.tokens for segment in segments])
        triples = [_rotated(part, segment) for part, segment in zip(parts, segments, strict=True)]
        if self.kernel == "sdpa":
            mixed = [_attend(*triple, segment.queries) for triple, segment in zip(triples, segments, strict=True)]
            return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).flatten(1)
        query, key, value = (torch.cat([x.flatten(0, 1) for x in parts]) for parts in zip(*triples, strict=True))
        lengths = [segment.tokens for segment in segments for _ in range(segment.batch)]
        return _first_queries(_PACKED[self.kernel](query, key, value, lengths).flatten(1), segments)

    def cls_weights(self, rows: Float[Tensor, "n d"], segment: Segment) -> Float[Tensor, "b k t"]:
        """Return the attention weights of the first token of each sequence, per head."""
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
    # Not slices, whose gradients are full-size matrices of zeros and must be summed.
    query, key, value = sequences.unbind(2)
    return query, key, value


def _attend(query: Tensor, key: Tensor, value: Tensor, num_queries: int | None) -> Float[Tensor, "q k e"]:
    if num_queries is not None:
        query = query[:, :num_queries]
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return mixed.transpose(1, 2).flatten(0, 1)


def _first_queries(rows: Float[Tensor, "n d"], segments: Sequence[Segment]) -> Float[Tensor, "q d"]:
    """Drop rows that are not queries (the packed kernels compute all rows)."""
    if all(segment.queries is None for segment in segments):
        return rows
    parts = rows.split([segment.batch * segment.tokens for segment in segments])
    sequences = (p.unflatten(0, (s.batch, s.tokens)) for p, s in zip(parts, segments, strict=True))
    return torch.cat([rows[:, : s.queries].flatten(0, 1) for rows, s in zip(sequences, segments, strict=True)])


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = _ends(tuple(lengths), query.device), max(lengths)
    mixed = varlen_attn(query, key, value, ends, ends, longest, longest)
    assert isinstance(mixed, Tensor)
    return mixed


@lru_cache(maxsize=64)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the ends of the sequences; cached, because every block of every step needs the same."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _xformers(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(lengths)
    try:
        mixed: Tensor = memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]
    except NotImplementedError as error:  # a message of forty lines
        raise DinocellError(
            f"attention kernel xformers: this build has no kernel for {query.dtype} on {query.device.type} with "
            f"torch {torch.__version__}; use varlen (CUDA, bfloat16) or sdpa"
        ) from error
    return mixed


def _dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    sequence = torch.repeat_interleave(torch.tensor(lengths, device=query.device))
    same = sequence[:, None] == sequence[None, :]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=same)[0].transpose(0, 1)


_PACKED = {"varlen": _varlen, "xformers": _xformers, "dense": _dense}


class PatchEmbedding(nn.Module):
    """Project square patches of images to tokens; equal to a strided convolution."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # A convolution's parameters, as in every released checkpoint.
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p d"]:
        """Return one token per patch, row by row."""
        size = self.patch_size
        pixels = images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(pixels.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class GeluMlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, rows: Float[Tensor, "n d"], scale: LayerScale | None = None) -> Float[Tensor, "n d"]:
        """Apply to every row, and scale."""
        return self.output(self.hidden(rows), scale)

    def hidden(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n h"]:
        """Return the input of the activation."""
        return self.fc1(rows)  # type: ignore[no-any-return]

    def output(self, hidden: Float[Tensor, "n h"], scale: LayerScale | None = None) -> Float[Tensor, "n d"]:
        """Return the rest of `forward`."""
        return scaled_linear(self.fc2, F.gelu(hidden), scale)


class SwigluMlp(nn.Module):
    """A gated linear unit: ``w3(silu(w1 x) * w2 x)`` (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, rows: Float[Tensor, "n d"], scale: LayerScale | None = None) -> Float[Tensor, "n d"]:
        """Apply to every row, and scale."""
        return self.output(self.hidden(rows), scale)

    def hidden(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n h"]]:
        """Return the input of the activation, and its factor."""
        return self.w1(rows), self.w2(rows)

    def output(
        self, hidden: tuple[Float[Tensor, "n h"], Float[Tensor, "n h"]], scale: LayerScale | None = None
    ) -> Float[Tensor, "n d"]:
        """Return the rest of `forward`."""
        gate, values = hidden
        return scaled_linear(self.w3, F.silu(gate) * values, scale)


Given = TypeVar("Given")
Made = TypeVar("Made")


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream with a LayerScale.

    With ``recompute_activations`` the outputs of norms and activations, a third of the memory for the backward pass,
    are recomputed there; matrix products are not.
    """

    recompute_activations = False

    def __init__(
        self, attention: Attention, mlp: GeluMlp | SwigluMlp, width: int, *, layer_scale: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = attention
        self.ls1 = LayerScale(width) if layer_scale else None
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = mlp
        self.ls2 = LayerScale(width) if layer_scale else None

    def forward(
        self,
        rows: Float[Tensor, "n d"],
        segments: Sequence[Segment],
        kept: tuple[Subset, Subset] | None = None,
        needed: NeededRows | None = None,
    ) -> Float[Tensor, "m d"]:
        """Transform the residual stream.

        Sequences in ``kept`` take the attention branch and the MLP branch (`find_subsets`; ``None``: all). Only the
        ``needed`` rows are computed and returned, exactly, with keys and values of every row (``None``: all).
        """
        if kept is None:
            if needed is None:
                rows = rows + self._attention(rows, segments)
            else:
                mixed = self.attn.mix(self._queries_keys_values(rows), segments)
                rows = rows[needed.rows] + self.attn.project(mixed[needed.among_queries], self.ls1)
            return rows + self._mlp(rows)

        attended, fed = kept
        rows = attended.add(rows, self._attention(rows[attended.rows], attended.segments))
        if needed is not None:
            rows = rows[needed.rows]
            share = fed.factor_of_sequences(sum(segment.batch for segment in segments), rows)[needed.sequence, None]
            return rows + self._mlp(rows) * share
        return fed.add(rows, self._mlp(rows[fed.rows]))

    def _attention(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        return self.attn.project(self.attn.mix(self._queries_keys_values(rows), segments), self.ls1)

    def _queries_keys_values(self, rows: Tensor) -> Tensor:
        return self._light(lambda x: self.attn.queries_keys_values(self.norm1(x)), rows)

    def _mlp(self, rows: Tensor) -> Tensor:
        if isinstance(self.mlp, GeluMlp):
            hidden = self._light(lambda x: self.mlp.hidden(self.norm2(x)), rows)
        else:  # recomputing the norm would recompute the first of the two products after it, too
            hidden = self.mlp.hidden(self.norm2(rows))
        return self._light(lambda x: self.mlp.output(x, self.ls2), hidden)  # type: ignore[arg-type]

    def _light(self, function: Callable[[Given], Made], values: Given) -> Made:
        """Apply a norm or an activation and the linear layers after it."""
        if not (self.recompute_activations and self.training and torch.is_grad_enabled()):
            return function(values)
        # Recomputation stops at the input of the last linear layer, before its product.
        again: Made = checkpoint(function, values, use_reentrant=False, preserve_rng_state=False)
        return again


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
