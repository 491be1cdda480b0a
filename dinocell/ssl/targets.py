"""What the student is to predict: the teacher's logits, balanced over the prototypes, as a softmax.

Sinkhorn-Knopp and centring both end in ``q[b, k] = softmax over k of (logit[b, k] / temperature + offset[k])``: one
number a prototype says it all, the normaliser of a row follows. So targets are the teacher's logits (kept, or made
again from their two factors a piece at a time) and one offset a prototype, never a matrix of probabilities.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dinocell.ssl.chunks import compiled_once, full_precision, pieces, with_scratch
from dinocell.ssl.heads import Projection

SumOverRanks = Callable[[Tensor], Tensor]
"""Return the sum of a tensor over all ranks, such as ``torch.distributed.all_reduce`` on a copy."""


def one_rank(values: Tensor) -> Tensor:
    """Return the values: the sum over the only rank."""
    return values


class TeacherLogits:
    """The logits of a teacher's projection, taken in pieces of rows.

    Parameters
    ----------
    projection
        The teacher's rows and prototypes.
    keep
        Compute the logits once and hold them, in the precision of the rows: three matrix products fewer with
        Sinkhorn-Knopp, ``rows x prototypes`` numbers more memory.
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

    def part(self, which: slice | Int[Tensor, " m"]) -> "TeacherLogits":
        """Return some rows as logits of their own."""
        some = copy.copy(self)
        some.rows = self.rows[which]
        some.kept = None if self.kept is None else self.kept[which]
        return some

    @torch.no_grad()
    def piece(
        self,
        which: slice | Int[Tensor, " m"],
        scale: Float[Tensor, ""],
        offsets: Float[Tensor, " k"],
        *,
        out: Float[Tensor, "m k"] | None = None,
    ) -> Float[Tensor, "m k"]:
        """Return ``scale * logits + offsets`` of some rows, at least in float32."""
        with full_precision(self.rows):
            if self.kept is not None:
                return torch.addcmul(offsets, self.kept[which].to(offsets.dtype), scale, out=out)
            if self.rows.dtype == offsets.dtype:
                return torch.addmm(offsets, self.rows[which] * scale, self.prototypes.T, out=out)
            return torch.addcmul(offsets, (self.rows[which] @ self.prototypes.T).to(offsets.dtype), scale, out=out)


@dataclass(frozen=True)
class Targets:
    """Probabilities over prototypes, one row a teacher token: ``softmax(scale * logits + offsets)``."""

    logits: TeacherLogits
    scale: Float[Tensor, ""]
    offsets: Float[Tensor, " k"]

    @property
    def num_rows(self) -> int:
        """Rows of this rank."""
        return self.logits.num_rows

    def part(self, which: slice | Int[Tensor, " m"]) -> "Targets":
        """Return some rows as targets of their own."""
        return replace(self, logits=self.logits.part(which))

    def piece(
        self, which: slice | Int[Tensor, " m"], *, scratch: Float[Tensor, "2 m k"] | None = None
    ) -> Float[Tensor, "m k"]:
        """Return the probabilities of some rows; they lie in ``scratch[1]``, if that is given."""
        if scratch is None:
            return torch.softmax(self.logits.piece(which, self.scale, self.offsets), dim=1)
        scaled = self.logits.piece(which, self.scale, self.offsets, out=scratch[0])
        return torch.softmax(scaled, dim=1, out=scratch[1])

    def probabilities(self) -> Float[Tensor, "n k"]:
        """Return all rows at once."""
        return self.piece(slice(None))


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

    Alternately gives every prototype and every row the same share; ends with rows that sum to one. Works with one
    offset a prototype in the log domain, so that any logits over any temperature stay finite, and takes several
    matrices of logits at once (CLS tokens, masked patches), so that they share their sums over ranks: ``iterations +
    1`` calls in all, each of K numbers a matrix.

    Parameters
    ----------
    logits
        Matrices to balance, each by itself; all ranks give as many, with any number of rows.
    temperature
        Of the teacher; 0.04 rising to 0.07 in DINOv2 and DINOv3.
    iterations
        Rounds, at least 1.
    sum_over_ranks
        For several ranks; the result is then that of one process with all rows.
    piece_elements
        Elements of a piece of logits, see `pieces`.
    compiled
        Let the compiler join the passes over a piece of logits: less memory traffic, the result but for rounding.

    Raises
    ------
    ValueError
        If ``iterations`` is below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    scales = [_scale(each, temperature) for each in logits]
    sizes = [each.num_prototypes for each in logits]
    local = [_log_sums(each, scale, chunk_elements, compiled) for each, scale in zip(logits, scales, strict=True)]
    offsets = [-total for total in _add_logs(local, [each.num_rows for each in logits], sum_over_ranks)]
    for _ in range(iterations - 1):
        # Each prototype's share lies in [1 / K, number of rows]: with the offsets so far its column of exp(logits)
        # sums to 1 and no row sums to more than K. Hence plain sums, plain logarithms, and no maximum over ranks.
        now = [Targets(*triple) for triple in zip(logits, scales, offsets, strict=True)]
        shares = sum_over_ranks(torch.cat([_column_sums(each, chunk_elements, compiled) for each in now]))
        offsets = [old - share.log() for old, share in zip(offsets, shares.split(sizes), strict=True)]
    return [Targets(*triple) for triple in zip(logits, scales, offsets, strict=True)]


