"""Labelled sets on disk, in SAMCell's file format, read through memory maps: images are loaded when they are used.

A folder contains images of one size::

    imgs.npy       (n h w 3) uint8, blue green red; in other tools' sets also (n h w), grey
    anns.npy       (n h w) int16, int32 for larger ids; in other tools' sets also (n 2 h w): cells, crowd regions
    dist_maps.npy  (n h w) float32 in [0, 1]; optional
    dataset.json   source, licence, names, counts, pixel size; not in other tools' sets

or one such subfolder per size (``520x704/``). Images that were scaled to a target size are padded at the bottom and the
right; ``dataset.json`` contains their sizes, and reading returns the image without the padding. ``wms.npy`` (weights of
other tools) is ignored.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float32, Integer, Real, Shaped

from dinocell.errors import ImageError, one_line

FORMAT_NAME = "dinocell labelled set"
FORMAT_VERSION = 1

# Each has three open files, and 1,024 is a common limit of a process.
_MAX_OPEN_FOLDERS = 64

_MappedArray = Shaped[np.ndarray, "..."]


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImage:
    """One image of a labelled set; its arrays are read-only views of memory-mapped files.

    Attributes
    ----------
    pixels
        Red, green, blue (equal in a grey image), or one grey channel if the file has only that: uint8 in labelled sets,
        the file's type where image files are read one by one.
    labels
        0 is background, each other integer one cell.
    distance
        The distance map, 0 to 1; None if the set has none.
    crowd
        Regions in which cells are not annotated one by one; None if the set has no such annotation.
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
        records = {group["folder"]: list(group["images"]) for group in self.description.get("groups", ())}
        self._groups = []
        for path in folders:
            of_group = records.get("." if path == folder else path.name, []) if self.description else None
            self._groups.append(_Group(path, of_group, keep_open=keep_open))
        self._first = np.cumsum([0, *(len(group) for group in self._groups)])

    @property
    def names(self) -> list[str]:
        """The name of every image, in order."""
        return [str(record["name"]) for group in self._groups for record in group.records]

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: SupportsIndex) -> LabelledImage:
        index = range(len(self))[index]
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._groups[group].read(index - int(self._first[group]))

    def __reduce__(self) -> tuple[Any, ...]:
        # A data loader's worker opens the files again; NumPy would pickle their whole content.
        return open_labelled, (self.folder,)


def open_labelled(folder: str | Path) -> LabelledSet:
    """Open a labelled set, of DINOCell or of SAMCell.

    ImageError if files are missing, damaged, of an unexpected type, or do not match each other.
    """
    return LabelledSet(Path(folder))


class _Group:
    """The arrays of one folder."""

    def __init__(self, folder: Path, records: list[dict[str, Any]] | None, *, keep_open: bool) -> None:
        self._folder = folder
        arrays = self._map()
        numbered: list[dict[str, Any]] = [{"name": f"{index:06d}"} for index in range(len(arrays[0]))]
        self.records = numbered if records is None else records
        self._check(*arrays)
        self._kept = arrays if keep_open else None

    def __len__(self) -> int:
        return len(self.records)

    def _map(self) -> tuple[_MappedArray, _MappedArray, _MappedArray | None]:
        images, labels, distance = (self._folder / f"{name}.npy" for name in ("imgs", "anns", "dist_maps"))
        return _mapped(images), _mapped(labels), _mapped(distance) if distance.exists() else None

    def read(self, index: int) -> LabelledImage:
        record = self.records[index]
        all_images, all_labels, all_distances = self._kept or self._map()
        height, width = record.get("valid", all_images.shape[1:3])
        image = all_images[index][:height, :width]
        labels = all_labels[index][..., :height, :width]
        if labels.dtype.kind == "i" and labels.min(initial=0) < 0:  # ids beyond 32,767 in SAMCell's int16
            raise ImageError(
                f"{self._folder}: anns.npy, image {record['name']}: negative labels (minimum {labels.min()}), "
                "possibly ids beyond the range of the type; save them as int32"
            )
        distance = all_distances[index][:height, :width] if all_distances is not None else None
        return LabelledImage(
            # From (h w blue-green-red) to (red-green-blue h w), without a copy.
            pixels=image[None] if image.ndim == 2 else image[..., ::-1].transpose(2, 0, 1),
            labels=labels if labels.ndim == 2 else labels[0],
            distance=distance,
            crowd=None if labels.ndim == 2 else labels[1] != 0,
            name=str(record["name"]),
            pixel_size_um=record.get("pixel_size_um"),
        )

    def _check(self, images: _MappedArray, labels: _MappedArray, distance: _MappedArray | None) -> None:
        size = (len(images), *images.shape[1:3])
        names = len(self.records)
        image_text, label_text, distance_text = (
            f"{name}.npy is {values.dtype} of {values.shape}" if values is not None else ""
            for name, values in (("imgs", images), ("anns", labels), ("dist_maps", distance))
        )
        are_images = images.dtype == np.uint8 and (images.ndim == 3 or images.shape[3:] in ((1,), (3,)))
        is_same_size = labels.shape in (size, (size[0], 2, *size[1:]))
        is_distance = distance is None or (distance.dtype == np.float32 and distance.shape == size)
        valid = {
            f"{image_text}, expected uint8 of (n h w 3) or (n h w)": are_images,
            f"{label_text}, expected one integer per cell; resized with interpolation?": labels.dtype.kind in "ui",
            f"{image_text}, {label_text}, expected the same number and size": is_same_size,
            f"{distance_text}, expected float32 of {size}; remove it, and it is computed": is_distance,
            f"dataset.json names {names} images, imgs.npy contains {len(images)}; build it again": names == len(images),
        }
        for problem, is_valid in valid.items():
            if not is_valid:
                raise ImageError(f"{self._folder}: {problem}")


def _mapped(path: Path) -> _MappedArray:
    try:
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError, EOFError) as error:
        problem = f"damaged or truncated ({one_line(error)}); build or copy the set again"
        if isinstance(error, FileNotFoundError):
            problem = "no such file; a labelled set needs imgs.npy and anns.npy"
        raise ImageError(f"{path}: {problem}") from error


def _array_folders(folder: Path) -> list[Path]:
    if (folder / "imgs.npy").exists():
        return [folder]
    folders = sorted(path.parent for path in folder.glob("*/imgs.npy"))
    # Sets read as sizes of one set would lose their descriptions, and padding would be part of the images.
    sets = [path.name for path in folders if (path / "dataset.json").exists()]
    if sets:
        problem = f"a folder of labelled sets ({', '.join(sets[:4])}); list them one by one"
    elif not folders:
        problem = "no labelled set (no imgs.npy); make one with 'dinocell dataset'"
    else:
        return folders
    raise ImageError(f"{folder}: {problem if folder.is_dir() else 'no such folder'}")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read ({one_line(error)}); build the set again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        return {}  # another tool's file of that name
    version = content.get("version")
    if version != FORMAT_VERSION:
        raise ImageError(f"{path}: version {version}, this DINOCell reads {FORMAT_VERSION}; build the set again")
    return content
