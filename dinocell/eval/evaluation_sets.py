"""What can be scored on: labelled sets in SAMCell's files, Cell Tracking Challenge folders, image and mask pairs.

Pairs are read when they are asked for, with the pixels that `dinocell segment` would see: the one channel, or the mean
of several. All are opened once first, so that a file that does not fit is found before the network's long work.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from dinocell.errors import DinocellError, ImageError
from dinocell.eval.metrics.ctc_files import frame_files
from dinocell.images.image import Image
from dinocell.images.read import IMAGE_SUFFIXES, has_image_name, image_stem
from dinocell.labelled.dataset import LabelledImage, open_labelled
from dinocell.labelled.layouts import Pair, PairContent, cellpose_pairs, dsb2018_pairs, read_pair
from dinocell.labelled.masks import read_labels


@runtime_checkable
class EvaluationSet(Protocol):
    """Labelled images by number, and their names."""

    @property
    def names(self) -> list[str]:
        """The name of every image, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> LabelledImage: ...


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Image and mask files that are read one by one.

    Attributes
    ----------
    note
        What whoever reads the scores has to know; empty if there is nothing.
    has_images
        False where there are masks alone: label images can be scored on them, a model cannot.
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
    """Open a folder of any layout that is known, by what is in it; see `_LAYOUTS`.

    Parameters
    ----------
    encoding
        Of the masks in ``images/`` with ``masks/``: one number a cell, or connected regions of one colour. Other
        layouts have their own, and take none but ``labels``.

    Raises
    ------
    DinocellError
        If the layout is not known, or a pair is incomplete or cannot be read.
    """
    if not folder.is_dir():
        raise DinocellError(f"{folder}: no such folder")
    if encoding != "labels" and (_sequences(folder) or not _FOLDERS(folder)):
        raise DinocellError(f"{folder}: masks encoded as {encoding} are read from images/ with masks/ only")
    if (folder / "imgs.npy").exists() or next(folder.glob("*/imgs.npy"), None) is not None:
        return open_labelled(folder)
    for is_one, opened in _LAYOUTS:
        if is_one(folder):
            found = opened(folder) if opened is not _open_folders else _open_folders(folder, encoding)
            for index in range(len(found)):
                try:
                    _ = found[index]
                except ImageError as error:
                    raise DinocellError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
            return found
    raise DinocellError(
        f"{folder}: no labelled set; expected imgs.npy and anns.npy (from 'dinocell dataset'), 01_GT/SEG (Cell "
        "Tracking Challenge), images/ and masks/ with the same names, 000_img.png and 000_masks.png (Cellpose), or "
        "ID/images and ID/masks (Data Science Bowl)"
    )


def _sequences(folder: Path) -> list[tuple[Path, str, Path]]:
    """Return parent, name and folder of masks of each sequence, gold before silver; the folder may be one of them."""
    here = Path(os.path.abspath(folder))  # noqa: PTH100 - "." has no name, and links keep theirs
    beside = [here.parent / f"{here.name}{end}" / "SEG" for end in ("_GT", "_ST")]
    below = sorted([*folder.glob("*_GT/SEG"), *folder.glob("*_ST/SEG")])
    found: dict[tuple[Path, str], Path] = {}
    for masks in [*(each for each in beside if each.is_dir()), *below]:
        found.setdefault((masks.parent.parent, masks.parent.name[:-3]), masks)
    return [(parent, name, masks) for (parent, name), masks in found.items()]


def _open_ctc(folder: Path) -> PairSet:
    pairs: list[Pair] = []
    notes = []
    has_images = True
    for parent, sequence, masks in _sequences(folder):
        raw = frame_files(parent / sequence, "t")
        has_images &= bool(raw)
        frames = frame_files(masks, "man_seg")
        for number, mask in frames.items():
            if raw and number not in raw:
                raise DinocellError(f"{parent / sequence}: no image of frame {number}, which {mask} is the mask of")
            name = f"{sequence}/{mask.stem.removeprefix('man_seg')}"
            read = partial(read_pair, name, raw[number], [mask], "labels") if raw else partial(_mask_alone, mask)
            pairs.append(Pair(name=name, read=read))
        notes += _partly_annotated(parent, sequence, frames)
    if not pairs:
        raise DinocellError(f"{folder}: no man_seg*.tif in its SEG folders")
    return PairSet(pairs=tuple(pairs), note="; ".join(notes), has_images=has_images)


