"""``dinocell finetune``: train a segmenter on labelled images, from a backbone."""

import argparse
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command

if TYPE_CHECKING:
    from dinocell.finetune.config import FinetuneConfig


def register(subparsers: Any) -> None:
    """Add ``finetune`` to the commands."""
    parser = add_command(
        subparsers,
        "finetune",
        "train a segmenter on labelled images, from a backbone or another segmenter",
        "dinocell finetune own_folder data.images='mine/images/{name}.tif' data.masks='mine/masks/{name}.png' "
        "model.weights=teacher_checkpoint.pth output=runs/mine\n"
        "  dinocell finetune generalist data.sets='[datasets/LIVECell-train,datasets/Cellpose-train]' --dry-run",
    )
    parser.add_argument("recipe", help="a shipped recipe or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument("--dry-run", action="store_true", help="take two steps and report steps, memory and time")
    parser.add_argument("--strict", action="store_true", help="stop if images or masks cannot be used (default: skip)")
    parser.set_defaults(run=_run, configure=_config)


def _config(options: argparse.Namespace) -> "FinetuneConfig":
    from dinocell.configs.load import find_recipe, load_config
    from dinocell.finetune.config import FinetuneConfig

    overrides = [*options.overrides, *(["data.strict=true"] if options.strict else [])]
    return load_config(FinetuneConfig, find_recipe("finetune", options.recipe), overrides)


def _run(options: argparse.Namespace) -> None:
    from dinocell.eval.threshold_search import score_segmenter
    from dinocell.finetune.train import dry_run, finetune

    config = _config(options)
    if options.dry_run:
        print(dry_run(config))
    else:
        print(f"segmenter: {finetune(config, score=score_segmenter)}")
