"""Build a labelled set from image and mask pairs, one pair in memory at a time; the output is complete or absent.

Pairs that cannot be used are skipped, counted and listed with the reason. Nothing is cropped: each image size has its
own subfolder, or, with a target size, images are scaled and padded to a square.
"""

import io
import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt8

from dinocell._version import __version__
from dinocell.errors import ImageError
from dinocell.images.image import Image, percentile_range, to_uint8
from dinocell.labelled.dataset import FORMAT_NAME, FORMAT_VERSION
from dinocell.labelled.distance import labels_to_distance
from dinocell.labelled.layouts import Pair
from dinocell.labelled.masks import PairError, reject
from dinocell.runtime.files import folder_lock

# Images of more than 8 bit are scaled so that one pixel in a thousand saturates at either end: dust and dead pixels.
PERCENTILES = (0.1, 99.9)


class Skipped(NamedTuple):
    """A pair that is not in the set, and the reason."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The result of a build; ``sizes`` are numbers of images by rows and columns, ``notes`` counts of lost details."""

    output: Path
    num_images: int
    num_cells: int
    sizes: dict[tuple[int, int], int]
    skipped: tuple[Skipped, ...]
    notes: dict[str, int]


def build_labelled(
    pairs: Sequence[Pair],
    output: str | Path,
    *,
    source: str = "",
    licence: str = "",
    target_size: int | None = None,
    channel: int | str | None = None,
    keep_empty: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    advice: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> BuildReport:
    """Write a labelled set (see ``dinocell.labelled.dataset``) of pairs from ``dinocell.labelled.layouts``.

    Parameters
    ----------
    source, licence
        Kept in ``dataset.json``.
    target_size
        Scale each image so that its longer side has this many pixels (down: area average, up: linear; labels: nearest)
        and pad it to a square with 0 at the bottom or the right. None keeps the sizes.
    channel
        Keep this channel of each image, by index or name; ``mean``: see `Image.mean`. None keeps grey and RGB images
        and skips all others.
    strict
        Stop at the first pair that cannot be used, instead of skipping it.
    overwrite
        Replace ``output`` if it is a labelled set; other files and folders are never replaced.
    advice
        The caller's setting that solves a kind of problem, by kind; appended to the reason.
    progress
        Called with the number of pairs done.

    Raises
    ------
    ImageError
        If no pair can be used, the output exists or cannot be written, or a pair cannot be used and ``strict`` is set.
    """
    output = Path(output)
    with _folder_when_done(output, overwrite=overwrite) as building:
        writer = _SetWriter(building)
        for done, pair in enumerate(pairs, start=1):
            try:
                if pair.name in writer.names:
                    reject("duplicate name", f"{pair.name}: a second pair of that name")
                example = _example(pair, target_size=target_size, channel=channel, keep_empty=keep_empty)
            except ImageError as error:
                kind = error.kind if isinstance(error, PairError) else "cannot be read"
                reason = f"{error} ({advice[kind]})" if advice and kind in advice else str(error)
                if strict:
                    reject(kind, reason, error)
                writer.skipped.append(Skipped(pair.name, kind, reason))
            else:
                writer.append(example)
            progress(done)
        settings = {"percentiles": list(PERCENTILES), "target_size": target_size, "channel": channel}
        return writer.finish(output, {"source": source, "licence": licence, **settings})


class _SetWriter:
    """The arrays of all sizes, and the content of ``dataset.json``."""

    def __init__(self, folder: Path) -> None:
        self.skipped: list[Skipped] = []
        self.names: set[str] = set()
        self._folder = folder
        self._sizes: dict[tuple[int, int], _SizeWriter] = {}
        self._notes: Counter[str] = Counter()

    def append(self, example: "_Example") -> None:
        self.names.add(example.record["name"])
        self._notes += example.notes
        height, width = size = example.labels.shape
        if size not in self._sizes:
            self._sizes[size] = _SizeWriter(self._folder / f"{height}x{width}", height, width)
        self._sizes[size].append(example)

    def finish(self, output: Path, settings: dict[str, Any]) -> BuildReport:
        if not self._sizes:
            reasons = Counter(skip.kind for skip in self.skipped)
            counted = ", ".join(f"{count} x {kind}" for kind, count in reasons.most_common()) or "there are no pairs"
            first = f"; first: {self.skipped[0].reason}" if self.skipped else ""
            raise ImageError(f"{output}: no pair could be used ({counted}){first}")
        groups = [arrays.finish() for _, arrays in sorted(self._sizes.items())]
        if len(groups) == 1:  # its arrays are directly in the set's folder
            subfolder = self._folder / groups[0]["folder"]
            for path in subfolder.iterdir():
                path.rename(self._folder / path.name)
            subfolder.rmdir()
            groups[0]["folder"] = "."
        records = [record for group in groups for record in group["images"]]
        pixel_sizes = {record["pixel_size_um"] for record in records}
        counts = {
            "num_images": len(records),
            "num_cells": sum(record["num_cells"] for record in records),
            "notes": {note: count for note, count in sorted(self._notes.items()) if count},
        }
        description = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "written_by": f"dinocell {__version__}",
            **settings,
            **counts,
            "pixel_size_um": pixel_sizes.pop() if len(pixel_sizes) == 1 else None,
            "skipped": [skip._asdict() for skip in self.skipped],
            "groups": groups,
        }
        text = json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False)
        (self._folder / "dataset.json").write_text(text + "\n", encoding="utf-8")
        sizes = {(group["height"], group["width"]): len(group["images"]) for group in groups}
        return BuildReport(output=output, sizes=sizes, skipped=tuple(self.skipped), **counts)


