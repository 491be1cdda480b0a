"""How much do frozen patch tokens say about cells? Ridge regression onto the patch means of the distance map.

Patch tokens are what a segmenter's decoder reads, and the distance map is what it learns to predict. So the R2 of a
linear readout, fitted on a few labelled images, says cheaply whether features help a segmenter; it needs no training.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dinocell.errors import require
from dinocell.images.image import as_image
from dinocell.labelled.dataset import LabelledImage
from dinocell.labelled.distance import labels_to_distance
from dinocell.models.vit import VisionTransformer

Readout = Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]]
"""A linear map of features to one number each, in float64."""


def fit_ridge(features: Float[Tensor, "n d"], targets: Float[Tensor, " n"], *, penalty: float = 1e-3) -> Readout:
    """Fit targets by ridge regression on features of unit variance; the bias is not penalised.

    Minimises ``mean((targets - prediction) ** 2) + penalty * sum(weight ** 2)``, the weights those of features divided
    by their standard deviation: neither the scale of the features nor the number of rows changes what the penalty does.
    A ValueError if there are no rows, or the penalty is not positive.
    """
    require(len(features), "expected features and targets, got no rows")
    require(penalty > 0, f"penalty: expected more than 0, got {penalty}")
    rows, expected = features.double(), targets.double()
    mean, mean_target = rows.mean(0), expected.mean()
    std = rows.std(0, correction=0).clamp_min(1e-12)
    scaled = (rows - mean) / std
    gram = scaled.T @ scaled / len(rows)
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, scaled.T @ (expected - mean_target) / len(rows)) / std
    return lambda features: (features.double() - mean) @ weight + mean_target


def r2(predicted: Float[Tensor, " n"], targets: Float[Tensor, " n"]) -> float:
    """Return the share of the targets' variance that is predicted: 1 is all of it, 0 no more than their mean."""
    expected = targets.double()
    return float(1 - (predicted.double() - expected).square().sum() / (expected - expected.mean()).square().sum())


def patch_means(image: Float[Tensor, "h w"], patch_size: int) -> Float[Tensor, "rows columns"]:
    """Return the mean of each patch; what is left over at the lower and right border is not used."""
    rows, columns = image.shape[0] // patch_size, image.shape[1] // patch_size
    whole = image[: rows * patch_size, : columns * patch_size]
    means: Tensor = whole.unflatten(0, (rows, patch_size)).unflatten(2, (columns, patch_size)).mean((1, 3))
    return means


def cut_crops(image: Float[Tensor, "h w"], size: int) -> Float[Tensor, "n s s"]:
    """Return the crops of a grid, row by row; what is left over at the lower and right border is not used."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    whole = image[: rows * size, : columns * size]
    crops: Tensor = whole.unflatten(0, (rows, size)).unflatten(2, (columns, size)).transpose(1, 2).flatten(0, 1)
    return crops


@torch.no_grad()
def patch_features(
    backbone: VisionTransformer, image: Float[Tensor, "h w"], *, crop_px: int = 64, batch_size: int = 64
) -> Float[Tensor, "n d"]:
    """Return the patch tokens of a standardised image's crops, crop after crop, patches row by row."""
    crops = cut_crops(image, crop_px)[:, None]
    return torch.cat([backbone(batch).patches.flatten(0, 1) for batch in crops.split(batch_size)])


def patch_targets(distance: Float[Tensor, "h w"], *, patch_size: int, crop_px: int = 64) -> Float[Tensor, " n"]:
    """Return the patch means of a distance map, in the order of `patch_features`."""
    return torch.cat([patch_means(crop, patch_size).flatten() for crop in cut_crops(distance, crop_px)])


def probe_r2(
    features_of: Callable[[int], Float[Tensor, "n d"]],
    targets_of: Callable[[int], Float[Tensor, " n"]],
    labelled: Sequence[int],
    unseen: Sequence[int],
    *,
    penalty: float = 1e-3,
) -> float:
    """Fit a readout on the labelled images and return its R2 over all patches of the unseen ones.

    ``features_of`` and ``targets_of`` return the features and targets of an image by its number.
    """
    readout = fit_ridge(
        torch.cat([features_of(number) for number in labelled]),
        torch.cat([targets_of(number) for number in labelled]),
        penalty=penalty,
    )
    predicted = torch.cat([readout(features_of(number)) for number in unseen])
    return r2(predicted, torch.cat([targets_of(number) for number in unseen]))


def labelled_r2(
    backbone: VisionTransformer,
    image_of: Callable[[int], LabelledImage],
    labelled: Sequence[int],
    unseen: Sequence[int],
    *,
    penalty: float = 0.01,
) -> float:
    """Return `probe_r2` of a backbone of one channel, on images (by number) that are standardised one by one.

    Crops have 64 px, less for smaller images, rounded down to whole patches.
    """
    patch_size, device = backbone.config.patch_size, next(backbone.parameters()).device

    def crop_px(image: LabelledImage) -> int:
        return int(min(64, *image.labels.shape)) // patch_size * patch_size

    def features_of(number: int) -> Float[Tensor, "n d"]:
        image = image_of(number)
        plane = torch.from_numpy(as_image(np.asarray(image.pixels)).plane().astype(np.float32)).to(device)
        plane = (plane - plane.mean()) / plane.std().clamp_min(1e-6)
        return patch_features(backbone, plane, crop_px=crop_px(image)).cpu()

    def targets_of(number: int) -> Float[Tensor, " n"]:
        image = image_of(number)
        distance = labels_to_distance(np.asarray(image.labels)) if image.distance is None else image.distance
        return patch_targets(torch.from_numpy(np.array(distance)), patch_size=patch_size, crop_px=crop_px(image))

    return probe_r2(features_of, targets_of, labelled, unseen, penalty=penalty)
