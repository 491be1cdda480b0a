"""A batch of tiles in one block of memory, whatever their sizes and types."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from dinocell.data_shards.sample import SampleInfo

# Tiles begin at multiples of a cache line.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from; what is drawn for it at random derives from these numbers and the seed alone."""

    epoch: int
    data_set: int
    sample: int


@runtime_checkable
class Drawn(Protocol):
    """What is drawn at random for a whole batch; it travels with the batch."""

    def pin_memory(self) -> "Drawn":
        """Return the same in page-locked memory."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Decoded tiles of a rank's next samples.

    Attributes
    ----------
    infos, origins, channels
        What each sample is, where it comes from, and which of its channels are here.
    next_position
        The stream's position after this step of all ranks: what a checkpoint has to keep.
    damaged
        One line a sample that could not be read and was replaced by another.
    chosen, chosen_by
        What the reader's ``choose`` returned for each sample, and that function; empty and None without one.
    drawn, drawn_by
        What the reader's ``draw`` returned for the batch, and that function; None without one.
    """

    infos: tuple[SampleInfo, ...]
    origins: tuple[Origin, ...]
    channels: tuple[tuple[int, ...], ...]
    next_position: int
    damaged: tuple[str, ...]
    storage: torch.Tensor
    starts: tuple[int, ...]
    chosen: tuple[object, ...] = ()
    chosen_by: object = None
    drawn: Drawn | None = None
    drawn_by: object = None

    def __len__(self) -> int:
        return len(self.infos)

    def tile(self, number: int) -> torch.Tensor:
        """Return the tile of a sample, (c h w), a view of the batch's one block of memory."""
        info, start = self.infos[number], self.starts[number]
        shape = (len(self.channels[number]), info.height, info.width)
        dtype = _TORCH_TYPES[info.dtype]
        end = start + int(np.prod(shape)) * dtype.itemsize
        return self.storage[start:end].view(dtype).view(shape)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; PyTorch's loader calls this."""
        drawn = None if self.drawn is None else self.drawn.pin_memory()
        return replace(self, storage=self.storage.pin_memory(), drawn=drawn)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tiles on a device, in one copy."""
        return replace(self, storage=self.storage.to(device, non_blocking=non_blocking))


def layout(infos: Sequence[SampleInfo], channels: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
    """Return where each tile begins in the batch's memory, and how many bytes that has."""
    starts, end = [], 0
    for info, chosen in zip(infos, channels, strict=True):
        starts.append(end)
        size = len(chosen) * info.height * info.width * np.dtype(info.dtype).itemsize
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return tuple(starts), end


_TORCH_TYPES = {
    name: getattr(torch, name)
    for name in (
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "float32",
        "float64",
    )
}
