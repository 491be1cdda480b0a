"""List image and mask pairs: LIVECell, Cellpose, Cell Tracking Challenge, DSB2018, any pattern of file names.

Each function lists the pairs of a folder without opening them, or raises ImageError if there is none. Pairs without an
image or a mask are listed too: reading them raises an error, and the builder counts them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from dinocell.images.image import Image
from dinocell.images.listing import Listed, NamePattern, list_files, nfc
from dinocell.images.read import IMAGE_SUFFIXES, has_image_name, read_image
from dinocell.labelled.masks import PairError, draw, read_coco, read_instances, read_labels, read_regions, reject

_ENCODINGS = ("labels", "regions", "instances")


@dataclass(frozen=True, kw_only=True, eq=False)
class PairContent:
    """An image, its labels, and counts of what labels cannot represent (overlapping pixels, crowd regions...)."""

    image: Image
    labels: Integer[np.ndarray, "h w"]
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image with its mask, not opened yet. ``read`` raises ImageError (PairError if the pair does not match)."""

    name: str
    read: Callable[[], PairContent]


def livecell_pairs(folder: Path, *, split: str | None = None, annotations: Path | None = None) -> list[Pair]:
    """List the images of a COCO file, found by name anywhere below the folder (LIVECell: one subfolder per cell type).

    Parameters
    ----------
    split
        ``train``, ``val`` or ``test``: uses ``livecell_coco_<split>.json`` anywhere below the folder.
    annotations
        The JSON file; by default, and without a split, the only JSON file below the folder.
    """
    _check_folder(folder)
    paths_by_name: dict[str, list[Path]] = {}
    for file in _files(folder):
        paths_by_name.setdefault(file.name.rpartition("/")[2], []).append(Path(file.path))
    if annotations is None:
        name = f"livecell_coco_{split}.json" if split else "*.json"
        found = [path for key, paths in paths_by_name.items() if fnmatchcase(key, name) for path in paths]
        if len(found) != 1:
            files = f"{len(found) or 'no'} files {name}"
            reject("no pairs", f"{folder}: {files} below it; name the file with --annotations")
        annotations = found[0]
    images, by_image = read_coco(annotations)
    pairs = []
    for image in images:
        # Looked up, never joined: a file_name such as ../../x must not lead out of the folder.
        name = nfc(image["file_name"].replace("\\", "/"))
        paths = paths_by_name.get(name.rpartition("/")[2], []) if name.lower().endswith(IMAGE_SUFFIXES) else []
        if len(paths) > 1:
            paths = [path for path in paths if nfc(path.as_posix()).endswith("/" + name)] or paths
        pairs.append(Pair(name=name, read=partial(_read_coco_pair, name, paths, image, by_image[image["id"]])))
    return pairs


def cellpose_pairs(folder: Path, *, split: str | None = None) -> list[Pair]:
    """List Cellpose's numbered pairs: ``000_img.png`` with ``000_masks.png``, in ``folder/<split>`` if that exists."""
    folder = folder / split if split and (folder / split).is_dir() else folder
    return folder_pairs(folder, images="{name}_img.*", masks="{name}_masks.*")


def ctc_pairs(folder: Path, *, truth: str = "gold", sequences: Sequence[str] = ()) -> list[Pair]:
    """List the frames of Cell Tracking Challenge sequences that have a segmentation.

    ``01/t000.tif`` is paired with ``01_GT/SEG/man_seg000.tif`` (``gold``: annotated by hand, in many sequences only
    some cells or frames) or ``01_ST/SEG/man_seg000.tif`` (``silver``: fused results of algorithms, whole frames). Masks
    of single slices of three-dimensional sequences are not listed.
    """
    _check_folder(folder)
    suffix = {"gold": "_GT", "silver": "_ST"}[truth]
    seg_folders = sorted(path / "SEG" for path in folder.glob(f"*{suffix}") if (path / "SEG").is_dir())
    seg_folders = [path for path in seg_folders if not sequences or path.parent.name.removesuffix(suffix) in sequences]
    pairs = []
    for seg in seg_folders:
        sequence = seg.parent.name.removesuffix(suffix)
        raw = _frames(folder / sequence, "t")
        for frame, mask in sorted(_frames(seg, "man_seg").items()):
            name = f"{sequence}/{mask.stem.removeprefix('man_seg')}"
            pairs.append(Pair(name=name, read=partial(read_pair, name, raw.get(frame), [mask], "labels")))
    if not pairs:
        reject("no pairs", f"{folder}: no {suffix}/SEG/man_seg*.tif of a sequence, such as 01{suffix}/SEG")
    return pairs


def dsb2018_pairs(folder: Path) -> list[Pair]:
    """List the 2018 Data Science Bowl: ``<id>/images/<id>.png`` with ``<id>/masks/*.png``, one file per nucleus."""
    _check_folder(folder)
    pairs = []
    for parent in sorted(path.parent for path in folder.glob("*/images")):
        images, masks = (
            sorted(path for path in parent.glob(f"{kind}/*") if has_image_name(path.name))
            for kind in ("images", "masks")
        )
        read = partial(_read_matched, parent.name, images, masks, "instances")
        pairs.append(Pair(name=parent.name, read=read))
    if not pairs:
        reject("no pairs", f"{folder}: no <id>/images/<id>.png in it")
    return pairs


