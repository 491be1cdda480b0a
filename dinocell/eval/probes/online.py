"""Probes of the teacher during training: channel consistency, kNN, and the patch probe on labelled images."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import require
from dinocell.eval.probes.consistency import channel_consistency
from dinocell.eval.probes.features import FeatureSettings, feature_rows
from dinocell.eval.probes.image_sets import ProbeImage, ShardImages, labels_of
from dinocell.eval.probes.knn import knn_scores
from dinocell.eval.probes.patch import labelled_r2
from dinocell.labelled.dataset import open_labelled
from dinocell.models.vit import VisionTransformer


class OnlineProbe:
    """Evaluate a teacher on shard sets; call the object with the teacher.

    Tiles that lack a channel of their set are skipped. Before training starts, a DinocellError if a set is missing, has
    no such label, fewer samples than neighbours, too few images, or no tile with all of its channels.

    Parameters
    ----------
    shards
        Shard set of which the first ``tiles`` tiles are used for channel consistency; it requires a model of one
        channel, and tiles of two or more.
    knn_train, knn_test, label
        Labelled sets: samples of the second are classified by the ``neighbours`` nearest of the first, by ``label``.
        For a model of one channel, the feature of a sample is the mean over its channels.
    patch_set, patch_labelled
        Labelled set of the patch probe, for a model of one channel, and its number of images for the fit; the others
        are the test images.
    crop_size
        Size of the central crop of a tile, in pixels; smaller tiles are padded.
    in_channels
        Number of input channels of the teacher.
    cache, cache_gb
        For remote sets, as in the training.
    """

    def __init__(
        self,
        shards: str,
        *,
        tiles: int,
        crop_size: int,
        in_channels: int = 1,
        knn_train: str | None = None,
        knn_test: str | None = None,
        label: str | None = None,
        neighbours: int = 10,
        patch_set: Path | None = None,
        patch_labelled: int = 4,
        cache: str | Path | None = None,
        cache_gb: float = 50.0,
    ) -> None:
        self._tiles, self._crop, self._neighbours = tiles, crop_size, neighbours
        open_images = partial(ShardImages, cache=cache, cache_gb=cache_gb)
        self._shards = open_images(shards)
        if in_channels == 1:
            _check_complete(self._shards, tiles)
        self._knn = None
        if knn_train is not None and knn_test is not None and label is not None:
            train, test = open_images(knn_train), open_images(knn_test)
            for images in (train, test):
                labels_of([image.labels for image in images.images(0, 1)], label, images.name)
                _check_complete(images, len(images))
            got = f"{neighbours}, but {knn_train} has {len(train)} samples"
            require(neighbours <= len(train), f"online_eval.neighbours: {got}")
            self._knn = (train, test, label)
        self._patch_set, self._patch_labelled = None if patch_set is None else open_labelled(patch_set), patch_labelled
        num_images = len(self._patch_set or ())
        require(
            self._patch_set is None or num_images > patch_labelled,
            f"online_eval.patch_labelled: expected fewer than the {num_images} images of {patch_set}, got "
            f"{patch_labelled}; the others are the test images",
        )

    def __call__(self, teacher: VisionTransformer) -> Mapping[str, float]:
        """Return the metrics: ``probe/consistency_margin``, ``probe/retrieval``, ``probe/knn_accuracy``, ..."""
        metrics: dict[str, float] = {}
        single = teacher.config.in_channels == 1
        settings = FeatureSettings(channels="each" if single else "stack", crop_size=self._crop)
        if single:
            features, _ = _features(teacher, self._shards, settings, self._tiles)
            if features.shape[0] >= 2 and features.shape[1] >= 2:
                consistency = channel_consistency(features)
                metrics["probe/consistency_margin"] = consistency.margin
                metrics["probe/consistency_same"] = consistency.same_field
                metrics["probe/consistency_different"] = consistency.different_field
                metrics["probe/retrieval"] = consistency.retrieval
        if self._knn is not None:
            metrics["probe/knn_accuracy"] = self._accuracy(teacher, settings)
        if self._patch_set is not None:
            fit, test = range(self._patch_labelled), range(self._patch_labelled, len(self._patch_set))
            metrics["probe/patch_r2"] = labelled_r2(teacher, self._patch_set.__getitem__, fit, test)
        return metrics

    def _accuracy(self, teacher: VisionTransformer, settings: FeatureSettings) -> float:
        assert self._knn is not None
        train_set, test_set, label = self._knn
        (train, train_labels), (test, test_labels) = (_features(teacher, s, settings) for s in (train_set, test_set))
        if train.ndim == 3:
            train, test = train.mean(1), test.mean(1)
        train_classes = labels_of(train_labels, label, train_set.name)
        test_classes = labels_of(test_labels, label, test_set.name)
        index = {name: position for position, name in enumerate(sorted({*train_classes, *test_classes}))}
        targets, expected = (torch.tensor([index[name] for name in names]) for names in (train_classes, test_classes))
        k = min(self._neighbours, len(train))  # incomplete tiles are skipped
        scores = knn_scores(train, targets, test, ks=[k], num_classes=len(index))
        return float((scores[k].argmax(1) == expected).float().mean())


def _features(
    teacher: VisionTransformer, images: ShardImages, settings: FeatureSettings, limit: int | None = None
) -> tuple[Tensor, list[Mapping[str, LabelValue]]]:
    """Return the features and labels of the tiles that have every channel of their set."""
    tiles = _complete_tiles(images, len(images) if limit is None else limit)
    rows = [(row, image.labels) for image, row in feature_rows(teacher, tiles, settings) if row is not None]
    return torch.from_numpy(np.stack([row for row, _ in rows])), [labels for _, labels in rows]


def _complete_tiles(images: ShardImages, limit: int) -> Iterator[ProbeImage]:
    """Return the tiles among the first ``limit`` that have every channel of their set."""
    return (image for image in images.images(0, min(limit, len(images))) if image.channel_names == images.channel_names)


def _check_complete(images: ShardImages, limit: int) -> None:
    is_complete = next(_complete_tiles(images, limit), None) is not None
    problem = f"none of the first {limit} tiles has all of the channels {', '.join(images.channel_names)}"
    require(is_complete, f"{images.name}: {problem}; set online_eval.every=0, or put another set first")
