"""``dinocell shards``: images on disk or in a bucket become a shard set for pretraining, and sets are looked into."""

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
    """Add ``shards`` and what can be done with them to the commands."""
    summary = "turn microscope images into shards for pretraining, and look into them"
    parser = subparsers.add_parser(
        "shards",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="example:\n  dinocell shards build --source phenix --input plates/ --output shards/jump\n"
        "  dinocell shards preview shards/jump --output jump.png\n\n"
        "'dinocell shards ACTION --help' explains an action.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_build(actions)
    _add_merge(actions)
    _add_info(actions)
    _add_verify(actions)
    _add_preview(actions)


def _add_build(actions: Any) -> None:
    parser = add_command(
        actions,
        "build",
        "cut images into tiles and write them as a shard set; run it again to continue after an interruption",
        "dinocell shards build --source pattern --pattern '{plate}/{well}_s{site}_w{channel}.tif' "
        "--input screen/ --output shards/screen",
    )
    add_source_arguments(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="OUT", help="folder of the set")
    tiles = parser.add_argument_group("tiles")
    tiles.add_argument("--tile-size", type=int, default=512, metavar="PX", help="side of a tile; 0: whole fields (512)")
    tiles.add_argument("--overlap", type=int, default=0, metavar="PX", help="pixels that neighbours share (0)")
    tiles.add_argument(
        "--cover",
        action="store_true",
        help="as many tiles as it takes to see every pixel; otherwise their number is rounded (1080 px: two of 512)",
    )
    tiles.add_argument("--min-size", type=int, default=64, metavar="PX", help="leave out smaller fields (64)")
    tiles.add_argument(
        "--min-structure",
        type=float,
        default=5.0,
        metavar="X",
        help="leave out blank tiles: noise has 1, an empty field about 3, cells more than 8 (5; 0 keeps them)",
    )
    tiles.add_argument(
        "--max-saturated",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="leave out overexposed tiles (0.5; 1 keeps them)",
    )
    values = parser.add_argument_group("values")
    values.add_argument(
        "--bit-depth",
        "--depth",
        choices=("keep", "8"),
        default="keep",
        help="keep the source's bits, or map to 8 (default: keep)",
    )
    values.add_argument(
        "--percentiles",
        nargs=2,
        type=float,
        default=(0.1, 99.9),
        metavar=("LOW", "HIGH"),
        help="what becomes 0 and 255",
    )
    values.add_argument(
        "--levels-of", choices=("plate", "field"), default="plate", help="take percentiles over plates or fields"
    )
    values.add_argument("--codec", choices=("pco", "png", "npy"), default="pco", help="how channels are stored (pco)")
    work = parser.add_argument_group("work")
    work.add_argument("--samples-per-shard", type=int, default=256, metavar="N", help="about how many (256)")
    work.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    work.add_argument(
        "--slice", type=_part, default=(1, 1), metavar="I/N", help="build one of N parts; then 'shards merge'"
    )
    work.add_argument("--strict", action="store_true", help="stop at the first input that cannot be read")
    work.add_argument(
        "--max-unreadable",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="stop when more of a shard cannot be read (0.5)",
    )
    parser.set_defaults(run=_run_build)


def _part(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 3/64, got {text!r}")
    return int(number), int(total)


def _run_build(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dinocell.data_shards.build.shard import ShardSettings
    from dinocell.data_shards.build.tiles import TileSettings
    from dinocell.data_shards.build.write import BuildProgress, build
    from dinocell.data_shards.sources.registry import source_from
    from dinocell.errors import ShardError

    try:
        settings = ShardSettings(
            tiles=TileSettings(
                size=options.tile_size,
                overlap=options.overlap,
                cover=options.cover,
                min_size=options.min_size,
                min_structure=options.min_structure,
                max_saturated=options.max_saturated,
            ),
            codec=options.codec,
            bit_depth=8 if options.bit_depth == "8" else None,
            percentiles=tuple(options.percentiles),
            levels_of=options.levels_of,
            max_unreadable=options.max_unreadable,
        )
    except ValueError as error:
        raise ShardError(str(error)) from error
    source = source_from(options)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task("listing", total=None, note="")

        def listed(number: int) -> None:
            if number % 1000 == 0:
                bar.update(task, note=f"{number:,} fields")

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
            listed=listed,
            progress=progress,
        )
    if manifest is None:
        number, total = options.slice
        print(f"part {number} of {total} is built; when all are: dinocell shards merge {options.output}")
    else:
        _print_built(options.output, manifest)


def _add_merge(actions: Any) -> None:
    parser = add_command(
        actions, "merge", "finish a set whose parts were built with --slice", "dinocell shards merge shards/jump"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of the set")
    parser.set_defaults(run=_run_merge)


def _run_merge(options: argparse.Namespace) -> None:
    from dinocell.data_shards.build.write import merge

    _print_built(options.output, merge(options.output))


def _print_built(output: str | Path, manifest: "Manifest") -> None:
    samples, fields, shards = (
        f"{number:,}" for number in (manifest.num_samples, manifest.num_fields, len(manifest.shards))
    )
    print(f"{output}: {samples} samples of {fields} fields in {shards} shards, {_bytes(manifest.num_bytes)}")
    if manifest.rejected:
        counted = Counter(manifest.rejected).most_common(_MAX_KINDS)
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in counted)
        print(f"rejected: {kinds} (each with its reason in rejected.jsonl)")


def _add_info(actions: Any) -> None:
    parser = add_command(actions, "info", "say what is in a set", "dinocell shards info shards/jump")
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
    _print_built(options.set, manifest)
    source = dict(manifest.settings["source"])
    print(f"source: {source.pop('kind')} {', '.join(f'{key}={value}' for key, value in source.items() if value)}")
    print(f"tiles: {', '.join(f'{count:,} of {shape}' for shape, count in manifest.shapes.items())}")
    table = Table(box=None, pad_edge=False)
    for heading in ("channel", "tiles", "lowest", "1 %", "median", "99 %", "highest", "mean", "deviation"):
        table.add_column(heading, justify="left" if heading == "channel" else "right")
    for name, known in manifest.channels.items():
        levels = (
            known.minimum,
            *(known.percentiles[p] for p in ("1", "50", "99")),
            known.maximum,
            known.mean,
            known.deviation,
        )
        table.add_row(name, f"{known.num_tiles:,}", *(f"{level:.5g}" for level in levels))
    Console().print(table, highlight=False, markup=False)


def _add_verify(actions: Any) -> None:
    parser = add_command(
        actions, "verify", "read a whole set and list what is damaged or missing", "dinocell shards verify shards/jump"
    )
    parser.add_argument("set", metavar="SET", help="folder or address of a set")
    parser.add_argument("--workers", type=whole_number(1), metavar="N", help="processes (default: one a core)")
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
    if problems:
        for problem in problems:
            print(f"{problem.file}: {problem.what}")
        raise ShardError(f"{options.set}: {len(problems)} problem(s) in {len({p.file for p in problems})} file(s)")
    print(f"{options.set}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, all as they should be")


def _add_preview(actions: Any) -> None:
    parser = add_command(
        actions,
        "preview",
        "draw some samples with all their channels, or the views that a pretraining recipe makes of them",
        "dinocell shards preview shards/jump --output p.png\n"
        "  dinocell shards preview shards/jump --views debug views.policy=bag --output views.png",
    )
    parser.add_argument("set", metavar="SET", help="folder or address of a set")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), metavar="PNG", help="(preview.png)")
    parser.add_argument("--samples", type=whole_number(1), default=8, metavar="N", help="rows (8)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="which samples (0)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="for remote sets: where copies of shards may lie")
    parser.add_argument(
        "--views",
        nargs="+",
        metavar=("RECIPE", "key=value"),
        help="a pretraining recipe and settings: draw its global and local crops, each with its channel",
    )
    parser.set_defaults(run=_run_preview)


def _run_preview(options: argparse.Namespace) -> None:
    from dinocell.data_shards.inspect import preview

    if options.views:
        recipe, *overrides = options.views
        _preview_views(options.set, options.output, recipe, overrides, options.samples, options.seed, options.cache)
        print(f"wrote {options.output}")
        return
    preview(options.set, options.output, num_samples=options.samples, seed=options.seed, cache=options.cache)
    print(f"wrote {options.output}")


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


def _preview_views(
    shards: str,
    output: Path,
    recipe: str,
    overrides: Sequence[str],
    num_samples: int,
    seed: int,
    cache: Path | None,
) -> None:
    """Draw the views that a pretraining recipe makes of a shard set."""
    from dinocell.configs.load import find_recipe, load_config, text_override
    from dinocell.ssl.config import PretrainConfig
    from dinocell.ssl.visualise import preview_views

    fixed = ["output=none", text_override("data.shards", [shards]), f"seed={seed}"]
    fixed += [text_override("data.cache", cache)] if cache is not None else []
    config = load_config(PretrainConfig, find_recipe("pretrain", recipe), [*fixed, *overrides])
    preview_views(config, output, num_samples=num_samples)
