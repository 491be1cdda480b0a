"""``dinocell shards``: build shard sets for pretraining from images on disk or in a bucket, and inspect them."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command, whole_number
from dinocell.data_shards.sources.registry import add_source_arguments

if TYPE_CHECKING:
    from dinocell.data_shards.manifest import Manifest

_MAX_KINDS = 12


def register(subparsers: Any) -> None:
    """Add ``shards`` and its actions to the commands."""
    parser = add_command(
        subparsers,
        "shards",
        "build shard sets for pretraining from microscope images, and inspect them",
        "dinocell shards build --source phenix --input plates/ --output shards/jump\n"
        "  dinocell shards preview shards/jump --output jump.png\n\n"
        "'dinocell shards ACTION --help' explains an action.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for add in (_add_build, _add_merge, _add_info, _add_verify, _add_preview):
        add(actions)


def _add_build(actions: Any) -> None:
    parser = add_command(
        actions,
        "build",
        "tile images and write them as a shard set; run it again to continue after an interruption",
        "dinocell shards build --source pattern --pattern '{plate}/{well}_s{site}_w{channel}.tif' "
        "--input screen/ --output shards/screen",
    )
    add_source_arguments(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="OUT", help="folder of the set")
    tiles = parser.add_argument_group("tiles")
    values = parser.add_argument_group("values")
    work = parser.add_argument_group("work")
    for group, option, read, default, unit, summary in (
        (tiles, "--tile-size", int, 512, "PX", "side of a tile; 0: whole fields (512)"),
        (tiles, "--overlap", int, 0, "PX", "pixels that neighbours share (0)"),
        (tiles, "--min-size", int, 64, "PX", "reject smaller fields (64)"),
        (
            *(tiles, "--min-contrast", float, 5.0, "X"),
            "reject blank tiles: noise has a contrast of 1, an empty field about 3, cells more than 8 (5; 0 keeps all "
            "but constant tiles)",
        ),
        (tiles, "--max-saturated", float, 0.5, "FRACTION", "reject overexposed tiles (0.5; 1 keeps them)"),
        (work, "--samples-per-shard", int, 256, "N", "approximate number (256)"),
        (work, "--workers", int, None, "N", "processes (default: one per core)"),
        (work, "--max-unreadable", float, 0.5, "FRACTION", "stop if more fields of a shard cannot be read (0.5)"),
    ):
        group.add_argument(option, type=read, default=default, metavar=unit, help=summary)
    depth_help = "keep the source's type, or convert to 8 bit (keep)"
    values.add_argument("--bit-depth", choices=("keep", "8"), default="keep", help=depth_help)
    values.add_argument(
        "--percentiles",
        nargs=2,
        type=float,
        default=(0.1, 99.9),
        metavar=("LOW", "HIGH"),
        help="for 8 bit: percentiles of a plate that become 0 and 255 (0.1 99.9)",
    )
    values.add_argument("--codec", choices=("pco", "png"), default="pco", help="encoding of the channels (pco)")
    # The names of version 0.1.
    tiles.add_argument("--min-structure", type=float, dest="min_contrast", help=argparse.SUPPRESS)
    values.add_argument("--depth", choices=("keep", "8"), dest="bit_depth", help=argparse.SUPPRESS)
    work.add_argument(
        "--slice", type=_part, default=(1, 1), metavar="I/N", help="build one of N parts; then 'shards merge'"
    )
    work.add_argument("--strict", action="store_true", help="stop at the first input that cannot be read")
    parser.set_defaults(run=_run_build)


def _part(text: str) -> tuple[int, int]:
    index, _, total = text.partition("/")
    if not (index.isdecimal() and total.isdecimal() and 1 <= int(index) <= int(total)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 3/64, got {text!r}")
    return int(index), int(total)


def _run_build(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dinocell.data_shards.build import BuildProgress, build
    from dinocell.data_shards.shard import ShardSettings, TileSettings
    from dinocell.data_shards.sources.registry import source_from

    limits = {name: getattr(options, name) for name in ("overlap", "min_size", "min_contrast", "max_saturated")}
    settings = ShardSettings(
        tiles=TileSettings(size=options.tile_size, **limits),
        codec=options.codec,
        bit_depth=8 if options.bit_depth == "8" else None,
        percentiles=tuple(options.percentiles),
        max_unreadable=options.max_unreadable,
    )
    source = source_from(options)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console()) as bar:
        task = bar.add_task("listing", total=None, note="")

        def on_listed(num_fields: int) -> None:
            if num_fields % 1000 == 0:
                bar.update(task, note=f"{num_fields:,} fields")

        def progress(state: BuildProgress) -> None:
            rejected = f", {sum(state.rejected.values()):,} rejected" if state.rejected else ""
            note = f"{state.num_samples:,} samples{rejected}"
            bar.update(task, description="shards", completed=state.done, total=state.total, note=note)

        manifest = build(
            source,
            options.output,
            settings=settings,
            samples_per_shard=options.samples_per_shard,
            workers=options.workers,
            part=options.slice,
            strict=options.strict,
            on_listed=on_listed,
            progress=progress,
        )
    if manifest is None:
        index, total = options.slice
        print(f"part {index} of {total} is built; after the last part: dinocell shards merge {options.output}")
    else:
        _print_summary(options.output, manifest)


def _add_merge(actions: Any) -> None:
    summary = "complete a set whose parts were built with --slice"
    parser = add_command(actions, "merge", summary, "dinocell shards merge shards/jump")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of the set")
    parser.set_defaults(run=_run_merge)


def _run_merge(options: argparse.Namespace) -> None:
    from dinocell.data_shards.build import merge

    _print_summary(options.output, merge(options.output))


def _print_summary(output: str | Path, manifest: "Manifest") -> None:
    from rich.filesize import decimal

    print(
        f"{output}: {manifest.num_samples:,} samples of {manifest.num_fields:,} fields in {len(manifest.shards):,} "
        f"shards, {decimal(manifest.num_bytes)}"
    )
    if manifest.rejected:
        kinds = [f"{count:,} {kind}" for kind, count in Counter(manifest.rejected).most_common(_MAX_KINDS)]
        print(f"rejected: {', '.join(kinds)} (reasons in rejected.jsonl)")


def _add_info(actions: Any) -> None:
    parser = add_command(actions, "info", "summarize a set", "dinocell shards info shards/jump")
    parser.add_argument("set", metavar="SET", help="folder or address of a set")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    parser.set_defaults(run=_run_info)


def _run_info(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from dinocell.data_shards.manifest import read_manifest

    manifest = read_manifest(options.set)
    if options.json:
        print(manifest.to_json(), end="")
        return
    _print_summary(options.set, manifest)
    source = dict(manifest.settings["source"])
    print(f"source: {source.pop('kind')} {', '.join(f'{key}={value}' for key, value in source.items() if value)}")
    print(f"tiles: {', '.join(f'{count:,} of {shape}' for shape, count in manifest.shapes.items())}")
    table = Table(box=None, pad_edge=False)
    for heading in ("channel", "tiles", "min", "1 %", "median", "99 %", "max", "mean", "std"):
        table.add_column(heading, justify="left" if heading == "channel" else "right")
    for name, statistics in manifest.channels.items():
        percentiles = (statistics.percentiles[percent] for percent in ("1", "50", "99"))
        values = (statistics.minimum, *percentiles, statistics.maximum, statistics.mean, statistics.std)
        table.add_row(name, f"{statistics.num_tiles:,}", *(f"{value:.5g}" for value in values))
    Console().print(table, highlight=False, markup=False)


def _add_verify(actions: Any) -> None:
    parser = add_command(
        actions, "verify", "read a whole set and list damaged and missing files", "dinocell shards verify shards/jump"
    )
    parser.add_argument("set", metavar="SET", help="folder or address of a set")
    parser.add_argument("--workers", type=whole_number(1), metavar="N", help="processes (default: one per core)")
    parser.set_defaults(run=_run_verify)


def _run_verify(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from dinocell.data_shards.inspect import verify
    from dinocell.data_shards.manifest import read_manifest
    from dinocell.errors import ShardError

    manifest = read_manifest(options.set)
    with Progress(console=Console(), transient=True) as bar:
        task = bar.add_task("shards", total=len(manifest.shards))
        problems = verify(
            options.set,
            workers=options.workers or os.cpu_count() or 1,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    for problem in problems:
        print(f"{problem.file}: {problem.what}")
    if problems:
        raise ShardError(f"{options.set}: {len(problems)} problem(s) in {len({p.file for p in problems})} file(s)")
    print(f"{options.set}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, no problems")


def _add_preview(actions: Any) -> None:
    parser = add_command(
        actions,
        "preview",
        "draw some samples with all channels, or their views in a pretraining recipe",
        "dinocell shards preview shards/jump --output p.png\n"
        "  dinocell shards preview shards/jump --views debug views.policy=bag --output views.png",
    )
    parser.add_argument("set", metavar="SET", help="folder or address of a set")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), metavar="PNG", help="(preview.png)")
    parser.add_argument("--samples", type=whole_number(1), default=8, metavar="N", help="rows (8)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="which samples (0)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="for remote sets: folder for copies of shards")
    parser.add_argument(
        "--views",
        nargs="+",
        metavar=("RECIPE", "key=value"),
        help="a pretraining recipe and settings: draw its global and local crops, each with its channel",
    )
    parser.set_defaults(run=_run_preview)


def _run_preview(options: argparse.Namespace) -> None:
    if options.views:
        recipe, *overrides = options.views
        _preview_views(options, recipe, overrides)
    else:
        from dinocell.data_shards.inspect import preview

        preview(options.set, options.output, num_samples=options.samples, seed=options.seed, cache=options.cache)
    print(f"wrote {options.output}")


def _preview_views(options: argparse.Namespace, recipe: str, overrides: Sequence[str]) -> None:
    """Draw the views that a pretraining recipe makes of a shard set."""
    from dinocell.configs.load import find_recipe, load_config, text_override
    from dinocell.ssl.config import PretrainConfig
    from dinocell.ssl.visualise import preview_views

    fixed = ["output=none", text_override("data.shards", [options.set]), f"seed={options.seed}"]
    fixed += [] if options.cache is None else [text_override("data.cache", options.cache)]
    config = load_config(PretrainConfig, find_recipe("pretrain", recipe), [*fixed, *overrides])
    preview_views(config, options.output, num_samples=options.samples)
