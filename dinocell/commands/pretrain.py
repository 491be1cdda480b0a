"""``dinocell pretrain``: train a teacher on shards."""

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command

if TYPE_CHECKING:
    from dinocell.ssl.config import PretrainConfig


def register(subparsers: Any) -> None:
    """Add ``pretrain`` to the commands."""
    parser = add_command(
        subparsers,
        "pretrain",
        "pretrain a backbone on shards by self-supervision (DINO, iBOT, channel consistency)",
        "dinocell pretrain debug data.shards='[shards/jump]' output=runs/first\n"
        "  dinocell pretrain debug data.shards='[shards/jump]' --dry-run",
    )
    parser.add_argument("recipe", help="a shipped recipe or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the recipe")
    parser.add_argument(
        "--dry-run", action="store_true", help="measure time and memory of two steps, and write nothing"
    )
    parser.set_defaults(run=_run, configure=_config)


def _config(options: argparse.Namespace) -> "PretrainConfig":
    from dinocell.configs.load import find_recipe, load_config
    from dinocell.ssl.config import PretrainConfig

    return load_config(PretrainConfig, find_recipe("pretrain", options.recipe), options.overrides)


def _run(options: argparse.Namespace) -> None:
    from dinocell.launch.slurm import exported
    from dinocell.ssl.train import dry_run, pretrain

    config = _config(options)
    if options.dry_run:
        print(dry_run(config))
    else:
        print(f"teacher: {pretrain(config, on_export=exported, online_eval=_online_probe(config))}")


def _online_probe(config: "PretrainConfig") -> Callable[[Any], Mapping[str, float]] | None:
    """Return the evaluation of the teacher during training; None if it is switched off."""
    from dinocell.eval.probes.online import OnlineProbe

    settings = config.online_eval
    if not settings.every:
        return None
    return OnlineProbe(
        config.data.shards[0],
        tiles=settings.tiles,
        crop_size=config.views.global_size,
        in_channels=config.views.in_channels,
        knn_train=settings.knn_train,
        knn_test=settings.knn_test,
        label=settings.label,
        neighbours=settings.neighbours,
        patch_set=settings.patch_set,
        patch_labelled=settings.patch_labelled,
        cache=config.data.cache,
        cache_gb=config.data.cache_gb,
    )
