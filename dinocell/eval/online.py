"""Probes of a teacher while it is trained: channel consistency, and neighbours on labelled images."""

from collections.abc import Mapping, Sequence

import torch

from dinocell.errors import DinocellError
from dinocell.eval.consistency import channel_consistency
from dinocell.eval.features import FeatureSettings, extract
from dinocell.eval.image_sets import ShardImages, labels_of
from dinocell.eval.knn import knn_scores
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
    """

    def __init__(
        self,
        shards: str,
        *,
        tiles: int,
        crop_size: int,
        knn_train: str | None = None,
        knn_test: str | None = None,
        label: str | None = None,
        neighbours: int = 10,
    ) -> None:
        self._tiles, self._crop, self._neighbours = tiles, crop_size, neighbours
        self._shards = ShardImages(shards)
        self._knn = None
        if knn_train is not None and knn_test is not None and label is not None:
            self._knn = (ShardImages(knn_train), ShardImages(knn_test), label)

    def __call__(self, teacher: VisionTransformer) -> Mapping[str, float]:
        """Return the numbers: ``probe/consistency_margin``, ``probe/retrieval``, ``probe/knn_accuracy``, ..."""
        found: dict[str, float] = {}
        single = teacher.config.in_channels == 1
        settings = FeatureSettings(channels="each" if single else "stack", crop_size=self._crop)
        if single:
            seen = extract(teacher, self._shards, settings, limit=self._tiles).tensor()
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
        train, test = (extract(teacher, each, settings) for each in (train_set, test_set))
        known = labels_of(train.labels, label, train_set.name)
        wanted = labels_of(test.labels, label, test_set.name)
        numbers = _numbers(known, wanted)
        if self._neighbours > len(known):
            raise DinocellError(f"watch.neighbours: {self._neighbours}, but {train_set.name} has {len(known)} samples")
        rows = [each.tensor().mean(1) if each.values.ndim == 3 else each.tensor() for each in (train, test)]
        labels = torch.tensor([numbers[each] for each in known])
        votes = knn_scores(rows[0], labels, rows[1], ks=[self._neighbours], num_classes=len(numbers))
        right = votes[self._neighbours].argmax(1) == torch.tensor([numbers[each] for each in wanted])
        return float(right.float().mean())


def _numbers(*names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted({each for some in names for each in some}))}
