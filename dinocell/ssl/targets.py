"""The student's targets: softmax of the teacher's logits, balanced over the prototypes.

Sinkhorn-Knopp and centring both give ``q[b, k] = softmax over k of (logit[b, k] / temperature + offset[k])``: one
offset per prototype describes the balance, the softmax normalises each row. So targets are the teacher's logits (stored
or recomputed in chunks from their two factors) and one offset per prototype, never a matrix of probabilities.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dinocell.ssl.heads import Projection, chunks_with_scratch, compiled_once, full_precision, row_chunks

SumOverRanks = Callable[[Tensor], Tensor]
"""Return the sum of a tensor over all ranks, such as ``torch.distributed.all_reduce`` on a copy."""


def one_rank(values: Tensor) -> Tensor:
    """Return the values: the sum over the only rank."""
    return values


class TeacherLogits:
    """The logits of a teacher's projection, computed in chunks of rows.

    Parameters
    ----------
    projection
        The teacher's rows and prototypes.
    keep
        Compute the logits once and store them, in the precision of the rows: three matrix products fewer with
        Sinkhorn-Knopp, memory for ``rows x prototypes`` more numbers.
    """

    def __init__(self, projection: Projection, *, keep: bool = False) -> None:
        self.rows = projection.rows.detach()
        self.prototypes = projection.prototypes.detach().to(self.rows.dtype)
        with full_precision(self.rows):
            self.kept = self.rows @ self.prototypes.T if keep else None

    @property
    def num_rows(self) -> int:
        """Rows of this rank."""
        return len(self.rows)

    @property
    def num_prototypes(self) -> int:
        """Prototypes, K."""
        return len(self.prototypes)

    def part(self, rows: slice | Int[Tensor, " m"]) -> "TeacherLogits":
        """Return the logits of some rows."""
        part = copy.copy(self)
        part.rows = self.rows[rows]
        part.kept = None if self.kept is None else self.kept[rows]
        return part

    @torch.no_grad()
    def chunk(
        self,
        rows: slice | Int[Tensor, " m"],
        scale: Float[Tensor, ""],
        offsets: Float[Tensor, " k"],
        *,
        out: Float[Tensor, "m k"] | None = None,
    ) -> Float[Tensor, "m k"]:
        """Return ``scale * logits + offsets`` of some rows, at least in float32."""
        with full_precision(self.rows):
            if self.kept is not None:
                return torch.addcmul(offsets, self.kept[rows].to(offsets.dtype), scale, out=out)
            if self.rows.dtype == offsets.dtype:
                return torch.addmm(offsets, self.rows[rows] * scale, self.prototypes.T, out=out)
            return torch.addcmul(offsets, (self.rows[rows] @ self.prototypes.T).to(offsets.dtype), scale, out=out)


@dataclass(frozen=True)
class Targets:
    """Probabilities over prototypes, one row per teacher token: ``softmax(scale * logits + offsets)``."""

    logits: TeacherLogits
    scale: Float[Tensor, ""]
    offsets: Float[Tensor, " k"]

    @property
    def num_rows(self) -> int:
        """Rows of this rank."""
        return self.logits.num_rows

    def part(self, rows: slice | Int[Tensor, " m"]) -> "Targets":
        """Return the targets of some rows."""
        return replace(self, logits=self.logits.part(rows))

    def chunk(
        self, rows: slice | Int[Tensor, " m"], *, scratch: Float[Tensor, "2 m k"] | None = None
    ) -> Float[Tensor, "m k"]:
        """Return the probabilities of some rows; in ``scratch[1]``, if given."""
        if scratch is None:
            return torch.softmax(self.logits.chunk(rows, self.scale, self.offsets), dim=1)
        scaled = self.logits.chunk(rows, self.scale, self.offsets, out=scratch[0])
        return torch.softmax(scaled, dim=1, out=scratch[1])

    def probabilities(self) -> Float[Tensor, "n k"]:
        """Return the probabilities of all rows."""
        return self.chunk(slice(None))


@torch.no_grad()
def sinkhorn_targets(
    logits: Sequence[TeacherLogits],
    temperature: float | Float[Tensor, ""],
    *,
    iterations: int = 3,
    sum_over_ranks: SumOverRanks = one_rank,
    chunk_elements: int | None = None,
    compiled: bool = False,
) -> list[Targets]:
    """Balance the use of prototypes by Sinkhorn-Knopp (Caron et al. 2020, SwAV; the targets of DINOv3).

    Alternately normalises the sums of columns (prototypes) and of rows of exp(logits / temperature), rows last. It
    works in the log domain with one offset per prototype, so any logits over any temperature stay finite. Several
    matrices (CLS tokens, masked patches) share their sums over ranks: ``iterations + 1`` calls, each of K numbers per
    matrix.

    Parameters
    ----------
    logits
        Matrices, each balanced by itself; the same number on all ranks, with any number of rows.
    temperature
        Of the teacher; 0.04 rising to 0.07 in DINOv2 and DINOv3.
    iterations
        Rounds, at least 1.
    sum_over_ranks
        For several ranks; the result is that of one process with all rows.
    chunk_elements
        Elements of a chunk of logits, see `dinocell.ssl.heads.row_chunks`.
    compiled
        Compile the passes over a chunk of logits: less memory traffic, the same result up to rounding.
    """
    scales = [_scale(matrix, temperature) for matrix in logits]
    sizes = [matrix.num_prototypes for matrix in logits]
    # First column step, from offsets of 0: in the log domain, as exp(logits / temperature) may overflow.
    local = [_log_sums(matrix, scale, chunk_elements, compiled) for matrix, scale in zip(logits, scales, strict=True)]
    offsets = [-total for total in _add_logs(local, [matrix.num_rows for matrix in logits], sum_over_ranks)]
    for _ in range(iterations - 1):
        # Row step: the softmax inside `Targets`. Column step: subtract the log of each prototype's sum. The sums are in
        # [1 / K, number of rows], because after a column step every column of exp(...) sums to 1 and so no row sums to
        # more than K. Plain sums and logarithms are therefore safe, without a maximum over ranks.
        now = [Targets(*triple) for triple in zip(logits, scales, offsets, strict=True)]
        sums = sum_over_ranks(torch.cat([_column_sums(targets, chunk_elements, compiled) for targets in now]))
        offsets = [old - total.log() for old, total in zip(offsets, sums.split(sizes), strict=True)]
    return [Targets(*triple) for triple in zip(logits, scales, offsets, strict=True)]


class Centre(nn.Module):
    """A running mean of the teacher's logits, subtracted before the softmax (Caron et al. 2021, DINO).

    One for CLS tokens, another for patches. The buffer ``centre`` is part of a checkpoint. ``momentum`` is the share of
    the old mean that an update keeps.
    """

    centre: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, logits: TeacherLogits, temperature: float | Float[Tensor, ""]) -> Targets:
        """Return the targets with the current centre."""
        scale = _scale(logits, temperature)
        return Targets(logits, scale, self.centre.to(scale.dtype) * -scale)

    @torch.no_grad()
    def update(self, logits: TeacherLogits, *, sum_over_ranks: SumOverRanks = one_rank) -> None:
        """Move the centre towards the mean logits of all rows of all ranks.

        Without rows, or if they are not finite, it does not move: such a step changes nothing else either.
        """
        with full_precision(logits.rows):
            # The mean of the logits is the mean row times the prototypes: the ranks exchange one row and a count.
            rows = logits.rows.to(_at_least_float32(logits.rows.dtype))
            count = rows.new_full((1,), logits.num_rows)  # filled on the device: a copy would wait for it
            total = sum_over_ranks(torch.cat((rows.sum(0), count)))
            mean = logits.prototypes.to(rows.dtype) @ (total[:-1] / total[-1].clamp(min=1))
            is_valid = (total[-1] > 0) & total.isfinite().all()
            moved = self.momentum * self.centre + (1 - self.momentum) * mean.to(self.centre.dtype)
            # A new tensor, not in place: targets of this step may still refer to the old one.
            self.centre = torch.where(is_valid, moved, self.centre)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scale(logits: TeacherLogits, temperature: float | Tensor) -> Tensor:
    dtype, device = _at_least_float32(logits.rows.dtype), logits.rows.device
    if isinstance(temperature, Tensor):
        return temperature.to(device, dtype).reciprocal()
    return torch.full((), temperature, dtype=dtype, device=device).reciprocal()  # a copy would wait for a GPU


def _log_sums(logits: TeacherLogits, scale: Tensor, elements: int | None, compiled: bool) -> Float[Tensor, " k"]:
    """Return the log of the sum over this rank's rows of exp(scale * logits); -inf without rows."""
    count, device = logits.num_prototypes, logits.rows.device
    total = torch.full((count,), -torch.inf, dtype=scale.dtype, device=device)
    if compiled:
        for rows in row_chunks(logits.num_rows, count, device, elements):
            of_chunk = compiled_once(_log_sums_of_chunk)(mark_dynamic_rows(logits.part(rows)), scale)
            total = torch.logaddexp(total, of_chunk)
        return total
    zero = torch.zeros_like(total)
    for rows, scratch in chunks_with_scratch(1, logits.num_rows, zero, elements):
        # As `_log_sums_of_chunk`, in place.
        scaled = logits.chunk(rows, scale, zero, out=scratch[0])
        largest = scaled.amax(0)
        total = torch.logaddexp(total, scaled.sub_(largest).exp_().sum(0).log_().add_(largest))
    return total


