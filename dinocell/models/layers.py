"""The parts of a transformer block, and the block: pre-norm, LayerScale, batch-subset drop path."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dinocell.models.attention import Attention, Segment
from dinocell.models.rows import KeptSequences, Subset, WantedRows, branch_factors


class PatchEmbedding(nn.Module):
    """Cut images into square patches and project each to a token; the same numbers as a strided convolution."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # Kept as a convolution's parameters, which is how every released checkpoint stores them.
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p d"]:
        """Return one token a patch, row by row."""
        size = self.patch_size
        pixels = images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(pixels.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class LayerScale(nn.Module):
    """A learned factor a channel on the output of a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Scale every channel."""
        return rows * self.gamma


class GeluMlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Apply to every row."""
        return self.fc2(F.gelu(self.fc1(rows)))  # type: ignore[no-any-return]


class SwigluMlp(nn.Module):
    """A gated linear unit: ``w3(silu(w1 x) * w2 x)`` (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Apply to every row."""
        return self.w3(F.silu(self.w1(rows)) * self.w2(rows))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream with a LayerScale."""

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
        kept: tuple[KeptSequences, KeptSequences] | None = None,
        wanted: WantedRows | None = None,
    ) -> Float[Tensor, "m d"]:
        """Transform the residual stream.

        Parameters
        ----------
        rows
            Tokens of all sequences, segment after segment.
        kept
            Sequences that take the attention branch and the MLP branch; ``None``: all.
        wanted
            Compute and return only these rows; ``None``: all. Exact: keys and values still come from every row.
        """
        if kept is None:
            if wanted is None:
                rows = self._add(rows, self.attn(self.norm1(rows), segments), self.ls1)
            else:
                mixed = self.attn.mix(self.norm1(rows), segments)
                rows = self._add(rows[wanted.rows], self.attn.proj(mixed[wanted.among_queries]), self.ls1)
            return self._add(rows, self.mlp(self.norm2(rows)), self.ls2)

        everything = [segment._replace(queries=None) for segment in segments]
        subset = Subset.of(everything, kept[0])
        branch = self.attn(self.norm1(rows[subset.rows]), subset.segments)
        rows = subset.add(rows, branch if self.ls1 is None else self.ls1(branch))
        if wanted is not None:
            rows = rows[wanted.rows]
            share = branch_factors(segments, kept[1], rows)[wanted.sequence, None]
            return self._add(rows, self.mlp(self.norm2(rows)) * share, self.ls2)
        subset = Subset.of(everything, kept[1])
        branch = self.mlp(self.norm2(rows[subset.rows]))
        return subset.add(rows, branch if self.ls2 is None else self.ls2(branch))

    @staticmethod
    def _add(rows: Tensor, branch: Tensor, scale: LayerScale | None) -> Tensor:
        if scale is None:
            return rows + branch
        # One kernel; the dtype of the residual stream wins (under autocast the branch is bf16).
        return torch.addcmul(rows, branch.to(rows.dtype), scale.gamma.to(rows.dtype))
