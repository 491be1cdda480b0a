"""``dinocell features`` and ``knn``: what a frozen backbone is worth, by the published protocols."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.errors import ConfigError, DinocellError
from dinocell.eval.probe_sets import add_feature_arguments, add_set_arguments, load_probed, open_one, open_pair
from dinocell.runtime.command_line import add_command

if TYPE_CHECKING:
    import torch

    from dinocell.eval.features import Features, FeatureSettings
    from dinocell.eval.image_sets import ImageSet
    from dinocell.eval.tasks import Task
    from dinocell.runtime.distributed import World


def register(subparsers: Any) -> None:
    """Add ``features`` and ``knn``."""
    _add_features(subparsers)
    _add_knn(subparsers)


def _add_features(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "features",
        "extract the features of images with a backbone, as .npy and a table, for your own analysis",
        "dinocell features --weights teacher_checkpoint.pth --data shards/screen --crop-size 0 --output features/s",
    )
    add_feature_arguments(parser)
    add_set_arguments(parser, pair=False)
    parser.add_argument("--parquet", action="store_true", help="also rows.parquet (needs pyarrow)")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.set_defaults(run=_run_features)


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


def _add_knn(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "knn",
        "classify images by their nearest neighbours in the features of a backbone",
        "dinocell knn --weights W --hpaone D --task CELL_TYPE --metric mean_per_class_multiclass_f1 --nb-knn 1 10 "
        "--output probes/knn",
    )
    add_feature_arguments(parser)
    add_set_arguments(parser)
    add_task_arguments(parser)
    parser.add_argument(
        "--nb-knn", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K", help="(10 20 100 200)"
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes (0.07)")
    parser.add_argument(
        "--leave-one-out",
        metavar="COLUMN",
        help="ask each group of the test images by the training images and the other groups; scored on the classes "
        "that the training images do not have (CHAMMI's HPA Task_three: cell_type, CP Task_four: plate)",
    )
    parser.set_defaults(run=_run_knn)


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """Features of two sets and what they are features for."""

    train: "Features"
    test: "Features"
    task: "Task"
    settings: "FeatureSettings"
    names: tuple[str, str]


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


@contextmanager
def _extractor(
    options: argparse.Namespace,
) -> "Iterator[tuple[Callable[[Path, ImageSet], Features], FeatureSettings, World]]":
    """Load the backbone on every rank and return what extracts a set to a folder."""
    from rich.console import Console

    from dinocell.eval.features import extract_to
    from dinocell.runtime.distributed import together
    from dinocell.runtime.progress import start_progress

    with together(options.device) as world:
        backbone = load_probed(options, world.device)
        settings = _settings(options, backbone)

        def extract(folder: Path, images: "ImageSet") -> "Features":
            own = len(images) // world.size
            bar = start_progress(Console(quiet=not world.is_main), total_steps=own, batch_size=1)
            shown = max(1, own // 20)

            def progress(done: int) -> None:
                bar.advance(done)
                if done % shown == 0:
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


def _run_features(options: argparse.Namespace) -> None:
    if options.parquet:
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise DinocellError("--parquet: needs pyarrow; install 'dinocell-toolkit[parquet]'") from error
    images = open_one(options)
    with _extractor(options) as (extract, _, world):
        found = extract(options.output, images)
        if not world.is_main:
            return
    if options.parquet:
        _write_parquet(options.output / "rows.parquet", found)
    shape = " x ".join(str(each) for each in found.values.shape)
    print(f"{options.output}: {shape} features, features.npy and rows.csv; {len(found.problems)} images left out")


def _write_parquet(path: Path, found: "Features") -> None:
    import pyarrow
    from pyarrow import parquet

    from dinocell.runtime.atomic import replacing

    columns = sorted({key for row in found.labels for key in row})
    table = {"id": list(found.ids)} | {key: [str(row.get(key, "")) for row in found.labels] for key in columns}
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table(table), temporary)


def open_material(options: argparse.Namespace) -> Material | None:
    """Open both sets, extract features that are not there yet; None on ranks that only help with that."""
    from dinocell.eval.tasks import make_task

    train_set, test_set = open_pair(options)
    with _extractor(options) as (extract, settings, world):
        train = extract(options.output / "features" / "train", train_set)
        test = extract(options.output / "features" / "test", test_set)
        if not world.is_main:
            return None
    task = make_task(
        options.task,
        train.labels,
        test.labels,
        train_name=train_set.name,
        test_name=test_set.name,
        columns=options.columns,
    )
    return Material(train=train, test=test, task=task, settings=settings, names=(train_set.name, test_set.name))


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


def _run_knn(options: argparse.Namespace) -> None:
    from dinocell.eval.classification import confusion, metric_of
    from dinocell.eval.knn import knn_scores
    from dinocell.eval.probe_report import draw_confusion, log_to_run, write_classes, write_scores

    material = open_material(options)
    if material is None:
        return
    task = material.task
    name = metric_name(options, task)
    metric = metric_of(name, multilabel=task.multilabel)
    train, test = (
        each.tensor()[kept] for each, kept in ((material.train, task.train_kept), (material.test, task.test_kept))
    )
    if options.leave_one_out:
        scores, task, train_size = _leave_one_out(options, material, train, test)
    else:
        _check_neighbours(options.nb_knn, len(train))
        scores = knn_scores(
            train, task.train, test, ks=options.nb_knn, num_classes=None if task.multilabel else len(task.classes),
            temperature=options.temperature,
        )  # fmt: skip
        train_size = len(train)
    found = {k: metric(each, task.test) for k, each in scores.items()}
    best = max(found, key=lambda k: (found[k].value, -k))
    rows = [{"k": k, name: each.value} for k, each in found.items()]
    about = describe(options, material) | {"neighbours of": f"{train_size} images", "temperature": options.temperature}
    if options.leave_one_out:
        about["leave one out"] = (
            f"groups of {options.leave_one_out}; scored on classes that are not in the training set"
        )
    paths = write_scores(options.output, "knn", about, rows)
    paths += write_classes(options.output, "knn", task.classes, found[best])
    if not task.multilabel:
        draw_confusion(options.output / "knn_confusion.png", task.classes, confusion(scores[best], task.test))
    logged = log_to_run(options.weights, {f"knn/{options.task}_{name}_k{k}": each.value for k, each in found.items()})
    for k, each in found.items():
        print(f"k {k:>4}: {name} {each.value:.4f}")
    print(f"scores: {paths[2]}" + (f"; TensorBoard: {logged}" if logged else ""))


def _check_neighbours(ks: Sequence[int], count: int) -> None:
    wrong = [k for k in ks if not 1 <= k <= count]
    if wrong:
        raise ConfigError(
            f"--nb-knn: expected 1 to {count}, the number of training images, got {', '.join(map(str, wrong))}"
        )


def _leave_one_out(
    options: argparse.Namespace, material: Material, train: "torch.Tensor", test: "torch.Tensor"
) -> "tuple[dict[int, torch.Tensor], Task, int]":
    import numpy as np
    import torch

    from dinocell.eval.image_sets import labels_of
    from dinocell.eval.knn import knn_scores

    task = material.task
    if task.multilabel:
        raise ConfigError("--leave-one-out: is for class labels, not for multi-label rows")
    rows = [row for row, kept in zip(material.test.labels, task.test_kept.tolist(), strict=True) if kept]
    groups = np.array(labels_of(rows, options.leave_one_out, material.names[1]))
    if len(set(groups)) < 2:
        raise DinocellError(
            f"--leave-one-out {options.leave_one_out}: expected several groups, got {', '.join(set(groups))}"
        )
    novel = sorted(set(task.test.tolist()) - set(task.train.tolist()))
    if not novel:
        raise DinocellError(
            "--leave-one-out: every class of the test images is in the training images: nothing is held out"
        )
    scores = {k: torch.zeros(len(test), len(task.classes)) for k in options.nb_knn}
    smallest = len(train) + min(len(test) - int((groups == group).sum()) for group in set(groups))
    _check_neighbours(options.nb_knn, smallest)
    for group in sorted(set(groups)):
        asked = torch.from_numpy(groups == group)
        found = knn_scores(
            torch.cat((train, test[~asked])), torch.cat((task.train, task.test[~asked])), test[asked],
            ks=options.nb_knn, num_classes=len(task.classes), temperature=options.temperature,
        )  # fmt: skip
        for k, each in found.items():
            scores[k][asked] = each
    kept = torch.tensor([label in novel for label in task.test.tolist()])
    # Only held-out classes are scored; a wrong vote for another class is still wrong.
    return {k: each[kept] for k, each in scores.items()}, _only(task, kept), smallest


def _only(task: "Task", kept: "torch.Tensor") -> "Task":
    return replace(task, test=task.test[kept])
