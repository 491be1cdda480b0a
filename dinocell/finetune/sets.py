"""Labelled sets of a run: opened, or built from images and masks, and split into training and validation."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from dinocell.errors import DinocellError, ImageError
from dinocell.finetune.config import DataConfig
from dinocell.labelled.build import build_labelled
from dinocell.labelled.dataset import LabelledImage, LabelledSet, open_labelled
from dinocell.labelled.layouts import folder_pairs
from dinocell.runtime.files import write_atomically
from dinocell.runtime.progress import start_progress

_ADVICE = {"several channels": "choose one with data.channel", "not a label image": "see data.encoding"}
_MAX_NAMES = 10  # of skipped pairs; dataset.json lists all


class ImageIndex(NamedTuple):
    """The index of a set, and of an image in it."""

    data_set: int
    image: int


class Split(NamedTuple):
    """Training and validation images; the latter may be in sets of their own."""

    sets: tuple[LabelledSet, ...]
    training: tuple[ImageIndex, ...]
    validation: tuple[ImageIndex, ...]

    def validation_images(self) -> list[LabelledImage]:
        """Open the validation images."""
        return [self.sets[index.data_set][index.image] for index in self.validation]


def open_sets(config: DataConfig, folder: Path, *, rebuild: bool = False) -> list[Path]:
    """Return the folders of the labelled sets; ``data.images`` and ``data.masks`` are built as one under ``folder``.

    ``rebuild`` builds it even if it exists: the images may have changed.

    Raises
    ------
    DinocellError
        If nothing can be used.
    """
    if config.images is None or config.masks is None:
        return [Path(name) for name in config.sets]
    output = folder / "labelled"
    if rebuild or not (output / "dataset.json").exists():
        root, images, masks = _patterns(config.images, config.masks)
        pairs = folder_pairs(root, images=images, masks=masks, encoding=config.encoding)
        channel = int(config.channel) if config.channel and config.channel.isdecimal() else config.channel
        bar = start_progress(Console(stderr=True), total_steps=len(pairs), batch_size=1)
        try:
            build_labelled(
                pairs,
                output,
                source=str(root),
                channel=channel,
                overwrite=output.exists(),
                advice=_ADVICE,
                progress=bar.advance,
            )
        except ImageError as error:  # the folder is not one that the user knows
            reason = str(error).removeprefix(f"{output}: ")
            raise DinocellError(f"data.images, data.masks: {reason}") from error
        finally:
            bar.close()
    return [output]


def _patterns(images: str, masks: str) -> tuple[Path, str, str]:
    """Return a common folder and two patterns relative to it."""
    parts = []
    for name, pattern in (("images", images), ("masks", masks)):
        path = Path(pattern).absolute()
        if not set("{*") & set(pattern) and not path.is_dir():
            raise DinocellError(
                f"data.{name}: no folder {path}; set a folder, or a pattern such as {name}/{{name}}.tif"
            )
        parts.append((path if "{" in pattern else path / "{name}.*").parts)
    shared = 0
    while all(shared < len(path) - 1 for path in parts) and parts[0][shared] == parts[1][shared]:
        if "{" in parts[0][shared] or "*" in parts[0][shared]:
            break
        shared += 1
    root = Path(*parts[0][:shared])
    if not root.is_dir():
        raise DinocellError(f"data.images, data.masks: no folder {root}")
    relative = ["/".join(path[shared:]) for path in parts]
    return root, relative[0], relative[1]


def split(sets: Sequence[Path], config: DataConfig, *, seed: int, record: Path | None) -> Split:
    """Split the images at random by ``seed``, and write their names to ``record``.

    Raises
    ------
    DinocellError
        If there are too few images, or, with ``strict``, if pairs were skipped when the sets were built.
    """
    opened = [open_labelled(folder) for folder in [*sets, *map(Path, config.validation_sets)]]
    if config.strict and any(data_set.description.get("skipped") for data_set in opened):
        raise DinocellError(
            f"images and masks that cannot be used: {'; '.join(skipped_pairs(opened))}. Fix them, or remove data.strict"
        )
    indices = [ImageIndex(index, image) for index, data_set in enumerate(opened) for image in range(len(data_set))]
    training = [index for index in indices if index.data_set < len(sets)]
    if config.validation_sets:
        validation = [index for index in indices if index.data_set >= len(sets)]
    else:
        if len(training) < 2:
            raise DinocellError(
                f"{config.images or ', '.join(map(str, sets))}: one image cannot be split into training and "
                "validation; add images, or set data.validation_sets"
            )
        order = np.random.default_rng([seed, 0x5B117]).permutation(len(training))
        num_validation = min(len(training) - 1, max(1, round(config.validation_share * len(training))))
        validation = [training[place] for place in sorted(order[:num_validation])]
        training = [training[place] for place in sorted(order[num_validation:])]
    if record is not None:
        names = {
            part: [f"{opened[index.data_set].folder}: {opened[index.data_set].names[index.image]}" for index in members]
            for part, members in (("training", training), ("validation", validation))
        }
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(names, indent=1, ensure_ascii=False) + "\n")
    return Split(tuple(opened), tuple(training), tuple(validation))


def skipped_pairs(sets: Sequence[LabelledSet]) -> Iterator[str]:
    """Yield a line for each reason why pairs of image and mask were skipped when the sets were built."""
    skipped = [skip for data_set in sets for skip in data_set.description.get("skipped", [])]
    for kind in dict.fromkeys(skip["kind"] for skip in skipped):
        same = [skip for skip in skipped if skip["kind"] == kind]
        more = f" and {len(same) - _MAX_NAMES} more" if len(same) > _MAX_NAMES else ""
        names = ", ".join(skip["name"] for skip in same[:_MAX_NAMES])
        reason = "" if kind == "no cells" else f"; the first: {same[0]['reason']}"
        yield f"{kind}: {len(same)} ({names}{more}){reason}"
