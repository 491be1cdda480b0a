"""The losses of pretraining, each a function of features: DINO, iBOT, KoLeo, Gram, reconstruction.

Formulas and weights: Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), Sablayrolles et al. 2019 (KoLeo), Oquab et al.
2024 (DINOv2), Simeoni et al. 2025 (DINOv3, Gram anchoring), He et al. 2022 (MAE, patches of unit variance).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinocell.ssl.heads import Projection, chunks_with_scratch, compiled_once, full_precision, row_chunks
from dinocell.ssl.targets import Targets, mark_dynamic_rows

# MAE's; crops have unit variance, so a variance this small is a patch without any structure.
_PATCH_VARIANCE_EPS = 1e-6


class DinoLoss(NamedTuple):
    """The total, with gradient; the means over pairs with global and with local crops, for logging (no gradient)."""

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
    compiled: bool = False,
) -> DinoLoss:
    """Compare the CLS token of every student crop with the teacher's of every *other* global crop of the same image.

    All pairs have the same weight, so for 2 global and 8 local crops their means have the weights 2/18 and 16/18.

    Parameters
    ----------
    student
        Projected CLS tokens, (v b) rows: crop by crop, global ones first, the images in the same order in each.
    targets
        Of the global crops, (num_globals b) rows in the same order.
    num_globals, num_locals
        Crops per image.
    temperature
        Of the student.
    local_weight
        Factor on the local pairs (DINOv3 lowers it late in training); the global ones keep their weight.
    compiled
        See `prototype_cross_entropy`.

    Raises
    ------
    ValueError
        If there is no pair of crops, or the rows do not match the numbers of crops.
    """
    num_crops, batch = num_globals + num_locals, targets.num_rows // max(num_globals, 1)
    num_pairs = num_globals * (num_crops - 1)
    if num_pairs <= 0 or targets.num_rows != num_globals * batch or len(student.rows) != num_crops * batch:
        raise ValueError(
            f"expected a pair of crops with equal numbers of rows; got {len(student.rows)} student rows of "
            f"{num_globals} global and {num_locals} local crops, {targets.num_rows} teacher rows"
        )
    # The loss is linear in the targets: each student crop is compared once, with the mean of its targets. For local
    # crops that is the mean over all global crops, for a global crop the mean over the others.
    probabilities = targets.probabilities().unflatten(0, (num_globals, batch))
    mean = probabilities.mean(0)
    others = probabilities.flip(0)
    if num_globals > 2:
        others = (mean * num_globals - probabilities).div_(num_globals - 1)
    # Each row stands for as many pairs as it has targets.
    global_weights = mean.new_full((num_globals * batch,), (num_globals - 1) / (num_pairs * batch))
    local_weights = mean.new_full((num_locals * batch,), local_weight * num_globals / (num_pairs * batch))
    loss = prototype_cross_entropy(
        student,
        torch.cat((others.flatten(0, 1), mean)),
        torch.cat((global_weights, local_weights)),
        temperature=temperature,
        target_of_row=_target_of_row(num_globals, num_locals, batch, mean.device),
        compiled=compiled,
    )
    of_global, of_local = loss.rows.split((num_globals * batch, num_locals * batch))
    return DinoLoss(loss.total, _mean(of_global if num_globals > 1 else of_global[:0]), _mean(of_local))


def ibot_loss(
    student: Projection,
    targets: Targets,
    weights: Float[Tensor, " m"],
    *,
    num_images: int,
    temperature: float = 0.1,
    compiled: bool = False,
) -> Float[Tensor, ""]:
    """Compare the student's masked patches with the teacher's, which sees the same patches unmasked.

    Parameters
    ----------
    student, targets
        Projected masked patches, in the same order.
    weights
        One over the number of masked patches of the patch's image, see `dinocell.ssl.masking`.
    num_images
        Global crops of the batch, masked or not: the loss is the mean over these.
    temperature
        Of the student.
    compiled
        See `prototype_cross_entropy`.
    """
    return prototype_cross_entropy(
        student,
        targets,
        weights / num_images,
        temperature=temperature,
        compiled=compiled,
    ).total


def koleo_loss(
    cls: Float[Tensor, "b d"],
    *,
    everyone: Float[Tensor, "a d"] | None = None,
    first: int = 0,
    duplicate_distance: float = 1e-5,
) -> Float[Tensor, ""]:
    """Push every CLS token away from its nearest neighbour: the mean of ``-log(distance)`` on the unit sphere.

    For one global crop at a time, never across the views of an image; always at least in float32. A token whose nearest
    neighbour is a duplicate contributes 0, as does a batch of one: blank crops are common in microscopy, cannot be
    separated, and the logarithm of their distance is rounding noise.

    Parameters
    ----------
    cls
        CLS tokens of this rank, before the head.
    everyone
        Those of all ranks, gathered with gradient, among which neighbours are searched; by default ``cls``.
    first
        Row of ``everyone`` where ``cls`` starts.
    duplicate_distance
        Maximum distance of duplicates.
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
        is_apart = squared > duplicate_distance**2
        # The inner `where` keeps the gradient of log(0) out of the unused branch.
        return torch.where(is_apart, -0.5 * torch.where(is_apart, squared, 1).log(), 0).sum() / len(own)


