"""What a frozen backbone says of crops that come again: computed once, kept in a file, read back."""

import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dinocell.errors import DinocellError

# Maps that the decoder gets, see `dinocell.finetune.decoder.Decoder`.
_MAPS = 4


class KeptFeatures:
    """The backbone's maps of crops, by the crop's number.

    The file has no name: it is gone when the process ends, however it ends, and a run that goes on makes it anew. A
    crop's maps are computed by themselves, so that they do not depend on which crops happen to be beside it: a run
    that was interrupted sees what it would have seen. What lies in the file counts as free memory, and is read as fast
    as memory as long as there is enough.

    Parameters
    ----------
    folder
        Where the file lies; its disk must hold `bytes_of_crop` for every crop.
    dtype
        Of the numbers kept: that of matrix products, in which the decoder would round them first thing.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._file, name = tempfile.mkstemp(dir=folder)
        Path(name).unlink()
        weakref.finalize(self, os.close, self._file)
        self._places: dict[int, int] = {}
        self._end = 0

    def tokens(
        self,
        numbers: Sequence[int],
        images: Float[Tensor, "b 1 h w"],
        compute: Callable[[Float[Tensor, "1 1 h w"]], list[Tensor]],
    ) -> list[Float[Tensor, "b d rows columns"]]:
        """Return the maps of crops, on the device of ``images``.

        Parameters
        ----------
        numbers
            One a crop; the same number is always the same crop.
        compute
            Makes the maps of a crop, all of one shape; called for each number that has not been seen before.

        Raises
        ------
        DinocellError
            If the disk is full, or fails.
        """
        try:
            for row, number in enumerate(numbers):
                if number not in self._places:
                    maps = torch.stack(compute(images[row : row + 1])).to("cpu", self._dtype)
                    self._append(number, maps)
            rows = [self._read(self._places[number]) for number in numbers]
        except OSError as error:
            raise DinocellError(
                f"data.fixed_crops: features cannot be kept in the run folder ({error.strerror or error}); "
                "make room, set it lower, or leave it out"
            ) from error
        batch = torch.cat(rows, dim=1)  # (4 b d rows columns)
        return list(batch.to(images.device, non_blocking=True))

    def _append(self, number: int, maps: Tensor) -> None:
        self._shape = maps.shape
        rest = _bytes(maps.contiguous())
        place = self._end
        while len(rest):
            count = os.pwrite(self._file, rest, place)
            rest, place = rest[count:], place + count
        self._places[number], self._end = self._end, place

    def _read(self, place: int) -> Tensor:
        maps = torch.empty(self._shape, dtype=self._dtype)
        rest = _bytes(maps)
        while len(rest):
            count = os.preadv(self._file, [rest], place)
            if not count:
                raise OSError("the file is shorter than what was written")
            rest, place = rest[count:], place + count
        return maps


def _bytes(maps: Tensor) -> memoryview:
    return memoryview(maps.view(torch.uint8).numpy().reshape(-1).data)


def bytes_of_crop(*, crop: int, patch_size: int, width: int, dtype: torch.dtype) -> int:
    """Return what the kept maps of a crop of ``crop`` pixels take."""
    side = -(-crop // patch_size)
    return _MAPS * width * side**2 * dtype.itemsize


def in_bytes(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
