"""The images of the demo: fields generated as a microscope would leave them, or the user's own."""

import csv
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocell.data_shards.build.shard import ShardSettings
from dinocell.data_shards.build.tiles import TileSettings
from dinocell.data_shards.build.write import build
from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.sources.field import Source
from dinocell.data_shards.sources.files import MultichannelSource
from dinocell.data_shards.sources.table import LabelledSource
from dinocell.demo.synthetic.field import CELL_TYPES, SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.images.read import IMAGE_SUFFIXES, has_image_name
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.layouts import Pair, folder_pairs, read_pair

# Of the generated images, whose cells are about 36 px across: what a 20x objective gives.
PIXEL_SIZE_UM = 0.65
# Of the user's labelled images, one in five is kept unseen for the scores, and at least one.
_UNSEEN_SHARE = 0.2
_SHOWN_WITHOUT_MASKS = 4


class Material(NamedTuple):
    """What the later stages work on; ``None`` where there is nothing of the kind."""

    shards: tuple[Path, ...]
    channels: tuple[str, ...]
    train: Path | None  # labelled set
    unseen: Path | None  # labelled set
    unseen_images: tuple[Path, ...]
    class_shards: tuple[Path, Path] | None  # to learn classes from, and to test on


@dataclass(frozen=True, kw_only=True)
class FieldCounts:
    """How many generated fields there are of each kind.

    Attributes
    ----------
    unlabelled
        Fields for pretraining, each of cells of one class, whose name is kept for the kNN probe alone.
    labelled, unseen
        Fields with masks, of mixed classes: to learn from, and to be scored on. The labelled ones also go into
        pretraining.
    classes
        Further fields of one class each, which the kNN probe has to name.
    """

    unlabelled: int = 120
    labelled: int = 40
    unseen: int = 10
    classes: int = 40

    def __post_init__(self) -> None:
        if self.labelled < 2 or self.unseen < 1:
            raise ValueError(f"expected at least 2 labelled and 1 unseen fields, got {self.labelled} and {self.unseen}")
        if min(self.unlabelled, self.classes) < len(CELL_TYPES):
            raise ValueError(f"unlabelled and classes: expected at least {len(CELL_TYPES)}, one a class of cells")


