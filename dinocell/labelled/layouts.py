"""Where image and mask pairs come from: LIVECell, Cellpose, Cell Tracking Challenge, DSB2018, any pattern of names.

Each function lists the pairs of a folder without opening them. A pair that lacks its image or its mask is listed too:
reading it raises, and the builder counts it.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Integer

from dinocell.errors import DinocellError
from dinocell.images.image import Image
from dinocell.images.read import IMAGE_SUFFIXES, read_image
from dinocell.images.storage import Listed, list_files
from dinocell.labelled.masks import ENCODINGS, PairError, draw, read_coco, read_instances, read_labels, read_regions


@dataclass(frozen=True, kw_only=True, eq=False)
class PairContent:
    """An image, its labels, and what was counted on the way (overlapping pixels, crowd regions...)."""

    image: Image
    labels: Integer[np.ndarray, "h w"]
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image with its mask, not opened yet. ``read`` raises ImageError (PairError where the pair itself is wrong)."""

    name: str
    read: Callable[[], PairContent]


def livecell_pairs(folder: Path, *, split: str | None = None, annotations: Path | None = None) -> list[Pair]:
    """List the images of a COCO file; they are found by name anywhere below the folder (LIVECell: one folder a type).

    Parameters
    ----------
    split
        ``train``, ``val`` or ``test``: takes ``livecell_coco_<split>.json``, wherever it lies below the folder.
    annotations
        The JSON file, instead of looking for it; without both, the only JSON file below the folder.

    Raises
    ------
    ImageError
        If there is no such file, or it is not COCO JSON.
    """
    _check_folder(folder)
    path = annotations or _annotation_file(folder, split)
    images, by_image = read_coco(path)
    places: dict[str, list[Path]] = {}
    for file in _files(folder):
        if file.name.lower().endswith(IMAGE_SUFFIXES):
            places.setdefault(file.name.rpartition("/")[2], []).append(Path(file.path))
    pairs = []
    for image in images:
        # By name, never by joining: a file_name such as ../../x must not lead out of the folder.
        wanted = _nfc(image["file_name"].replace("\\", "/"))
        found = places.get(wanted.rpartition("/")[2], [])
        if len(found) > 1:
            found = [place for place in found if _nfc(place.as_posix()).endswith("/" + wanted)] or found
        read = partial(_read_coco_pair, wanted, found, image, by_image[image["id"]])
        pairs.append(Pair(name=wanted, read=read))
    return pairs


def cellpose_pairs(folder: Path, *, split: str | None = None) -> list[Pair]:
    """List Cellpose's numbered pairs: ``000_img.png`` with ``000_masks.png``, in ``folder/<split>`` if that exists.

    Raises
    ------
    ImageError
        If there is not one.
    """
    _check_folder(folder)
    folder = folder / split if split and (folder / split).is_dir() else folder
    return folder_pairs(folder, images="{name}_img.*", masks="{name}_masks.*")


def ctc_pairs(folder: Path, *, truth: str = "gold", sequences: Sequence[str] = ()) -> list[Pair]:
    """List the frames of Cell Tracking Challenge sequences that have a segmentation.

    ``01/t000.tif`` goes with ``01_GT/SEG/man_seg000.tif`` (``gold``: by hand, in many sequences only some cells or
    frames) or ``01_ST/SEG/man_seg000.tif`` (``silver``: by fused algorithms, whole frames). Masks of single slices of
    three-dimensional sequences are not listed.

    Raises
    ------
    ImageError
        If there is no such sequence.
    """
    _check_folder(folder)
    if truth not in ("gold", "silver"):
        raise ValueError(f"truth: expected gold or silver, got {truth!r}")
    suffix = {"gold": "_GT", "silver": "_ST"}[truth]
    seg_folders = sorted(path / "SEG" for path in folder.glob(f"*{suffix}") if (path / "SEG").is_dir())
    seg_folders = [path for path in seg_folders if not sequences or path.parent.name.removesuffix(suffix) in sequences]
    pairs = []
    for seg in seg_folders:
        sequence = seg.parent.name.removesuffix(suffix)
        raw = {_frame_number(path, r"t(\d+)"): path for path in sorted((folder / sequence).glob("t*.tif*"))}
        masks = {_frame_number(path, r"man_seg(\d+)"): path for path in sorted(seg.glob("man_seg*.tif*"))}
        for number, mask in sorted((number, mask) for number, mask in masks.items() if number is not None):
            name = f"{sequence}/{mask.stem.removeprefix('man_seg')}"
            pairs.append(Pair(name=name, read=partial(read_pair, name, raw.get(number), [mask], "labels")))
    if not pairs:
        raise PairError("no pairs", f"{folder}: no {suffix}/SEG/man_seg*.tif of a sequence, such as 01{suffix}/SEG")
    return pairs


