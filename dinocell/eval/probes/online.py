"""Probes of a teacher while it is trained: channel consistency, and neighbours on labelled images."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import DinocellError
from dinocell.eval.probes.consistency import channel_consistency
from dinocell.eval.probes.features import FeatureSettings, feature_rows
from dinocell.eval.probes.image_sets import ProbeImage, ShardImages, labels_of
from dinocell.eval.probes.knn import knn_scores
from dinocell.models.vit import VisionTransformer


class OnlineProbe:
    """Measures a teacher on shard sets; call it with the teacher.

    Parameters
    ----------
    shards
        Whose first ``tiles`` tiles are seen through every channel alone; channel consistency needs a model of one
        channel, and tiles of two or more.
    knn_train, knn_test, label
        Labelled sets: the ``neighbours`` nearest of the first name the samples of the second by ``label``. Each sample
        is the mean feature of its channels, for a model of one channel.
    crop_size
        Of the middle of a tile; smaller tiles are padded.
    in_channels
        Of the teacher's images.
    cache, cache_gb
        For remote sets, as the training's.

    Tiles that lack a channel of their set are left out.

    Raises
    ------
    DinocellError
        If a set is missing, has no such label, fewer samples than neighbours, or no tile with all of its channels:
        before a training begins.
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
        cache: str | Path | None = None,
        cache_gb: float = 50.0,
    ) -> None:
        self._tiles, self._crop, self._neighbours = tiles, crop_size, neighbours
        opened = partial(ShardImages, cache=cache, cache_gb=cache_gb)
        self._shards = opened(shards)
        if in_channels == 1:
            _check_whole(self._shards, tiles)
        self._knn = None
        if knn_train is not None and knn_test is not None and label is not None:
            train, test = opened(knn_train), opened(knn_test)
            for each in (train, test):
                labels_of([image.labels for image in each.images(0, 1)], label, each.name)
                _check_whole(each, len(each))
            if neighbours > len(train):
                raise DinocellError(f"online_eval.neighbours: {neighbours}, but {knn_train} has {len(train)} samples")
            self._knn = (train, test, label)

    def __call__(self, teacher: VisionTransformer) -> Mapping[str, float]:
        """Return the numbers: ``probe/consistency_margin``, ``probe/retrieval``, ``probe/knn_accuracy``, ..."""
        found: dict[str, float] = {}
        single = teacher.config.in_channels == 1
        settings = FeatureSettings(channels="each" if single else "stack", crop_size=self._crop)
        if single:
            seen, _ = _features(teacher, self._shards, settings, self._tiles)
            if seen.shape[0] >= 2 and seen.shape[1] >= 2:
                consistency = channel_consistency(seen)
                found["probe/consistency_margin"] = consistency.margin
                found["probe/consistency_same"] = consistency.same_field
                found["probe/consistency_different"] = consistency.different_field
                found["probe/retrieval"] = consistency.retrieval
        if self._knn is not None:
            found["probe/knn_accuracy"] = self._accuracy(teacher, settings)
        return found

    def _accuracy(self, teacher: VisionTransformer, settings: FeatureSettings) -> float:
        assert self._knn is not None
        train_set, test_set, label = self._knn
        (train, known), (test, wanted) = (_features(teacher, each, settings) for each in (train_set, test_set))
        if train.ndim == 3:
            train, test = train.mean(1), test.mean(1)
        names = [labels_of(rows, label, each.name) for rows, each in ((known, train_set), (wanted, test_set))]
        numbers = _numbers(*names)
        labels, asked = (torch.tensor([numbers[each] for each in some]) for some in names)
        k = min(self._neighbours, len(train))  # incomplete tiles were left out
        votes = knn_scores(train, labels, test, ks=[k], num_classes=len(numbers))
        return float((votes[k].argmax(1) == asked).float().mean())


def _features(
    teacher: VisionTransformer, images: ShardImages, settings: FeatureSettings, limit: int | None = None
) -> tuple[Tensor, list[Mapping[str, LabelValue]]]:
    """Return the features and labels of the tiles that have every channel of their set."""
    whole = _whole(images, len(images) if limit is None else limit)
    found = [
        (torch.from_numpy(row), image.labels)
        for image, row in feature_rows(teacher, whole, settings)
        if row is not None
    ]
    return torch.stack([row for row, _ in found]), [labels for _, labels in found]


def _whole(images: ShardImages, limit: int) -> Iterator[ProbeImage]:
    """Return those of the first tiles that have every channel of their set."""
    return (image for image in images.images(0, min(limit, len(images))) if image.channel_names == images.channel_names)


def _check_whole(images: ShardImages, limit: int) -> None:
    if next(_whole(images, limit), None) is None:
        names = ", ".join(images.channel_names)
        raise DinocellError(
            f"{images.name}: none of the first {limit} tiles has all of the channels {names}: nothing to evaluate; set "
            "online_eval.every=0, or another set first"
        )


def _numbers(*names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted({each for some in names for each in some}))}
