"""Labelled sets of a run: opened, or made of images and masks, and divided into training and validation."""

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

_ADVICE = {"several channels": "data.channel chooses one", "not a label image": "data.encoding says what masks are"}
# Pairs that are named where some were left out; dataset.json has them all.
_MOST_NAMES = 10


class Chosen(NamedTuple):
    """An image of one of several sets."""

    data_set: int
    image: int


class Split(NamedTuple):
    """The images to learn from and to validate on; the latter may lie in sets of their own."""

    sets: tuple[LabelledSet, ...]
    training: tuple[Chosen, ...]
    validation: tuple[Chosen, ...]

    def validation_images(self) -> list[LabelledImage]:
        """Open the validation images."""
        return [self.sets[chosen.data_set][chosen.image] for chosen in self.validation]


def open_sets(config: DataConfig, folder: Path, *, anew: bool = False) -> list[Path]:
    """Return the folders of the labelled sets; images and masks given as patterns become one below ``folder``.

    ``anew`` makes that one even if it is there: images may have changed since.

    Raises
    ------
    DinocellError
        If nothing can be used.
    """
    if config.images is None or config.masks is None:
        return [Path(each) for each in config.sets]
    output = folder / "labelled"
    if anew or not (output / "dataset.json").exists():
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
        except ImageError as error:  # in the user's words: the folder is of our making
            reason = str(error).removeprefix(f"{output}: ")
            raise DinocellError(f"data.images, data.masks: {reason}") from error
        finally:
            bar.close()
    return [output]


def _patterns(images: str, masks: str) -> tuple[Path, str, str]:
    """Return a common folder and two patterns below it."""
    parts = []
    for name, pattern in (("images", images), ("masks", masks)):
        path = Path(pattern).absolute()
        if not set("{*") & set(pattern) and not path.is_dir():
            raise DinocellError(
                f"data.{name}: no folder {path}; name a folder, or a pattern such as {name}/{{name}}.tif"
            )
        parts.append((path if "{" in pattern else path / "{name}.*").parts)
    shared = 0
    while all(shared < len(each) - 1 for each in parts) and parts[0][shared] == parts[1][shared]:
        if "{" in parts[0][shared] or "*" in parts[0][shared]:
            break
        shared += 1
    root = Path(*parts[0][:shared])
    if not root.is_dir():
        raise DinocellError(f"data.images, data.masks: no folder {root}")
    below = ["/".join(each[shared:]) for each in parts]
    return root, below[0], below[1]


def split(sets: Sequence[Path], config: DataConfig, *, seed: int, record: Path | None) -> Split:
    """Divide the images, drawn by ``seed``, and write who is where to ``record``.

    Raises
    ------
    DinocellError
        If there are too few images to divide, or, with ``strict``, if pairs were left out of the sets.
    """
    opened = [open_labelled(folder) for folder in [*sets, *map(Path, config.validation_sets)]]
    if config.strict and any(each.description.get("skipped") for each in opened):
        raise DinocellError(
            f"images and masks that cannot be used: {'; '.join(left_out(opened))}. Mend them, or leave out data.strict"
        )
    everything = [Chosen(number, image) for number, each in enumerate(opened) for image in range(len(each))]
    training = [chosen for chosen in everything if chosen.data_set < len(sets)]
    if config.validation_sets:
        validation = [c for c in everything if c.data_set >= len(sets)]
    else:
        if len(training) < 2:
            raise DinocellError(
                f"{config.images or ', '.join(map(str, sets))}: one image cannot be divided into training and "
                "validation; add images, or set data.validation_sets"
            )
        order = np.random.default_rng([seed, 0x5B117]).permutation(len(training))
        number = min(len(training) - 1, max(1, round(config.validation_share * len(training))))
        validation = [training[index] for index in sorted(order[:number])]
        training = [training[index] for index in sorted(order[number:])]
    if record is not None:
        names = {
            kind: [f"{opened[c.data_set].folder}: {opened[c.data_set].names[c.image]}" for c in chosen]
            for kind, chosen in (("training", training), ("validation", validation))
        }
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(names, indent=1, ensure_ascii=False) + "\n")
    return Split(tuple(opened), tuple(training), tuple(validation))


def left_out(sets: Sequence[LabelledSet]) -> Iterator[str]:
    """Yield for each reason why pairs of image and mask were left out when the sets were made: it, and which ones."""
    skipped = [skip for each in sets for skip in each.description.get("skipped", [])]
    for kind in dict.fromkeys(skip["kind"] for skip in skipped):
        found = [skip for skip in skipped if skip["kind"] == kind]
        more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
        names = ", ".join(skip["name"] for skip in found[:_MOST_NAMES])
        reason = "" if kind == "no cells" else f"; the first: {found[0]['reason']}"
        yield f"{kind}: {len(found)} ({names}{more}){reason}"