class _Example(NamedTuple):
    """The entries of one pair in the arrays and in ``dataset.json``."""

    pixels: UInt8[np.ndarray, "h w 3"]  # blue, green, red
    labels: Int32[np.ndarray, "h w"]
    distance: Float32[np.ndarray, "h w"]
    notes: Counter[str]
    record: dict[str, Any]


def _example(pair: Pair, *, target_size: int | None, channel: int | str | None, keep_empty: bool) -> _Example:
    content = pair.read()
    image, labels, notes = content.image, content.labels, content.notes.copy()
    try:
        image_size, mask_size = (f"{h} x {w}" for h, w in (image.pixels.shape[1:], labels.shape))
        for is_wrong, kind, reason in (
            (image_size != mask_size, "sizes differ", f"the image is {image_size}, the mask {mask_size}"),
            (labels.max() >= 2**31, "ids too large", f"id {labels.max()}; the maximum is {2**31 - 1}"),
            (not keep_empty and not labels.any(), "no cells", "the mask is empty"),
        ):
            if is_wrong:
                reject(kind, reason)
        pixels, levels = _to_bgr(image if channel is None else image.select(channel))
    except ImageError as error:
        kind = error.kind if isinstance(error, PairError) else "values or channels"
        reject(kind, f"{pair.name}: {error}", error)
    labels = labels.astype(np.int32)
    num_before, scale = _num_cells(labels), 1.0
    if target_size is not None:
        scale = target_size / max(labels.shape)
        pixels, labels = _scaled(pixels, labels, scale)
        notes["cells lost in scaling"] += num_before - _num_cells(labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distance = labels_to_distance(labels)
    notes["images filled by one cell"] += len(caught)
    record = {
        "name": pair.name,
        "valid": list(labels.shape),
        "num_cells": _num_cells(labels),
        "levels": levels,
        "scale": scale,
        "pixel_size_um": image.pixel_size_um / scale if image.pixel_size_um is not None else None,
    }
    if target_size is not None:
        # After the distance map: the edge of the image is not the boundary of a cell.
        missing = [(0, target_size - side) for side in labels.shape]
        labels, distance = np.pad(labels, missing), np.pad(distance, missing)
        pixels = np.pad(pixels, [*missing, (0, 0)])
    return _Example(pixels, labels, distance, notes, record)


def _to_bgr(image: Image) -> tuple[UInt8[np.ndarray, "h w 3"], list[float] | None]:
    """Return blue, green, red in 8 bit, and the grey levels that became 0 and 255 (None if they were 8 bit before)."""
    pixels = image.grey().without_alpha().pixels
    if len(pixels) not in (1, 3):
        names = f" ({', '.join(image.channel_names)})" if image.channel_names else ""
        reject("several channels", f"{len(pixels)} channels{names}; expected one, or red, green and blue")
    levels = None
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype != np.uint8:
        low, high = percentile_range(pixels, *PERCENTILES)
        pixels, levels = to_uint8(pixels, low, high), [low, high]
    return np.ascontiguousarray(np.broadcast_to(pixels[::-1], (3, *pixels.shape[1:])).transpose(1, 2, 0)), levels


def _scaled(
    pixels: UInt8[np.ndarray, "h w 3"], labels: Int32[np.ndarray, "h w"], scale: float
) -> tuple[UInt8[np.ndarray, "h2 w2 3"], Int32[np.ndarray, "h2 w2"]]:
    import cv2

    height, width = (max(1, round(side * scale)) for side in labels.shape)
    if (height, width) == labels.shape:
        return pixels, labels
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    # Nearest by pixel centres, by indexing: cv2 does not resize int32.
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=method)), labels[np.ix_(rows, columns)]


