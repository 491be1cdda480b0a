"""Positions of patches: rotary tables (DINOv3) and learned, interpolated embeddings (DINOv2, Cell-DINO).

Both are computed once per resolution and forward pass, not per block; tables without noise are cached.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Axial rotary positions of DINOv3.

    The ``head_dim / 4`` periods of an axis are geometric: from 1 to ``base ** (1 - 4 / head_dim)``, or from
    ``min_period`` to ``max_period`` (both included) if these are given. Before patch centres are mapped to [-1, 1],
    each axis is divided by its own length (``coordinates="separate"``), or both by the shorter (``min``) or longer
    (``max``) one.
    """

    base: float = 100.0
    min_period: float | None = None
    max_period: float | None = None
    coordinates: Literal["separate", "min", "max"] = "separate"

    def __post_init__(self) -> None:
        periods = (self.min_period, self.max_period)
        is_valid = periods == (None, None) or (None not in periods and 0 < periods[0] < periods[1])  # type: ignore[operator]
        if not is_valid or self.base <= 1:
            expected = "a base above 1, and both or neither of 0 < min_period < max_period"
            raise ValueError(f"rope: expected {expected}, got {self}")


@dataclass(frozen=True, kw_only=True)
class LearnedPositionConfig:
    """A table of learned positions, one per patch of the training grid, bicubically resized to other grids.

    DINOv2 without registers and Cell-DINO scale by ``(size + 0.1) / trained size`` (``offset=0.1``, no antialiasing);
    DINOv2 with registers resizes to the exact size with antialiasing (``offset=0``); Hugging Face always resizes to the
    exact size.
    """

    grid_rows: int = 37
    grid_columns: int = 37
    offset: float = 0.1
    antialias: bool = False

    def __post_init__(self) -> None:
        if self.grid_rows < 1 or self.grid_columns < 1 or not 0 <= self.offset < 1:
            raise ValueError(f"learned: expected a grid of at least 1 x 1 and an offset in [0, 1), got {self}")


@dataclass(frozen=True, kw_only=True)
class TrainingNoise:
    """Noise in the forward pass of a training; a model in eval mode ignores it.

    ``drop_path`` is the share of samples that skip each branch of each block. The ``rope_*`` values perturb the patch
    coordinates once per forward pass and resolution: a shift by U(-shift, shift) per axis, a log-uniform factor in
    [1/jitter, jitter] per axis, a log-uniform factor in [1/rescale, rescale] for both axes. The released DINOv3 models
    were trained with ``rope_rescale=2``.
    """

    drop_path: float = 0.0
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None

    @property
    def moves_positions(self) -> bool:
        """Whether coordinates are perturbed at all."""
        return any(value is not None for value in (self.rope_shift, self.rope_jitter, self.rope_rescale))

    def __post_init__(self) -> None:
        ranges = {"drop_path": (0, 1), "rope_shift": (0, math.inf)}
        ranges |= {"rope_jitter": (1, math.inf), "rope_rescale": (1, math.inf)}
        for name, (low, end) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value < end:
                raise ValueError(f"{name}: expected a number in [{low}, {end}), got {value}")


class RotaryTable(NamedTuple):
    """Cosines and sines of the angles of every token; prefix tokens (CLS, registers) have angle 0."""

    cos: Float[Tensor, "n 1 1 e"]
    sin: Float[Tensor, "n 1 1 e"]


def rotary_periods(config: RopeConfig, head_dim: int, device: torch.device | None = None) -> Float[Tensor, " q"]:
    """Return the ``head_dim / 4`` periods, in units of half an image, shared by both axes."""
    count = head_dim // 4
    if config.min_period is not None and config.max_period is not None:
        first, last = math.log(config.min_period), math.log(config.max_period)
        return torch.linspace(first, last, count, device=device).exp()
    exponents = torch.arange(count, device=device, dtype=torch.float32) / count
    return torch.full_like(exponents, config.base) ** exponents


def rotary_table(
    grid: tuple[int, int],
    num_prefix: int,
    head_dim: int,
    config: RopeConfig,
    *,
    noise: TrainingNoise | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> RotaryTable:
    """Return the rotation of every token of one resolution: float32, (num_prefix + rows * columns, 1, 1, head_dim).

    ``grid`` are the rows and columns of patches; the ``num_prefix`` tokens before them are not rotated. ``head_dim`` is
    a multiple of 4: the first half of a head's width pairs with the second half, and each half holds the row angles,
    then the column angles. ``noise`` perturbs the coordinates (training).
    """
    rows, columns = grid
    lengths = {"separate": (rows, columns), "min": (min(grid),) * 2, "max": (max(grid),) * 2}[config.coordinates]
    # Centres of patches, in [0, 1] of the chosen length, then in [-1, 1]: (rows * columns, 2).
    row = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / lengths[0]
    column = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / lengths[1]
    centres = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1) * 2 - 1
    if noise is not None:
        centres = _perturb(centres, noise, generator)
    periods = rotary_periods(config, head_dim, device)
    # (p, 2 axes, q periods) -> (p, 2q), repeated for the two halves of a head: (p, head_dim).
    angles = (2 * math.pi * centres[:, :, None] / periods).flatten(1).tile(2)
    # Prefix tokens get angle 0.
    angles = F.pad(angles, (0, 0, num_prefix, 0))[:, None, None, :]
    return RotaryTable(angles.cos(), angles.sin())


