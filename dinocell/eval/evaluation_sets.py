"""Sets to evaluate on: labelled sets in SAMCell's files, Cell Tracking Challenge folders, image and mask pairs.

Pairs are read on access, with the pixels that `dinocell segment` uses: the single channel, or the mean of several. All
are opened once at the beginning, so that a file that does not fit is found before a long computation.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from dinocell.errors import DinocellError, ImageError, require
from dinocell.eval.metrics.ctc import frame_files
from dinocell.images.image import Image
from dinocell.images.read import IMAGE_SUFFIXES, has_image_name, image_stem
from dinocell.labelled.dataset import LabelledImage, open_labelled
from dinocell.labelled.layouts import Pair, PairContent, cellpose_pairs, dsb2018_pairs, read_pair
from dinocell.labelled.masks import read_labels


@runtime_checkable
class EvaluationSet(Protocol):
    """Labelled images by index, and their names."""

    @property
    def names(self) -> list[str]:
        """The name of every image, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> LabelledImage: ...


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Pairs of image and mask files, read on access.

    Attributes
    ----------
    note
        A remark for the reader of the scores; may be empty.
    has_images
        False if there are only masks: label images can be scored on them, a model cannot.
    """

    pairs: tuple[Pair, ...]
    note: str = ""
    has_images: bool = True

    @property
    def names(self) -> list[str]:
        """The name of every image, in order."""
        return [pair.name for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: SupportsIndex) -> LabelledImage:
        pair = self.pairs[index]
        content = pair.read()
        plane = content.image.plane()
        if plane.shape != content.labels.shape:
            sizes = (" x ".join(map(str, shape)) for shape in (plane.shape, content.labels.shape))
            raise ImageError("{}: the image is {}, its mask {}; expected one size".format(pair.name, *sizes))
        return LabelledImage(
            pixels=plane[None],
            labels=content.labels,
            distance=None,
            crowd=None,
            name=pair.name,
            pixel_size_um=content.image.pixel_size_um,
        )


def open_evaluation_set(folder: Path, *, encoding: Literal["labels", "regions"] = "labels") -> EvaluationSet:
    """Open a folder of any supported layout, recognised by its files; see `_LAYOUTS`.

    A DinocellError if the layout is not supported, or a pair is incomplete or cannot be read.

    Parameters
    ----------
    encoding
        Encoding of the masks in ``masks/``: one integer per cell, or connected regions of one colour. Other layouts
        only support ``labels``.
    """
    require(folder.is_dir(), f"{folder}: no such folder")
    has_encoding = encoding == "labels" or (_FOLDERS(folder) and not _sequences(folder))
    require(has_encoding, f"{folder}: encoding {encoding!r} needs images/ and masks/")
    if (folder / "imgs.npy").exists() or next(folder.glob("*/imgs.npy"), None) is not None:
        return open_labelled(folder)
    for matches, open_layout in _LAYOUTS:
        if matches(folder) and len(pairs := open_layout(folder, encoding)):
            for index in range(len(pairs)):
                try:
                    _ = pairs[index]
                except ImageError as error:
                    raise DinocellError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
            return pairs
    raise DinocellError(
        f"{folder}: not a labelled set; expected imgs.npy and anns.npy (from 'dinocell dataset'), "
        "01_GT/SEG/man_seg000.tif (Cell Tracking Challenge), images/ and masks/ with the same names, 000_img.png and "
        "000_masks.png (Cellpose), or ID/images and ID/masks (Data Science Bowl)"
    )


def _sequences(folder: Path) -> list[tuple[Path, str, Path]]:
    """Return parent, name and mask folder of each sequence, gold before silver; ``folder`` may be one of them."""
    here = Path(os.path.abspath(folder))  # noqa: PTH100 - "." has no name, and links must not be resolved
    siblings = [here.parent / f"{here.name}{end}" / "SEG" for end in ("_GT", "_ST")]
    children = sorted([*folder.glob("*_GT/SEG"), *folder.glob("*_ST/SEG")])
    sequences: dict[tuple[Path, str], Path] = {}
    for masks in [*(path for path in siblings if path.is_dir()), *children]:
        sequences.setdefault((masks.parent.parent, masks.parent.name[:-3]), masks)
    return [(parent, name, masks) for (parent, name), masks in sequences.items()]


def _open_ctc(folder: Path, _encoding: str) -> PairSet:
    pairs: list[Pair] = []
    notes = []
    has_images = True
    for parent, sequence, masks in _sequences(folder):
        raw = frame_files(parent / sequence, "t")
        has_images &= bool(raw)
        frames = frame_files(masks, "man_seg")
        for number, mask in frames.items():
            problem = f"no image of frame {number}, whose mask is {mask}"
            require(number in raw or not raw, f"{parent / sequence}: {problem}")
            name = f"{sequence}/{mask.stem.removeprefix('man_seg')}"
            read = partial(read_pair, name, raw[number], [mask], "labels") if raw else partial(_read_mask_only, mask)
            pairs.append(Pair(name=name, read=read))
        notes += _partly_annotated(parent, sequence, frames)
    return PairSet(pairs=tuple(pairs), note="; ".join(notes), has_images=has_images)


def _partly_annotated(parent: Path, sequence: str, masks: dict[int, Path]) -> list[str]:
    """Return a note if there are fewer masks than markers, as in many gold sets."""
    markers = frame_files(parent / f"{sequence}_GT" / "TRA", "man_track")
    num_masks, num_markers = (
        sum(np.count_nonzero(np.unique(read_labels(files[number]))) for number in masks.keys() & markers.keys())
        for files in (masks, markers)
    )
    if num_masks >= num_markers:
        return []
    return [
        f"{sequence}: only {num_masks} of the {num_markers} cells that TRA marks have a mask; predictions of the "
        "others count as false in all scores but SEG"
    ]


def _read_mask_only(mask: Path) -> PairContent:
    labels = read_labels(mask)
    return PairContent(image=Image(pixels=np.zeros((1, *labels.shape), np.uint8)), labels=labels)


def _open_folders(folder: Path, encoding: str) -> PairSet:
    images = [path for path in sorted((folder / "images").iterdir()) if has_image_name(path.name)]
    names = [image_stem(path.name) for path in images]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    got = ", ".join(repeated[:_MAX_NAMES]) + " several times" if repeated else "none"
    require(names and not repeated, f"{folder / 'images'}: expected images with different names, got {got}")
    masks = find_predictions(folder / "masks", "", names)
    return PairSet(
        pairs=tuple(
            Pair(name=name, read=partial(read_pair, name, image, [mask], encoding))
            for name, image, mask in zip(names, images, masks, strict=True)
        )
    )


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: all(next(folder.glob(pattern), None) is not None for pattern in patterns)


_FOLDERS = _has("images/*", "masks/*")
# How a layout is recognised and opened; the first match counts.
_LAYOUTS: Sequence[tuple[Callable[[Path], bool], Callable[[Path, str], PairSet]]] = (
    (lambda folder: bool(_sequences(folder)), _open_ctc),
    (_FOLDERS, _open_folders),
    (_has("*_img.*", "*_masks.*"), lambda folder, _: PairSet(pairs=tuple(cellpose_pairs(folder)))),
    (_has("*/images/*", "*/masks/*"), lambda folder, _: PairSet(pairs=tuple(dsb2018_pairs(folder)))),
)


# Appended to the image's name by `dinocell segment`, Cellpose and other tools.
ENDINGS = ("", "_labels", "_cp_masks", "_masks", "_mask", "_label", "_pred", "_seg")
_MAX_NAMES = 3


def find_predictions(folder: Path, dataset: str, names: Sequence[str]) -> list[Path]:
    """Return the label image of each name: ``NAME.tif``, ``NAME_labels.tif``, ``NAME_cp_masks.png`` and the like.

    A name may itself end in an image suffix, which the label image's name need not repeat. Files are in
    ``folder/dataset`` if that exists, else in ``folder``. For ``01/007``, a frame of the Cell Tracking Challenge, the
    file may also be ``01_RES/mask007.tif``. A DinocellError if the folder or files are missing, or a name has several
    files.
    """
    inside = folder / dataset if (folder / dataset).is_dir() else folder
    files: list[Path] = []
    missing: list[str] = []
    for name in names:
        stems = dict.fromkeys((name, image_stem(name)))  # LIVECell's names include the suffix
        names_of_files = [f"{stem}{end}{suffix}" for stem in stems for end in ENDINGS for suffix in IMAGE_SUFFIXES]
        candidates = [inside / file for file in names_of_files if has_image_name(Path(file).name)]
        sequence, _, number = name.rpartition("/")
        candidates += [inside / f"{sequence}_RES" / f"mask{number}.tif"] if sequence and number.isdecimal() else []
        existing = [path for path in candidates if path.exists()]
        if len(existing) > 1:
            raise DinocellError(f"{inside}: expected one label image of {name}, got {[path.name for path in existing]}")
        missing += [] if existing else [name]
        files += existing
    if missing:
        of_set = f" of {dataset}" if dataset else ""
        example = image_stem(missing[0])
        listed = ", ".join(missing[:_MAX_NAMES]) + (", ..." if len(missing) > _MAX_NAMES else "")
        raise DinocellError(
            f"{inside}: no label image of {len(missing)} of the {len(names)} images{of_set} ({listed}); "
            f"expected files such as {example}.tif or {example}_labels.tif"
        )
    return files
