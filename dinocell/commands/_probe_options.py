"""Options of the probe commands: image sets, features and tasks."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.errors import ConfigError

if TYPE_CHECKING:
    from dinocell.eval.probes.features import Features, FeatureSettings
    from dinocell.eval.probes.image_sets import ImageSet
    from dinocell.eval.probes.tasks import Task
    from dinocell.models.vit import VisionTransformer
    from dinocell.runtime.distributed import World


_NAMED = ("hpaone", "hpafov", "chammi")


def add_set_arguments(parser: argparse.ArgumentParser, *, pair: bool = True) -> None:
    """Add the options of image sets; ``pair``: a training set and a test set."""
    group = parser.add_argument_group("images")
    if pair:
        group.add_argument("--train", metavar="SET", help="shard set, or folder with one folder of images per class")
        group.add_argument("--test", metavar="SET", help="the same, for the test set")
    else:
        group.add_argument("--data", metavar="SET", help="shard set, or folder with one folder of images per class")
    both = ": its train and val images" if pair else ""
    group.add_argument("--hpaone", metavar="FOLDER", help=f"HPAone as published{both}")
    group.add_argument("--hpafov", metavar="FOLDER", help=f"HPA-FoV as published{both}")
    group.add_argument("--chammi", metavar="FOLDER", help="CHAMMI as published; with --subset and --chammi-task")
    group.add_argument("--subset", choices=("Allen", "HPA", "CP"), help="of CHAMMI")
    if pair:
        group.add_argument(
            "--chammi-task", default="Task_one", metavar="SPLIT", help="CHAMMI's test images: Task_one, ... (Task_one)"
        )
    else:
        group.add_argument("--split", help="of a published set: train, val, all, ssl, Train, Task_one, ...")


def open_pair(options: argparse.Namespace) -> tuple["ImageSet", "ImageSet"]:
    """Open the training set and the test set.

    Raises
    ------
    DinocellError
        If the options select none or several.
    """
    from dinocell.data_shards.sources.hpa_chammi import ChammiSource, HpaFovSource, HpaOneSource
    from dinocell.eval.probes.image_sets import FieldImages

    named = [name for name in _NAMED if getattr(options, name)]
    if bool(options.train) != bool(options.test) or len(named) + bool(options.train) != 1:
        raise ConfigError("expected --train and --test, or one of --hpaone, --hpafov, --chammi")
    if options.train:
        return open_set(options.train), open_set(options.test)
    folder = getattr(options, named[0])
    if named[0] == "chammi":
        if not options.subset:
            raise ConfigError("--subset: expected Allen, HPA or CP with --chammi: they have different channels")
        sources = [
            ChammiSource(input=folder, subset=(options.subset,), split=split)
            for split in ("Train", options.chammi_task)
        ]
        names = [f"{folder} ({options.subset}, {split})" for split in ("Train", options.chammi_task)]
        return FieldImages(sources[0], names[0]), FieldImages(sources[1], names[1])
    kind = HpaOneSource if named[0] == "hpaone" else HpaFovSource
    train, test = (FieldImages(kind(input=folder, split=split), f"{folder} ({split})") for split in ("train", "val"))
    return train, test


def open_queries(options: argparse.Namespace) -> "ImageSet":
    """Open only the test set: ``--test``, or that part of a published set.

    Raises
    ------
    DinocellError
        As `open_pair`.
    """
    if options.test and not options.train and not any(getattr(options, name) for name in _NAMED):
        return open_set(options.test)
    return open_pair(options)[1]


def open_one(options: argparse.Namespace) -> "ImageSet":
    """Open the set of ``--data`` or of a published set.

    Raises
    ------
    DinocellError
        If the options select none or several.
    """
    from dinocell.data_shards.sources.hpa_chammi import ChammiSource, HpaFovSource, HpaOneSource
    from dinocell.eval.probes.image_sets import FieldImages

    named = [name for name in _NAMED if getattr(options, name)]
    if len(named) + bool(options.data) != 1:
        raise ConfigError("expected --data, or one of --hpaone, --hpafov, --chammi")
    if options.data:
        return open_set(options.data)
    folder = getattr(options, named[0])
    if named[0] == "chammi":
        subset = (options.subset,) if options.subset else ()
        return FieldImages(ChammiSource(input=folder, subset=subset, split=options.split), folder)
    if named[0] == "hpaone":
        return FieldImages(HpaOneSource(input=folder, split=options.split or "val"), folder)
    return FieldImages(HpaFovSource(input=folder, split=options.split or "val"), folder)


def open_set(location: str) -> "ImageSet":
    """Open a shard set, or a folder with one folder of images per class (the label ``class``)."""
    from dinocell.eval.probes.image_sets import ClassFolders, FieldImages, ShardImages

    path = Path(location)
    if path.is_dir() and not (path / "manifest.json").exists():
        return FieldImages(ClassFolders(input=path), location)
    return ShardImages(location)


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of feature extraction."""
    parser.add_argument(
        "--weights",
        required=True,
        metavar="CHECKPOINT",
        help="a backbone: a path, hf://owner/name, a URL, a bare name such as dinov3_vits16, or random:VARIANT",
    )
    group = parser.add_argument_group("features")
    group.add_argument(
        "--channels",
        choices=("stack", "bag", "mean"),
        help="stack: all channels as joint input; bag: one feature per channel, concatenated; mean: the mean "
        "image (stack, or bag for a model of one channel)",
    )
    group.add_argument(
        "--resize-size", type=int, default=0, metavar="PX", help="resize the shorter side; 0: unchanged (0)"
    )
    group.add_argument(
        "--crop-size", type=int, default=384, metavar="PX", help="size of the central crop; 0: all (384)"
    )
    group.add_argument(
        "--n-last-blocks", type=int, default=1, metavar="N", help="number of last blocks whose CLS tokens are used (1)"
    )
    group.add_argument("--avgpool", action="store_true", help="append the mean patch token of the last block")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (64)")
    group.add_argument("--patch-size", type=int, metavar="PX", help="resample the patch embedding")
    group.add_argument("--half", action="store_true", help="store features in float16")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")