def gram_loss(student: Float[Tensor, "b p d"], teacher: Float[Tensor, "b p d"]) -> Float[Tensor, ""]:
    """Return the mean squared difference of the cosines between all patches of an image, student and Gram teacher.

    ``student`` and ``teacher`` are the patch tokens of the global crops.
    """
    with full_precision(student):
        dtype = torch.promote_types(student.dtype, torch.float32)
        own, reference = (F.normalize(patches.to(dtype), dim=-1) for patches in (student, teacher.detach()))
        own, reference = own @ own.transpose(1, 2), reference @ reference.transpose(1, 2)
        return (own - reference).square().mean()


def reconstruction_loss(
    predicted: Float[Tensor, "m e"],
    images: Float[Tensor, "n c h w"],
    indices: Int[Tensor, " m"],
    weights: Float[Tensor, " m"],
    *,
    patch_size: int,
    patch_normalised: bool = False,
) -> Float[Tensor, ""]:
    """Compare predicted pixels of masked patches with those of the images: squared error.

    The mean over the masked patches of each image, then over the images, masked or not, as in `ibot_loss`: without
    ``patch_normalised``, images of unit variance of which half are masked start at about 0.5.

    Parameters
    ----------
    predicted
        The ``c * patch_size ** 2`` values of each masked patch, channel by channel, row by row.
    images
        The targets, standardised: the crops without mask, or the same crops in other channels.
    indices
        Masked patches, as indices into the flattened (image, patch) grid.
    weights
        One over the number of masked patches of the patch's image, see `dinocell.ssl.masking`.
    patch_normalised
        Compare with patches of zero mean and unit variance each, by channel (MAE).
    """
    with full_precision(predicted):
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        target = to_patches(images.detach().to(dtype), patch_size)[indices]
        if patch_normalised:
            target = target - target.mean((2, 3), keepdim=True)
            target = target * (target.square().mean((2, 3), keepdim=True) + _PATCH_VARIANCE_EPS).rsqrt()
        squared = (predicted.to(dtype) - target.flatten(1)).square().mean(1)
        loss: Tensor = (squared * weights).sum() / len(images)
        return loss


def to_patches(images: Float[Tensor, "n c h w"], patch_size: int) -> Float[Tensor, "patches c s s"]:
    """Return the patches of all images, image after image, row by row."""
    grid = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    patches: Tensor = grid.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return patches


@lru_cache(maxsize=8)
def _target_of_row(num_globals: int, num_locals: int, batch: int, device: torch.device) -> Int[Tensor, " n"]:
    """Return the row of (others of each global crop, then means) for each student row; cached, as it never changes."""
    of_globals = torch.arange(num_globals * batch, device=device)
    of_locals = torch.arange(num_globals * batch, (num_globals + 1) * batch, device=device).repeat(num_locals)
    return torch.cat((of_globals, of_locals))


def _mean(values: Tensor) -> Tensor:
    """Return the mean, and 0 for none: a kind of crop that the recipe does not have."""
    return values.mean() if len(values) else values.new_zeros(())


