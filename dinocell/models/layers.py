"""The parts of a transformer block, and the block: pre-norm, LayerScale, batch-subset drop path."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinocell.models.attention import Attention, Segment
from dinocell.models.rows import Subset, WantedRows
from dinocell.models.scale import LayerScale, scaled_linear

Given = TypeVar("Given")
Made = TypeVar("Made")


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
        """Return what goes into the activation."""
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
        """Return what goes into the activation, and its factor."""
        return self.w1(rows), self.w2(rows)

    def output(
        self, hidden: tuple[Float[Tensor, "n h"], Float[Tensor, "n h"]], scale: LayerScale | None = None
    ) -> Float[Tensor, "n d"]:
        """Return the rest of `forward`."""
        gate, values = hidden
        return scaled_linear(self.w3, F.silu(gate) * values, scale)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream with a LayerScale.

    With ``recompute_activations`` the outputs of norms and activations, a third of what the backward pass would keep,
    are made again there instead; no product of matrices is.
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
        wanted: WantedRows | None = None,
    ) -> Float[Tensor, "m d"]:
        """Transform the residual stream.

        Parameters
        ----------
        rows
            Tokens of all sequences, segment after segment.
        kept
            Sequences that take the attention branch and the MLP branch, see `find_subsets`; ``None``: all.
        wanted
            Compute and return only these rows; ``None``: all. Exact: keys and values still come from every row.
        """
        if kept is None:
            if wanted is None:
                rows = rows + self._attention(rows, segments)
            else:
                mixed = self.attn.mix(self._queries_keys_values(rows), segments)
                rows = rows[wanted.rows] + self.attn.project(mixed[wanted.among_queries], self.ls1)
            return rows + self._mlp(rows)

        attended, fed = kept
        rows = attended.add(rows, self._attention(rows[attended.rows], attended.segments))
        if wanted is not None:
            rows = rows[wanted.rows]
            share = fed.factor_of_sequences(sum(segment.batch for segment in segments), rows)[wanted.sequence, None]
            return rows + self._mlp(rows) * share
        return fed.add(rows, self._mlp(rows[fed.rows]))

    def _attention(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        return self.attn.project(self.attn.mix(self._queries_keys_values(rows), segments), self.ls1)

    def _queries_keys_values(self, rows: Tensor) -> Tensor:
        return self._light(lambda x: self.attn.queries_keys_values(self.norm1(x)), rows)

    def _mlp(self, rows: Tensor) -> Tensor:
        if isinstance(self.mlp, GeluMlp):
            hidden = self._light(lambda x: self.mlp.hidden(self.norm2(x)), rows)
        else:  # Two products behind one norm: to make the norm again, the first of them would be made again, too.
            hidden = self.mlp.hidden(self.norm2(rows))
        return self._light(lambda x: self.mlp.output(x, self.ls2), hidden)  # type: ignore[arg-type]

    def _light(self, function: Callable[[Given], Made], values: Given) -> Made:
        """Apply a norm or an activation and the linear layers behind it."""
        if not (self.recompute_activations and self.training and torch.is_grad_enabled()):
            return function(values)
        # What is made again ends where the last linear layer has its input: its product is not.
        again: Made = checkpoint(function, values, use_reentrant=False, preserve_rng_state=False)
        return again
