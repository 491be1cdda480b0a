"""The losses of pretraining, each a function of features: DINO, iBOT, KoLeo, Gram.

Formulas and weights: Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), Sablayrolles et al. 2019 (KoLeo), Oquab et al.
2024 (DINOv2), Simeoni et al. 2025 (DINOv3, Gram anchoring).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinocell.ssl.chunks import compiled_once, full_precision, pieces, with_scratch
from dinocell.ssl.heads import Projection
from dinocell.ssl.targets import Targets, mark_dynamic_rows


class DinoLoss(NamedTuple):
    """The total, to be differentiated; the means over pairs of either kind, to be looked at (no gradient)."""

    total: Float[Tensor, ""]
    global_crops: Float[Tensor, ""]
    local_crops: Float[Tensor, ""]


def dino_loss(
    student: Projection,
    targets: Targets,
    *,
    num_globals: int,
    num_locals: int,
    temperature: float = 0.1,
    local_weight: float = 1.0,
    chunk_elements: int | None = None,
    compiled: bool = False,
) -> DinoLoss:
    """Compare the CLS token of every student crop with the teacher's of every *other* global crop of the same image.

    Every pair counts alike, so 2 global and 8 local crops give their means the weights 2/18 and 16/18. The loss is
    linear in the targets: each crop is compared once, with the mean of its targets.

    Parameters
    ----------
    student
        Projected CLS tokens, (v b) rows: crop after crop, global ones first, the images in the same order in each.
    targets
        Of the global crops, (num_globals b) rows in the same order.
    num_globals, num_locals
        Crops an image.
    temperature
        Of the student.
    local_weight
        Factor on the local pairs (DINOv3 lowers it late in training); the global ones keep their weight.
    piece_elements, compiled
        See `prototype_cross_entropy`.

    Raises
    ------
    ValueError
        If there is no pair of crops, or the rows do not fit the numbers of crops.
    """
    num_crops, batch = num_globals + num_locals, targets.num_rows // max(num_globals, 1)
    num_global_pairs, num_local_pairs = num_globals * (num_globals - 1), num_globals * num_locals
    num_pairs = num_global_pairs + num_local_pairs
    if num_pairs == 0:
        raise ValueError(f"expected at least two crops, one global: got {num_globals} global, {num_locals} local")
    if targets.num_rows != num_globals * batch or len(student.rows) != num_crops * batch:
        raise ValueError(
            f"expected as many rows of each of {num_crops} student and {num_globals} teacher crops, "
            f"got {len(student.rows)} and {targets.num_rows} rows"
        )
    probabilities = targets.probabilities().unflatten(0, (num_globals, batch))
    mean = probabilities.mean(0)
    # With two views the mean of the others is the other; with more, the mean without one's own share.
    others = probabilities.flip(0)
    if num_globals > 2:
        others = (mean * num_globals - probabilities).div_(num_globals - 1)
    of_global_row = (num_globals - 1) / (num_pairs * batch)
    of_local_row = local_weight * num_globals / (num_pairs * batch)
    weights = torch.cat(
        (mean.new_full((num_globals * batch,), of_global_row), mean.new_full((num_locals * batch,), of_local_row))
    )
    loss = prototype_cross_entropy(
        student,
        torch.cat((others.flatten(0, 1), mean)),
        weights,
        temperature=temperature,
        target_of_row=_target_of_row(num_globals, num_locals, batch, mean.device),
        chunk_elements=chunk_elements,
        compiled=compiled,
    )
    of_global, of_local = loss.rows.split((num_globals * batch, num_locals * batch))
    return DinoLoss(loss.total, _mean(of_global if num_global_pairs else of_global[:0]), _mean(of_local))


def ibot_loss(
    student: Projection,
    targets: Targets,
    weights: Float[Tensor, " m"],
    *,
    num_images: int,
    temperature: float = 0.1,
    chunk_elements: int | None = None,
    compiled: bool = False,
) -> Float[Tensor, ""]:
    """Compare the student's masked patches with the teacher's view of the same, unmasked patches.

    Parameters
    ----------
    student, targets
        Projected patches where the mask is, in the same order.
    weights
        One over the number of masked patches of the patch's image, see `dinocell.ssl.masking`.
    num_images
        Global crops of the batch, masked or not: the mean is over these.
    temperature
        Of the student.
    piece_elements, compiled
        See `prototype_cross_entropy`.
    """
    share = weights / num_images
    return prototype_cross_entropy(
        student, targets, share, temperature=temperature, chunk_elements=chunk_elements, compiled=compiled
    ).total


def koleo_loss(
    cls: Float[Tensor, "b d"],
    *,
    everyone: Float[Tensor, "a d"] | None = None,
    first: int = 0,
    duplicate_distance: float = 1e-5,
) -> Float[Tensor, ""]:
    """Push every CLS token away from its nearest neighbour: the mean of ``-log(distance)`` on the unit sphere.

    For one global crop at a time, never across the views of an image. In float32 whatever comes in. A token whose
    nearest neighbour is a duplicate contributes nothing, as does a batch of one: blank crops are common in microscopy,
    nothing can part them, and the logarithm of their distance is rounding noise.

    Parameters
    ----------
    cls
        CLS tokens of this rank, before the head.
    everyone
        Those of all ranks, gathered with gradient, among which neighbours are looked for; by default ``cls``.
    first
        Row of ``everyone`` where ``cls`` starts.
    duplicate_distance
        At most this far apart, two tokens count as duplicates.
    """
    with full_precision(cls):
        own = F.normalize(cls.to(torch.promote_types(cls.dtype, torch.float32)), dim=-1)
        if everyone is None:
            first, others = 0, own
        else:
            others = F.normalize(everyone.to(own.dtype), dim=-1)
        if len(others) < 2:
            return own.sum() * 0
        with torch.no_grad():
            similarity = own @ others.T
            similarity.diagonal(first).fill_(-torch.inf)
            nearest = similarity.argmax(1)
        squared = (own - others[nearest]).square().sum(1)
        apart = squared > duplicate_distance**2
        # The inner `where` keeps the gradient of log(0) out of the unused branch.
        return torch.where(apart, -0.5 * torch.where(apart, squared, 1).log(), 0).sum() / len(own)


def gram_loss(
    student: Float[Tensor, "b p d"],
    teacher: Float[Tensor, "b p d"],
    *,
    use: Bool[Tensor, "b p"] | None = None,
    negatives: Literal["keep", "drop", "drop_in_teacher"] = "keep",
) -> Float[Tensor, ""]:
    """Hold the cosines between the patches of an image where an earlier teacher had them: mean squared difference.

    Parameters
    ----------
    student, teacher
        Patch tokens of the global crops; the Gram teacher's, if seen at a higher resolution, resized to the same grid.
    use
        Patches that take part; all by default. The mean is over the pairs that do.
    negatives
        Set negative cosines to zero: nowhere, on both sides, or in the teacher's only.
    """
    with full_precision(student):
        dtype = torch.promote_types(student.dtype, torch.float32)
        own, wanted = (F.normalize(patches.to(dtype), dim=-1) for patches in (student, teacher.detach()))
        own, wanted = own @ own.transpose(1, 2), wanted @ wanted.transpose(1, 2)
        if negatives != "keep":
            wanted = wanted.relu()
        if negatives == "drop":
            own = own.relu()
        squared = (own - wanted).square()
        if use is None:
            return squared.mean()
        pairs = use[:, :, None] & use[:, None, :]
        return (squared * pairs).sum() / pairs.sum().clamp(min=1)


@lru_cache(maxsize=8)
def _target_of_row(num_globals: int, num_locals: int, batch: int, device: torch.device) -> Int[Tensor, " n"]:
    """Return the row of (others of each global crop, then means) for each student row; the same in every step."""
    of_globals = torch.arange(num_globals * batch, device=device)
    of_locals = torch.arange(num_globals * batch, (num_globals + 1) * batch, device=device).repeat(num_locals)
    return torch.cat((of_globals, of_locals))


def _mean(values: Tensor) -> Tensor:
    """Return the mean, and 0 for none: a kind of crop that the recipe does not have."""
    return values.mean() if len(values) else values.new_zeros(())


# --- cross_entropy -------------------------------------------------------------------------------------------------
#
# Cross-entropy of student rows against targets over prototypes, without the matrix of logits.
#
# Logits, log-softmax, loss and both gradients are made for a piece of rows at a time, in one go in the forward pass;
# the
# backward pass only scales. At 1,096 rows and 65,536 prototypes the plain way holds five matrices of 287 MB.


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
    chunk_elements: int | None = None,
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
        Elements of a piece of logits, see `dinocell.ssl.chunks`; changes memory and time, not the result.
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
    arguments = (targets, weights.detach(), temperature, target_of_row, chunk_elements, compiled)
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
        chunk_elements: int | None,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        weights = weights.to(torch.promote_types(rows.dtype, torch.float32))
        plain, losses = prototypes.to(rows.dtype), torch.empty_like(weights)
        rows_gradient = torch.empty_like(rows, dtype=weights.dtype) if ctx.needs_input_grad[0] else None
        prototypes_gradient = None
        with full_precision(rows):
            for which, scratch in _pieces(weights, plain, chunk_elements, compiled):
                some, share = rows[which], weights[which, None] / temperature
                target_rows = which if target_of_row is None else target_of_row[which]
                wanted = targets[target_rows] if isinstance(targets, Tensor) else targets.part(target_rows)
                if scratch is None:
                    compare = compiled_once(_compare)
                    losses[which], difference = compare(
                        mark_dynamic_rows(some), plain, mark_dynamic_rows(wanted), temperature
                    )
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
