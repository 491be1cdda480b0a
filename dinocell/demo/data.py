"""The images of the demo: generated fields in a microscope's file layout, or the user's own."""

import csv
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocell.data_shards.build import build
from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.field import Source
from dinocell.data_shards.sources.files import MultichannelSource
from dinocell.data_shards.sources.table import LabelledSource
from dinocell.demo.synthetic.field import CELL_LINES, SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.images.read import IMAGE_SUFFIXES, has_image_name
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.layouts import Pair, folder_pairs, read_pair

# Pixel size of the generated images, whose cells have a diameter of about 64 px, as with a 40x objective.
PIXEL_SIZE_UM = 0.325
# One in five of the user's labelled images, and at least one, is held out for the scores.
_UNSEEN_SHARE = 0.2
_SHOWN_WITHOUT_MASKS = 4


class DemoData(NamedTuple):
    """Inputs of the later stages; ``None`` where there are none."""

    shards: tuple[Path, ...]
    channels: tuple[str, ...]
    train: Path | None  # labelled set
    unseen: Path | None  # labelled set
    unseen_images: tuple[Path, ...]
    class_shards: tuple[Path, Path] | None  # training and test fields of the kNN probe


@dataclass(frozen=True, kw_only=True)
class FieldCounts:
    """Numbers of generated fields.

    Attributes
    ----------
    unlabelled
        Fields for pretraining, each with cells of one class; the class is used only by the kNN probe.
    labelled, unseen
        Fields with masks and cells of several classes, for training and for the scores. The labelled ones are also
        used for pretraining.
    classes
        Further fields of one class each: the test set of the kNN probe.
    """

    unlabelled: int = 480
    labelled: int = 6
    unseen: int = 12
    classes: int = 160

    def __post_init__(self) -> None:
        if self.labelled < 2 or self.unseen < 1:
            raise ValueError(f"expected at least 2 labelled and 1 unseen fields, got {self.labelled} and {self.unseen}")
        if min(self.unlabelled, self.classes) < len(CELL_LINES):
            raise ValueError(f"unlabelled and classes: expected at least {len(CELL_LINES)}, one per cell class")