def load_probed(options: argparse.Namespace, device: object) -> "VisionTransformer":
    """Load the backbone of ``--weights``; ``random:VARIANT`` is an untrained one with one channel and patch 8."""
    return load_weights(options.weights, device, patch_size=options.patch_size)


def load_weights(source: str, device: object, *, patch_size: int | None = None) -> "VisionTransformer":
    """Load a backbone, or create an untrained one for ``random:VARIANT``."""
    import torch

    from dinocell.models.config import VARIANTS
    from dinocell.models.vit import VisionTransformer, variant_config
    from dinocell.models.weights import load_backbone, read_weights

    assert isinstance(device, torch.device)
    if source.startswith("random:"):
        variant = source.removeprefix("random:")
        if variant not in VARIANTS:
            raise ConfigError(f"--weights {source}: expected one of {', '.join(VARIANTS)} after random:")
        torch.manual_seed(0)
        vit = VisionTransformer(variant_config(variant, patch_size=patch_size or 8, in_channels=1))
        # At 1e-5, the initial value in training, tokens would hardly depend on the image.
        vit.init_weights(layer_scale=1.0)
        return vit.eval().to(device)
    # Published models of RGB images read one grey channel at a time.
    rgb = read_weights(source).card.input.convention == "imagenet"
    return load_backbone(
        source,
        patch_size=patch_size,
        in_channels=1 if rgb else None,
        input="standardised" if rgb else None,
    ).to(device)


# --- probe data -----------------------------------------------------------------------------------------------------


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the prediction task and its metric."""
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task",
        default="class",
        metavar="COLUMN",
        help="a label column, or PROTEIN_LOCALIZATION or CELL_TYPE of the Human Protein Atlas (class: of folders)",
    )
    group.add_argument(
        "--columns", nargs="+", default=[], metavar="COLUMN", help="several labels per image: their columns"
    )
    group.add_argument(
        "--metric",
        metavar="NAME",
        help="mean_per_class_multilabel_f1, mean_per_class_multiclass_f1, accuracy, top-5 (an F1, by the task)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="features, scores and figures")


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeData:
    """Features of two sets and the task."""

    train: "Features"
    test: "Features"
    task: "Task"
    settings: "FeatureSettings"
    names: tuple[str, str]
    world: "World"


def open_probe_data(options: argparse.Namespace, *, learn: bool = True) -> ProbeData:
    """Open both sets and extract missing features; the result is the same on every rank.

    Without ``learn`` only the test set is opened and used for both.
    """
    from dinocell.eval.probes.tasks import make_task

    train_set, test_set = open_pair(options) if learn else [open_queries(options)] * 2
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
    return ProbeData(train=train, test=test, task=task, settings=settings, names=names, world=world)


def metric_name(options: argparse.Namespace, task: "Task") -> str:
    """Return the selected metric, or the F1 that fits the task."""
    from dinocell.eval.metrics.classification import MULTICLASS, MULTILABEL

    return options.metric or (MULTILABEL if task.multilabel else MULTICLASS)


def describe(options: argparse.Namespace, data: ProbeData) -> dict[str, Any]:
    """Return a description of the measurement."""
    settings = data.settings
    return {
        "weights": options.weights,
        "trained on": f"{data.names[0]} ({len(data.task.train)} images)",
        "tested on": f"{data.names[1]} ({len(data.task.test)} images)",
        "task": f"{options.task}, {len(data.task.classes)} classes",
        "features": f"channels {settings.channels}, resize {settings.resize_size}, crop {settings.crop_size}, "
        f"{settings.n_last_blocks} last blocks" + (", mean patch token" if settings.avgpool else ""),
    }


@contextmanager
def extractor(
    options: argparse.Namespace,
) -> "Iterator[tuple[Callable[[Path, ImageSet], Features], FeatureSettings, World]]":
    """Load the backbone on every rank and yield a function that extracts a set to a folder."""
    from rich.console import Console

    from dinocell.eval.probes.feature_files import extract_to
    from dinocell.runtime.distributed import together
    from dinocell.runtime.progress import start_progress

    with together(options.device) as world:
        backbone = load_probed(options, world.device)
        settings = _settings(options, backbone)

        def extract(folder: Path, images: "ImageSet") -> "Features":
            share = len(images) // world.size
            bar = start_progress(Console(quiet=not world.is_main), total_steps=share, batch_size=1)
            shown = max(1, share // 20)

            last_shown = 0

            def progress(done: int) -> None:
                nonlocal last_shown
                if done % settings.batch_size and done < share:  # images arrive in batches
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
    from dinocell.eval.probes.features import FeatureSettings, default_channels

    return FeatureSettings(
        channels=options.channels or default_channels(backbone),
        resize_size=options.resize_size,
        crop_size=options.crop_size,
        n_last_blocks=options.n_last_blocks,
        avgpool=options.avgpool,
        batch_size=options.batch_size,
    )
