"""``dinocell pretrain``: shards become teacher checkpoints."""

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinocell.ssl.config import PretrainConfig


def register(subparsers: Any) -> None:
    """Add ``pretrain`` to the commands."""
    summary = "pretrain a backbone on shards by self-supervision (DINO, iBOT, channel consistency)"
    parser = subparsers.add_parser(
        "pretrain",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="example:\n  dinocell pretrain debug data.shards='[shards/jump]' output=runs/first\n"
        "  dinocell pretrain debug data.shards='[shards/jump]' --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a shipped recipe or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument(
        "--dry-run", action="store_true", help="time two steps, say how long the run takes, and write nothing"
    )
    parser.set_defaults(run=_run, configure=_config)


def _config(options: argparse.Namespace) -> "PretrainConfig":
    from dinocell.configs.load import find_recipe, load_config
    from dinocell.ssl.config import PretrainConfig

    return load_config(PretrainConfig, find_recipe("pretrain", options.recipe), options.overrides)


def _run(options: argparse.Namespace) -> None:
    from dinocell.launch.hooks import exported
    from dinocell.ssl.train import dry_run, pretrain

    config = _config(options)
    if options.dry_run:
        print(dry_run(config))
    else:
        print(f"teacher: {pretrain(config, on_export=exported, watch=_online_probe(config))}")


def _online_probe(config: "PretrainConfig") -> Callable[[Any], Mapping[str, float]] | None:
    """Return what measures the teacher of a pretraining run, which itself knows no evaluation; None: nothing is to."""
    from dinocell.eval.probes.online import OnlineProbe

    if not config.watch.every:
        return None
    watch = config.watch
    return OnlineProbe(
        config.data.shards[0],
        tiles=watch.tiles,
        crop_size=config.views.global_size,
        in_channels=config.views.in_channels,
        knn_train=watch.knn_train,
        knn_test=watch.knn_test,
        label=watch.label,
        neighbours=watch.neighbours,
        cache=config.data.cache,
        cache_gb=config.data.cache_gb,
    )