def dsb2018_pairs(folder: Path) -> list[Pair]:
    """List the images of the 2018 Data Science Bowl: ``<id>/images/<id>.png`` with ``<id>/masks/*.png``, one a nucleus.

    Raises
    ------
    ImageError
        If there is not one.
    """
    _check_folder(folder)
    pairs = []
    for images in sorted(folder.glob("*/images")):
        name = images.parent.name
        found = [path for path in sorted(_visible(images.iterdir())) if path.suffix.lower() in IMAGE_SUFFIXES]
        masks = sorted(_visible(images.parent.glob("masks/*")))
        masks = [path for path in masks if path.suffix.lower() in IMAGE_SUFFIXES]
        pairs.append(Pair(name=name, read=partial(_read_matched, name, found, masks, "instances")))
    if not pairs:
        raise PairError("no pairs", f"{folder}: no <id>/images/<id>.png in it")
    return pairs


def folder_pairs(folder: Path, *, images: str, masks: str, encoding: str = "labels") -> list[Pair]:
    """List pairs by two patterns, such as ``imgs/{name}.tif`` and ``masks/{name}.png``.

    Parameters
    ----------
    images, masks
        Paths below the folder, linked folders too; what is hidden is left out. ``{field}`` stands for a part of one
        folder or file name, and must be the same text wherever it occurs; ``*`` for any part that does not matter.
        Every field of ``images`` occurs in ``masks``.
    encoding
        ``labels``: one number a cell. ``regions``: connected regions of one colour. ``instances``: one file a cell,
        told apart by a further field or ``*`` of the pattern, as in ``{name}/masks/{cell}.png``.

    Raises
    ------
    ImageError
        If no image fits the pattern.
    """
    _check_folder(folder)
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")
    image_pattern, mask_pattern = _compiled(images), _compiled(masks)
    fields = list(image_pattern.groupindex)
    if not fields or not set(fields) <= set(mask_pattern.groupindex):
        raise DinocellError(
            f"patterns {images!r} and {masks!r}: expected a field such as {{name}} in the first, "
            "and each of its fields in the second"
        )
    found: dict[tuple[str, ...], tuple[list[Path], list[Path]]] = {}
    # A name that fits both ('{name}.tif' fits 'a_mask.tif' too) belongs to the pattern that says more about it.
    order = sorted(((0, image_pattern, images), (1, mask_pattern, masks)), key=lambda entry: -_num_literal(entry[2]))
    for file in _files_of_patterns(folder, (images, masks)):
        for kind, pattern, _ in order:
            match = pattern.fullmatch(file.name)
            if match:
                key = tuple(str(match[field]) for field in fields)
                found.setdefault(key, ([], []))[kind].append(Path(file.path))
                break
    if not any(of_image for of_image, _ in found.values()):
        raise PairError("no pairs", f"{folder}: no file fits the pattern {images!r}")
    return [
        Pair(name=(name := "/".join(key)), read=partial(_read_matched, name, *found[key], encoding))
        for key in sorted(found)
    ]


def _read_matched(name: str, images: list[Path], masks: list[Path], encoding: str) -> PairContent:
    if len(images) > 1:
        _fail("several files", f"{name}: {len(images)} images of that name, such as {images[0]} and {images[1]}")
    if len(masks) > 1 and encoding != "instances":
        _fail("several files", f"{name}: {len(masks)} masks of that name, such as {masks[0]} and {masks[1]}")
    return read_pair(name, images[0] if images else None, masks, encoding)


def read_pair(name: str, image_path: Path | None, masks: list[Path], encoding: str) -> PairContent:
    """Read an image and its mask, of one of the `ENCODINGS`.

    Raises
    ------
    ImageError
        If one is missing (PairError) or cannot be read.
    """
    if image_path is None:
        _fail("no image", f"{name}: {masks[0]} has no image" if masks else f"{name}: no image")
    if not masks:
        _fail("no mask", f"{image_path}: no mask goes with it")
    notes: Counter[str] = Counter()
    image = read_image(image_path)
    if encoding == "instances":
        labels = read_instances(masks, notes)
    else:
        labels = read_regions(masks[0]) if encoding == "regions" else read_labels(masks[0])
    return PairContent(image=image, labels=labels, notes=notes)


