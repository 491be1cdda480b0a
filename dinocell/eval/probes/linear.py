"""Linear probes: all learning rates and weight decays of a grid are trained at once on extracted features.

The protocol of DINOv2 and Cell-DINO: weights N(0, 0.01), biases 0, AdamW, learning rates times batch / 256, cosine
decay to 0. All classifiers use the same batches, so one matrix product serves all of them.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from dinocell.errors import ConfigError, DinocellError, require
from dinocell.eval.probes.classification import Metric
from dinocell.runtime.files import replacing

# Cell-DINO's grid.
LEARNING_RATES = (
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0,
)  # fmt: skip
WEIGHT_DECAYS = (0.0, 1e-5, 1e-4)
Loss = Literal["cross_entropy", "binary_cross_entropy"]
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """Training settings of linear classifiers.

    Attributes
    ----------
    epochs, epoch_steps
        Number of epochs, and batches per epoch; ``epoch_steps`` None: one pass over the features.
    validation_share
        Share of the training images on which the classifier is selected; they are not used for training.
    """

    loss: Loss = "cross_entropy"
    learning_rates: tuple[float, ...] = LEARNING_RATES
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS
    epochs: int = 30
    epoch_steps: int | None = 145
    batch_size: int = 64
    validation_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        rates, decays = self.learning_rates, self.weight_decays
        counts = (self.epochs, self.batch_size, 1 if self.epoch_steps is None else self.epoch_steps)
        share = self.validation_share
        for is_valid, option, expected, values in (
            (rates and all(0 < rate < math.inf for rate in rates), "--learning-rates", "numbers above 0", rates),
            (decays and all(0 <= x < math.inf for x in decays), "--weight-decays", "numbers of at least 0", decays),
            (min(counts) >= 1, "--epochs, --train-batch-size, --epoch-steps", "at least 1", counts),
            (0 < share < 1, "--validation-share", "a share between 0 and 1", (share,)),
        ):
            got = ", ".join(f"{value:g}" for value in values) or "none"
            require(is_valid, f"{option}: expected {expected}, got {got}", ConfigError)

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each classifier."""
        return [(rate, decay) for rate in self.learning_rates for decay in self.weight_decays]


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifiers:
    """A grid of linear classifiers: weights (g c d), biases (g c)."""

    weight: Float[Tensor, "g c d"]
    bias: Float[Tensor, "g c"]

    def scores(self, features: Shaped[Tensor, "n d"], *, which: int, chunk: int = 16384) -> Float[Tensor, "n c"]:
        """Return the logits of one classifier."""
        parts = [F.linear(part.float(), self.weight[which], self.bias[which]) for part in features.split(chunk)]
        return torch.cat(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """One linear classifier, its classes, and the properties of the features that it requires."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]
    classes: tuple[str, ...]
    task: str
    features: dict[str, object]

    def scores(self, features: Shaped[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Return the logits.

        A DinocellError if the features are not as wide as the classifier.
        """
        width, got = self.weight.shape[1], features.shape[1]
        problem = f"the classifier takes features of {width} numbers, these have {got}"
        require(got == width, f"{problem}: another backbone, or other --n-last-blocks, --avgpool, --channels")
        return F.linear(features.float(), self.weight, self.bias)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save

        said = {"classes": json.dumps(self.classes), "task": self.task, "features": json.dumps(self.features)}
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, metadata=said))

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """Read what `save` wrote; raise a DinocellError if the file is something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                said = file.metadata() or {}
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            return cls(
                weight=weight,
                bias=bias,
                classes=tuple(json.loads(said["classes"])),
                task=said["task"],
                features=json.loads(said["features"]),
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DinocellError(f"{path}: is no classifier of 'dinocell linear' ({error})") from error


def split_off(count: int, share: float, *, seed: int) -> tuple[Int[Tensor, " t"], Int[Tensor, " v"]]:
    """Return the indices of the images for training and for selection; at least one of each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(share * count)), count - 1)
    if count < 2:
        raise DinocellError(f"expected at least 2 labelled training images, got {count}")
    return order[held:].sort().values, order[:held].sort().values


