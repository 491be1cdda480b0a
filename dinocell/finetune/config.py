"""Schema of a fine-tuning recipe."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dinocell.finetune.targets import TargetName
from dinocell.models.config import VARIANTS
from dinocell.runtime.device import Precision

# Former keys that are still read under their old name, and former keys with the one value that is still accepted.
RENAMED_KEYS: dict[str, str] = {
    "augment.inversion": "augment.invert_contrast",
    "picture_every": "image_every",
    "optim.max_bad_steps": "optim.max_nonfinite_steps",
}
REMOVED_KEYS: dict[str, Any] = {"data.fixed_crops": None}


def _check(section: object, is_valid: Callable[[Any], bool], expected: str, *names: str) -> None:
    """Raise if one of the named fields has a value out of range; None is always valid."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not is_valid(value):
            raise ValueError(f"{name}: expected {expected}, got {list(value) if isinstance(value, tuple) else value}")


def _at_least(section: object, minimum: int, *names: str) -> None:
    _check(section, lambda value: value >= minimum, f"at least {minimum}", *names)


def _positive(section: object, *names: str) -> None:
    _check(section, lambda value: value > 0, "more than 0", *names)


def _refuse(conflicts: dict[str, bool]) -> None:
    """Raise with the first message whose condition holds."""
    for message, is_wrong in conflicts.items():
        if is_wrong:
            raise ValueError(message)


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
        _refuse(
            {
                "set either sets, or images and masks": bool(self.sets) == bool(self.images),
                "images and masks: set both; one of them is missing": bool(self.images) != bool(self.masks),
                f"weights: expected one per set, {len(self.sets)}": self.weights is not None
                and len(self.weights) != len(self.sets),
            },
        )
        _check(self, lambda share: 0 < share < 1, "more than 0 and less than 1", "validation_share")
        _check(self, lambda weights: all(weight > 0 for weight in weights), "more than 0 for each set", "weights")
        _at_least(self, 1, "crops_per_image")


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
        _check(self, lambda size: size in VARIANTS, f"one of {', '.join(VARIANTS)}", "size")
        _at_least(self, 1, "patch_size")
        own = "segmenter: it has its own backbone and blocks; remove weights and blocks"
        _refuse(
            {
                "pretrained=false means random weights: remove weights, or pretrained=false": self.weights is not None
                and not self.pretrained,
                own: self.segmenter is not None and (self.weights is not None or self.blocks is not None),
            },
        )
        depth = VARIANTS[self.size].depth
        _check(
            self,
            lambda blocks: sorted({*blocks}) == list(blocks) and 0 <= blocks[0] <= blocks[-1] < depth,
            f"four ascending numbers from 0 to {depth - 1} for size {self.size}",
            "blocks",
        )


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
        _at_least(self, 16, "crop")
        _check(
            self, lambda value: 0 <= value <= 1, "a probability from 0 to 1", "flip", "invert_contrast", "with_cells"
        )
        _check(self, lambda value: 0 <= value <= 180, "0 to 180", "rotation_deg")
        _check(self, lambda value: 0 <= value <= 10, "0 to 10 pixels", "blur_px")
        _check(self, lambda value: 0 <= value <= 1, "a fraction of the grey range from 0 to 1", "noise")
        _check(self, lambda ends: 0 < ends[0] <= ends[1], "0 < minimum <= maximum", "scale", "brightness")


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
        _at_least(self, 0, "foreground_weight", "gradient_weight")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (SAMCell's values) with linear warm-up and cosine decay to 0.

    Attributes
    ----------
    learning_rate, backbone_learning_rate
        Peak values; the second is used only if the backbone is not frozen.
    layer_decay
        Factor on the learning rate from each block of the backbone to the one below.
    warmup_steps
        Steps of the warm-up, at most a tenth of the run.
    clip
        Maximum gradient norm of backbone and decoder each.
    ema
        Decay of the moving average of the weights, which is used for validation and in the files; 0: no average.
    max_nonfinite_steps
        Stop after so many consecutive steps with a non-finite loss or gradient. Such steps change no weight.
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
        _positive(self, "learning_rate", "clip")
        _at_least(self, 0, "backbone_learning_rate", "weight_decay", "warmup_steps")
        _at_least(self, 1, "max_nonfinite_steps")
        _check(self, lambda betas: all(0 <= beta < 1 for beta in betas), "two numbers from 0 to less than 1", "betas")
        _check(self, lambda value: 0 < value <= 1, "more than 0, up to 1", "layer_decay")
        _check(self, lambda value: 0 <= value < 1, "0 to less than 1", "ema")


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
        _at_least(self, 0, "patience", "min_delta")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Settings that do not change the result, except for rounding.

    Attributes
    ----------
    device
        ``auto``: CUDA if available.
    dtype
        Of matrix products; ``auto``: bfloat16 on GPUs that support it (Ampere and later), float32 elsewhere.
    workers
        Processes that load and augment.
    timeout_s
        How long a rank waits for another.
    """

    device: str = "auto"
    dtype: Precision = "auto"
    workers: int = 2
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        _at_least(self, 0, "workers")
        _positive(self, "timeout_s")


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
        _at_least(self, 1, "epochs", "batch_size", *intervals)
        _at_least(self, 0, "seed")
        if self.target == "flows" and self.loss != LossConfig():
            raise ValueError("loss: foreground_weight and gradient_weight are for target distance; remove them")

    @property
    def crops_per_step(self) -> int:
        """The batch size: as set, or 8 with a frozen backbone, else 4."""
        return self.batch_size or (8 if self.model.freeze_backbone else 4)
