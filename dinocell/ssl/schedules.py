"""The schedules of a pretraining run."""

import math
from dataclasses import dataclass, field

from dinocell.runtime.schedules import Freeze, Schedule, check_range

FREEZE_FROM_WEIGHTS = Freeze(hold=0.02, warmup=0.03)


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Everything of a pretraining run that changes with the step; DINOv2's defaults, the cell recipes' learning rate.

    ``learning_rate`` is that of a batch of 1,024 before `dinocell.runtime.optim.scaled_learning_rate`. ``last_layer``
    and ``backbone`` are what rests at first. ``backbone`` null: random weights do not rest; those of ``model.weights``
    do for 0.02 of the run and come in over 0.03 of it, as the heads are always new, and new heads damage good features.
    """

    learning_rate: Schedule = field(default_factory=lambda: Schedule(peak=5e-4, end=1e-6, warmup=0.1))
    weight_decay: Schedule = field(default_factory=lambda: Schedule(peak=0.04, end=0.2))
    teacher_momentum: Schedule = field(default_factory=lambda: Schedule(peak=0.996, end=1.0))
    teacher_temperature: Schedule = field(default_factory=lambda: Schedule(start=0.04, peak=0.07, warmup=0.3))
    local_weight: Schedule = field(default_factory=lambda: Schedule(peak=1.0))
    gram_weight: Schedule = field(default_factory=lambda: Schedule(peak=0.0))
    last_layer: Freeze = field(default_factory=lambda: Freeze(hold=0.01))
    backbone: Freeze | None = None

    def backbone_freeze(self, *, from_weights: bool) -> Freeze:
        """Return how the backbone rests, from released or earlier weights or from random ones."""
        return self.backbone or (FREEZE_FROM_WEIGHTS if from_weights else Freeze())

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "local_weight", "gram_weight"):
            check_range(name, getattr(self, name), 0.0, math.inf)
        check_range("teacher_momentum", self.teacher_momentum, 0.0, 1.0)
        check_range("teacher_temperature", self.teacher_temperature, 1e-4, math.inf)