def folder_pairs(folder: Path, *, images: str, masks: str, encoding: str = "labels") -> list[Pair]:
    """List pairs by two patterns, such as ``imgs/{name}.tif`` and ``masks/{name}.png``.

    Parameters
    ----------
    images, masks
        Paths relative to the folder; linked folders are followed, hidden files skipped. ``{field}`` matches a part of
        one folder or file name, the same text wherever it occurs; ``*`` any part that does not matter. Every field of
        ``images`` must be in ``masks``.
    encoding
        ``labels``: one integer per cell. ``regions``: connected regions of one colour. ``instances``: one file per
        cell, with a further field or ``*`` in the pattern, as in ``{name}/masks/{cell}.png``.
    """
    _check_folder(folder)
    if encoding not in _ENCODINGS:
        raise ValueError(f"encoding: expected one of {', '.join(_ENCODINGS)}, got {encoding!r}")
    image_pattern, mask_pattern = NamePattern.parse(images), NamePattern.parse(masks)
    fields = image_pattern.names
    if not set(fields) <= set(mask_pattern.names):
        reject("no pairs", f"patterns {images!r} and {masks!r}: expected each field of the first in the second")
    by_key: dict[tuple[str, ...], tuple[list[Path], list[Path]]] = {}
    # A name that matches both ('{name}.tif' matches 'a_mask.tif' too) belongs to the more specific pattern.
    order = sorted(((0, image_pattern), (1, mask_pattern)), key=lambda entry: -entry[1].num_literal)
    for file in _files_of_patterns(folder, (images, masks)):
        for kind, pattern in order:
            if values := pattern.match(file.name):
                key = tuple(values[field] for field in fields)
                by_key.setdefault(key, ([], []))[kind].append(Path(file.path))
                break
    if not any(image_paths for image_paths, _ in by_key.values()):
        reject("no pairs", f"{folder}: no file matches the pattern {images!r}")
    return [
        Pair(name=(name := "/".join(key)), read=partial(_read_matched, name, *by_key[key], encoding))
        for key in sorted(by_key)
    ]


def _read_matched(name: str, images: list[Path], masks: list[Path], encoding: str) -> PairContent:
    _check_single(name, "images", images)
    if encoding != "instances":
        _check_single(name, "masks", masks)
    return read_pair(name, images[0] if images else None, masks, encoding)


def read_pair(name: str, image_path: Path | None, masks: list[Path], encoding: str) -> PairContent:
    """Read an image and its mask (several for ``instances``); PairError if one is missing."""
    if image_path is None:
        reject("no image", f"{name}: {masks[0]} has no image" if masks else f"{name}: no image")
    if not masks:
        reject("no mask", f"{image_path}: no mask")
    notes: Counter[str] = Counter()
    image = read_image(image_path)
    one_file = {"labels": read_labels, "regions": read_regions}
    labels = read_instances(masks, notes) if encoding == "instances" else one_file[encoding](masks[0])
    return PairContent(image=image, labels=labels, notes=notes)


def _read_coco_pair(
    name: str, paths: list[Path], record: dict[str, Any], annotations: list[dict[str, Any]]
) -> PairContent:
    if not paths:
        reject("no image", f"{name}: annotated, but not below the folder")
    _check_single(name, "files", paths)
    notes: Counter[str] = Counter()
    image = read_image(paths[0])
    _, height, width = image.pixels.shape
    annotated = (record.get("height", height), record.get("width", width))
    if annotated != (height, width):
        reject("sizes differ", f"{paths[0]}: {height} x {width}, annotated as {annotated[0]} x {annotated[1]}")
    try:
        labels = draw(annotations, (height, width), notes)
    except PairError as error:
        reject(error.kind, f"{name}: {error}")
    return PairContent(image=image, labels=labels, notes=notes)


def _check_single(name: str, what: str, paths: list[Path]) -> None:
    if len(paths) > 1:
        reject("several files", f"{name}: {len(paths)} {what} of that name, such as {paths[0]} and {paths[1]}")


def _frames(folder: Path, prefix: str) -> dict[int, Path]:
    """Return the TIFF files named by a prefix and a frame number, by number."""
    paths = ((re.fullmatch(rf"{prefix}(\d+)", path.stem), path) for path in sorted(folder.glob(f"{prefix}*.tif*")))
    return {int(match[1]): path for match, path in paths if match}


def _files(folder: Path) -> list[Listed]:
    """List the files below a folder, without hidden ones; a ``.zarr`` folder is one image."""
    return list_files(folder, folders_as_files=(".zarr",))


def _files_of_patterns(folder: Path, patterns: Sequence[str]) -> list[Listed]:
    """List the files below the literal folders that patterns begin with.

    Nothing else is searched: images and masks on two disks may have only the root in common.
    """
    files: set[Listed] = set()
    for pattern in patterns:
        if literal := _literal_folder(folder, pattern):
            subfolder, prefix = literal
            files |= {Listed(prefix + file.name, file.path) for file in _files(subfolder)}
    return sorted(files)


def _literal_folder(folder: Path, pattern: str) -> tuple[Path, str] | None:
    """Return the last folder of a pattern before its first field, and its relative name; None if it does not exist."""
    path, prefix = folder, ""
    for part in nfc(pattern).removeprefix("./").split("/")[:-1]:
        if set("{*") & set(part):
            break
        if (path / part).is_dir():
            path /= part
        else:  # the same name in another Unicode form
            same = [entry for entry in path.iterdir() if nfc(entry.name) == part and entry.is_dir()]
            if not same:
                return None
            path = same[0]
        prefix += f"{part}/"
    return path, prefix


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        reject("no pairs", f"{folder}: no such folder")