def _num_cells(labels: Int32[np.ndarray, "h w"]) -> int:
    return int(np.count_nonzero(np.unique(labels)))


class _SizeWriter:
    """The three arrays of one image size (rows, columns), in a folder of their own."""

    def __init__(self, folder: Path, height: int, width: int) -> None:
        folder.mkdir()
        self._images = _GrowingArray(folder / "imgs.npy", np.dtype(np.uint8), (height, width, 3))
        self._labels = _GrowingArray(folder / "anns.npy", np.dtype(np.int16), (height, width))
        self._distance = _GrowingArray(folder / "dist_maps.npy", np.dtype(np.float32), (height, width))
        self._records: list[dict[str, Any]] = []
        self._entry = {"folder": folder.name, "height": height, "width": width, "images": self._records}

    def append(self, example: _Example) -> None:
        if example.labels.max() > np.iinfo(self._labels.dtype).max:
            self._labels = self._labels.widened(np.dtype(np.int32))
        self._images.append(example.pixels)
        self._labels.append(example.labels)
        self._distance.append(example.distance)
        self._records.append(example.record)

    def finish(self) -> dict[str, Any]:
        """Complete the files; return their entry in ``dataset.json``."""
        for array in (self._images, self._labels, self._distance):
            array.finish()
        return self._entry


class _GrowingArray:
    """A .npy file whose first axis grows: NumPy leaves space for its length in the header, which is written last.

    The file is open only during writes: a set may have more sizes than a process may have open files.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], item_shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self._path, self._item_shape, self._count = path, item_shape, 0
        path.write_bytes(bytes(len(self._header())))  # no array yet, if the build is killed

    def _header(self) -> bytes:
        header = io.BytesIO()
        shape = (self._count, *self._item_shape)
        np.lib.format.write_array_header_1_0(header, {"descr": self.dtype.str, "fortran_order": False, "shape": shape})
        return header.getvalue()

    def append(self, item: Shaped[np.ndarray, "..."]) -> None:
        """Add one item, converted to the type of the array."""
        assert item.shape == self._item_shape
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(item, self.dtype).data)
        self._count += 1

    def finish(self) -> None:
        """Write the header, and flush everything to the disk."""
        with self._path.open("r+b") as file:
            file.write(self._header())
            file.flush()
            os.fsync(file.fileno())

    def widened(self, dtype: np.dtype[Any]) -> "_GrowingArray":
        """Convert the file to another type."""
        self.finish()
        before = self._path.rename(self._path.with_suffix(".narrow"))
        wide = _GrowingArray(self._path, dtype, self._item_shape)
        for item in np.lib.format.open_memmap(before, mode="r"):
            wide.append(item)
        before.unlink()
        return wide


@contextmanager
def _folder_when_done(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder next to ``output``; rename it to that on success, remove it on failure."""
    is_set = output.is_dir() and _is_labelled_set(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not (is_set and overwrite):
        advice = "add --overwrite to replace it" if is_set else "not a labelled set only, choose another output"
        raise ImageError(f"{output}: exists; {advice}")
    target = output.resolve()  # a link is kept, and its target is replaced
    building = target.with_name(f".{target.name}.building")
    old = target.with_name(f".{target.name}.old")
    try:
        building.mkdir(parents=True, exist_ok=True)
        with folder_lock(building, wait=False) as is_ours:
            if not is_ours:
                raise ImageError(f"{output}: another process is building it now")
            try:
                for path in building.iterdir():  # left by a killed build
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
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
    """Return whether a folder has the files of a labelled set and no others, so that no image is ever removed."""
    own = re.compile(r"dataset\.json|(\d+x\d+/)?(imgs|anns|dist_maps)\.npy|\d+x\d+/")
    names = (path.relative_to(folder).as_posix() + "/" * path.is_dir() for path in folder.rglob("*"))
    return (folder / "dataset.json").is_file() and all(own.fullmatch(name) for name in names)
