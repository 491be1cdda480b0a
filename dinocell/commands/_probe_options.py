"""Options of the probe commands: image sets, backbones and features."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dinocell.errors import ConfigError, require

if TYPE_CHECKING:
    from dinocell.data_shards.sources.field import Source
    from dinocell.eval.probes.features import Features, FeatureSettings
    from dinocell.eval.probes.image_sets import ImageSet
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

    A DinocellError if the options select none or several.
    """
    published = _published(options, "train", "test")
    if not published:
        return open_set(options.train), open_set(options.test)
    if published == "chammi":
        return _open_part(options, published, "Train"), _open_part(options, published, options.chammi_task)
    return _open_part(options, published, "train"), _open_part(options, published, "val")


def open_queries(options: argparse.Namespace) -> "ImageSet":
    """Open only the test set: ``--test``, or that part of a published set; errors as `open_pair`."""
    if options.test and not options.train and not any(getattr(options, name) for name in _NAMED):
        return open_set(options.test)
    return open_pair(options)[1]


def open_one(options: argparse.Namespace) -> "ImageSet":
    """Open the set of ``--data`` or of a published set.

    A DinocellError if the options select none or several.
    """
    published = _published(options, "data")
    return _open_part(options, published, options.split, is_alone=True) if published else open_set(options.data)


def _published(options: argparse.Namespace, *own: str) -> str:
    """Return the option of the published set, or "" if the options ``own`` are set instead."""
    named = [name for name in _NAMED if getattr(options, name)]
    given = [bool(getattr(options, name)) for name in own]
    is_one = len(set(given)) == 1 and len(named) + given[0] == 1
    require(is_one, f"expected --{' and --'.join(own)}, or one of --hpaone, --hpafov, --chammi", ConfigError)
    has_subset = len(own) == 1 or not options.chammi or options.subset
    require(has_subset, "--subset: expected Allen, HPA or CP with --chammi: they have different channels", ConfigError)
    return "".join(named)


def _open_part(options: argparse.Namespace, published: str, split: str | None, *, is_alone: bool = False) -> "ImageSet":
    """Open a split of a published set; ``is_alone``: the set is named after its folder only."""
    from dinocell.data_shards.sources.hpa_chammi import ChammiSource, HpaFovSource, HpaOneSource
    from dinocell.eval.probes.image_sets import FieldImages

    folder = getattr(options, published)
    if published == "chammi":
        name = f"{folder} ({options.subset}, {split})"
        subset = (options.subset,) if options.subset else ()
        source: Source = ChammiSource(input=folder, subset=subset, split=split)
    else:
        name = f"{folder} ({split})"
        kind = HpaOneSource if published == "hpaone" else HpaFovSource
        source = kind(input=folder, split=split or "val")
    return FieldImages(source, folder if is_alone else name)


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


def load_weights(source: str, device: object, *, patch_size: int | None = None) -> "VisionTransformer":
    """Load a backbone; ``random:VARIANT`` is an untrained one with one channel and, by default, patch size 8."""
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
    if read_weights(source).card.input.convention == "imagenet":
        return load_backbone(source, patch_size=patch_size, in_channels=1, input="standardised").to(device)
    return load_backbone(source, patch_size=patch_size, in_channels=None).to(device)


@contextmanager
def extractor(
    options: argparse.Namespace,
) -> "Iterator[tuple[Callable[[Path, ImageSet], Features], FeatureSettings, World]]":
    """Load the backbone on every rank and yield a function that extracts a set to a folder."""
    from rich.console import Console

    from dinocell.eval.probes.features import FeatureSettings, default_channels, extract_to
    from dinocell.runtime.distributed import together
    from dinocell.runtime.progress import start_progress

    with together(options.device) as world:
        backbone = load_weights(options.weights, world.device, patch_size=options.patch_size)
        settings = FeatureSettings(
            channels=options.channels or default_channels(backbone),
            resize_size=options.resize_size,
            crop_size=options.crop_size,
            n_last_blocks=options.n_last_blocks,
            avgpool=options.avgpool,
            batch_size=options.batch_size,
        )

        def extract(folder: Path, images: "ImageSet") -> "Features":
            share = len(images) // world.size
            bar = start_progress(Console(quiet=not world.is_main), total_steps=share, batch_size=1)
            shown, last_shown = max(1, share // 20), 0

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
