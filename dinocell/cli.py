"""The one command line: ``dinocell COMMAND``, ``python -m dinocell COMMAND`` or ``python -m dinocell.cli COMMAND``.

Parsers are built from the standard library alone; each command imports its stage when it runs. Exit codes: 0 done,
1 a bug (with traceback) or some images failed (listed), 2 the user's mistake (one line), 130 interrupted.
"""

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dinocell import __version__
from dinocell.data_shards import dataset_command, shards_command
from dinocell.errors import DinocellError
from dinocell.eval import (
    consistency_command,
    evaluate_command,
    features_command,
    finetune_command,
    knn_command,
    linear_command,
    segment_command,
)
from dinocell.launch import launch_command
from dinocell.launch.hooks import exported
from dinocell.runtime.command_line import add_command, whole_number
from dinocell.ssl import pretrain_command

# What the machine refuses, wherever it happens: a name that is too long, no permission, a full or broken disk. No bug.
_REFUSED = {
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
}

if TYPE_CHECKING:
    from dinocell.demo.config import DemoConfig

# What is a setting, not a recipe: a path may hold a "=" as well, but behind a slash.
_SETTING = re.compile(r"[\w.]+=")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except DinocellError as error:
        print(f"dinocell: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dinocell info FILE | head` closed our output: not an error, and nobody is listening
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        print(f"dinocell: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:  # a run that was told to stop says how it goes on
        print(f"dinocell: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="dinocell",
        description="From unlabelled multi-channel microscopy to a cell segmentation model.",
        epilog="'dinocell COMMAND --help' explains a command, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dinocell {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    shards_command.register(commands, preview_views=_preview_views)
    dataset_command.register(commands)
    pretrain_command.register(commands, probe=_online_probe, on_export=exported)
    finetune_command.register(commands)
    segment_command.register(commands)
    evaluate_command.register(commands)
    features_command.register(commands)
    knn_command.register(commands)
    linear_command.register(commands)
    consistency_command.register(commands)
    launch_command.register(commands, main=main, check=_check)
    _add_info(commands)
    _add_export(commands)
    return parser


def _check(arguments: Sequence[str], with_recipe: bool) -> None:
    """Refuse a command line that cannot be run, without running it: its words and, if so told, its recipe and settings.

    Raises
    ------
    ConfigError
        If there is no such recipe, or a setting that cannot be.
    SystemExit
        If the words are no command.
    """
    options = build_parser().parse_args(arguments)
    configure = vars(options).get("configure")
    if configure is not None and with_recipe:
        configure(options)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with a suggestion where a word is nearly right.

    Of commands with a recipe, ``key=value`` settings may stand anywhere: before the recipe, before and after options.
    """

    _is_mixing = False

    # Not annotated as its parent is: typeshed has it overloaded on the kind of namespace.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        takes_settings = any(action.dest == "overrides" for action in self._get_positional_actions())
        if self._is_mixing or not takes_settings:
            return super().parse_known_args(args, namespace)
        self._is_mixing = True  # Python 3.11's intermixed parsing comes back here, twice
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_mixing = False
        words = [word for word in (found.recipe, *found.overrides) if word is not None]
        recipes = [word for word in words if not _SETTING.match(word)]
        if len(recipes) > 1:
            self.error(f"expected one recipe, and settings as key=value; got {', '.join(map(repr, recipes))}")
        if recipes:
            found.recipe = recipes[0]
        elif self.get_default("recipe_is_optional"):
            found.recipe = None
        else:
            self.error("expected a recipe: the name of a shipped one, or a YAML file")
        found.overrides = [word for word in words if _SETTING.match(word)]
        return found, unknown

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message:
            got, known = message.split("invalid choice: ", 1)[1].split(" (choose from ", 1)
            near = difflib.get_close_matches(got.strip("'"), [k.strip(" ')") for k in known.split(",")], n=1)
            message = f"unknown command or choice {got}" + (f"; did you mean '{near[0]}'?" if near else f" ({known}")
        # Intermixed parsing counts a list that may be empty among what is missing.
        message = message.replace("required: recipe, key=value", "required: recipe")
        self.exit(2, f"{self.prog}: {message} (see '{self.prog} --help')\n")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="CHECKPOINT",
        help="a path, a folder, hf://owner/name, a URL with #sha256=..., or a bare name such as dinov3_vits16",
    )


def _add_demo(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        "go the whole road on generated images or on your own, in minutes on 2 CPU cores",
        "dinocell demo\n  dinocell demo --data my_images/ --output my_demo\n  dinocell demo --quick seed=1",
    )
    parser.add_argument("recipe", nargs="?", help="standard (default), quick, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument("--quick", action="store_true", help="the recipe quick: everything runs, nothing is learned")
    parser.add_argument("--data", metavar="FOLDER", help="your images: FOLDER/images and, for scores, FOLDER/masks")
    parser.add_argument("--output", metavar="FOLDER", help="where everything goes (demo)")
    parser.set_defaults(run=_run_demo, configure=_demo_config, recipe_is_optional=True)


def _demo_config(options: argparse.Namespace) -> "DemoConfig":
    from dinocell.configs.load import find_recipe, load_config, text_override
    from dinocell.demo.config import DemoConfig

    if options.quick and options.recipe not in (None, "quick"):
        raise DinocellError(f"demo: --quick is the recipe 'quick'; expected no other beside it, got {options.recipe!r}")
    recipe, overrides = options.recipe or ("quick" if options.quick else "standard"), list(options.overrides)
    folders = {key: getattr(options, key) for key in ("data", "output")}
    overrides += [text_override(key, folder) for key, folder in folders.items() if folder is not None]
    return load_config(DemoConfig, find_recipe("demo", recipe), overrides)


def _run_demo(options: argparse.Namespace) -> None:
    from dinocell.demo.run import run_demo

    print(run_demo(_demo_config(options)))


def _preview_views(
    shards: str,
    output: Path,
    recipe: str,
    overrides: Sequence[str],
    num_samples: int,
    seed: int,
    cache: Path | None,
) -> None:
    """Draw what a pretraining recipe makes of a shard set, for the command that knows nothing of pretraining."""
    from dinocell.configs.load import find_recipe, load_config, text_override
    from dinocell.ssl.config import PretrainConfig
    from dinocell.ssl.preview import preview_views

    fixed = ["output=none", text_override("data.shards", [shards]), f"seed={seed}"]
    fixed += [text_override("data.cache", cache)] if cache is not None else []
    config = load_config(PretrainConfig, find_recipe("pretrain", recipe), [*fixed, *overrides])
    preview_views(config, output, num_samples=num_samples)


def _online_probe(config: Any) -> Callable[[Any], Mapping[str, float]] | None:
    """Return what measures the teacher of a pretraining run, which itself knows no evaluation; None: nothing is to."""
    from dinocell.eval.online import OnlineProbe

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


def _add_info(commands: Any) -> None:
    parser = add_command(commands, "info", "say what a checkpoint or a segmenter is", "dinocell info dinov3_vits16.pth")
    _add_source(parser)
    parser.add_argument(
        "--image-size", type=whole_number(1), default=224, metavar="PX", help="cost for this side (default 224)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=_run_info)


def _run_info(options: argparse.Namespace) -> None:
    from dinocell.finetune.describe import describe_segmenter
    from dinocell.finetune.files import is_segmenter, read_segmenter
    from dinocell.models.describe import describe
    from dinocell.models.weights import read_weights

    if is_segmenter(options.source):
        lines = describe_segmenter(read_segmenter(options.source))
    else:
        lines = describe(read_weights(options.source), image_size=options.image_size)
    if options.json:
        import json

        print(json.dumps(lines, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, value)
    Console().print(table, highlight=False, markup=False)


def _add_export(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "convert a checkpoint to another layout, patch size or number of channels",
        "dinocell export teacher_checkpoint.pth --layout meta --in-channels 3 --output for_meta.pth",
    )
    _add_source(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a .pth, .pt or .safetensors file")
    parser.add_argument(
        "--layout",
        choices=("dinocell", "meta", "meta-flat", "huggingface"),
        default="dinocell",
        help="dinocell: our file (default); meta: the same, for Meta's evaluators; meta-flat: the bare state dict that "
        "Meta's model classes load; huggingface: a folder for transformers",
    )
    parser.add_argument(
        "--in-channels", type=whole_number(1), metavar="C", help="fold the patch embedding to C channels"
    )
    parser.add_argument("--patch-size", type=whole_number(1), metavar="PX", help="resample the patch embedding")
    parser.add_argument(
        "--input",
        choices=("unit", "standardised", "imagenet"),
        help="input convention to convert to (default: the file's; with --in-channels 3 in others' layouts imagenet)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.set_defaults(run=_run_export)


def _run_export(options: argparse.Namespace) -> None:
    from dinocell.models.weights import fit_weights, read_weights, save_weights

    if options.output.exists() and not options.overwrite:
        raise DinocellError(f"{options.output} exists already; add --overwrite to replace it")
    target = options.input
    if target is None and options.in_channels == 3 and options.layout != "dinocell":
        target = "imagenet"  # what Meta's and Hugging Face's own preprocessing feeds
    weights = read_weights(options.source)
    fitted = fit_weights(weights, patch_size=options.patch_size, in_channels=options.in_channels, input=target)
    save_weights(options.output, fitted, layout=options.layout)
    print(f"wrote {options.output} ({options.layout} layout)")
    for note in fitted.card.derived_from[len(weights.card.derived_from) :]:
        print(f"  {note}")
    if fitted.card.licence:
        print(f"  licence: {fitted.card.licence}")


if __name__ == "__main__":
    sys.exit(main())
