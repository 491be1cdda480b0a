"""The patch probe: ridge regression of patch tokens onto the distance map."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from dinocell.eval.probes.patch import (
    fit_ridge,
    labelled_r2,
    patch_features,
    patch_means,
    patch_targets,
    probe_r2,
    r2,
)
from dinocell.labelled.dataset import LabelledImage, open_labelled
from dinocell.labelled.distance import labels_to_distance
from dinocell.models.config import ViTConfig
from dinocell.models.vit import VisionTransformer, variant_config


@pytest.mark.parametrize("penalty", [1e-4, 0.1, 3.0])
def test_ridge_equals_scikit_learn(penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 7, generator=generator) * torch.logspace(-2, 2, 7) + 5
    targets = features @ torch.randn(7, generator=generator) + torch.randn(200, generator=generator)
    test = torch.randn(50, 7, generator=generator) * torch.logspace(-2, 2, 7) + 5
    std = features.double().std(0, correction=0)
    # scikit-learn's penalty is on the sum of squares, ours on their mean.
    oracle = Ridge(alpha=penalty * len(features)).fit((features.double() / std).numpy(), targets.double().numpy())
    expected = oracle.predict((test.double() / std).numpy())
    predicted = fit_ridge(features, targets, penalty=penalty)(test)
    torch.testing.assert_close(predicted, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
    wanted = torch.randn(50, generator=generator)
    assert r2(predicted, wanted) == pytest.approx(r2_score(wanted.double().numpy(), expected))


def test_neither_scale_nor_repetition_of_the_rows_changes_the_readout() -> None:
    generator = torch.Generator().manual_seed(1)
    features, targets = torch.randn(60, 4, generator=generator), torch.randn(60, generator=generator)
    expected = fit_ridge(features, targets, penalty=0.3)(features)
    scale = torch.tensor([1.0, 10.0, 0.1, 1000.0])
    torch.testing.assert_close(fit_ridge(features * scale, targets, penalty=0.3)(features * scale), expected)
    torch.testing.assert_close(fit_ridge(features.repeat(3, 1), targets.repeat(3), penalty=0.3)(features), expected)


def test_a_constant_feature_is_ignored() -> None:
    generator = torch.Generator().manual_seed(2)
    features, targets = torch.randn(40, 3, generator=generator), torch.randn(40, generator=generator)
    constant = torch.cat((features, torch.ones(40, 1)), 1)
    expected = fit_ridge(features, targets)(features)
    torch.testing.assert_close(fit_ridge(constant, targets)(constant), expected)


def test_the_mean_has_an_r2_of_zero_and_the_targets_of_one() -> None:
    targets = torch.arange(10.0)
    assert r2(targets.mean().expand(10), targets) == pytest.approx(0)
    assert r2(targets, targets) == 1


def test_features_and_targets_are_of_the_same_patches() -> None:
    # A backbone that returns the mean of each patch: then a readout of one feature is exact.
    class PatchMeans(VisionTransformer):
        def forward(self, images, *_arguments, **_options):  # type: ignore[no-untyped-def, override]
            means = torch.stack([patch_means(image[0], 8).flatten() for image in images])[..., None]
            return type("Output", (), {"patches": means})

    image = torch.rand(70, 100, generator=torch.Generator().manual_seed(3))
    backbone = PatchMeans(ViTConfig(width=8, depth=1, heads=1, mlp_hidden=8))
    features = patch_features(backbone, image, crop_px=32, batch_size=4)
    targets = patch_targets(image, patch_size=8, crop_px=32)
    assert len(targets) == 2 * 3 * 16
    torch.testing.assert_close(features[:, 0], targets)
    torch.testing.assert_close(targets[16:32].view(4, 4), patch_means(image[:32, 32:64], 8))


def test_probe_fits_on_labelled_images_and_scores_unseen_ones() -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(4, 50, 5, generator=generator)
    targets = features @ torch.randn(5, generator=generator)
    found = probe_r2(lambda n: features[n], lambda n: targets[n], [0, 1], [2, 3], penalty=1e-9)
    assert found == pytest.approx(1)
    noise = torch.randn(4, 50, generator=generator)
    assert probe_r2(lambda n: features[n], lambda n: noise[n], [0, 1], [2, 3]) < 0.1


def test_a_labelled_set_is_read_standardised_with_or_without_its_distance_maps(labelled_folder: Path) -> None:
    torch.manual_seed(5)
    backbone = VisionTransformer(variant_config("nano", patch_size=8, in_channels=1)).eval()
    images = open_labelled(labelled_folder / "set")
    features, targets = [], []
    for image in (images[number] for number in range(3)):
        grey = torch.from_numpy(np.array(image.pixels[0], np.float32))
        features.append(patch_features(backbone, (grey - grey.mean()) / grey.std()))
        targets.append(patch_targets(torch.from_numpy(labels_to_distance(np.array(image.labels))), patch_size=8))
    expected = probe_r2(features.__getitem__, targets.__getitem__, [0, 1], [2], penalty=0.01)
    assert labelled_r2(backbone, images.__getitem__, range(2), [2]) == pytest.approx(expected, abs=1e-3)

    def without_distance(number: int) -> LabelledImage:
        image = images[number]
        return LabelledImage(**{**vars(image), "distance": None})

    assert labelled_r2(backbone, without_distance, range(2), [2]) == pytest.approx(expected, abs=1e-3)


def test_images_smaller_than_a_crop_are_probed_whole(labelled_folder: Path) -> None:
    backbone = VisionTransformer(variant_config("nano", patch_size=8, in_channels=1)).eval()
    images = open_labelled(labelled_folder / "set")

    def cut(number: int) -> LabelledImage:
        image = images[number]
        parts = {name: getattr(image, name)[..., :30, :40] for name in ("pixels", "labels", "distance")}
        return LabelledImage(**{**vars(image), **parts})

    assert np.isfinite(labelled_r2(backbone, cut, range(3), range(3, 6)))


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="no rows"):
        fit_ridge(torch.zeros(0, 2), torch.zeros(0))
    with pytest.raises(ValueError, match=r"penalty: expected more than 0, got 0\.0"):
        fit_ridge(torch.zeros(3, 2), torch.zeros(3), penalty=0.0)