def _partly_annotated(parent: Path, sequence: str, masks: dict[int, Path]) -> list[str]:
    """Say so if the masks show fewer cells than the markers, as many gold sets do."""
    markers = frame_files(parent / f"{sequence}_GT" / "TRA", "man_track")
    both = [(masks[number], markers[number]) for number in masks if number in markers]
    num_masks, num_markers = (sum(_num_cells(pair[k]) for pair in both) for k in (0, 1))
    if num_masks >= num_markers:
        return []
    return [
        f"{sequence}: only {num_masks} of the {num_markers} cells that TRA marks have a mask; all scores but SEG count "
        "the others as false where they are found"
    ]


def _num_cells(path: Path) -> int:
    return int(np.count_nonzero(np.unique(read_labels(path))))


def _mask_alone(mask: Path) -> PairContent:
    labels = read_labels(mask)
    return PairContent(image=Image(pixels=np.zeros((1, *labels.shape), np.uint8)), labels=labels)


def _open_folders(folder: Path, encoding: str = "labels") -> PairSet:
    images = [path for path in sorted((folder / "images").iterdir()) if has_image_name(path.name)]
    names = [image_stem(path.name) for path in images]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DinocellError(f"{folder / 'images'}: several images are called {twice}; expected one mask for each name")
    if not images:
        raise DinocellError(f"{folder / 'images'}: no image there")
    masks = find_predictions(folder / "masks", "", names)
    return PairSet(
        pairs=tuple(
            Pair(name=name, read=partial(read_pair, name, image, [mask], encoding))
            for name, image, mask in zip(names, images, masks, strict=True)
        )
    )


def _open_cellpose(folder: Path) -> PairSet:
    return PairSet(pairs=tuple(cellpose_pairs(folder)))


def _open_dsb2018(folder: Path) -> PairSet:
    return PairSet(pairs=tuple(dsb2018_pairs(folder)))


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: all(next(folder.glob(pattern), None) is not None for pattern in patterns)


_FOLDERS = _has("images/*", "masks/*")
# In this order: what is in the folder, and how it is opened then.
_LAYOUTS: Sequence[tuple[Callable[[Path], bool], Callable[[Path], PairSet]]] = (
    (lambda folder: bool(_sequences(folder)), _open_ctc),
    (_FOLDERS, _open_folders),
    (_has("*_img.*", "*_masks.*"), _open_cellpose),
    (_has("*/images/*", "*/masks/*"), _open_dsb2018),
)


# --- predicted_files -----------------------------------------------------------------------------------------------
#
# Which file of a folder is a tool's label image of which image.

# What tools append to the image's name: nothing, `dinocell segment`, Cellpose, and habits of others.
ENDINGS = ("", "_labels", "_cp_masks", "_masks", "_mask", "_label", "_pred", "_seg")
_NAMED = 3


def find_predictions(folder: Path, dataset: str, names: Sequence[str]) -> list[Path]:
    """Return the label image of each name: ``NAME.tif``, ``NAME_labels.tif``, ``NAME_cp_masks.png`` and the like.

    A name may itself have the ending of an image, which the label image's need not repeat. They lie in
    ``folder/dataset`` if there is such a folder, else in ``folder``. Of ``01/007``, a frame of the Cell Tracking
    Challenge, it may be ``01_RES/mask007.tif`` as well.

    Raises
    ------
    DinocellError
        If the folder or files are missing, or a name has several files.
    """
    if not folder.is_dir():
        raise DinocellError(f"{folder}: expected a folder of label images, there is none")
    inside = folder / dataset if (folder / dataset).is_dir() else folder
    files: list[Path] = []
    missing: list[str] = []
    for name in names:
        stems = dict.fromkeys((name, image_stem(name)))  # LIVECell's names are whole: a.tif
        possible = [f"{stem}{end}{suffix}" for stem in stems for end in ENDINGS for suffix in IMAGE_SUFFIXES]
        candidates = [inside / each for each in possible if has_image_name(Path(each).name)]
        sequence, _, number = name.rpartition("/")
        candidates += [inside / f"{sequence}_RES" / f"mask{number}.tif"] if sequence and number.isdecimal() else []
        there = [path for path in candidates if path.exists()]
        if len(there) > 1:
            raise DinocellError(f"{inside}: expected one label image of {name}, got {there[0].name}, {there[1].name}")
        missing += [] if there else [name]
        files += there
    if missing:
        of_set = f" of {dataset}" if dataset else ""
        example = image_stem(missing[0])
        listed = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise DinocellError(
            f"{inside}: no label image of {len(missing)} of the {len(names)} images{of_set} ({listed}); "
            f"expected files such as {example}.tif or {example}_labels.tif"
        )
    return files