def generate(
    folder: Path,
    counts: FieldCounts,
    field: SyntheticConfig,
    *,
    seed: int,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Write the generated fields as OME-TIFF, with label masks where they are mixed, and a table of classes."""
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    jobs = [_Job(kind, number) for kind, total in vars(counts).items() for number in range(total)]
    write = partial(_write_field, folder, field, seed)
    for kind in vars(counts):
        (folder / "images" / kind).mkdir(parents=True)
    for kind in ("labelled", "unseen"):
        (folder / "masks" / kind).mkdir(parents=True)
    if workers == 1:
        for done, job in enumerate(jobs, start=1):
            write(job)
            progress(done)
    else:
        with ProcessPoolExecutor(workers) as pool:
            for done, _ in enumerate(pool.map(write, jobs, chunksize=4), start=1):
                progress(done)
    with (folder / "classes.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "cell_class"))
        for job in jobs:
            if job.kind in ("unlabelled", "classes"):
                table.writerow((f"{job.name}.ome.tif", CELL_TYPES[job.number % len(CELL_TYPES)].name))


class _Job(NamedTuple):
    kind: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.number:03d}"


def _write_field(folder: Path, field: SyntheticConfig, seed: int, job: _Job) -> None:
    kinds = ("unlabelled", "labelled", "unseen", "classes")
    if job.kind in ("unlabelled", "classes"):
        weights = tuple(float(number == job.number % len(CELL_TYPES)) for number in range(len(CELL_TYPES)))
        field = replace(field, num_classes=len(CELL_TYPES), class_weights=weights)
    made = make_field(np.random.SeedSequence((seed, kinds.index(job.kind), job.number)), field)
    write_tiff(
        folder / "images" / job.kind / f"{job.name}.ome.tif",
        made.pixels,
        channel_names=made.channel_names,
        pixel_size_um=PIXEL_SIZE_UM,
    )
    if job.kind in ("labelled", "unseen"):
        write_labels(folder / "masks" / job.kind / f"{job.name}.tif", made.labels, pixel_size_um=PIXEL_SIZE_UM)


def generated_material(folder: Path, *, workers: int) -> Material:
    """Build shards and labelled sets from what `generate` wrote; sets that stand are kept."""
    images = folder / "images"
    table = str(folder / "classes.csv")
    source = LabelledSource(
        source=MultichannelSource(input=str(images / "unlabelled")), labels=table, labels_key=("image=id",)
    )
    _build_shards(source, folder / "shards" / "unlabelled", workers)
    manifest = _build_shards(
        MultichannelSource(input=str(images / "labelled")), folder / "shards" / "labelled", workers
    )
    known = LabelledSource(
        source=MultichannelSource(input=str(images / "classes")), labels=table, labels_key=("image=id",)
    )
    _build_shards(known, folder / "shards" / "classes", workers)
    for kind in ("labelled", "unseen"):
        pairs = folder_pairs(folder, images=f"images/{kind}/{{name}}.ome.tif", masks=f"masks/{kind}/{{name}}.tif")
        _build_labelled(pairs, folder / "sets" / kind, "generated by the demo")
    return Material(
        shards=(folder / "shards" / "unlabelled", folder / "shards" / "labelled"),
        channels=tuple(manifest.channels),
        train=folder / "sets" / "labelled",
        unseen=folder / "sets" / "unseen",
        unseen_images=tuple(sorted((images / "unseen").iterdir())),
        class_shards=(folder / "shards" / "unlabelled", folder / "shards" / "classes"),
    )


def own_material(data: Path, folder: Path, *, workers: int) -> Material:
    """Build shards, and labelled sets if there are masks, from the user's folder.

    Images lie in ``data/images`` with masks of the same stem in ``data/masks``, or, without masks, in ``data`` itself.
    A file is a field, with one channel or several.

    Raises
    ------
    DinocellError
        If there are fewer than two images, or two images or masks of one stem.
    """
    images = data / "images" if (data / "images").is_dir() else data
    files = _by_stem(images)
    masks = _by_stem(data / "masks") if (data / "masks").is_dir() else {}
    if len(files) < 2:
        raise DinocellError(f"{images}: expected at least 2 images ({', '.join(IMAGE_SUFFIXES)}), found {len(files)}")
    labelled = [name for name in files if name in masks]
    unseen = _every_fifth(labelled)
    train = [name for name in labelled if name not in unseen]
    own = folder / "own"
    shutil.rmtree(own, ignore_errors=True)
    _link(own / "seen", [path for name, path in files.items() if name not in unseen])
    manifest = _build_shards(MultichannelSource(input=str(own / "seen")), folder / "shards" / "own", workers)
    sets: dict[str, Path] = {}
    for kind, names in (("train", train), ("unseen", unseen)):
        if unseen:
            reads = {name: partial(read_pair, name, files[name], [masks[name]], "labels") for name in names}
            pairs = [Pair(name=name, read=read) for name, read in reads.items()]
            sets[kind] = _build_labelled(pairs, folder / "sets" / kind, str(data))
    shown = [files[name] for name in unseen] or list(files.values())[:_SHOWN_WITHOUT_MASKS]
    return Material(
        shards=(folder / "shards" / "own",),
        channels=tuple(manifest.channels),
        train=sets.get("train"),
        unseen=sets.get("unseen"),
        unseen_images=tuple(shown),
        class_shards=None,
    )


def _every_fifth(names: list[str]) -> list[str]:
    """Return the labelled images that are kept for the scores; none if there would be fewer than two to learn from."""
    number = max(1, round(len(names) * _UNSEEN_SHARE))
    return names[:: max(1, len(names) // number)][:number] if len(names) > 2 else []


def _by_stem(folder: Path) -> dict[str, Path]:
    """Return the pictures of a folder by their names without what says the format (``.tif``, ``.ome.tif``)."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not has_image_name(path.name):
            continue
        stem = path.name
        while stem.lower().endswith((*IMAGE_SUFFIXES, ".ome")):
            stem = stem.rpartition(".")[0]
        if stem in found:
            raise DinocellError(f"{found[stem]} and {path}: two pictures of one name; rename or remove one of them")
        found[stem] = path
    return found


def _link(folder: Path, files: list[Path]) -> None:
    folder.mkdir(parents=True)
    for path in files:
        (folder / path.name).symlink_to(path.resolve())


def _build_shards(source: Source, output: Path, workers: int) -> Manifest:
    """Build a set of whole fields; one that stands is read, not built again."""
    settings = ShardSettings(tiles=TileSettings(size=0, min_size=64, min_structure=0))
    manifest = build(source, output, settings=settings, samples_per_shard=32, workers=workers)
    assert manifest is not None  # only a part of a build has none
    return manifest


def _build_labelled(pairs: list[Pair], output: Path, source: str) -> Path:
    build_labelled(pairs, output, source=source, channel="mean", keep_empty=True, overwrite=True)
    return output


# --- config --------------------------------------------------------------------------------------------------------
#
# What a recipe of the demo holds.


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo.

    Attributes
    ----------
    output
        Folder of everything that the demo makes.
    data
        A folder of your own images instead of generated ones: ``images/`` and, for scores, ``masks/`` with the same
        names; or just images.
    weights
        A backbone to fine-tune instead of pretraining one: any source of `load_backbone`.
    pretrain_steps, finetune_epochs
        How long the two trainings take.
    counts, field
        How many fields are generated, and how they look.
    """

    output: Path = Path("demo")
    data: Path | None = None
    weights: str | None = None
    seed: int = 0
    pretrain_steps: int = 100
    finetune_epochs: int = 5
    counts: FieldCounts = field(default_factory=FieldCounts)
    field: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        if self.pretrain_steps < 1 or self.finetune_epochs < 1:
            raise ValueError("pretrain_steps and finetune_epochs: expected at least 1")
        if min(self.field.size) < 64:
            raise ValueError(f"field.size: expected at least 64 px a side, got {self.field.size}")