def generate(
    folder: Path,
    counts: FieldCounts,
    field: SyntheticConfig,
    *,
    seed: int,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Write the generated fields as OME-TIFF, label masks of those with several classes, and a table of classes."""
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
                cell_type = field.cell_types[job.number % field.num_classes]
                table.writerow((f"{job.name}.ome.tif", cell_type.name))


class _Job(NamedTuple):
    kind: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.number:03d}"


def _write_field(folder: Path, field: SyntheticConfig, seed: int, job: _Job) -> None:
    kinds = ("unlabelled", "labelled", "unseen", "classes")
    if job.kind in ("unlabelled", "classes"):
        kind = job.number % field.num_classes
        # Fields of small and of large cells are equally covered: the class is in the cells, not in the background.
        fewest, most = (max(1, round(0.8 * number / field.cell_types[kind].radius ** 2)) for number in field.num_cells)
        weights = tuple(float(number == kind) for number in range(field.num_classes))
        field = replace(field, num_cells=(fewest, most), class_weights=weights)
    made = make_field(np.random.SeedSequence((seed, kinds.index(job.kind), job.number)), field)
    write_tiff(
        folder / "images" / job.kind / f"{job.name}.ome.tif",
        made.pixels,
        channel_names=made.channel_names,
        pixel_size_um=PIXEL_SIZE_UM,
    )
    if job.kind in ("labelled", "unseen"):
        write_labels(folder / "masks" / job.kind / f"{job.name}.tif", made.labels, pixel_size_um=PIXEL_SIZE_UM)


def prepare_generated(folder: Path, *, workers: int) -> DemoData:
    """Build shards and labelled sets from the output of `generate`; existing sets are kept."""
    images = folder / "images"
    table = str(folder / "classes.csv")
    source = LabelledSource(
        source=MultichannelSource(input=str(images / "unlabelled")), labels=table, labels_key=("image=id",)
    )
    _build_shards(source, folder / "shards" / "unlabelled", workers)
    manifest = _build_shards(
        MultichannelSource(input=str(images / "labelled")), folder / "shards" / "labelled", workers
    )
    class_source = LabelledSource(
        source=MultichannelSource(input=str(images / "classes")), labels=table, labels_key=("image=id",)
    )
    _build_shards(class_source, folder / "shards" / "classes", workers)
    for kind in ("labelled", "unseen"):
        pairs = folder_pairs(folder, images=f"images/{kind}/{{name}}.ome.tif", masks=f"masks/{kind}/{{name}}.tif")
        _build_labelled(pairs, folder / "sets" / kind, "generated by the demo")
    return DemoData(
        shards=(folder / "shards" / "unlabelled", folder / "shards" / "labelled"),
        channels=tuple(manifest.channels),
        train=folder / "sets" / "labelled",
        unseen=folder / "sets" / "unseen",
        unseen_images=tuple(sorted((images / "unseen").iterdir())),
        class_shards=(folder / "shards" / "unlabelled", folder / "shards" / "classes"),
    )


def prepare_own(data: Path, folder: Path, *, workers: int) -> DemoData:
    """Build shards, and labelled sets if there are masks, from the user's folder.

    Images are in ``data/images`` with masks of the same stem in ``data/masks``, or, without masks, in ``data`` itself.
    Each file is a field with one or several channels.

    Raises DinocellError if there are fewer than two images, or two images or masks with the same stem.
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
    return DemoData(
        shards=(folder / "shards" / "own",),
        channels=tuple(manifest.channels),
        train=sets.get("train"),
        unseen=sets.get("unseen"),
        unseen_images=tuple(shown),
        class_shards=None,
    )


def _every_fifth(names: list[str]) -> list[str]:
    """Return the names of held-out labelled images; none if fewer than two would remain for training."""
    count = max(1, round(len(names) * _UNSEEN_SHARE))
    return names[:: max(1, len(names) // count)][:count] if len(names) > 2 else []


def _by_stem(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by name without the format suffix (``.tif``, ``.ome.tif``)."""
    paths: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not has_image_name(path.name):
            continue
        stem = path.name
        while stem.lower().endswith((*IMAGE_SUFFIXES, ".ome")):
            stem = stem.rpartition(".")[0]
        if stem in paths:
            raise DinocellError(
                f"{paths[stem]} and {path}: two images with the same name; rename or remove one of them"
            )
        paths[stem] = path
    return paths


def _link(folder: Path, files: list[Path]) -> None:
    folder.mkdir(parents=True)
    for path in files:
        (folder / path.name).symlink_to(path.resolve())


def _build_shards(source: Source, output: Path, workers: int) -> Manifest:
    """Build a shard set of whole fields, or read the existing one."""
    settings = ShardSettings(tiles=TileSettings(size=0, min_size=64, min_contrast=0))
    manifest = build(source, output, settings=settings, samples_per_shard=32, workers=workers)
    assert manifest is not None  # None is returned only for one slice of a distributed build
    return manifest


def _build_labelled(pairs: list[Pair], output: Path, source: str) -> Path:
    build_labelled(pairs, output, source=source, channel="mean", keep_empty=True, overwrite=True)
    return output


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo.

    Attributes
    ----------
    output
        Output folder.
    data
        A folder of your own images instead of generated ones: ``images/`` and, for scores, ``masks/`` with the same
        names; or just images.
    weights
        A backbone to fine-tune instead of pretraining one: any source of `load_backbone`.
    pretrain_steps, finetune_epochs
        Duration of the two trainings.
    counts, field
        Number and appearance of the generated fields.
    """

    output: Path = Path("demo")
    data: Path | None = None
    weights: str | None = None
    seed: int = 0
    pretrain_steps: int = 1000
    finetune_epochs: int = 26
    counts: FieldCounts = field(default_factory=FieldCounts)
    field: SyntheticConfig = field(
        default_factory=lambda: SyntheticConfig(
            size=(192, 192), num_cells=(6, 9), cell_radius_px=32.0, cell_types=CELL_LINES
        )
    )

    def __post_init__(self) -> None:
        if self.pretrain_steps < 1 or self.finetune_epochs < 1:
            raise ValueError("pretrain_steps and finetune_epochs: expected at least 1")
        if min(self.field.size) < 64:
            raise ValueError(f"field.size: expected at least 64 px per side, got {self.field.size}")