class Centre(nn.Module):
    """A running mean of the teacher's logits, subtracted before the softmax (Caron et al. 2021, DINO).

    One for CLS tokens, another for patches. The buffer ``centre`` belongs to the training state.

    Parameters
    ----------
    num_prototypes
        K.
    momentum
        Share of the old mean that an update keeps.
    """

    centre: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a share in [0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, logits: TeacherLogits, temperature: float | Float[Tensor, ""]) -> Targets:
        """Return the targets under the centre as it stands."""
        scale = _scale(logits, temperature)
        return Targets(logits, scale, self.centre.to(scale.dtype) * -scale)

    @torch.no_grad()
    def update(self, logits: TeacherLogits, *, sum_over_ranks: SumOverRanks = one_rank) -> None:
        """Move the centre towards the mean logits of all rows of all ranks.

        No rows leave it where it is, and so do rows that are not finite: such a step changes nothing else either.

        The mean of the logits is the mean row times the prototypes: the ranks exchange one row.
        """
        with full_precision(logits.rows):
            rows = logits.rows.to(_working(logits.rows.dtype))
            count = rows.new_full((1,), logits.num_rows)  # filled on the device: a copy would wait for it
            total = sum_over_ranks(torch.cat((rows.sum(0), count)))
            mean = logits.prototypes.to(rows.dtype) @ (total[:-1] / total[-1].clamp(min=1))
            moves = (total[-1] > 0) & total.isfinite().all()
            moved = self.momentum * self.centre + (1 - self.momentum) * mean.to(self.centre.dtype)
            # A new tensor, not in place: targets of this step may still hold the old one.
            self.centre = torch.where(moves, moved, self.centre)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scale(logits: TeacherLogits, temperature: float | Tensor) -> Tensor:
    dtype, device = _working(logits.rows.dtype), logits.rows.device
    if isinstance(temperature, Tensor):
        return temperature.to(device, dtype).reciprocal()
    return torch.full((), temperature, dtype=dtype, device=device).reciprocal()  # no copy, which would wait for a GPU


def _log_sums(logits: TeacherLogits, scale: Tensor, elements: int | None, compiled: bool) -> Float[Tensor, " k"]:
    """Return log sum over this rank's rows of exp(scale * logits); -inf without rows."""
    count, device = logits.num_prototypes, logits.rows.device
    total = torch.full((count,), -torch.inf, dtype=scale.dtype, device=device)
    if compiled:
        for which in pieces(logits.num_rows, count, device, elements):
            some = compiled_once(_log_sums_of_piece)(mark_dynamic_rows(logits.part(which)), scale)
            total = torch.logaddexp(total, some)
        return total
    zero = torch.zeros_like(total)
    for which, scratch in with_scratch(1, logits.num_rows, zero, elements):
        scaled = logits.piece(which, scale, zero, out=scratch[0])
        largest = scaled.amax(0)
        total = torch.logaddexp(total, scaled.sub_(largest).exp_().sum(0).log_().add_(largest))
    return total


def _log_sums_of_piece(logits: TeacherLogits, scale: Tensor) -> Float[Tensor, " k"]:
    """Return `_log_sums` of all rows at once."""
    scaled = logits.piece(slice(None), scale, scale.new_zeros(logits.num_prototypes))
    largest = scaled.amax(0)
    return (scaled - largest).exp().sum(0).log() + largest


def _column_sums(targets: Targets, elements: int | None, compiled: bool) -> Float[Tensor, " k"]:
    total = torch.zeros_like(targets.offsets)
    if compiled:
        for which in pieces(targets.num_rows, len(total), total.device, elements):
            total += compiled_once(_column_sums_of_piece)(mark_dynamic_rows(targets.part(which)))
        return total
    for which, scratch in with_scratch(2, targets.num_rows, total, elements):
        total += targets.piece(which, scratch=scratch).sum(0)
    return total


def _column_sums_of_piece(targets: Targets) -> Float[Tensor, " k"]:
    """Return `_column_sums` of all rows at once."""
    return targets.probabilities().sum(0)


Rows = TypeVar("Rows", bound=TeacherLogits | Targets | Tensor)


def mark_dynamic_rows(piece: Rows) -> Rows:
    """Tell the compiler that pieces differ in their number of rows: the last one, and those of ranks in every step."""
    if isinstance(piece, Targets):
        mark_dynamic_rows(piece.logits)
    else:
        for each in (piece.rows, piece.kept) if isinstance(piece, TeacherLogits) else (piece,):
            if each is not None:
                torch._dynamo.maybe_mark_dynamic(each, 0)
    return piece


def _add_logs(local: Sequence[Tensor], num_rows: Sequence[int], sum_over_ranks: SumOverRanks) -> list[Tensor]:
    """Return log of the sum over ranks of exp(local), in two sums.

    Alone there is nothing to add. The first finds the ranks' mean as a common shift, weighted by rows. The largest rank
    lies above it, so nothing underflows as a whole; float64 holds ranks that differ by up to e^700.
    """
    if sum_over_ranks is one_rank:
        return list(local)
    sizes = [len(each) for each in local]
    weighted = [torch.where(each.isneginf(), 0, each) * n for each, n in zip(local, num_rows, strict=True)]
    counts = [each.new_full((1,), n) for each, n in zip(local, num_rows, strict=True)]  # a copy would wait for a GPU
    *totals, count = sum_over_ranks(torch.cat([*weighted, *counts])).split([*sizes, len(sizes)])
    shifts = [total / n.clamp(min=1) for total, n in zip(totals, count, strict=True)]
    shifted = [(each - shift).double().exp() for each, shift in zip(local, shifts, strict=True)]
    sums = sum_over_ranks(torch.cat(shifted)).log().split(sizes)
    return [shift + total.to(shift.dtype) for shift, total in zip(shifts, sums, strict=True)]
