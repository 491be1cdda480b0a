"""One step of DINO and iBOT as a module: the teacher's targets, the student's predictions, the losses.

Student and teacher are a backbone and two heads each; the teacher is a moving average of the student and gets no
gradient.
"""

import copy
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dinocell.models.vit import VisionTransformer
from dinocell.runtime.distributed import gather, is_alone, rank, sum_over_ranks
from dinocell.ssl.config import HeadsConfig, LossConfig
from dinocell.ssl.heads import Projection, ProjectionHead, ReconstructionHead, compiled_once
from dinocell.ssl.losses import dino_loss, gram_loss, ibot_loss, koleo_loss, reconstruction_loss
from dinocell.ssl.masking import PatchMasks
from dinocell.ssl.targets import Centre, Targets, TeacherLogits, one_rank, sinkhorn_targets
from dinocell.ssl.views import Views


class Losses(NamedTuple):
    """The total, with gradient, and its parts before their weights."""

    total: Float[Tensor, ""]
    dino_global: Float[Tensor, ""]
    dino_local: Float[Tensor, ""]
    ibot: Float[Tensor, ""]
    koleo: Float[Tensor, ""]
    gram: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]


class StepOutput(NamedTuple):
    """The losses of a step, and the inputs of its monitors."""

    losses: Losses
    targets: Targets
    student_cls: Float[Tensor, "n d"]


