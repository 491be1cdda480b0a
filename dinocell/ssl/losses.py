"""The losses of pretraining, each a function of features: DINO, iBOT, KoLeo, Gram.

Formulas and weights: Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), Sablayrolles et al. 2019 (KoLeo), Oquab et al.
2024 (DINOv2), Simeoni et al. 2025 (DINOv3, Gram anchoring).
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dinocell.ssl.cross_entropy import prototype_cross_entropy
from dinocell.ssl.heads import Projection
from dinocell.ssl.pieces import full_precision
from dinocell.ssl.targets import Targets


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
    piece_elements: int | None = None,
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
        piece_elements=piece_elements,
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
    piece_elements: int | None = None,
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
        student, targets, share, temperature=temperature, piece_elements=piece_elements, compiled=compiled
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