def _read_coco_pair(
    name: str, found: list[Path], record: dict[str, Any], annotations: list[dict[str, Any]]
) -> PairContent:
    if not found:
        _fail("no image", f"{name}: annotated, but not below the folder")
    if len(found) > 1:
        _fail("several files", f"{name}: {len(found)} files of that name, such as {found[0]} and {found[1]}")
    notes: Counter[str] = Counter()
    image = read_image(found[0])
    shape = (image.pixels.shape[1], image.pixels.shape[2])
    meant = (record.get("height", shape[0]), record.get("width", shape[1]))
    if meant != shape:
        _fail("sizes differ", f"{found[0]}: {shape[0]} x {shape[1]}, annotated as {meant[0]} x {meant[1]}")
    try:
        labels = draw(annotations, shape, notes)
    except PairError as error:
        _fail(error.kind, f"{name}: {error}")
    return PairContent(image=image, labels=labels, notes=notes)


def _fail(kind: str, message: str) -> NoReturn:
    raise PairError(kind, message)


def _annotation_file(folder: Path, split: str | None) -> Path:
    name = f"livecell_coco_{split}.json" if split else "*.json"
    found = [Path(file.path) for file in _files(folder) if fnmatchcase(file.name.rpartition("/")[2], name)]
    if len(found) == 1:
        return found[0]
    what = "no" if not found else f"{len(found)} files"
    raise PairError("no pairs", f"{folder}: {what} {name} below it; name the file with --annotations")


def _frame_number(path: Path, pattern: str) -> int | None:
    match = re.fullmatch(pattern, path.stem)
    return int(match[1]) if match else None


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(_regex_parts(_nfc(pattern).removeprefix("./"))))


def _regex_parts(pattern: str) -> Iterator[str]:
    seen: set[str] = set()
    for part in re.split(r"(\{\w+\}|\*)", pattern):
        if part == "*":
            yield "[^/]*"
        elif part[:1] == "{" and part.endswith("}"):
            name = part[1:-1]
            if not name.isidentifier():
                raise DinocellError(f"pattern {pattern!r}: {part} is no field name; letters first, then digits")
            yield f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"
            seen.add(name)
        else:
            yield re.escape(part)


def _num_literal(pattern: str) -> int:
    return len(re.sub(r"\{\w+\}|\*", "", pattern))


def _files(folder: Path) -> list[Listed]:
    """List what lies below a folder and folders linked into it, without hidden files; a ``.zarr`` is one image."""
    return list_files(folder, folders_as_files=(".zarr",))


def _files_of_patterns(folder: Path, patterns: Sequence[str]) -> list[Listed]:
    """List what patterns may fit: what lies below the folders that they name in full.

    Nothing else is looked at: images and masks on two disks have only the root in common.
    """
    found: dict[str, Listed] = {}
    for pattern in patterns:
        named = _named_folder(folder, pattern)
        if named is not None:
            place, above = named
            found |= {(name := above + file.name): Listed(name, file.path) for file in _files(place)}
    return sorted(found.values())


def _named_folder(folder: Path, pattern: str) -> tuple[Path, str] | None:
    """Return the last folder that a pattern names in full, and its name below ``folder``; None if it is not there."""
    place, above = folder, ""
    for part in _nfc(pattern).removeprefix("./").split("/")[:-1]:
        if set("{*") & set(part):
            break
        inside = place / part
        if not inside.is_dir():  # or there is one in another Unicode spelling
            same = [path for path in place.iterdir() if _nfc(path.name) == part and path.is_dir()]
            if not same:
                return None
            inside = same[0]
        place, above = inside, f"{above}{part}/"
    return place, above


def _visible(paths: Iterable[Path]) -> Iterator[Path]:
    """Leave out hidden files: ``._000_img.png`` is what macOS writes beside an image on a foreign disk."""
    return (path for path in paths if not path.name.startswith("."))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise PairError("no pairs", f"{folder}: no such folder")


def _nfc(text: str) -> str:
    """Return a name in one spelling: macOS writes ö as o and a dot pair, Linux as one letter."""
    return unicodedata.normalize("NFC", text)
