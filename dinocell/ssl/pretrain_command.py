"""``dinocell pretrain``: shards become teacher checkpoints."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinocell.ssl.config import PretrainConfig

Probe = Callable[[Any], Callable[[Any], Mapping[str, float]] | None]
"""From a configuration to what measures its teacher while it is trained."""


def register(
    subparsers: Any, *, probe: Probe = lambda _: None, on_export: Callable[[Path], None] = lambda _: None
) -> None:
    """Add ``pretrain`` to the commands; what looks at its teachers comes from above."""
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
    parser.set_defaults(run=partial(_run, probe, on_export), configure=_config)


def _config(options: argparse.Namespace) -> "PretrainConfig":
    from dinocell.configs.load import find_recipe, load_config
    from dinocell.ssl.config import PretrainConfig

    return load_config(PretrainConfig, find_recipe("pretrain", options.recipe), options.overrides)


def _run(probe: Probe, on_export: Callable[[Path], None], options: argparse.Namespace) -> None:
    from dinocell.ssl.train import dry_run, pretrain

    config = _config(options)
    if options.dry_run:
        print(dry_run(config))
    else:
        print(f"teacher: {pretrain(config, on_export=on_export, watch=probe(config))}")
