"""What a recipe of the demo holds."""

from dataclasses import dataclass, field
from pathlib import Path

from dinocell.data_shards.synthetic import SyntheticConfig
from dinocell.demo.data import FieldCounts


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo.

    Attributes
    ----------
    output
        Folder of everything that the demo makes.
    data
        A folder of your own images instead of generated ones: ``images/`` and, for scores, ``masks/`` with the same
        names; or just images.
    weights
        A backbone to fine-tune instead of pretraining one: any source of `load_backbone`.
    pretrain_steps, finetune_epochs
        How long the two trainings take.
    counts, field
        How many fields are generated, and how they look.
    """

    output: Path = Path("demo")
    data: Path | None = None
    weights: str | None = None
    seed: int = 0
    pretrain_steps: int = 100
    finetune_epochs: int = 5
    counts: FieldCounts = field(default_factory=FieldCounts)
    field: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        if self.pretrain_steps < 1 or self.finetune_epochs < 1:
            raise ValueError("pretrain_steps and finetune_epochs: expected at least 1")
        if min(self.field.size) < 64:
            raise ValueError(f"field.size: expected at least 64 px a side, got {self.field.size}")
