"""The schema of a pretraining recipe."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dinocell.models.config import VARIANTS
from dinocell.models.layers import AttentionKernel
from dinocell.runtime import sections
from dinocell.runtime.distributed import Parallel
from dinocell.runtime.schedules import Freeze, Schedule, check_range
from dinocell.runtime.sections import AdamWConfig, check, check_ascending, refuse

Policy = Literal["consistency", "average", "bag", "stack"]
TargetChannels = Literal["same", "other", "mean"]
Compile = Literal["nothing", "blocks", "all"]
Recompute = Literal["nothing", "activations", "blocks"]

# Former keys of `PretrainConfig`: present name, and for deleted ones the only value that is still accepted.
RENAMED_KEYS = {
    "watch": "online_eval",
    "picture_every": "image_every",
    "optim.max_bad_steps": "optim.max_nonfinite_steps",
}
REMOVED_KEYS = {"gram.negatives": "keep", "views.black": "0.1", "views.white": "99.9"}


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """All quantities that change during a run. Defaults: DINOv2's, with the learning rate of its cell recipes.

    ``learning_rate`` is for a batch of 1,024, see `dinocell.runtime.optim.scaled_learning_rate`. ``last_layer`` and
    ``backbone`` freeze these parts at the start. With ``backbone`` null, random weights are not frozen; weights from
    ``model.weights`` are frozen for 0.02 of the run and then warmed up over 0.03, because the heads are always new
    and their first gradients damage good features.
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
        """Return how the backbone is frozen at the start, from pretrained weights or from random ones."""
        return self.backbone or (Freeze(freeze=0.02, warmup=0.03) if from_weights else Freeze())

    def __post_init__(self) -> None:
        ranges = {"teacher_momentum": (0.0, 1.0), "teacher_temperature": (1e-4, math.inf)}
        for name in ("learning_rate", "weight_decay", *ranges, "local_weight", "gram_weight"):
            check_range(name, getattr(self, name), *ranges.get(name, (0.0, math.inf)))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training tiles.

    Attributes
    ----------
    shards
        Folders or addresses of shard sets.
    weights
        Relative sampling frequency of each set; null: proportional to its number of samples.
    block_shards
        Number of shards whose samples are shuffled together.
    cache, cache_gb
        For remote sets: a local folder for copies of shards, and its maximum size.
    """

    shards: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    block_shards: int = 16
    cache: Path | None = None
    cache_gb: float = 50.0

    def __post_init__(self) -> None:
        refuse((not self.shards, "shards: expected the folder or address of at least one shard set, got none"))
        check(self, "cache_gb", "weights", gt=0)
        check(self, "block_shards", ge=1)


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How tiles become views (crops and photometry of Cell-DINO; the channel policies are DINOCell's).

    Attributes
    ----------
    policy
        ``consistency``: some views are the mean of all channels, the others one random channel, so that features
        become independent of the stain. ``average``: the mean in all views. ``bag``: one random channel for all views
        of a sample (channel-adaptive DINO). ``stack``: all channels, as in Cell-DINO.
    global_mean_probability, local_mean_probability
        For ``consistency``: probability that a view is the mean; one number per global view, one for all local views.
    channels
        For ``stack``: names of the input channels, in order. Other channels of a tile are ignored, missing ones are 0.
    global_size, global_area, local_size, local_area
        Side of a crop in pixels, and minimum and maximum share of the tile's area that it covers.
    aspect
        Minimum and maximum ratio of a crop's sides on the tile.
    right_angles
        Rotate by a random multiple of 90 degrees.
    brightness, contrast
        Standard deviation of the factors, one per channel and view; always applied, before channels are averaged.
    drop_channel, protein_contrast, protein_channel
        For ``stack``: probability to blank one channel (never the protein), and to scale the protein by 0 to 2 over
        its maximum.
    blur, blur_sigma_px, noise, noise_sigma
        Probabilities of a Gaussian blur and of Gaussian noise, and the ranges of their standard deviations (noise:
        relative to intensities of 0 to 1).
    """

    policy: Policy = "consistency"
    global_mean_probability: tuple[float, ...] = (1.0, 0.0)
    local_mean_probability: float = 0.3
    channels: tuple[str, ...] = ()
    num_local: int = 8
    global_size: int = 224
    local_size: int = 96
    global_area: tuple[float, float] = (0.4, 1.0)
    local_area: tuple[float, float] = (0.05, 0.4)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flips: bool = True
    right_angles: bool = True
    brightness: float = 0.2
    contrast: float = 0.2
    drop_channel: float = 0.2
    protein_contrast: float = 0.2
    protein_channel: str = "protein"
    blur: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    noise: float = 0.0
    noise_sigma: tuple[float, float] = (0.01, 0.05)

    def __post_init__(self) -> None:
        probabilities = ("global_mean_probability", "local_mean_probability", "drop_channel", "protein_contrast")
        check(self, *probabilities, "blur", "noise", ge=0, le=1)
        check(self, "global_area", "local_area", gt=0, le=1)
        check(self, "aspect", gt=0)
        check(self, "global_size", "local_size", ge=1)
        check(self, "num_local", "brightness", "contrast", "blur_sigma_px", "noise_sigma", ge=0)
        check_ascending(self, "global_area", "local_area", "aspect", "blur_sigma_px", "noise_sigma")
        two = "global_mean_probability: expected a number for each of at least 2 global views"
        once = "channels: expected names of input channels, each once, for policy stack at least one"
        is_repeated = len(set(self.channels)) < len(self.channels)
        refuse(
            (self.num_global < 2, two),
            (is_repeated or (self.policy == "stack" and not self.channels), f"{once}; got {list(self.channels)}"),
        )

    @property
    def num_global(self) -> int:
        """Number of global views of a tile."""
        return len(self.global_mean_probability)

    @property
    def num_views(self) -> int:
        """Number of all views of a tile; the global ones come first."""
        return self.num_global + self.num_local

    @property
    def kinds(self) -> tuple[tuple[range, int], tuple[range, int]]:
        """Indices of the global views and their side in pixels, then those of the local views."""
        return (
            (range(self.num_global), self.global_size),
            (range(self.num_global, self.num_views), self.local_size),
        )

    @property
    def in_channels(self) -> int:
        """Input channels of the model."""
        return len(self.channels) if self.policy == "stack" else 1


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How many patches are masked, and in which shapes.

    Attributes
    ----------
    image_share
        Share of the global crops that get a mask.
    min_patch_share, max_patch_share
        Range of the masked share of such a crop's patches; the shares are spread evenly over this range.
    samples_per_group
        Number of samples (each with all of its global crops) within which the shares are spread; null: the batch.
    min_block
        Minimum number of patches of a block.
    max_block_share
        Maximum share of the crop that a block covers.
    min_aspect
        Minimum ratio of height and width of a block; the maximum is its inverse.
    shift
        Roll each mask around by a random offset, so that patches at the border are masked as often as central ones.
    """

    image_share: float = 0.5
    min_patch_share: float = 0.1
    max_patch_share: float = 0.5
    samples_per_group: int | None = None
    min_block: int = 4
    max_block_share: float = 0.5
    min_aspect: float = 0.3
    shift: bool = False

    def __post_init__(self) -> None:
        check(self, "image_share", "max_patch_share", ge=0, le=1)
        check(self, "min_patch_share", ge=0, le=self.max_patch_share)
        check(self, "max_block_share", "min_aspect", gt=0, le=1)
        check(self, "min_block", "samples_per_group", ge=1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone: ``variant`` with random weights, or ``weights``, any source that `load_backbone` accepts.

    Attributes
    ----------
    layer_scale
        Initial value of LayerScale, with random weights.
    drop_path
        Share of the student's samples that skip each branch of each block.
    """

    variant: str = "small"
    patch_size: int = 8
    weights: str | None = None
    layer_scale: float = 1e-5
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        variants = ", ".join(VARIANTS)
        refuse((self.variant not in VARIANTS, f"variant: expected one of {variants}, got {self.variant}"))
        check(self, "patch_size", ge=1)
        check(self, "layer_scale", ge=0)
        check(self, "drop_path", ge=0, lt=1)


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
        check(self, "num_prototypes", "hidden", "bottleneck", "layers", ge=1)


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Regression of the pixels of masked patches from the student's patch tokens that iBOT computes as well.

    Attributes
    ----------
    weight
        Of the loss; 0: no reconstruction, and no head for it.
    target
        What is predicted. ``same``: the crop itself, with its photometry; ``other``: another random channel of the same
        region; ``mean``: the mean of all its channels.
    patch_normalised
        Predict each patch and channel with zero mean and unit variance (MAE), instead of the standardised crop.
    hidden_dim
        Width of the hidden layer of the head, two linear layers with GELU.
    """

    weight: float = 0.0
    target: TargetChannels = "same"
    patch_normalised: bool = False
    hidden_dim: int = 512

    def __post_init__(self) -> None:
        check(self, "weight", ge=0)
        check(self, "hidden_dim", ge=1)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses (DINOv2's), and how the teacher's targets are balanced."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temperature: float = 0.1
    centring: Literal["sinkhorn", "softmax"] = "sinkhorn"
    sinkhorn_iterations: int = 3
    centre_momentum: float = 0.9
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    def __post_init__(self) -> None:
        check(self, "dino_weight", "ibot_weight", "koleo_weight", ge=0)
        check(self, "student_temperature", gt=0)
        check(self, "sinkhorn_iterations", ge=1)
        check(self, "centre_momentum", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """The Gram teacher, an earlier state of the teacher's backbone; used while ``schedules.gram_weight`` is above 0.

    It is copied from the teacher when the weight first is above 0, and again every ``refresh_every`` steps, at most
    ``max_refreshes`` times (DINOv3). It sees the teacher's global crops, unmasked; DINOv3 uses larger ones.
    """

    refresh_every: int = 10_000
    max_refreshes: int = 3

    def __post_init__(self) -> None:
        check(self, "refresh_every", ge=1)
        check(self, "max_refreshes", ge=0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(AdamWConfig):
    """AdamW and its settings.

    Attributes
    ----------
    accumulate
        Number of parts into which a rank splits its share of a step: less memory, the same gradient. Targets are
        balanced, masks distributed and KoLeo's neighbours searched within a part.
    head_weight_decay_factor
        Factor on the heads' weight decay.
    rule
        How the learning rate of the schedule, which is for a batch of 1,024, scales with the batch size.
    """

    rule: Literal["sqrt", "linear", "constant"] = "sqrt"
    layer_decay: float = 0.9
    patch_embedding_factor: float = 0.2
    head_weight_decay_factor: float = 1.0
    clip: float = 3.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "layer_decay", "patch_embedding_factor", "head_weight_decay_factor", ge=0)
        check(self, "accumulate", ge=1)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(sections.ComputeConfig):
    """Settings that change the results by rounding errors only.

    Attributes
    ----------
    parallel
        How the model is distributed over several ranks, see `dinocell.runtime.distributed`.
    attention
        How attention is computed, see `dinocell.models.layers`; all but ``sdpa`` and ``dense`` need CUDA.
    compile
        ``blocks``: each block; 1.5x on an H200 (benchmarks/results/pretrain_step_gpu.md), no gain on the CPU. ``all``:
        whole passes of the backbones (on several ranks, or with ``recompute=blocks``, each block), targets and losses;
        less work for the host (benchmarks/results/host_time.md), another 1.08x for S/8 and 1.02x for L/16, and two to
        three times the duration of the first step (benchmarks/results/pretrain_step_gpu_large.md).
    recompute
        What the backward pass recomputes instead of storing it. ``activations``: the outputs of norms and activations,
        no matrix product; ``blocks``: everything inside each block, and the teacher's logits. Figures:
        benchmarks/results/pretrain_step_cpu.md.
    """

    parallel: Parallel = "auto"
    attention: AttentionKernel = "sdpa"
    compile: Compile = "nothing"
    recompute: Recompute = "nothing"


@dataclass(frozen=True, kw_only=True)
class OnlineEvalConfig:
    """Evaluation of the teacher during training.

    Attributes
    ----------
    every
        Steps between evaluations; 0: never.
    tiles
        Number of training tiles for channel consistency; each is seen through every channel.
    knn_train, knn_test, label
        Shard sets of a kNN classification: reference and test samples, and the label to predict.
    neighbours
        Number of neighbours, k.
    patch_set
        Folder of a labelled set (``dinocell dataset``) on which a linear readout of the patch tokens predicts distance
        maps; null: off.
    patch_labelled
        Number of its images on which the readout is fitted, the first ones; the others are the test images.
    """

    every: int = 1000
    tiles: int = 64
    knn_train: str | None = None
    knn_test: str | None = None
    label: str | None = None
    neighbours: int = 10
    patch_set: Path | None = None
    patch_labelled: int = 4

    def __post_init__(self) -> None:
        given = [name for name in ("knn_train", "knn_test", "label") if getattr(self, name) is not None]
        wanted = "knn_train, knn_test, label: expected all three or none"
        refuse((len(given) in (1, 2), f"{wanted}, got {', '.join(given)}"))
        check(self, "every", ge=0)
        check(self, "neighbours", "patch_labelled", ge=1)
        check(self, "tiles", ge=2)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run.

    Attributes
    ----------
    steps, batch_size
        Length of the run; tiles per step, over all ranks.
    log_every, image_every, export_every
        Steps between metrics, images and teacher checkpoints; the last step always exports.
    checkpoint_every, keep_checkpoints, keep_checkpoint_every
        Steps between checkpoints, from which a run resumes; how many of the latest are kept, and those whose step is a
        multiple of the last number (0: no others).
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
    online_eval: OnlineEvalConfig = field(default_factory=OnlineEvalConfig)
    log_every: int = 10
    image_every: int = 1000
    export_every: int = 9000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_checkpoint_every: int = 0
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        intervals = ("log_every", "image_every", "export_every", "checkpoint_every")
        check(self, "steps", "batch_size", *intervals, "keep_checkpoints", ge=1)
        check(self, "keep_checkpoint_every", ge=0)
        # The seed of each step and rank is a multiple of this one and must fit into 64 bits.
        check(self, "seed", ge=0, le=2**32 - 1)
        batch, parts = self.batch_size, self.optim.accumulate
        refuse((batch % parts > 0, f"optim.accumulate: expected a divisor of batch_size {batch}, got {parts}"))
        patch = self.model.patch_size
        for name, size in (("global_size", self.views.global_size), ("local_size", self.views.local_size)):
            refuse((size % patch > 0, f"views.{name}: expected a multiple of patch_size {patch}, got {size}"))
        same = "losses.reconstruction.target: expected same with views.policy=stack, whose crops have all channels"
        target = self.target_channels
        refuse((self.views.policy == "stack" and target != "same", f"{same}, got {target}"))
        one = f"online_eval.patch_set: expected null for a model of {self.views.in_channels} channels"
        refuse((self.views.in_channels > 1 and self.online_eval.patch_set is not None, one))

    @property
    def mask_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a global crop."""
        side = self.views.global_size // self.model.patch_size
        return side, side

    @property
    def mean_masked(self) -> float:
        """Expected number of masked patches per sample, over all of its global crops."""
        masking = self.masking
        share = masking.image_share * (masking.min_patch_share + masking.max_patch_share) / 2
        return share * self.views.num_global * math.prod(self.mask_grid)

    @property
    def uses_gram(self) -> bool:
        """Whether the Gram loss has a weight at any step."""
        return self.schedules.gram_weight != Schedule(peak=0.0)

    @property
    def uses_reconstruction(self) -> bool:
        """Whether pixels of masked patches are predicted."""
        return self.losses.reconstruction.weight > 0

    @property
    def target_channels(self) -> TargetChannels:
        """Channels of the additional target views to plan; ``same`` needs none besides the global views."""
        return self.losses.reconstruction.target if self.uses_reconstruction else "same"
