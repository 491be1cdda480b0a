"""One step of DINO and iBOT as a module: the teacher's targets, the student's predictions, the losses.

Student and teacher are a backbone and two heads each; the teacher is a moving average of the student and never learns
by gradient.
"""

import copy
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dinocell.models.vit import VisionTransformer
from dinocell.ssl.config import HeadsConfig, LossConfig
from dinocell.ssl.heads import Projection, ProjectionHead
from dinocell.ssl.losses import dino_loss, ibot_loss, koleo_loss
from dinocell.ssl.masking import PatchMasks
from dinocell.ssl.targets import Centre, Targets, TeacherLogits, sinkhorn_targets
from dinocell.ssl.views import Views


class Losses(NamedTuple):
    """The total, to be differentiated, and its parts before their weights."""

    total: Float[Tensor, ""]
    dino_global: Float[Tensor, ""]
    dino_local: Float[Tensor, ""]
    ibot: Float[Tensor, ""]
    koleo: Float[Tensor, ""]


class StepOutput(NamedTuple):
    """The losses of a step, and what its monitors look at."""

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
        Of the recipe.
    """

    def __init__(self, backbone: VisionTransformer, heads: HeadsConfig, losses: LossConfig) -> None:
        super().__init__()
        self._losses = losses
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
        self.centres: nn.ModuleList | None = None
        if losses.centring == "softmax":
            self.centres = nn.ModuleList(
                Centre(heads.num_prototypes, momentum=losses.centre_momentum) for _ in range(2)
            )

    def train(self, mode: bool = True) -> "StudentTeacher":
        """Set the mode of the student; the teacher always predicts without noise."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        views: Views,
        masks: PatchMasks,
        *,
        teacher_temperature: float,
        local_weight: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> StepOutput:
        """Return the losses of a batch.

        Parameters
        ----------
        views
            Standardised crops, view by view.
        masks
            Of the global crops, in the same order; on the device of the views.
        teacher_temperature, local_weight
            Of this step.
        generator
            Source of the student's training noise.
        """
        num_globals, batch = views.global_views.shape[:2]
        num_locals = len(views.local_views)
        images = views.global_views.flatten(0, 1)
        cls_targets, patch_targets = self._targets(images, masks, teacher_temperature)

        crops = [images] if num_locals == 0 else [images, views.local_views.flatten(0, 1)]
        nothing = masks.indices[:0]
        outputs = self.student["backbone"](
            crops,
            [masks.masks.flatten(1), None][: len(crops)],
            select=[masks.indices, nothing][: len(crops)],
            generator=generator,
        )
        cls = torch.cat([output.cls for output in outputs])
        dino = dino_loss(
            self.student["dino_head"](cls),
            cls_targets,
            num_globals=num_globals,
            num_locals=num_locals,
            temperature=self._losses.student_temperature,
            local_weight=local_weight,
        )
        ibot = ibot_loss(
            self._patch_head(self.student)(outputs[0].patches),
            patch_targets,
            masks.weights,
            num_images=num_globals * batch,
            temperature=self._losses.student_temperature,
        )
        koleo = torch.stack([koleo_loss(view) for view in outputs[0].cls.split(batch)]).sum()
        total = dino.total + self._losses.ibot_weight * ibot + self._losses.koleo_weight * koleo
        return StepOutput(Losses(total, dino.global_crops, dino.local_crops, ibot, koleo), cls_targets, outputs[0].cls)

    @torch.no_grad()
    def _targets(self, images: Tensor, masks: PatchMasks, temperature: float) -> tuple[Targets, Targets]:
        output = self.teacher["backbone"](images, select=masks.indices)
        projections: list[Projection] = [
            self.teacher["dino_head"](output.cls),
            self._patch_head(self.teacher)(output.patches),
        ]
        logits = [TeacherLogits(projection) for projection in projections]
        if self.centres is None:
            cls, patches = sinkhorn_targets(logits, temperature, iterations=self._losses.sinkhorn_iterations)
            return cls, patches
        centres = [cast("Centre", centre) for centre in self.centres]
        cls, patches = (centre(each, temperature) for centre, each in zip(centres, logits, strict=True))
        for centre, each in zip(centres, logits, strict=True):
            centre.update(each)
        return cls, patches

    @staticmethod
    def _patch_head(side: nn.ModuleDict) -> nn.Module:
        return side["ibot_head"] if "ibot_head" in side else side["dino_head"]
