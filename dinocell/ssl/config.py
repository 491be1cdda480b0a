"""What a pretraining recipe holds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dinocell.models.config import VARIANTS
from dinocell.runtime.schedules import Freeze, Schedule
from dinocell.ssl.masking import MaskingConfig
from dinocell.ssl.schedules import Schedules
from dinocell.ssl.view_plan import ViewsConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tiles come from.

    Attributes
    ----------
    shards
        Folders or addresses of shard sets.
    weights
        How often each set is to come; null: as often as it has samples.
    block_shards
        Shards that are mixed with one another at a time.
    cache, cache_gb
        For remote sets: a folder for copies of shards, and its bound.
    """

    shards: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    block_shards: int = 16
    cache: Path | None = None
    cache_gb: float = 50.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone: ``variant`` with random weights, or ``weights``, any source of `load_backbone`.

    Attributes
    ----------
    layer_scale
        First value of LayerScale, with random weights.
    drop_path
        Share of the student's samples that skip each branch of each block.
    start_freeze
        With ``weights``: the backbone's learning rate at first, on top of its schedule. The heads are always new, and
        new heads damage good features; so it rests, then rises, unless the recipe says otherwise.
    """

    variant: str = "small"
    patch_size: int = 8
    weights: str | None = None
    layer_scale: float = 1e-5
    drop_path: float = 0.1
    start_freeze: Freeze = field(default_factory=lambda: Freeze(hold=0.02, warmup=0.03))

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {self.variant}")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """The projection heads of DINO and iBOT; ``shared`` uses one for both."""

    num_prototypes: int = 8192
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    shared: bool = False
    weight_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the losses add up (DINOv2's weights) and how targets are balanced."""

    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temperature: float = 0.1
    centring: Literal["sinkhorn", "softmax"] = "sinkhorn"
    sinkhorn_iterations: int = 3
    centre_momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and what is around it.

    Attributes
    ----------
    rule
        How the learning rate of the schedule, which is for a batch of 1,024, follows the batch.
    clip
        Largest gradient norm of each sub-module.
    max_bad_steps
        So many steps in a row without a finite loss and gradient end the run. Such steps change no weight.
    """

    rule: Literal["sqrt", "linear", "constant"] = "sqrt"
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.9
    patch_embedding_factor: float = 0.2
    clip: float = 3.0
    max_bad_steps: int = 10


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What must not change the result, but for rounding.

    Attributes
    ----------
    device
        ``auto``: CUDA if there is one.
    dtype
        Of matrix products; ``auto``: bfloat16 on CUDA, float32 on the CPU.
    workers
        Processes that read and decode ahead.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: int = 2


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run.

    Attributes
    ----------
    steps, batch_size
        Length of the run; tiles a step.
    log_every, picture_every, export_every
        Steps between numbers, pictures and teacher checkpoints; the last step always exports.
    checkpoint_every, keep_checkpoints, keep_checkpoint_every
        Steps between training states, from which a run goes on; how many of the newest stay, and those whose step the
        last number divides (0: no others).
    """

    output: Path
    data: DataConfig
    seed: int = 0
    steps: int = 125_000
    batch_size: int = 64
    views: ViewsConfig = field(default_factory=ViewsConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    schedules: Schedules = field(default_factory=Schedules)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log_every: int = 10
    picture_every: int = 1000
    export_every: int = 9000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_checkpoint_every: int = 0
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "log_every", "picture_every", "export_every")
        for name in (*counts, "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.schedules.gram_weight != Schedule(peak=0.0):
            raise ValueError("schedules.gram_weight: expected 0 throughout, for no step adds the Gram loss yet")
        for name in ("global_size", "local_size"):
            size = getattr(self.views, name)
            if size % self.model.patch_size:
                raise ValueError(f"views.{name}: expected a multiple of patch_size {self.model.patch_size}, got {size}")