class StudentTeacher(nn.Module):
    """Student and teacher.

    Parameters
    ----------
    backbone
        The student's, with its training noise; the teacher starts as a copy of it.
    heads, losses
        Sections of the recipe.
    with_gram
        Whether there is a Gram teacher; needed if the Gram loss has a weight at any step.
    keep_logits
        Store the teacher's logits during a step, see `TeacherLogits`: faster, but more memory.
    compiled
        Compile the passes over logits, in targets and losses.

    On several ranks each takes its part of the batch: targets are balanced over all of them, and the mean of their
    losses is the loss of one process with the whole batch.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        heads: HeadsConfig,
        losses: LossConfig,
        *,
        with_gram: bool = False,
        keep_logits: bool = True,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self._losses, self._keep_logits, self._compiled = losses, keep_logits, compiled
        names = ("dino_head",) if heads.shared else ("dino_head", "ibot_head")
        self.student = nn.ModuleDict({"backbone": backbone})
        for name in names:
            self.student[name] = ProjectionHead(
                backbone.config.width,
                heads.num_prototypes,
                hidden=heads.hidden,
                bottleneck=heads.bottleneck,
                layers=heads.layers,
                weight_norm=heads.weight_norm,
            )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if losses.reconstruction.weight > 0:  # of the student only: the teacher predicts no pixels
            vit = backbone.config
            self.student["reconstruction_head"] = ReconstructionHead(
                vit.width, vit.in_channels * vit.patch_size**2, hidden_dim=losses.reconstruction.hidden_dim
            )
        self.gram = nn.ModuleDict({"backbone": copy.deepcopy(self.teacher["backbone"])} if with_gram else {})
        self.centres: nn.ModuleList | None = None
        if losses.centring == "softmax":
            self.centres = nn.ModuleList(
                Centre(heads.num_prototypes, momentum=losses.centre_momentum) for _ in range(2)
            )

    def train(self, mode: bool = True) -> "StudentTeacher":
        """Set the mode of the student; the teacher always predicts without noise."""
        super().train(mode)
        self.teacher.eval()
        self.gram.eval()
        return self

    @torch.no_grad()
    def update_gram_teacher(self) -> None:
        """Copy the current teacher into the Gram teacher."""
        for ours, theirs in zip(self.gram.parameters(), self.teacher["backbone"].parameters(), strict=True):
            ours.copy_(theirs)

    def forward(
        self,
        views: Views,
        masks: PatchMasks,
        *,
        teacher_temperature: float,
        local_weight: float = 1.0,
        gram_weight: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> StepOutput:
        """Return the losses of a batch.

        Parameters
        ----------
        views
            Standardised crops, view by view.
        masks
            Of the global crops, in the same order; on the device of the views.
        teacher_temperature, local_weight, gram_weight
            Of this step.
        generator
            Source of the student's training noise.
        """
        num_globals, batch = views.global_views.shape[:2]
        num_locals = len(views.local_views)
        images = views.global_views.flatten(0, 1)
        cls_targets, patch_targets = self._targets(images, masks, teacher_temperature)

        crops = [images] if num_locals == 0 else [images, views.local_views.flatten(0, 1)]
        # The Gram loss wants every patch of the global crops; without it the last block computes the masked ones alone.
        with_gram = gram_weight > 0
        outputs = self.student["backbone"](
            crops,
            [masks.masks.flatten(1), None][: len(crops)],
            select=[None if with_gram else masks.indices, masks.indices[:0]][: len(crops)],
            generator=generator,
        )
        patches = outputs[0].patches
        masked = patches.flatten(0, 1)[masks.indices] if with_gram else patches
        cls = torch.cat([output.cls for output in outputs])
        dino = dino_loss(
            self.student["dino_head"](cls),
            cls_targets,
            num_globals=num_globals,
            num_locals=num_locals,
            temperature=self._losses.student_temperature,
            local_weight=local_weight,
            compiled=self._compiled,
        )
        ibot = ibot_loss(
            self._patch_head(self.student)(masked),
            patch_targets,
            masks.weights,
            num_images=num_globals * batch,
            temperature=self._losses.student_temperature,
            compiled=self._compiled,
        )
        koleo = torch.stack([self._koleo(own) for own in outputs[0].cls.split(batch)]).sum()
        weights = self._losses
        total = weights.dino_weight * dino.total + weights.ibot_weight * ibot + weights.koleo_weight * koleo
        gram = reconstruction = total.new_zeros(())
        if with_gram:
            gram = self._gram_loss(images, patches)
            total = total + gram_weight * gram
        if weights.reconstruction.weight > 0:
            reconstruction = self._reconstruction_loss(masked, views, masks)
            total = total + weights.reconstruction.weight * reconstruction
        losses = Losses(total, dino.global_crops, dino.local_crops, ibot, koleo, gram, reconstruction)
        return StepOutput(losses, cls_targets, outputs[0].cls)

    def _gram_loss(self, images: Tensor, patches: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self.gram["backbone"](images).patches
        loss = compiled_once(gram_loss) if self._compiled else gram_loss
        return loss(patches, reference)

    def _reconstruction_loss(self, masked: Tensor, views: Views, masks: PatchMasks) -> Tensor:
        targets = views.global_views if views.target_views is None else views.target_views
        loss = compiled_once(reconstruction_loss) if self._compiled else reconstruction_loss
        return loss(
            self.student["reconstruction_head"](masked),
            targets.flatten(0, 1),
            masks.indices,
            masks.weights,
            patch_size=cast("VisionTransformer", self.student["backbone"]).config.patch_size,
            patch_normalised=self._losses.reconstruction.patch_normalised,
        )

    def _koleo(self, cls: Tensor) -> Tensor:
        """Return KoLeo with neighbours among the tokens of all ranks."""
        loss = compiled_once(koleo_loss) if self._compiled else koleo_loss
        if is_alone():
            return loss(cls)
        return loss(cls, everyone=gather(cls), first=rank() * len(cls))

    @torch.no_grad()
    def _targets(self, images: Tensor, masks: PatchMasks, temperature: float) -> tuple[Targets, Targets]:
        output = self.teacher["backbone"](images, select=masks.indices)
        projections: list[Projection] = [
            self.teacher["dino_head"](output.cls),
            self._patch_head(self.teacher)(output.patches),
        ]
        logits = [TeacherLogits(projection, keep=self._keep_logits) for projection in projections]
        if self.centres is None:
            cls, patches = sinkhorn_targets(
                logits,
                temperature,
                iterations=self._losses.sinkhorn_iterations,
                sum_over_ranks=one_rank if is_alone() else sum_over_ranks,
                compiled=self._compiled,
            )
            return cls, patches
        centres = [cast("Centre", centre) for centre in self.centres]
        cls, patches = (centre(matrix, temperature) for centre, matrix in zip(centres, logits, strict=True))
        for centre, matrix in zip(centres, logits, strict=True):
            centre.update(matrix, sum_over_ranks=sum_over_ranks)
        return cls, patches

    @staticmethod
    def _patch_head(side: nn.ModuleDict) -> nn.Module:
        return side["ibot_head"] if "ibot_head" in side else side["dino_head"]
