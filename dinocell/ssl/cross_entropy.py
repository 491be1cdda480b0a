"""Cross-entropy of student rows against targets over prototypes, without the matrix of logits.

Logits, log-softmax, loss and both gradients are made for a piece of rows at a time, in one go in the forward pass; the
backward pass only scales. At 1,096 rows and 65,536 prototypes the plain way holds five matrices of 287 MB.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinocell.ssl.heads import Projection
from dinocell.ssl.targets import Targets, full_precision, with_scratch


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
        Elements of a piece of logits, see `dinocell.ssl.targets.pieces`; changes memory and time, not the result.

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
    arguments = (targets, weights.detach(), temperature, target_of_row, piece_elements)
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
    ) -> tuple[Tensor, Tensor]:
        weights = weights.to(torch.promote_types(rows.dtype, torch.float32))
        plain, losses = prototypes.to(rows.dtype), torch.empty_like(weights)
        rows_gradient = torch.empty_like(rows, dtype=weights.dtype) if ctx.needs_input_grad[0] else None
        prototypes_gradient = None
        if ctx.needs_input_grad[1]:
            prototypes_gradient = torch.zeros_like(prototypes, dtype=weights.dtype)
        like = weights.new_empty(()).expand(len(prototypes))
        with full_precision(rows):
            for which, scratch in with_scratch(3, len(rows), like, piece_elements):
                some, share = rows[which], weights[which, None] / temperature
                target_rows = which if target_of_row is None else target_of_row[which]
                if isinstance(targets, Tensor):
                    wanted = targets[target_rows].to(weights.dtype)
                elif targets.offsets.dtype == weights.dtype:
                    wanted = targets.piece(target_rows, scratch=scratch[:2])
                else:
                    wanted = targets.piece(target_rows).to(weights.dtype)
                log_student = _log_softmax(some, plain, temperature, scratch[0], scratch[2])
                # Over the logits, which are done with. A dot product would save the memory traffic, but adds 65,536
                # numbers one by one: an error of 1e-4 in float32.
                losses[which] = -torch.mul(wanted, log_student, out=scratch[0]).sum(1)
                if rows_gradient is None and prototypes_gradient is None:
                    continue
                difference = log_student.exp_().sub_(wanted).to(rows.dtype)
                if rows_gradient is not None:
                    rows_gradient[which] = (difference @ plain) * share
                if prototypes_gradient is not None:
                    _add_product(prototypes_gradient, difference.T, some * share.to(rows.dtype))
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
        return rows_gradient, prototypes_gradient, None, None, None, None, None


def _log_softmax(rows: Tensor, prototypes: Tensor, temperature: float, scratch: Tensor, out: Tensor) -> Tensor:
    """Return the log-softmax of the rows' logits over the temperature, in ``out``."""
    if rows.dtype == scratch.dtype:
        torch.mm(rows / temperature, prototypes.T, out=scratch)
    else:
        torch.div(rows @ prototypes.T, temperature, out=scratch)
    return torch.log_softmax(scratch, dim=1, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
