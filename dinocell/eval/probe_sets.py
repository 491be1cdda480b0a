"""The options of the probes that say which images to learn from and which to be asked about."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dinocell.errors import ConfigError

if TYPE_CHECKING:
    from dinocell.eval.image_sets import ImageSet
    from dinocell.models.vit import VisionTransformer

_NAMED = ("hpaone", "hpafov", "chammi")


def add_set_arguments(parser: argparse.ArgumentParser, *, pair: bool = True) -> None:
    """Add the options that name image sets; ``pair``: one to learn from and one to be asked about."""
    group = parser.add_argument_group("images")
    if pair:
        group.add_argument("--train", metavar="SET", help="shard set, or folder with a folder of images a class")
        group.add_argument("--test", metavar="SET", help="the same, to be asked about")
    else:
        group.add_argument("--data", metavar="SET", help="shard set, or folder with a folder of images a class")
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
    """Open the set to learn from and the one to be asked about.

    Raises
    ------
    DinocellError
        If the options name none, or several.
    """
    from dinocell.data_shards.sources_tables import ChammiSource, HpaFovSource, HpaOneSource
    from dinocell.eval.image_sets import FieldImages

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


def open_asked(options: argparse.Namespace) -> "ImageSet":
    """Open the set to be asked about alone: ``--test``, or that part of a published set.

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
        If the options name none, or several.
    """
    from dinocell.data_shards.sources_tables import ChammiSource, HpaFovSource, HpaOneSource
    from dinocell.eval.image_sets import FieldImages

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
    """Open a shard set, or a folder with a folder of images a class (the label ``class``)."""
    from dinocell.eval.image_sets import ClassFolders, FieldImages, ShardImages

    path = Path(location)
    if path.is_dir() and not (path / "manifest.json").exists():
        return FieldImages(ClassFolders(input=path), location)
    return ShardImages(location)


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how an image becomes a feature, and where it computes."""
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
        help="stack: all channels into a model of so many; bag: a feature a channel, concatenated; mean: of the mean "
        "image (stack, or bag for a model of one channel)",
    )
    group.add_argument(
        "--resize-size", type=int, default=0, metavar="PX", help="scale the shorter side; 0: leave it (0)"
    )
    group.add_argument("--crop-size", type=int, default=384, metavar="PX", help="cut out the middle; 0: all (384)")
    group.add_argument("--n-last-blocks", type=int, default=1, metavar="N", help="CLS tokens of so many blocks (1)")
    group.add_argument("--avgpool", action="store_true", help="append the mean patch token of the last block")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    group.add_argument("--patch-size", type=int, metavar="PX", help="resample the patch embedding")
    group.add_argument("--half", action="store_true", help="keep features in float16")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")


def load_probed(options: argparse.Namespace, device: object) -> "VisionTransformer":
    """Load the backbone of ``--weights``; ``random:VARIANT`` is an untrained one, of one channel and patch 8."""
    return load_weights(options.weights, device, patch_size=options.patch_size)


def load_weights(source: str, device: object, *, patch_size: int | None = None) -> "VisionTransformer":
    """Load a backbone, or make an untrained one for ``random:VARIANT``; for images in any number of channels."""
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
        # At 1e-5, where training starts, the tokens would not see the image.
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