def train_grid(
    features: Shaped[Tensor, "all d"],
    labels: Int[Tensor, " n"] | Float[Tensor, "n c"],
    settings: LinearSettings,
    *,
    num_classes: int,
    rows: Int[Tensor, " n"] | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Classifiers:
    """Train every classifier of the grid.

    A ConfigError if the loss does not fit the labels.

    Parameters
    ----------
    features
        Of any type, in memory or mapped from a file, of which one batch is read at a time.
    labels
        Class indices for cross entropy; rows of zeros and ones for binary cross entropy.
    rows
        Indices of the features that the labels belong to; None: all of them.
    progress
        Called with the number of completed steps and their total.
    """
    if (settings.loss == "cross_entropy") != (labels.ndim == 1):
        kind = "class labels" if labels.ndim == 1 else "multi-label rows"
        raise ConfigError(f"--loss: {settings.loss} is not for {kind}")
    device = device or features.device
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.arange(len(features)) if rows is None else rows
    grid, count, width = settings.grid, len(rows), features.shape[1]
    scale = settings.batch_size / 256
    rates = torch.tensor([rate * scale for rate, _ in grid], device=device)
    decays = torch.tensor([decay for _, decay in grid], device=device)
    # Weights over their own learning rates. Adam's step does not depend on the size of the gradient, so that of the
    # true weights moves these at a rate of 1, all classifiers alike: one fused step does for the whole grid.
    one = torch.randn(num_classes, width, generator=generator).to(device) * 0.01
    weight = nn.Parameter(one / rates[:, None, None])
    bias = nn.Parameter(torch.zeros(len(grid), num_classes, device=device))
    optimizer = torch.optim.AdamW([weight, bias], betas=_BETAS, eps=_EPS, weight_decay=0.0, fused=True)
    per_epoch = settings.epoch_steps or max(1, count // settings.batch_size)
    steps = settings.epochs * per_epoch
    batches = _batches(rows, labels, min(settings.batch_size, count), generator)
    decaying, decays = bool(decays.any()), rates * decays
    for step in range(steps):
        which, targets = next(batches)
        batch, targets = features[which].to(device).float(), targets.to(device)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            logits = F.linear(batch, weight.flatten(0, 1), bias.flatten()).unflatten(1, (len(grid), num_classes))
            # In the sum of the mean losses, the gradient of each classifier is that of its own loss.
            residual = _residual(logits.mul_(rates[:, None]), targets).flatten(1)
            weight.grad = (residual.T @ batch).unflatten(0, (len(grid), num_classes))
            bias.grad = residual.sum(0).unflatten(0, (len(grid), num_classes))
            if decaying:
                shrink = 1 - cosine * decays
                weight.mul_(shrink[:, None, None])
                bias.mul_(shrink[:, None])
        optimizer.param_groups[0]["lr"] = cosine
        optimizer.step()
        progress(step + 1, steps)
    return Classifiers(weight=weight.detach() * rates[:, None, None], bias=bias.detach() * rates[:, None])


def _residual(logits: Float[Tensor, "b g c"], labels: Tensor) -> Float[Tensor, "b g c"]:
    """Return the gradient of the mean loss of each classifier by its logits."""
    if labels.ndim == 1:
        probabilities = logits.softmax(-1)
        probabilities[torch.arange(len(labels)), :, labels] -= 1
        return probabilities.div_(len(labels))
    # Also the mean over classes, as in torch's binary cross-entropy.
    return (logits.sigmoid() - labels[:, None]).div_(labels.numel())


def _batches(
    rows: Int[Tensor, " n"], labels: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows and labels endlessly: each image once per pass, without the last incomplete batch of a pass."""
    while True:
        order = torch.randperm(len(rows), generator=generator)
        rows_now, labels_now = rows[order], labels[order]
        for start in range(0, len(rows) - size + 1, size):
            yield rows_now[start : start + size], labels_now[start : start + size]


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The selected classifier of a grid, and the scores."""

    which: int
    learning_rate: float
    weight_decay: float
    chosen_by: float
    all_scores: tuple[float, ...]


def choose(
    classifiers: Classifiers,
    features: Shaped[Tensor, "n d"],
    labels: Tensor,
    settings: LinearSettings,
    metric: Metric,
) -> Choice:
    """Select the classifier with the best score on some images; ties are broken by index."""
    values = [metric(classifiers.scores(features, which=which), labels).value for which in range(len(settings.grid))]
    best = int(np.nan_to_num(values, nan=-np.inf).argmax())
    rate, decay = settings.grid[best]
    return Choice(which=best, learning_rate=rate, weight_decay=decay, chosen_by=values[best], all_scores=tuple(values))
