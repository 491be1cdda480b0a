"""The heads: an MLP onto the unit sphere with prototypes for DINO and iBOT, and the head of reconstruction.

The projection head does not compute logits. The (tokens, prototypes) matrix is the largest tensor of a training step;
losses and targets take its two factors and compute it in chunks of rows.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])

# Elements of a chunk by default, and maximum rows on the CPU: smaller chunks give slow matrix products, larger ones
# exceed the processor's cache (benchmarks/ssl_heads.py).
_CPU_ELEMENTS, _CPU_ROWS = 2**23, 256
_GPU_ELEMENTS = 2**27


class Projection(NamedTuple):
    """Rows on the unit sphere and the prototypes; the logits are ``rows @ prototypes.T``."""

    rows: Float[Tensor, "n d"]
    prototypes: Float[Tensor, "k d"]

    def logits(self) -> Float[Tensor, "n k"]:
        """Return the full matrix of logits, for tests and small sizes."""
        return self.rows @ self.prototypes.T


class Prototypes(nn.Module):
    """The last layer: one vector per prototype, free (DINOv3) or as length times direction (DINOv2).

    The parameters have the names of Meta's checkpoints: ``weight``, or ``weight_g`` (k 1) and ``weight_v`` (k d).
    """

    def __init__(self, num_prototypes: int, bottleneck: int, *, weight_norm: bool) -> None:
        super().__init__()
        self.weight_norm = weight_norm
        if weight_norm:
            self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1))
            self.weight_v = nn.Parameter(torch.empty(num_prototypes, bottleneck))
        else:
            self.weight = nn.Parameter(torch.empty(num_prototypes, bottleneck))

    def forward(self) -> Float[Tensor, "k d"]:
        """Return the prototypes."""
        if self.weight_norm:
            return self.weight_g * F.normalize(self.weight_v, dim=1)
        return self.weight


class ProjectionHead(nn.Module):
    """A small MLP with GELU, L2 normalisation, and prototypes.

    Parameters
    ----------
    width
        Width of the input tokens.
    num_prototypes
        65,536 in DINOv2's ViT-L recipe; 8,192 is enough for cells.
    hidden, bottleneck, layers
        Width of the hidden layers (2,048) and of the output (256), and the number of linear layers (3).
    weight_norm
        Separate parameters for length and direction of each prototype, as in DINOv2; not in DINOv3.
    """

    def __init__(
        self,
        width: int,
        num_prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        weight_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        linear = [nn.Linear(before, after) for before, after in pairwise(widths)]
        # Module names as in Meta's heads: mlp.0, mlp.2, mlp.4, and plain mlp for a single layer.
        between = [module for layer in linear for module in (layer, nn.GELU())][:-1]
        self.mlp: nn.Module = linear[0] if layers == 1 else nn.Sequential(*between)
        self.last_layer = Prototypes(num_prototypes, bottleneck, weight_norm=weight_norm)
        if not linear[0].weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, *, generator: torch.Generator | None = None) -> None:
        """Set every parameter to its initial value (as in DINOv2 and DINOv3).

        ========================  ========================================
        linear weights            truncated normal, std 0.02, cut at +-2
        linear biases             0
        prototypes, directions    truncated normal, std 0.02, cut at +-2
        lengths of prototypes     1
        ========================  ========================================
        """
        _init_linear(self.mlp, generator)
        last = self.last_layer
        nn.init.trunc_normal_(last.weight_v if last.weight_norm else last.weight, std=0.02, generator=generator)
        if last.weight_norm:
            nn.init.ones_(last.weight_g)

    def forward(self, tokens: Float[Tensor, "n d"]) -> Projection:
        """Project normalised tokens (CLS, or masked patches) onto the unit sphere.

        Prototypes must be taken from the returned projection: FSDP2 gathers parameters around a forward pass.
        """
        rows = self.mlp(tokens)
        # 1e-12 is zero in fp16, and the gradient of a zero row would be infinite. Autocast normalises in float32; the
        # type of the rows is the type in which the logits are computed.
        unit = F.normalize(rows, dim=-1, eps=1e-6 if rows.dtype == torch.float16 else 1e-12)
        return Projection(unit.to(rows.dtype), self.last_layer())


class ReconstructionHead(nn.Module):
    """Two linear layers with GELU from the token of a masked patch to its ``pixels``: channels times area numbers."""

    def __init__(self, width: int, pixels: int, *, hidden_dim: int = 512) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden_dim), nn.Linear(hidden_dim, pixels)
        if not self.fc1.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, *, generator: torch.Generator | None = None) -> None:
        """Set weights to a truncated normal distribution, std 0.02, cut at +-2, and biases to 0."""
        _init_linear(self, generator)

    def forward(self, tokens: Float[Tensor, "m d"]) -> Float[Tensor, "m e"]:
        """Return the pixels, channel by channel, row by row."""
        pixels: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return pixels


def _init_linear(parent: nn.Module, generator: torch.Generator | None) -> None:
    for module in parent.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            nn.init.zeros_(module.bias)


def row_chunks(
    num_rows: int, num_prototypes: int, device: torch.device, elements: int | None = None
) -> Iterator[slice]:
    """Yield slices of rows whose logits have at most ``elements`` elements, but at least one row."""
    on_cpu = device.type == "cpu"
    size = max(1, (elements or (_CPU_ELEMENTS if on_cpu else _GPU_ELEMENTS)) // max(num_prototypes, 1))
    if on_cpu and elements is None:
        size = min(size, _CPU_ROWS)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def chunks_with_scratch(
    count: int, num_rows: int, like: Float[Tensor, " k"], elements: int | None = None
) -> Iterator[tuple[slice, Float[Tensor, "count m k"]]]:
    """Yield `row_chunks` with memory for ``count`` matrices each.

    The memory is reused: on the CPU new pages cost more than the arithmetic.
    """
    scratch: Tensor | None = None
    for rows in row_chunks(num_rows, len(like), like.device, elements):
        if scratch is None:  # the first chunk is the largest
            scratch = like.new_empty(count, rows.stop, len(like))
        yield rows, scratch[:, : rows.stop - rows.start]


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context without autocast: products run in the type of their factors."""
    return torch.autocast(like.device.type, enabled=False)


@cache
def compiled_once(function: Function) -> Function:
    """Return the compiled function; the same object at every call."""
    return cast("Function", torch.compile(function))
