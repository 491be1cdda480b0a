"""``dinocell demo``: the whole pipeline on generated or own images."""

import argparse
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command
from dinocell.errors import DinocellError

if TYPE_CHECKING:
    from dinocell.demo.data import DemoConfig


def register(commands: Any) -> None:
    """Add ``demo`` to the commands."""
    parser = add_command(
        commands,
        "demo",
        "run the whole pipeline on generated images or on your own, in minutes on 2 CPU cores",
        "dinocell demo\n  dinocell demo --data my_images/ --output my_demo\n  dinocell demo --quick seed=1",
    )
    parser.add_argument("recipe", nargs="?", help="standard (default), quick, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument("--quick", action="store_true", help="the recipe quick: a smoke test that learns nothing")
    parser.add_argument("--data", metavar="FOLDER", help="your images: FOLDER/images and, for scores, FOLDER/masks")
    parser.add_argument("--output", metavar="FOLDER", help="output folder (demo)")
    parser.set_defaults(run=_run, configure=_config, recipe_is_optional=True)


def _config(options: argparse.Namespace) -> "DemoConfig":
    from dinocell.configs.load import find_recipe, load_config, text_override
    from dinocell.demo.data import DemoConfig

    if options.quick and options.recipe not in (None, "quick"):
        raise DinocellError(f"demo: --quick is the recipe 'quick'; expected no other recipe, got {options.recipe!r}")
    recipe, overrides = options.recipe or ("quick" if options.quick else "standard"), list(options.overrides)
    folders = {key: getattr(options, key) for key in ("data", "output")}
    overrides += [text_override(key, folder) for key, folder in folders.items() if folder is not None]
    return load_config(DemoConfig, find_recipe("demo", recipe), overrides)


def _run(options: argparse.Namespace) -> None:
    from dinocell.demo.run import run_demo

    print(run_demo(_config(options)))
