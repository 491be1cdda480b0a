"""The files of a labelled set while they are written: arrays that grow, in a folder renamed when all is there."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from dinocell.errors import ImageError
from dinocell.runtime.locks import folder_lock


class SizeWriter:
    """The three arrays of one image size (rows, columns), in a folder of their own."""

    def __init__(self, folder: Path, height: int, width: int) -> None:
        folder.mkdir()
        self._folder, self._shape = folder, (height, width)
        self._images = GrowingArray(folder / "imgs.npy", np.dtype(np.uint8), (height, width, 3))
        self._labels = GrowingArray(folder / "anns.npy", np.dtype(np.int16), (height, width))
        self._distance = GrowingArray(folder / "dist_maps.npy", np.dtype(np.float32), (height, width))
        self._records: list[dict[str, Any]] = []

    def append(
        self,
        pixels: UInt8[np.ndarray, "h w 3"],
        labels: Int32[np.ndarray, "h w"],
        distance: Float32[np.ndarray, "h w"],
        record: dict[str, Any],
    ) -> None:
        """Add one image; ``record`` goes to ``dataset.json``."""
        if labels.max() > np.iinfo(self._labels.dtype).max:
            self._labels = self._labels.widened(np.dtype(np.int32))
        self._images.append(pixels)
        self._labels.append(labels)
        self._distance.append(distance)
        self._records.append(record)

    def finish(self) -> dict[str, Any]:
        """Make the files whole; return what ``dataset.json`` says about them."""
        for array in (self._images, self._labels, self._distance):
            array.finish()
        height, width = self._shape
        return {"folder": self._folder.name, "height": height, "width": width, "images": self._records}


class GrowingArray:
    """A .npy file whose first axis grows; its header, of fixed length, is written last.

    The file is open only while something is written: a folder may hold more sizes than a process may open files.
    """

    _HEADER_BYTES = 256  # a multiple of 64, so that the data is aligned

    def __init__(self, path: Path, dtype: np.dtype[Any], item_shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self._path, self._item_shape, self._count = path, item_shape, 0
        path.write_bytes(bytes(self._HEADER_BYTES))

    def append(self, item: np.ndarray) -> None:
        """Add one item, converted to the type of the array."""
        assert item.shape == self._item_shape
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(item, self.dtype).data)
        self._count += 1

    def finish(self) -> None:
        """Write the header, and make sure that everything is on the disk."""
        shape = (self._count, *self._item_shape)
        content = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode("ascii")
        length = self._HEADER_BYTES - 10
        with self._path.open("r+b") as file:
            file.write(b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + content.ljust(length - 1) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def widened(self, dtype: np.dtype[Any]) -> "GrowingArray":
        """Return the same array in another type, at the same place."""
        self.finish()
        before = self._path.rename(self._path.with_suffix(".narrow"))
        wide = GrowingArray(self._path, dtype, self._item_shape)
        for item in np.lib.format.open_memmap(before, mode="r"):
            wide.append(item)
        before.unlink()
        return wide


@contextmanager
def folder_when_done(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a hidden folder beside ``output``; rename it to that when all went well, remove it when not."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not _is_labelled_set(output):
            raise ImageError(f"{output}: exists already and is not a labelled set alone; choose another output")
        if not overwrite:
            raise ImageError(f"{output}: exists already; add --overwrite to replace it")
    target = output.resolve()  # a link stays, and what it leads to is replaced
    building = target.with_name(f".{target.name}.building")
    old = target.with_name(f".{target.name}.old")
    try:
        building.mkdir(parents=True, exist_ok=True)
        with folder_lock(building, wait=False) as is_ours:
            if not is_ours:
                raise ImageError(f"{output}: another process is building it now")
            try:
                _clear(building)  # what a killed build left
                yield building
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    target.rename(old)
                building.rename(target)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise ImageError(f"{output}: cannot be written ({error.strerror or error})") from error


def _is_labelled_set(folder: Path) -> bool:
    """Say whether a folder holds the files of a labelled set and nothing else, so that no picture is ever removed."""
    if not (folder / "dataset.json").is_file():
        return False
    arrays = {"imgs.npy", "anns.npy", "dist_maps.npy"}
    for path in folder.iterdir():
        if path.is_dir():
            known = re.fullmatch(r"\d+x\d+", path.name) and {file.name for file in path.iterdir()} <= arrays
        else:
            known = path.name in arrays | {"dataset.json"}
        if not known:
            return False
    return True


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def move_up(folder: Path) -> None:
    """Move what a folder holds into the one above it."""
    for path in sorted(folder.iterdir()):
        path.rename(folder.parent / path.name)
    folder.rmdir()
