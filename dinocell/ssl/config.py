"""What a pretraining recipe holds."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dinocell.models.config import VARIANTS
from dinocell.models.layers import AttentionKernel
from dinocell.runtime.device import Precision
from dinocell.runtime.schedules import Freeze, Schedule, check_range
from dinocell.runtime.sharding import Parallel
from dinocell.ssl.masking import MaskingConfig
from dinocell.ssl.view_plan import ViewsConfig

RENAMED_KEYS = {"optim.max_bad_steps": "optim.max_nonfinite_steps"}

# --- schedules -----------------------------------------------------------------------------------------------------
#
# The schedules of a pretraining run.

FREEZE_FROM_WEIGHTS = Freeze(freeze=0.02, warmup=0.03)


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
    last_layer: Freeze = field(default_factory=lambda: Freeze(freeze=0.01))
    backbone: Freeze | None = None

    def backbone_freeze(self, *, from_weights: bool) -> Freeze:
        """Return how the backbone rests, from released or earlier weights or from random ones."""
        return self.backbone or (FREEZE_FROM_WEIGHTS if from_weights else Freeze())

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "local_weight", "gram_weight"):
            check_range(name, getattr(self, name), 0.0, math.inf)
        check_range("teacher_momentum", self.teacher_momentum, 0.0, 1.0)
        check_range("teacher_temperature", self.teacher_temperature, 1e-4, math.inf)


Compile = Literal["nothing", "blocks", "all"]
Recompute = Literal["nothing", "activations", "blocks"]

# Of the run's, seeds of each step, rank and part are made, which must fit into 64 bits.
_LARGEST_SEED = 2**32 - 1


def _check(section: Any, low: int, *names: str, high: int | None = None) -> None:
    """Refuse fields of a section that are below ``low``, above ``high``, infinite or no number."""
    for name in names:
        value = getattr(section, name)
        if not (low <= value and (high is None or value <= high) and math.isfinite(value)):
            expected = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected more than 0, got {value}")


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

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("shards: expected the folder or address of at least one shard set, got none")
        if self.weights is not None and not all(weight > 0 and math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"weights: expected numbers above 0, got {list(self.weights)}; leave out a set instead")
        _check(self, 1, "block_shards")
        _check_positive(self, "cache_gb")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone: ``variant`` with random weights, or ``weights``, any source of `load_backbone`.

    Attributes
    ----------
    layer_scale
        First value of LayerScale, with random weights.
    drop_path
        Share of the student's samples that skip each branch of each block.
    """

    variant: str = "small"
    patch_size: int = 8
    weights: str | None = None
    layer_scale: float = 1e-5
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {self.variant}")
        _check(self, 1, "patch_size")
        _check(self, 0, "layer_scale")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: expected a share from 0 to less than 1, got {self.drop_path}")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """The projection heads of DINO and iBOT; ``shared`` uses one for both."""

    num_prototypes: int = 8192
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    shared: bool = False
    weight_norm: bool = False

    def __post_init__(self) -> None:
        _check(self, 1, "num_prototypes", "hidden", "bottleneck", "layers")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the losses add up (DINOv2's weights) and how targets are balanced."""

    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temperature: float = 0.1
    centring: Literal["sinkhorn", "softmax"] = "sinkhorn"
    sinkhorn_iterations: int = 3
    centre_momentum: float = 0.9

    def __post_init__(self) -> None:
        _check(self, 0, "ibot_weight", "koleo_weight")
        _check_positive(self, "student_temperature")
        _check(self, 1, "sinkhorn_iterations")
        _check(self, 0, "centre_momentum", high=1)


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """The Gram teacher, an earlier state of the teacher's backbone; it is there while ``schedules.gram_weight`` is.

    It is taken when the weight first is above 0, and again ``refresh_every`` steps later, at most ``max_refreshes``
    times (DINOv3). It sees the teacher's global crops, unmasked; DINOv3 shows it larger ones.

    Attributes
    ----------
    negatives
        What negative cosines count for, see `dinocell.ssl.losses.gram_loss`.
    """

    refresh_every: int = 10_000
    max_refreshes: int = 3
    negatives: Literal["keep", "drop", "drop_in_teacher"] = "keep"

    def __post_init__(self) -> None:
        if self.refresh_every < 1 or self.max_refreshes < 0:
            raise ValueError("refresh_every: expected at least 1, and max_refreshes at least 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and what is around it.

    Attributes
    ----------
    accumulate
        Parts in which a rank takes its share of a step, one after the other: less memory, the same gradient. Targets
        are balanced, masks dealt, and KoLeo's neighbours looked for within a part.
    head_weight_decay_factor
        On the heads' weight decay.
    rule
        How the learning rate of the schedule, which is for a batch of 1,024, follows the batch.
    clip
        Largest gradient norm of each sub-module.
    max_nonfinite_steps
        So many steps in a row without a finite loss and gradient end the run. Such steps change no weight.
    """

    rule: Literal["sqrt", "linear", "constant"] = "sqrt"
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.9
    patch_embedding_factor: float = 0.2
    head_weight_decay_factor: float = 1.0
    clip: float = 3.0
    accumulate: int = 1
    max_nonfinite_steps: int = 10

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers from 0 to less than 1, got {list(self.betas)}")
        _check(self, 0, "layer_decay", "patch_embedding_factor", "head_weight_decay_factor")
        if not self.clip > 0:  # infinite: no clipping
            raise ValueError(f"clip: expected more than 0, got {self.clip}")
        _check(self, 1, "max_nonfinite_steps")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What must not change the result, but for rounding.

    Attributes
    ----------
    device
        ``auto``: CUDA if there is one.
    dtype
        Of matrix products; ``auto``: bfloat16 on GPUs that have it (Ampere and later), float32 elsewhere.
    workers
        Processes of each rank that read and decode ahead.
    parallel
        How the model lies on several ranks, see `dinocell.runtime.sharding`.
    attention
        How attention is computed, see `dinocell.models.layers`; other than ``sdpa``: CUDA.
    compile
        ``blocks``: each block; 1.5x on an H200 (benchmarks/results/pretrain_step_gpu.md), nothing on the CPU. ``all``:
        whole passes of the backbones (on several ranks, or with ``recompute=blocks``, each block), targets and losses;
        less work for the host (benchmarks/results/host_time.md), another 1.08x for S/8 and 1.02x for L/16, and two to
        three times the time of the first step (benchmarks/results/pretrain_step_gpu_large.md).
    recompute
        What the backward pass computes again instead of keeping it. ``activations``: the outputs of norms and
        activations, no matrix product; ``blocks``: all of each block, and the teacher's logits. Figures:
        benchmarks/results/pretrain_step_cpu.md.
    timeout_s
        How long ranks wait for one another before all stop with an error.
    """

    device: str = "auto"
    dtype: Precision = "auto"
    workers: int = 2
    parallel: Parallel = "auto"
    attention: AttentionKernel = "sdpa"
    compile: Compile = "nothing"
    recompute: Recompute = "nothing"
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        _check(self, 0, "workers")
        _check_positive(self, "timeout_s")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is measured of the teacher while it is trained, besides losses.

    Attributes
    ----------
    every
        Steps between measurements; 0: never.
    tiles
        Of the training shards, for channel consistency: each through every channel.
    knn_train, knn_test, label
        Shard sets whose samples have the label ``label``: neighbours of the first name the samples of the second.
    neighbours
        That vote.
    """

    every: int = 1000
    tiles: int = 64
    knn_train: str | None = None
    knn_test: str | None = None
    label: str | None = None
    neighbours: int = 10

    def __post_init__(self) -> None:
        given = [name for name in ("knn_train", "knn_test", "label") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"knn_train, knn_test, label: expected all three or none, got {', '.join(given)}")
        if self.every < 0 or self.tiles < 2 or self.neighbours < 1:
            raise ValueError("every: expected at least 0, tiles at least 2, neighbours at least 1")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run.

    Attributes
    ----------
    steps, batch_size
        Length of the run; tiles a step, over all ranks.
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
    gram: GramConfig = field(default_factory=GramConfig)
    schedules: Schedules = field(default_factory=Schedules)
    optim: OptimConfig = field(default_factory=OptimConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    log_every: int = 10
    picture_every: int = 1000
    export_every: int = 9000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_checkpoint_every: int = 0
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        _check(self, 1, "steps", "batch_size", "log_every", "picture_every", "export_every")
        _check(self, 1, "checkpoint_every", "keep_checkpoints")
        _check(self, 0, "keep_checkpoint_every")
        _check(self, 0, "seed", high=_LARGEST_SEED)
        if self.optim.accumulate < 1 or self.batch_size % self.optim.accumulate:
            raise ValueError(
                f"optim.accumulate: expected a divisor of batch_size {self.batch_size}, got {self.optim.accumulate}"
            )
        for name in ("global_size", "local_size"):
            size = getattr(self.views, name)
            if size % self.model.patch_size:
                raise ValueError(f"views.{name}: expected a multiple of patch_size {self.model.patch_size}, got {size}")

    @property
    def uses_gram(self) -> bool:
        """Whether the Gram loss counts at any time."""
        return self.schedules.gram_weight != Schedule(peak=0.0)