def _log_sums_of_chunk(logits: TeacherLogits, scale: Tensor) -> Float[Tensor, " k"]:
    scaled = logits.chunk(slice(None), scale, scale.new_zeros(logits.num_prototypes))
    largest = scaled.amax(0)
    return (scaled - largest).exp().sum(0).log() + largest


def _column_sums(targets: Targets, elements: int | None, compiled: bool) -> Float[Tensor, " k"]:
    """Return the sum of each prototype's probabilities over this rank's rows."""
    total = torch.zeros_like(targets.offsets)
    if compiled:
        for rows in row_chunks(targets.num_rows, len(total), total.device, elements):
            total += compiled_once(_column_sums_of_chunk)(mark_dynamic_rows(targets.part(rows)))
        return total
    for rows, scratch in chunks_with_scratch(2, targets.num_rows, total, elements):
        total += targets.chunk(rows, scratch=scratch).sum(0)
    return total


def _column_sums_of_chunk(targets: Targets) -> Float[Tensor, " k"]:
    return targets.probabilities().sum(0)


Rows = TypeVar("Rows", bound=TeacherLogits | Targets | Tensor)


def mark_dynamic_rows(chunk: Rows) -> Rows:
    """Tell the compiler that the number of rows varies: in the last chunk, and between steps on several ranks."""
    if isinstance(chunk, Targets):
        mark_dynamic_rows(chunk.logits)
    else:
        for tensor in (chunk.rows, chunk.kept) if isinstance(chunk, TeacherLogits) else (chunk,):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return chunk


def _add_logs(local: Sequence[Tensor], num_rows: Sequence[int], sum_over_ranks: SumOverRanks) -> list[Tensor]:
    """Return log of the sum over ranks of exp(local), by two sums over ranks.

    The first gives the mean over the ranks, weighted by rows, as a common shift. The largest rank is above it, so the
    sum does not underflow; float64 holds ranks that differ by up to e^700.
    """
    if sum_over_ranks is one_rank:
        return list(local)
    sizes = [len(values) for values in local]
    weighted = [torch.where(values.isneginf(), 0, values) * n for values, n in zip(local, num_rows, strict=True)]
    counts = [values.new_full((1,), n) for values, n in zip(local, num_rows, strict=True)]  # a copy would wait for it
    *totals, count = sum_over_ranks(torch.cat([*weighted, *counts])).split([*sizes, len(sizes)])
    shifts = [total / n.clamp(min=1) for total, n in zip(totals, count, strict=True)]
    shifted = [(values - shift).double().exp() for values, shift in zip(local, shifts, strict=True)]
    sums = sum_over_ranks(torch.cat(shifted)).log().split(sizes)
    return [shift + total.to(shift.dtype) for shift, total in zip(shifts, sums, strict=True)]