@lru_cache(maxsize=8)
def kept_rotary_table(
    grid: tuple[int, int], num_prefix: int, head_dim: int, config: RopeConfig, device: torch.device
) -> RotaryTable:
    """Return `rotary_table` without noise, cached for the last few resolutions; it must not be modified."""
    return rotary_table(grid, num_prefix, head_dim, config, device=device)


def _perturb(
    centres: Float[Tensor, "p 2"], noise: TrainingNoise, generator: torch.Generator | None
) -> Float[Tensor, "p 2"]:
    """Shift, then jitter, then rescale the coordinates (DINOv3's order)."""

    def uniform(count: int, bound: float) -> Tensor:
        drawn = torch.rand(count, generator=generator, device=centres.device, dtype=centres.dtype)
        return drawn * (2 * bound) - bound

    if noise.rope_shift is not None:
        centres = centres + uniform(2, noise.rope_shift)
    if noise.rope_jitter is not None:
        centres = centres * uniform(2, math.log(noise.rope_jitter)).exp()
    if noise.rope_rescale is not None:
        centres = centres * uniform(1, math.log(noise.rope_rescale)).exp()
    return centres


def rotate(x: Float[Tensor, "*b n t k e"], table: RotaryTable) -> Float[Tensor, "*b n t k e"]:
    """Rotate queries and keys (stacked in ``t``) by their tokens' angles, in the precision of the table."""
    first, second = x.chunk(2, dim=-1)
    return (x * table.cos + torch.cat((-second, first), dim=-1) * table.sin).to(x.dtype)


def split_rotated(
    qkv: Float[Tensor, "b n 3 k e"], table: RotaryTable
) -> tuple[Float[Tensor, "b n k e"], Float[Tensor, "b n k e"], Float[Tensor, "b n k e"]]:
    """Return queries and keys, rotated as by `rotate`, and values.

    In place: ``qkv`` is a projection's output that is not used otherwise, and a copy would be the second largest tensor
    that a block keeps for the backward pass.
    """
    if torch.compiler.is_compiling():
        queries_and_keys, value = qkv.split((2, 1), dim=2)
        query, key = rotate(queries_and_keys, table).unbind(2)
        return query, key, value.squeeze(2)
    if torch.is_grad_enabled() and qkv.requires_grad:
        parts: tuple[Tensor, Tensor, Tensor] = _SplitRotated.apply(qkv, table.cos, table.sin)  # type: ignore[no-untyped-call]
        return parts
    return _split_rotated(qkv, table.cos, table.sin)


def _split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate in place and return three views of ``qkv``."""
    qkv = qkv.detach()
    queries_and_keys = qkv[:, :, :2]
    if cos.dtype == qkv.dtype:
        first, second = queries_and_keys.chunk(2, dim=-1)
        (first_cos, second_cos), (first_sin, second_sin) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        # Keep x1 * sin before x1 is overwritten: x1 = x1 cos - x2 sin, x2 = x2 cos + x1 sin.
        crossed = first * second_sin
        first.mul_(first_cos).addcmul_(second, first_sin, value=-1.0)
        second.mul_(second_cos).add_(crossed)
    else:
        exact = torch.empty_like(queries_and_keys, dtype=cos.dtype)
        _rotate_into(exact, queries_and_keys, cos, sin, 1.0)
        queries_and_keys.copy_(exact)
    query, key, value = qkv.unbind(2)
    return query, key, value


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> None:
    """Rotate without the temporaries of the plain formula (two passes over memory instead of four)."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)


class _SplitRotated(torch.autograd.Function):
    """Rotation and split in one step; the backward pass rotates each gradient into its part of the whole gradient.

    Only the table is kept for the backward pass, and no part of the gradient is copied again.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _split_rotated(qkv, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = (tensor.squeeze(-3) for tensor in ctx.saved_tensors)
        batch, tokens, heads, width = value.shape
        gradient = value.new_empty(batch, tokens, 3, heads, width)
        for index, part in enumerate((query, key)):
            if cos.dtype == part.dtype:
                _rotate_into(gradient[:, :, index], part, cos, sin, -1.0)
            else:
                exact = torch.empty_like(part, dtype=cos.dtype)
                _rotate_into(exact, part, cos, sin, -1.0)
                gradient[:, :, index] = exact
        gradient[:, :, 2] = value
        return gradient, None, None


def learned_positions(
    table: Float[Tensor, "1 q d"], grid: tuple[int, int], config: LearnedPositionConfig
) -> Float[Tensor, "1 n d"]:
    """Resize a learned table (CLS first, then the training grid row by row) to another grid of patches.

    Interpolation runs in float32. For the training grid the table is returned unchanged.
    """
    trained = (config.grid_rows, config.grid_columns)
    if grid == trained:
        return table
    patches = table[:, 1:].float().unflatten(1, trained).permute(0, 3, 1, 2)
    if config.offset:
        factors = tuple((size + config.offset) / old for size, old in zip(grid, trained, strict=True))
        patches = F.interpolate(patches, scale_factor=factors, mode="bicubic", antialias=config.antialias)
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=config.antialias)
    assert patches.shape[-2:] == grid, f"{tuple(patches.shape)} for grid {grid}"
    return torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


def position_parameter(config: LearnedPositionConfig, width: int) -> nn.Parameter:
    """Return an uninitialised table of learned positions for CLS and every patch of the training grid."""
    return nn.Parameter(torch.empty(1, 1 + config.grid_rows * config.grid_columns, width))