class CrossEntropy(NamedTuple):
    """The weighted sum, with gradient, and the value of every row, for logging (no gradient)."""

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
        Of each row in the total.
    temperature
        Of the student; 0.1 in DINO.
    target_of_row
        Row of ``targets`` for each student row; by default the row of the same index.
    chunk_elements
        Elements of a chunk of logits, see `dinocell.ssl.heads`; changes memory and time, not the result.
    compiled
        Compile the passes over a chunk of logits; the same result up to rounding.

    Raises
    ------
    ValueError
        If targets and student differ in the number of rows or prototypes.
    """
    num_rows, num_targets = len(student.rows), targets.num_rows if isinstance(targets, Targets) else len(targets)
    num_prototypes = targets.logits.num_prototypes if isinstance(targets, Targets) else targets.shape[1]
    if num_prototypes != len(student.prototypes) or (target_of_row is None and num_targets != num_rows):
        raise ValueError(
            f"targets: expected {num_rows} rows and {len(student.prototypes)} prototypes as the student, got "
            f"{num_targets} and {num_prototypes}"
        )
    if isinstance(targets, Tensor):
        targets = targets.detach()
    arguments = (targets, weights.detach(), temperature, target_of_row, chunk_elements, compiled)
    total, rows = _FusedCrossEntropy.apply(student.rows, student.prototypes, *arguments)  # type: ignore[no-untyped-call]
    return CrossEntropy(total, rows)


class _FusedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of student rows and targets over prototypes, without the full matrix of logits.

    The forward pass computes logits, log-softmax, loss and both gradients for a chunk of rows at a time; the backward
    pass only scales. At 1,096 rows and 65,536 prototypes the plain implementation holds five matrices of 287 MB.
    """

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
            for chunk, scratch in _chunks(weights, plain, chunk_elements, compiled):
                student, share = rows[chunk], weights[chunk, None] / temperature
                target_rows = chunk if target_of_row is None else target_of_row[chunk]
                target = targets[target_rows] if isinstance(targets, Tensor) else targets.part(target_rows)
                # The gradient of the loss to the logits is (softmax(logits) - targets) * weight / temperature; the
                # chain rule through logits = rows @ prototypes.T gives those to rows and prototypes.
                if scratch is None:
                    compare = compiled_once(_compare)
                    losses[chunk], difference = compare(
                        mark_dynamic_rows(student), plain, mark_dynamic_rows(target), temperature
                    )
                else:
                    losses[chunk], difference = _compare_in(scratch, student, plain, target, temperature)
                if rows_gradient is not None:
                    rows_gradient[chunk] = (difference @ plain) * share
                if ctx.needs_input_grad[1]:
                    weighted = student * share.to(rows.dtype)
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


def _chunks(
    weights: Tensor, prototypes: Tensor, elements: int | None, compiled: bool
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield chunks of the rows, and memory for the three matrices of each; compiled code allocates its own."""
    num_rows, count = len(weights), len(prototypes)
    if compiled:
        yield from ((chunk, None) for chunk in row_chunks(num_rows, count, weights.device, elements))
    else:
        yield from chunks_with_scratch(3, num_rows, weights.new_empty(()).expand(count), elements)


def _compare(
    rows: Tensor, prototypes: Tensor, targets: Targets | Tensor, temperature: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m k"]]:
    """Return each row's loss, and the student's probabilities minus the targets, in the type of the rows."""
    target = targets if isinstance(targets, Tensor) else targets.probabilities()
    target = target.to(torch.promote_types(rows.dtype, torch.float32))
    log_student = torch.log_softmax((rows @ prototypes.T).to(target.dtype) / temperature, dim=1)
    return -(target * log_student).sum(1), (log_student.exp() - target).to(rows.dtype)


def _compare_in(
    scratch: Float[Tensor, "3 m k"], rows: Tensor, prototypes: Tensor, targets: Targets | Tensor, temperature: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m k"]]:
    """Return the same as `_compare`, with the matrices in ``scratch``."""
    if isinstance(targets, Tensor):
        target = targets.to(scratch.dtype)
    elif targets.offsets.dtype == scratch.dtype:
        target = targets.chunk(slice(None), scratch=scratch[:2])
    else:
        target = targets.probabilities().to(scratch.dtype)
    if rows.dtype == scratch.dtype:
        torch.mm(rows / temperature, prototypes.T, out=scratch[0])
    else:
        torch.div(rows @ prototypes.T, temperature, out=scratch[0])
    log_student = torch.log_softmax(scratch[0], dim=1, out=scratch[2])
    # Overwrites the logits, which are no longer needed. A dot product would save the memory traffic, but adds 65,536
    # numbers one by one: an error of 1e-4 in float32.
    losses = -torch.mul(target, log_student, out=scratch[0]).sum(1)
    return losses, log_student.exp_().sub_(target).to(rows.dtype)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)
