"""Labelled sets as a stream of crops: which image comes when, what is made of it, and the loader.

A crop follows from the seed and its number in the run alone: neither the workers nor the number of ranks change it,
and a run that goes on at a step sees what it would have seen.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinocell.finetune.augment import Crop, cut, plain
from dinocell.finetune.config import AugmentConfig
from dinocell.finetune.preprocess import Levels, SegmenterSettings, grey_levels, levels_of
from dinocell.finetune.sets import Chosen, Split
from dinocell.images.image import as_image
from dinocell.labelled.dataset import LabelledImage

# Images that a worker keeps prepared: a small set is prepared once, of a large one little is kept.
_KEPT_IMAGES = 64


class Examples(NamedTuple):
    """Crops ready for the network, and their target maps."""

    images: Float[Tensor, "b 1 s s"]
    targets: Float[Tensor, "b k s s"]


class Crops(Dataset[Examples]):
    """The crops of a run by their number; crop ``n`` is the same whenever and wherever it is made.

    Parameters
    ----------
    weights
        How often each set is to come; None: as often as it has images.
    crops_per_image
        Of the typical image an epoch.
    fixed
        So many crops of each image are drawn, and come again when all have been; None: each crop is a new one.
    """

    def __init__(
        self,
        divided: Split,
        settings: SegmenterSettings,
        augment: AugmentConfig,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        crops_per_image: int | None = None,
        fixed: int | None = None,
    ) -> None:
        self._divided, self._settings, self._augment, self._seed = divided, settings, augment, seed
        self._fixed = fixed
        self._place = {chosen: place for place, chosen in enumerate(divided.training)}
        members: dict[int, list[Chosen]] = {}
        for chosen in divided.training:
            members.setdefault(chosen.data_set, []).append(chosen)
        self._members = list(members.values())
        if crops_per_image is None:
            sides = [divided.sets[c.data_set][c.image].labels.shape for c in divided.training[:16]]
            area = float(np.median([height * width for height, width in sides]))
            crops_per_image = max(1, round(area / augment.crop**2))
        total = crops_per_image * len(divided.training)
        shares = np.array([len(each) for each in self._members] if weights is None else list(weights), float)
        self._quotas = np.maximum(1, np.rint(total * shares / shares.sum())).astype(int)
        self._prepare = lru_cache(maxsize=_KEPT_IMAGES)(self._prepare_anew)

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker starts with nothing prepared; the sets open their files again.
        return {name: value for name, value in vars(self).items() if name != "_prepare"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare = lru_cache(maxsize=_KEPT_IMAGES)(self._prepare_anew)

    @property
    def epoch_length(self) -> int:
        """Crops an epoch."""
        return int(self._quotas.sum())

    def __getitem__(self, number: int) -> Examples:
        image, labels, levels = self._prepare(self.chosen(number))
        generator = np.random.default_rng([self._seed, 1, number if self._fixed is None else self.drawn(number)])
        return example(cut(image, labels, self._augment, generator), levels, self._settings)

    def chosen(self, number: int) -> Chosen:
        """Return the image that a crop is cut from: each comes once before any comes twice."""
        return self._chosen(number)[0]

    def drawn(self, number: int) -> int:
        """Return which of all fixed crops a crop is, from 0 to before `num_drawn`."""
        assert self._fixed is not None
        chosen, turn = self._chosen(number)
        return self._place[chosen] * self._fixed + turn % self._fixed

    @property
    def num_drawn(self) -> int:
        """Number of fixed crops; 0 if every crop is a new one."""
        return (self._fixed or 0) * len(self._divided.training)

    def _chosen(self, number: int) -> tuple[Chosen, int]:
        """Return a crop's image, and how often that has come before."""
        epoch, within = divmod(number, self.epoch_length)
        order = _shuffled(self._seed, 2, epoch, self.epoch_length)
        slot = int(order[within])
        data_set = int(np.searchsorted(np.cumsum(self._quotas), slot, side="right"))
        nth = epoch * int(self._quotas[data_set]) + slot - int(self._quotas[:data_set].sum())
        members = self._members[data_set]
        turn, index = divmod(nth, len(members))
        return members[int(_shuffled(self._seed, 3 + data_set, turn, len(members))[index])], turn

    def _prepare_anew(self, chosen: Chosen) -> tuple[np.ndarray, np.ndarray, Levels]:
        return prepared(self._divided.sets[chosen.data_set][chosen.image], self._settings)


@lru_cache(maxsize=16)
def _shuffled(seed: int, stream: int, turn: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, turn]).permutation(length)


def prepared(image: LabelledImage, settings: SegmenterSettings) -> tuple[np.ndarray, np.ndarray, Levels]:
    """Return equalised grey levels, the cells as int32, and how levels come to the convention.

    Cells keep their ids, or are numbered anew where these exceed the pixels: crops are turned as float32, which holds
    numbers to 16 million exactly.
    """
    grey = grey_levels(as_image(np.asarray(image.pixels)).plane(), settings)
    labels = np.asarray(image.labels)
    if labels.max() > labels.size:
        labels = np.unique(np.append(labels, labels.dtype.type(0)), return_inverse=True)[1][:-1].reshape(labels.shape)
    return grey, np.ascontiguousarray(labels, dtype=np.int32), levels_of(grey, settings)


def example(crop: Crop, levels: Levels, settings: SegmenterSettings) -> Examples:
    """Turn a crop into a network's input and target, without a batch dimension of its own (b = 1)."""
    if crop.inverted and settings.convention == "standardised":
        levels = Levels(255 - levels.zero, levels.unit)
    target = crop.flows() if settings.target == "flows" else crop.distance()[None]
    return Examples(torch.from_numpy(levels.apply(crop.image))[None, None], torch.from_numpy(target)[None])


def loader(
    crops: Crops,
    *,
    first_step: int,
    last_step: int,
    batch_size: int,
    rank: int,
    ranks: int,
    workers: int,
    pin_memory: bool = False,
) -> "DataLoader[Examples]":
    """Return the batches of this rank for the steps from ``first_step`` (counted from 0) to before ``last_step``.

    ``batch_size`` is that of all ranks; a rank takes every ``ranks``-th crop of it.
    """
    steps = range(first_step, last_step)
    numbers = [crops_of_step(step, batch_size=batch_size, rank=rank, ranks=ranks) for step in steps]
    return DataLoader(
        crops,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=joined,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def crops_of_step(step: int, *, batch_size: int, rank: int, ranks: int) -> list[int]:
    """Return the numbers of a rank's crops of a step, counted from 0."""
    return list(range(step * batch_size + rank, (step + 1) * batch_size, ranks))


def joined(examples: Sequence[Examples]) -> Examples:
    """Stack examples to a batch."""
    return Examples(*(torch.cat(parts) for parts in zip(*examples, strict=True)))


def validation_batches(
    images: Sequence[LabelledImage], settings: SegmenterSettings, *, crop: int, batch_size: int
) -> Iterator[Examples]:
    """Yield the crops of whole images, without augmentation, in batches."""
    waiting: list[Examples] = []
    for image in images:
        pixels, labels, levels = prepared(image, settings)
        for each in plain(pixels, labels, crop):
            waiting.append(example(each, levels, settings))
            if len(waiting) == batch_size:
                yield joined(waiting)
                waiting = []
    if waiting:
        yield joined(waiting)
