"""What probes work on: features of two sets by a frozen backbone, and the task that the images' labels make."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.eval.probe_sets import load_probed, open_asked, open_pair

if TYPE_CHECKING:
    from dinocell.eval.features import Features, FeatureSettings
    from dinocell.eval.image_sets import ImageSet
    from dinocell.eval.tasks import Task
    from dinocell.runtime.distributed import World


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is to be predicted, and how that is scored."""
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task",
        default="class",
        metavar="COLUMN",
        help="a label column, or PROTEIN_LOCALIZATION or CELL_TYPE of the Human Protein Atlas (class: of folders)",
    )
    group.add_argument(
        "--columns", nargs="+", default=[], metavar="COLUMN", help="several labels an image: their columns"
    )
    group.add_argument(
        "--metric",
        metavar="NAME",
        help="mean_per_class_multilabel_f1, mean_per_class_multiclass_f1, accuracy, top-5 (an F1, by the task)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="features, scores and pictures")


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """Features of two sets and what they are features for."""

    train: "Features"
    test: "Features"
    task: "Task"
    settings: "FeatureSettings"
    names: tuple[str, str]
    world: "World"


def open_material(options: argparse.Namespace, *, learn: bool = True) -> Material:
    """Open both sets, extract features that are not there yet; the same on every rank.

    Without ``learn`` there is one set, the one to be asked about; it then stands for both.
    """
    from dinocell.eval.tasks import make_task

    train_set, test_set = open_pair(options) if learn else [open_asked(options)] * 2
    with extractor(options) as (extract, settings, world):
        test = extract(options.output / "features" / "test", test_set)
        train = extract(options.output / "features" / "train", train_set) if learn else test
    task = make_task(
        options.task,
        train.labels,
        test.labels,
        train_name=train_set.name,
        test_name=test_set.name,
        columns=options.columns,
    )
    names = (train_set.name, test_set.name)
    return Material(train=train, test=test, task=task, settings=settings, names=names, world=world)


def metric_name(options: argparse.Namespace, task: "Task") -> str:
    """Return the metric that was asked for, or the F1 that fits the task."""
    from dinocell.eval.classification import MULTICLASS, MULTILABEL

    return options.metric or (MULTILABEL if task.multilabel else MULTICLASS)


def describe(options: argparse.Namespace, material: Material) -> dict[str, Any]:
    """Say what was measured."""
    settings = material.settings
    return {
        "weights": options.weights,
        "trained on": f"{material.names[0]} ({len(material.task.train)} images)",
        "tested on": f"{material.names[1]} ({len(material.task.test)} images)",
        "task": f"{options.task}, {len(material.task.classes)} classes",
        "features": f"channels {settings.channels}, resize {settings.resize_size}, crop {settings.crop_size}, "
        f"{settings.n_last_blocks} last blocks" + (", mean patch token" if settings.avgpool else ""),
    }


@contextmanager
def extractor(
    options: argparse.Namespace,
) -> "Iterator[tuple[Callable[[Path, ImageSet], Features], FeatureSettings, World]]":
    """Load the backbone on every rank and return what extracts a set to a folder."""
    from rich.console import Console

    from dinocell.eval.feature_files import extract_to
    from dinocell.runtime.distributed import together
    from dinocell.runtime.progress import start_progress

    with together(options.device) as world:
        backbone = load_probed(options, world.device)
        settings = _settings(options, backbone)

        def extract(folder: Path, images: "ImageSet") -> "Features":
            own = len(images) // world.size
            bar = start_progress(Console(quiet=not world.is_main), total_steps=own, batch_size=1)
            shown = max(1, own // 20)

            last_shown = 0

            def progress(done: int) -> None:
                nonlocal last_shown
                if (
                    done % settings.batch_size and done < own
                ):  # images come a batch at once: within one there is no rate
                    return
                bar.advance(done)
                if done // shown > last_shown:
                    last_shown = done // shown
                    bar.report(done, {})

            try:
                return extract_to(
                    folder,
                    backbone,
                    images,
                    settings,
                    weights=options.weights,
                    half=options.half,
                    world=world,
                    progress=progress,
                )
            finally:
                bar.close()

        yield extract, settings, world


def _settings(options: argparse.Namespace, backbone: Any) -> "FeatureSettings":
    from dinocell.eval.features import FeatureSettings, default_channels

    return FeatureSettings(
        channels=options.channels or default_channels(backbone),
        resize_size=options.resize_size,
        crop_size=options.crop_size,
        n_last_blocks=options.n_last_blocks,
        avgpool=options.avgpool,
        batch_size=options.batch_size,
    )
