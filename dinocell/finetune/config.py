"""Schema of a fine-tuning recipe."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dinocell.finetune.targets import TargetName
from dinocell.models.config import VARIANTS
from dinocell.runtime.sections import AdamWConfig, ComputeConfig, check, check_ascending, refuse

# Former keys that are still read under their old name, and former keys with the one value that is still accepted.
RENAMED_KEYS: dict[str, str] = {
    "augment.inversion": "augment.invert_contrast",
    "picture_every": "image_every",
    "optim.max_bad_steps": "optim.max_nonfinite_steps",
}
REMOVED_KEYS: dict[str, Any] = {"data.fixed_crops": None}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and their labels: ``sets``, or ``images`` and ``masks``.

    Attributes
    ----------
    sets
        Labelled sets: folders made by `dinocell dataset`, or SAMCell's own.
    weights
        Sampling weight of each set; null: in proportion to its number of images.
    images, masks
        Image files without a set: two path patterns, such as ``mine/images/{name}.tif`` and ``mine/masks/{name}.png``,
        or two folders whose files have the same names except for the suffix.
    encoding
        Encoding of the masks: ``labels`` (one integer per cell), ``regions`` (regions of one colour).
    channel
        For images of several channels: a number, a name, or ``mean``.
    validation_share
        Fraction of the images used for validation, at least one; whole images, drawn by ``seed``.
    validation_sets
        Labelled sets for validation instead.
    crops_per_image
        Crops per image and epoch; null: enough to cover the median image once.
    strict
        Stop if there are pairs of image and mask that cannot be used, instead of skipping and listing them.
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
    strict: bool = False

    def __post_init__(self) -> None:
        num_sets = len(self.sets)
        refuse(
            (bool(self.sets) == bool(self.images), "set either sets, or images and masks"),
            (bool(self.images) != bool(self.masks), "images and masks: set both; one of them is missing"),
            (self.weights is not None and len(self.weights) != num_sets, f"weights: expected one per set, {num_sets}"),
        )
        check(self, "validation_share", gt=0, lt=1)
        check(self, "weights", gt=0)
        check(self, "crops_per_image", ge=1)


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
        Start from this segmenter instead, with its size, patch size and weights.
    freeze_backbone
        Do not train the backbone.
    blocks
        Four blocks whose tokens the decoder uses; null: spread over the depth.
    """

    size: str = "small"
    patch_size: int = 8
    weights: str | None = None
    pretrained: bool = True
    segmenter: str | None = None
    freeze_backbone: bool = True
    blocks: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        refuse((self.size not in VARIANTS, f"size: expected one of {', '.join(VARIANTS)}, got {self.size}"))
        depth, blocks = VARIANTS[self.size].depth, self.blocks
        are_wrong = blocks is not None and (sorted({*blocks}) != [*blocks] or not {*blocks} <= {*range(depth)})
        ascending = f"blocks: expected four ascending numbers from 0 to {depth - 1} for size {self.size}, got {blocks}"
        refuse(
            (
                self.weights is not None and not self.pretrained,
                "pretrained=false means random weights: remove weights, or pretrained=false",
            ),
            (
                self.segmenter is not None and (self.weights is not None or blocks is not None),
                "segmenter: it has its own backbone and blocks; remove weights and blocks",
            ),
            (are_wrong, ascending),
        )
        check(self, "patch_size", ge=1)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation (SAMCell's, with blur and noise added).

    One affine map per crop; labels are warped by nearest neighbour and the target is computed from them.

    Attributes
    ----------
    crop
        Side of a crop in pixels.
    flip, invert_contrast
        Probabilities of a flipped image and of inverted grey levels.
    rotation_deg
        Maximum rotation in either direction.
    scale, brightness
        Minimum and maximum factor.
    with_cells
        Probability that a crop is centred near a cell; else anywhere.
    blur_px, noise
        Maximum standard deviation of a Gaussian blur, in pixels, and of Gaussian noise, as a fraction of the grey
        range; each crop draws its own, from 0. They make a model robust to other microscopes' focus and exposure; 0:
        none.
    """

    crop: int = 256
    flip: float = 0.5
    rotation_deg: float = 180.0
    scale: tuple[float, float] = (0.8, 1.2)
    brightness: tuple[float, float] = (0.95, 1.05)
    invert_contrast: float = 0.5
    with_cells: float = 0.9
    blur_px: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check(self, "crop", ge=16)
        check(self, "flip", "invert_contrast", "with_cells", "noise", ge=0, le=1)
        check(self, "rotation_deg", ge=0, le=180)
        check(self, "blur_px", ge=0, le=10)
        check(self, "scale", "brightness", gt=0)
        check_ascending(self, "scale", "brightness")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Additions to the mean squared error of distance maps; the loss of flows has no options.

    Attributes
    ----------
    foreground_weight
        Extra weight of pixels inside cells; 0: all pixels count equally.
    gradient_weight
        Weight of the squared error of the differences between neighbouring pixels, which sharpens valleys.
    """

    foreground_weight: float = 0.0
    gradient_weight: float = 0.0

    def __post_init__(self) -> None:
        check(self, "foreground_weight", "gradient_weight", ge=0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(AdamWConfig):
    """AdamW (SAMCell's values) with linear warm-up and cosine decay to 0.

    Attributes
    ----------
    learning_rate, backbone_learning_rate
        Peak values; the second is used only if the backbone is not frozen.
    layer_decay
        Factor on the learning rate from each block of the backbone to the one below.
    warmup_steps
        Steps of the warm-up, at most a tenth of the run.
    ema
        Decay of the moving average of the weights, which is used for validation and in the files; 0: no average.
    """

    learning_rate: float = 1e-4
    backbone_learning_rate: float = 1e-5
    weight_decay: float = 0.1
    layer_decay: float = 1.0
    warmup_steps: int = 250
    ema: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "learning_rate", gt=0)
        check(self, "backbone_learning_rate", "weight_decay", "warmup_steps", ge=0)
        check(self, "layer_decay", gt=0, le=1)
        check(self, "ema", ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class StoppingConfig:
    """Early stopping by the validation loss.

    Attributes
    ----------
    patience
        Epochs without an improvement after which the training ends; 0: never.
    min_delta
        Minimum decrease of the validation loss that counts as an improvement.
    """

    patience: int = 7
    min_delta: float = 1e-4

    def __post_init__(self) -> None:
        check(self, "patience", "min_delta", ge=0)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run.

    Attributes
    ----------
    output
        The run folder.
    epochs
        Maximum number of passes over the training images; see ``stopping``.
    batch_size
        Crops per step, over all ranks. Null: 8 with a frozen backbone, else 4.
    target
        ``distance``: each pixel's distance to its cell's boundary over the cell's largest. ``flows``: the direction to
        the centre of its cell along rows and columns, and the cell probability (Cellpose's target).
    log_every, image_every
        Steps between metrics; epochs between example images.
    validate_every, score_every
        Epochs between validation losses, and between scores of segmented validation images.
    checkpoint_every
        Epochs between checkpoints.
    """

    output: Path
    data: DataConfig
    seed: int = 0
    epochs: int = 100
    batch_size: int | None = None
    target: TargetName = "distance"
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    log_every: int = 10
    image_every: int = 5
    validate_every: int = 1
    score_every: int = 5
    checkpoint_every: int = 1
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        intervals = ("log_every", "image_every", "validate_every", "score_every", "checkpoint_every")
        check(self, "epochs", "batch_size", *intervals, ge=1)
        check(self, "seed", ge=0)
        only = "loss: foreground_weight and gradient_weight are for target distance; remove them"
        refuse((self.target == "flows" and self.loss != LossConfig(), only))

    @property
    def crops_per_step(self) -> int:
        """The batch size: as set, or 8 with a frozen backbone, else 4."""
        return self.batch_size or (8 if self.model.freeze_backbone else 4)
