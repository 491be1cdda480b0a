"""What a fine-tuning recipe holds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dinocell.models.config import VARIANTS
from dinocell.runtime.device import Precision

RENAMED_KEYS = {"optim.max_bad_steps": "optim.max_nonfinite_steps"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images and cells come from: ``sets``, or ``images`` and ``masks``.

    Attributes
    ----------
    sets
        Labelled sets: folders that `dinocell dataset` made, or SAMCell's own.
    weights
        How often each set is to come; null: as often as it has images.
    images, masks
        Straight from a folder, without a set: two patterns of paths, as ``mine/images/{name}.tif`` and
        ``mine/masks/{name}.png``, or two folders whose files have the same names but for the suffix.
    encoding
        What masks are: ``labels`` (one number a cell), ``regions`` (regions of one colour).
    channel
        For images of several channels: a number, a name, or ``mean``.
    validation_share
        Share of the images that are kept for validation, whole images, drawn by ``seed``; at least one.
    validation_sets
        Labelled sets for validation instead.
    crops_per_image
        Crops of each image an epoch; null: as many as it takes to cover a typical image once.
    fixed_crops
        So many augmented crops of each image are drawn once, and every epoch takes from these; null: each crop is a new
        one. Only with a frozen backbone, whose features of them, and of the validation images, are then computed once
        and kept on the run folder's disk: less time for less variety.
    strict
        Stop if there are pairs of image and mask that cannot be used, instead of leaving them out and saying so.
    """

    sets: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    images: str | None = None
    masks: str | None = None
    encoding: Literal["labels", "regions"] = "labels"
    channel: str | None = None
    validation_share: float = 0.1
    validation_sets: tuple[str, ...] = ()
    crops_per_image: int | None = None
    fixed_crops: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if bool(self.sets) == bool(self.images):
            raise ValueError("set either sets, or images and masks" + ("; got both" if self.sets else ""))
        if bool(self.images) != bool(self.masks):
            raise ValueError("images and masks go together; one of them is missing")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share: expected more than 0 and less than 1, got {self.validation_share}")
        if self.weights is not None and len(self.weights) != len(self.sets):
            raise ValueError(f"weights: expected one a set, {len(self.sets)}, got {len(self.weights)}")
        if self.weights is not None and not all(weight > 0 for weight in self.weights):
            raise ValueError(f"weights: expected numbers above 0, got {list(self.weights)}; leave out a set instead")
        for name in ("crops_per_image", "fixed_crops"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The segmenter.

    Attributes
    ----------
    size, patch_size
        Of the vision transformer; see the table of variants.
    weights
        Backbone: any source of `load_backbone`. Null with ``pretrained``: Meta's DINOv3 release of that size.
    pretrained
        False: random weights, on purpose.
    segmenter
        Go on from a segmenter instead; size, patch size and weights are its own.
    freeze_backbone
        The backbone never changes.
    blocks
        Four blocks whose tokens the decoder gets; null: spread over the depth.
    """

    size: str = "small"
    patch_size: int = 8
    weights: str | None = None
    pretrained: bool = True
    segmenter: str | None = None
    freeze_backbone: bool = True
    blocks: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.size not in VARIANTS:
            raise ValueError(f"size: expected one of {', '.join(VARIANTS)}, got {self.size}")
        if self.weights is not None and not self.pretrained:
            raise ValueError("pretrained=false means random weights: leave out weights, or pretrained=false")
        if self.patch_size < 1:
            raise ValueError(f"patch_size: expected at least 1, got {self.patch_size}")
        if self.segmenter is not None and (self.weights is not None or self.blocks is not None):
            raise ValueError("segmenter: it has its own backbone and blocks; leave out weights and blocks")
        if self.blocks is not None:
            depth = VARIANTS[self.size].depth
            if sorted({*self.blocks}) != list(self.blocks) or not 0 <= self.blocks[0] <= self.blocks[-1] < depth:
                raise ValueError(
                    f"blocks: expected four ascending numbers from 0 to {depth - 1} for size {self.size}, "
                    f"got {list(self.blocks)}"
                )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation (SAMCell's; blur and noise are ours).

    One affine map an image, the cells by nearest neighbour, the target from the cells.

    Attributes
    ----------
    crop
        Side of a crop in pixels.
    flip, inversion
        Chances of a mirror image and of inverted grey levels.
    rotation_deg
        Largest turn either way.
    scale, brightness
        Least and largest factor.
    with_cells
        Chance that a crop is drawn around a cell; else anywhere.
    blur_px, noise
        Largest deviation of a Gaussian blur, in pixels, and of Gaussian noise, as a share of the range of grey levels;
        each crop draws its own, from 0 on. For a model that is to stand other microscopes' focus and light; 0: none.
    """

    crop: int = 256
    flip: float = 0.5
    rotation_deg: float = 180.0
    scale: tuple[float, float] = (0.8, 1.2)
    brightness: tuple[float, float] = (0.95, 1.05)
    inversion: float = 0.5
    with_cells: float = 0.9
    blur_px: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 16:
            raise ValueError(f"crop: expected at least 16, got {self.crop}")
        for name in ("flip", "inversion", "with_cells"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a chance from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.rotation_deg <= 180:
            raise ValueError(f"rotation_deg: expected 0 to 180, got {self.rotation_deg}")
        if not 0 <= self.blur_px <= 10:
            raise ValueError(f"blur_px: expected 0 to 10 pixels, got {self.blur_px}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise: expected a share of the grey range from 0 to 1, got {self.noise}")
        for name in ("scale", "brightness"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: expected 0 < least <= largest, got {low} and {high}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What may be added to the mean squared error of distance maps; the loss of flows has nothing to set.

    Attributes
    ----------
    foreground_weight
        Extra weight of pixels inside cells; 0: all count alike.
    gradient_weight
        Weight of the squared error of the maps' differences between neighbouring pixels, which sharpens valleys.
    """

    foreground_weight: float = 0.0
    gradient_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("foreground_weight", "gradient_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (SAMCell's values) with linear warm-up and a cosine to 0.

    Attributes
    ----------
    learning_rate, backbone_learning_rate
        At the peak; the second only counts where the backbone is not frozen.
    layer_decay
        Factor on the learning rate from each block of the backbone to the one below.
    warmup_steps
        Steps of the warm-up, at most a tenth of the run.
    clip
        Largest gradient norm of backbone and decoder each.
    ema
        Share of the moving average of the weights that a step keeps, for validation and the files; 0: no average.
    max_nonfinite_steps
        So many steps in a row without a finite loss and gradient end the run. Such steps change no weight.
    """

    learning_rate: float = 1e-4
    backbone_learning_rate: float = 1e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0
    warmup_steps: int = 250
    clip: float = 1.0
    ema: float = 0.0
    max_nonfinite_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("backbone_learning_rate", "weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers from 0 to less than 1, got {list(self.betas)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected more than 0, up to 1, got {self.layer_decay}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected 0 to less than 1, got {self.ema}")
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps: expected at least 1, got {self.max_nonfinite_steps}")


@dataclass(frozen=True, kw_only=True)
class StoppingConfig:
    """When the validation error no longer falls.

    Attributes
    ----------
    patience
        Epochs without an improvement after which the training ends; 0: never.
    min_delta
        What counts as an improvement of the validation error.
    """

    patience: int = 7
    min_delta: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("patience", "min_delta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")


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
        Processes that read and augment ahead.
    timeout_s
        How long a rank waits for another.
    """

    device: str = "auto"
    dtype: Precision = "auto"
    workers: int = 2
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s: expected more than 0, got {self.timeout_s}")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run.

    Attributes
    ----------
    output
        The run folder.
    epochs
        Passes over the training images at most; see ``stopping``.
    batch_size
        Crops a step, over all ranks. Null: 8 with a frozen backbone, else 4.
    target
        ``distance``: each pixel's distance to its cell's boundary over the cell's largest. ``flows``: the direction to
        the middle of its cell along rows and columns, and the chance of a cell (Cellpose's target).
    log_every, picture_every
        Steps between numbers; epochs between pictures.
    validate_every, score_every
        Epochs between validation errors, and between scores of segmented validation images.
    checkpoint_every
        Epochs between training states.
    """

    output: Path
    data: DataConfig
    seed: int = 0
    epochs: int = 100
    batch_size: int | None = None
    target: Literal["distance", "flows"] = "distance"
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    log_every: int = 10
    picture_every: int = 5
    validate_every: int = 1
    score_every: int = 5
    checkpoint_every: int = 1
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        names = ("epochs", "log_every", "picture_every", "validate_every", "score_every", "checkpoint_every")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.target == "flows" and (self.loss.foreground_weight or self.loss.gradient_weight):
            raise ValueError("loss: foreground_weight and gradient_weight are for target distance; leave them out")
        if self.data.fixed_crops is not None and not self.model.freeze_backbone:
            raise ValueError(
                "data.fixed_crops: a backbone that learns has other features every step; leave it out, or "
                "model.freeze_backbone=true"
            )

    @property
    def crops_a_step(self) -> int:
        """The batch size: as set, or 8 with a frozen backbone, else 4."""
        return self.batch_size or (8 if self.model.freeze_backbone else 4)
