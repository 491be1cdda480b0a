"""A grid of linear classifiers at once is each of them alone, trained by torch; chosen where it was said."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinocell.errors import ConfigError, DinocellError
from dinocell.eval.probes.classification import accuracy, multilabel_f1
from dinocell.eval.probes.linear import Classifier, LinearSettings, choose, split_off, train_grid


def blobs(count: int = 200, classes: int = 3, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_the_grid_equals_torch_one_by_one(loss: str) -> None:
    features, labels = blobs()
    targets = labels if loss == "cross_entropy" else F.one_hot(labels, 3).float()
    settings = LinearSettings(
        loss=loss,  # type: ignore[arg-type]
        learning_rates=(1e-3, 0.1),
        weight_decays=(0.0, 1e-2),
        epochs=2,
        epoch_steps=7,
        batch_size=32,
    )
    found = train_grid(features, targets, settings, num_classes=3)
    for which, (rate, decay) in enumerate(settings.grid):
        generator = torch.Generator().manual_seed(0)
        layer = torch.nn.Linear(8, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(3, 8, generator=generator) * 0.01)
            layer.bias.zero_()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=rate * 32 / 256, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 14)
        orders = iter(lambda generator=generator: torch.randperm(200, generator=generator), None)
        batches = [part for order in (next(orders) for _ in range(3)) for part in order.split(32)[:6]]
        for batch in batches[:14]:
            logits = layer(features[batch])
            if loss == "cross_entropy":
                value = F.cross_entropy(logits, targets[batch])
            else:
                value = F.binary_cross_entropy_with_logits(logits, targets[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(found.weight[which], layer.weight.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.bias[which], layer.bias.detach(), rtol=1e-3, atol=1e-5)


def test_features_of_a_file_are_read_a_batch_at_a_time_and_rows_are_chosen(tmp_path: Path) -> None:
    features, labels = blobs()
    np.save(tmp_path / "f.npy", features.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "f.npy", mmap_mode="c"))
    rows = torch.arange(3, 200, 2)
    settings = LinearSettings(learning_rates=(0.1,), weight_decays=(0.0,), epochs=1, epoch_steps=5)
    wanted = train_grid(features[rows], labels[rows], settings, num_classes=3)
    found = train_grid(mapped, labels[rows], settings, num_classes=3, rows=rows)
    assert torch.equal(found.weight, wanted.weight)
    half = train_grid(features.half(), labels, settings, num_classes=3)
    assert half.weight.dtype == torch.float32


def test_it_learns_and_the_best_of_the_held_out_images_is_taken() -> None:
    features, labels = blobs(600)
    settings = LinearSettings(learning_rates=(1e-5, 0.1), weight_decays=(0.0,), epochs=5, epoch_steps=20)
    learn, held = split_off(600, 0.2, seed=3)
    assert len(learn) == 480
    assert not set(learn.tolist()) & set(held.tolist())
    classifiers = train_grid(features[learn], labels[learn], settings, num_classes=3)
    choice = choose(classifiers, features[held], labels[held], settings, accuracy)
    assert choice.learning_rate == 0.1
    assert choice.chosen_by > 0.9
    assert choice.all_scores[0] < choice.all_scores[1]


def test_a_saved_classifier_says_the_same(tmp_path: Path) -> None:
    features, labels = blobs()
    settings = LinearSettings(learning_rates=(0.1,), weight_decays=(0.0,), epochs=1, epoch_steps=5)
    grid = train_grid(features, labels, settings, num_classes=3)
    saved = Classifier(
        weight=grid.weight[0], bias=grid.bias[0], classes=("a", "b", "ü"), task="class", features={"n": 1}
    )
    saved.save(tmp_path / "c.safetensors")
    loaded = Classifier.load(tmp_path / "c.safetensors")
    assert loaded.classes == ("a", "b", "ü")
    assert torch.equal(loaded.scores(features), grid.scores(features, which=0))
    with pytest.raises(DinocellError, match="takes features of 8 numbers, these have 9"):
        loaded.scores(torch.zeros(1, 9))
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(DinocellError, match="is no classifier"):
        Classifier.load(tmp_path / "no.safetensors")


def test_what_cannot_be_is_refused() -> None:
    features, labels = blobs(20)
    with pytest.raises(ConfigError, match="cross_entropy is not for multi-label rows"):
        train_grid(features, F.one_hot(labels, 3).float(), LinearSettings(), num_classes=3)
    with pytest.raises(ConfigError, match="--validation-share"):
        LinearSettings(validation_share=1.0)
    with pytest.raises(DinocellError, match="at least 2 labelled"):
        split_off(1, 0.1, seed=0)
    assert multilabel_f1(torch.zeros(0, 2), torch.zeros(0, 2)).value == 0.0
