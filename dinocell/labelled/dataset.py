"""Labelled sets on disk, in SAMCell's files, read through memory maps: nothing is loaded before it is asked for.

A folder holds images of one size::

    imgs.npy       (n h w 3) uint8, blue green red; others' files may be (n h w), grey
    anns.npy       (n h w) int16, int32 where an id exceeds it; others' files may be (n 2 h w): cells, crowd regions
    dist_maps.npy  (n h w) float32 in [0, 1]; may be missing
    dataset.json   source, licence, names, counts, pixel size; missing in others' sets

or sub-folders of that kind, one a size (``520x704/``). Images that were fitted to a target size are padded below and to
the right; ``dataset.json`` says how far the image goes, and reading returns the image without the padding.
``wms.npy`` (weights of other tools) is ignored.
"""

import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float32, Integer, Real

from dinocell.errors import ImageError

FORMAT_NAME = "dinocell labelled set"
FORMAT_VERSION = 1

# Each holds three open files, and 1,024 is a common limit of a process.
_MAX_OPEN_FOLDERS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImage:
    """One image of a labelled set; its arrays are views into memory-mapped files and cannot be written to.

    Attributes
    ----------
    pixels
        Red, green, blue (equal in a grey image), or one grey channel in sets whose file holds only that: uint8 in
        labelled sets, what the file holds where image files are read one by one.
    labels
        0 is background, each other number one cell.
    distance
        The distance map, 0 to 1; None if the set has none.
    crowd
        Regions in which cells were not told apart; None if the set does not say.
    """

    pixels: Real[np.ndarray, "c h w"]
    labels: Integer[np.ndarray, "h w"]
    distance: Float32[np.ndarray, "h w"] | None
    crowd: Bool[np.ndarray, "h w"] | None
    name: str
    pixel_size_um: float | None


class LabelledSet:
    """The images of a folder; see ``open_labelled``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description: dict[str, Any] = _read_description(folder)
        folders = _array_folders(folder)
        keep_open = len(folders) <= _MAX_OPEN_FOLDERS
        self._groups = [_Group(path, self._records(path), keep_open=keep_open) for path in folders]
        self._first = np.cumsum([0, *(len(group) for group in self._groups)])

    @property
    def names(self) -> list[str]:
        """The name of every image, in order."""
        return [group.name(index) for group in self._groups for index in range(len(group))]

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: SupportsIndex) -> LabelledImage:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._groups[number].read(index - int(self._first[number]))

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader's worker opens the files again; NumPy would send it their whole content.
        return open_labelled, (self.folder,)

    def _records(self, path: Path) -> list[dict[str, Any]] | None:
        if not self.description:
            return None
        name = "." if path == self.folder else path.name
        records = [group["images"] for group in self.description["groups"] if group["folder"] == name]
        if not records:
            raise ImageError(f"{path}: not in {self.folder / 'dataset.json'}; build the set again")
        return list(records[0])


def open_labelled(folder: str | Path) -> LabelledSet:
    """Open a labelled set, ours or one of SAMCell's own making.

    Raises
    ------
    ImageError
        If files are missing, damaged, of another type than expected, or do not fit together.
    """
    return LabelledSet(Path(folder))


class _Group:
    """The arrays of one folder."""

    def __init__(self, folder: Path, records: list[dict[str, Any]] | None, *, keep_open: bool) -> None:
        self._folder, self._records = folder, records
        arrays = self._map()
        self._check(*arrays)
        self._length = len(arrays[0])
        self._kept = arrays if keep_open else None

    def __len__(self) -> int:
        return self._length

    def _map(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        has_distance = (self._folder / "dist_maps.npy").exists()
        return (
            _mapped(self._folder / "imgs.npy"),
            _mapped(self._folder / "anns.npy"),
            _mapped(self._folder / "dist_maps.npy") if has_distance else None,
        )

    def name(self, index: int) -> str:
        return f"{index:06d}" if self._records is None else str(self._records[index]["name"])

    def read(self, index: int) -> LabelledImage:
        record = self._records[index] if self._records is not None else {}
        all_images, all_labels, all_distances = self._kept or self._map()
        height, width = record.get("valid", all_images.shape[1:3])
        image = all_images[index][:height, :width]
        labels = all_labels[index][..., :height, :width]
        if labels.dtype.kind == "i" and labels.min(initial=0) < 0:
            self._fail(
                f"anns.npy, image {self.name(index)}: negative labels (down to {labels.min()}), where 0 is background "
                "and each other number one cell; more ids than its type can hold? Save them as int32"
            )
        distance = all_distances[index][:height, :width] if all_distances is not None else None
        return LabelledImage(
            # From (h w blue-green-red) to (red-green-blue h w), without a copy.
            pixels=image[None] if image.ndim == 2 else image[..., ::-1].transpose(2, 0, 1),
            labels=labels if labels.ndim == 2 else labels[0],
            distance=distance,
            crowd=None if labels.ndim == 2 else labels[1] != 0,
            name=self.name(index),
            pixel_size_um=record.get("pixel_size_um"),
        )

    def _check(self, images: np.ndarray, labels: np.ndarray, distance: np.ndarray | None) -> None:
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))):
            self._fail(f"imgs.npy: expected uint8 of (n h w 3) or (n h w), got {images.dtype} of {images.shape}")
        if labels.dtype.kind not in "ui":
            self._fail(f"anns.npy: expected whole numbers, one a cell, got {labels.dtype}; resized with interpolation?")
        if not (labels.ndim == 3 or (labels.ndim == 4 and labels.shape[1] == 2)):
            self._fail(f"anns.npy: expected (n h w) or (n 2 h w), got {labels.shape}")
        if len(labels) != len(images) or labels.shape[-2:] != images.shape[1:3]:
            self._fail(f"imgs.npy is {images.shape}, anns.npy {labels.shape}; expected as many, of the same size")
        if distance is not None:
            expected = (len(images), *images.shape[1:3])
            if distance.dtype != np.float32 or distance.shape != expected:
                self._fail(
                    f"dist_maps.npy: expected float32 of {expected}, got {distance.dtype} of {distance.shape}; "
                    "remove it, and it is computed anew"
                )
        if self._records is not None and len(self._records) != len(images):
            self._fail(f"dataset.json names {len(self._records)} images, imgs.npy holds {len(images)}")

    def _fail(self, message: str) -> None:
        raise ImageError(f"{self._folder}: {message}")


def _mapped(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; a labelled set needs imgs.npy and anns.npy") from None
    except (OSError, ValueError, EOFError) as error:
        cause = " ".join(str(error).split())
        raise ImageError(f"{path}: damaged or cut short ({cause}); build or copy the set again") from error
    return array


def _array_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder")
    if (folder / "imgs.npy").exists():
        return [folder]
    folders = sorted(path.parent for path in folder.glob("*/imgs.npy"))
    if not folders:
        raise ImageError(f"{folder}: no labelled set (no imgs.npy); make one with 'dinocell dataset'")
    # Read as groups of one, their own descriptions would be lost: padding would be taken for image.
    sets = [path.name for path in folders if (path / "dataset.json").exists()]
    if sets:
        raise ImageError(f"{folder}: a folder of labelled sets ({', '.join(sets[:4])}); name them one by one")
    return folders


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read ({error}); build the set again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        return {}  # another tool's file of that name
    if content.get("version") != FORMAT_VERSION:
        raise ImageError(
            f"{path}: version {content.get('version')}, this DINOCell reads {FORMAT_VERSION}; build it again"
        )
    return content
