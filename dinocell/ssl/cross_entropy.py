"""Cross-entropy of student rows against targets over prototypes, without the matrix of logits.

Logits, log-softmax, loss and both gradients are made for a piece of rows at a time, in one go in the forward pass; the
backward pass only scales. At 1,096 rows and 65,536 prototypes the plain way holds five matrices of 287 MB.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinocell.ssl.heads import Projection
from dinocell.ssl.pieces import compiled_once, full_precision, pieces, with_scratch
from dinocell.ssl.targets import Targets, with_any_rows


class CrossEntropy(NamedTuple):
    """The weighted sum, to be differentiated, and every row's own value, to be looked at (no gradient)."""

    total: Float[Tensor, ""]
    rows: Float[Tensor, " n"]


def prototype_cross_entropy(
    student: Projection,
    targets: Targets | Float[Tensor, "t k"],
    weights: Float[Tensor, " n"],
    *,
    temperature: float = 0.1,
    target_of_row: Int[Tensor, " n"] | None = None,
    piece_elements: int | None = None,
    compiled: bool = False,
) -> CrossEntropy:
    """Return ``sum over b of weights[b] * -sum over k of q[b, k] log softmax(student logits[b] / temperature)[k]``.

    The gradient flows to the student's rows and prototypes. Products run in the type of the rows (bf16 under autocast),
    everything else at least in float32.

    Parameters
    ----------
    student
        Rows and prototypes of a head.
    targets
        The teacher's, or plain probabilities; each row must sum to one.
    weights
        Share of each row in the total.
    temperature
        Of the student; 0.1 in DINO.
    target_of_row
        Row of ``targets`` that each student row is compared with; by default they go side by side.
    piece_elements
        Elements of a piece of logits, see `dinocell.ssl.pieces`; changes memory and time, not the result.
    compiled
        Let the compiler join the passes over a piece of logits: the result but for rounding.

    Raises
    ------
    ValueError
        If targets and student disagree in the number of rows or prototypes, or the temperature is not positive.
    """
    num_rows, num_targets = len(student.rows), targets.num_rows if isinstance(targets, Targets) else len(targets)
    num_prototypes = targets.logits.num_prototypes if isinstance(targets, Targets) else targets.shape[1]
    if num_prototypes != len(student.prototypes):
        raise ValueError(f"targets: expected {len(student.prototypes)} prototypes as the student, got {num_prototypes}")
    if target_of_row is None and num_targets != num_rows:
        raise ValueError(f"targets: expected {num_rows} rows as the student, got {num_targets}; or give target_of_row")
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if isinstance(targets, Tensor):
        targets = targets.detach()
    arguments = (targets, weights.detach(), temperature, target_of_row, piece_elements, compiled)
    total, rows = _FusedCrossEntropy.apply(student.rows, student.prototypes, *arguments)  # type: ignore[no-untyped-call]
    return CrossEntropy(total, rows)


class _FusedCrossEntropy(torch.autograd.Function):
    """Forward: the loss, and the gradient for an upstream gradient of one. Backward: times the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        prototypes: Tensor,
        targets: Targets | Tensor,
        weights: Tensor,
        temperature: float,
        target_of_row: Tensor | None,
        piece_elements: int | None,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        weights = weights.to(torch.promote_types(rows.dtype, torch.float32))
        plain, losses = prototypes.to(rows.dtype), torch.empty_like(weights)
        rows_gradient = torch.empty_like(rows, dtype=weights.dtype) if ctx.needs_input_grad[0] else None
        prototypes_gradient = None
        with full_precision(rows):
            for which, scratch in _pieces(weights, plain, piece_elements, compiled):
                some, share = rows[which], weights[which, None] / temperature
                target_rows = which if target_of_row is None else target_of_row[which]
                wanted = targets[target_rows] if isinstance(targets, Tensor) else targets.part(target_rows)
                if scratch is None:
                    compare = compiled_once(_compare)
                    losses[which], difference = compare(with_any_rows(some), plain, with_any_rows(wanted), temperature)
                else:
                    losses[which], difference = _compare_in(scratch, some, plain, wanted, temperature)
                if rows_gradient is not None:
                    rows_gradient[which] = (difference @ plain) * share
                if ctx.needs_input_grad[1]:
                    weighted = some * share.to(rows.dtype)
                    prototypes_gradient = _add_product(prototypes_gradient, difference.T, weighted, weights.dtype)
            if ctx.needs_input_grad[1] and prototypes_gradient is None:
                prototypes_gradient = torch.zeros_like(prototypes, dtype=weights.dtype)
        ctx.save_for_backward(rows_gradient, prototypes_gradient)
        ctx.dtypes = rows.dtype, prototypes.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor, _rows: Tensor) -> tuple[Tensor | None, ...]:
        rows_gradient, prototypes_gradient = ctx.saved_tensors
        if rows_gradient is not None:
            rows_gradient = (rows_gradient * total).to(ctx.dtypes[0])
        if prototypes_gradient is not None:
            prototypes_gradient = (prototypes_gradient * total).to(ctx.dtypes[1])
        return rows_gradient, prototypes_gradient, None, None, None, None, None, None


def _pieces(
    weights: Tensor, prototypes: Tensor, elements: int | None, compiled: bool
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield pieces of the rows, and memory for the three matrices of each; compiled code takes its own."""
    num_rows, count = len(weights), len(prototypes)
    if compiled:
        yield from ((which, None) for which in pieces(num_rows, count, weights.device, elements))
    else:
        yield from with_scratch(3, num_rows, weights.new_empty(()).expand(count), elements)


def _compare(
    rows: Tensor, prototypes: Tensor, targets: Targets | Tensor, temperature: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m k"]]:
    """Return each row's loss, and the student's probabilities without the targets', in the type of the rows."""
    wanted = targets if isinstance(targets, Tensor) else targets.probabilities()
    wanted = wanted.to(torch.promote_types(rows.dtype, torch.float32))
    log_student = torch.log_softmax((rows @ prototypes.T).to(wanted.dtype) / temperature, dim=1)
    return -(wanted * log_student).sum(1), (log_student.exp() - wanted).to(rows.dtype)


def _compare_in(
    scratch: Float[Tensor, "3 m k"], rows: Tensor, prototypes: Tensor, targets: Targets | Tensor, temperature: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m k"]]:
    """Return the same as `_compare`; the matrices lie in ``scratch``."""
    if isinstance(targets, Tensor):
        wanted = targets.to(scratch.dtype)
    elif targets.offsets.dtype == scratch.dtype:
        wanted = targets.piece(slice(None), scratch=scratch[:2])
    else:
        wanted = targets.probabilities().to(scratch.dtype)
    log_student = _log_softmax(rows, prototypes, temperature, scratch[0], scratch[2])
    # Over the logits, which are done with. A dot product would save the memory traffic, but adds 65,536 numbers one by
    # one: an error of 1e-4 in float32.
    losses = -torch.mul(wanted, log_student, out=scratch[0]).sum(1)
    return losses, log_student.exp_().sub_(wanted).to(rows.dtype)


def _log_softmax(rows: Tensor, prototypes: Tensor, temperature: float, scratch: Tensor, out: Tensor) -> Tensor:
    """Return the log-softmax of the rows' logits over the temperature, in ``out``."""
    if rows.dtype == scratch.dtype:
        torch.mm(rows / temperature, prototypes.T, out=scratch)
    else:
        torch.div(rows @ prototypes.T, temperature, out=scratch)
    return torch.log_softmax(scratch, dim=1, out=out)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)
