"""``dinocell dataset``: convert published datasets of labelled images into a labelled set for fine-tuning."""

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command, whole_number

if TYPE_CHECKING:
    from dinocell.labelled.build import BuildReport

_MAX_SKIPPED_LINES = 8
_ADVICE = {"no cells": "--keep-empty keeps such images", "several channels": "--channel selects one"}
_ENCODING_ADVICE = {"not a label image": "--encoding sets the kind of masks"}


def register(subparsers: Any) -> None:
    """Add ``dataset`` and its kinds of source to the commands."""
    parser = add_command(
        subparsers,
        "dataset",
        "make a labelled set (imgs.npy, dist_maps.npy, anns.npy) from images and masks",
        "dinocell dataset livecell --input LIVECell_dataset_2021/ --output datasets/LIVECell-train --split train\n\n"
        "'dinocell dataset KIND --help' explains a kind.",
    )
    kinds = parser.add_subparsers(title="kinds of source", metavar="KIND", required=True)

    livecell = _add_kind(
        kinds,
        "livecell",
        "COCO annotations: LIVECell, or any other COCO instance JSON with its images",
        "--input LIVECell_dataset_2021/ --output datasets/LIVECell-train --split train",
    )
    livecell.add_argument("--split", choices=("train", "val", "test"), help="use livecell_coco_SPLIT.json")
    livecell.add_argument("--annotations", type=Path, metavar="JSON", help="the JSON file (default: searched for)")

    cellpose = _add_kind(
        kinds,
        "cellpose",
        "numbered pairs: 000_img.png and 000_masks.png",
        "--input cellpose/train --output datasets/Cellpose-train --target-size 512",
    )
    cellpose.add_argument("--split", metavar="NAME", help="use the subfolder of this name if it exists")

    ctc = _add_kind(
        kinds,
        "ctc",
        "Cell Tracking Challenge folders: 01/ with 01_GT/SEG or 01_ST/SEG",
        "--input PhC-C2DH-U373/ --output datasets/U373 --truth silver",
    )
    ctc.add_argument(
        "--truth",
        choices=("gold", "silver"),
        default="gold",
        help="gold: _GT, annotated by hand, often not every cell (default); silver: _ST, fused results of algorithms",
    )
    ctc.add_argument("--sequence", nargs="+", default=[], metavar="01", help="only these sequences")

    dsb2018_example = "--input stage1_train/ --output datasets/DSB2018"
    _add_kind(kinds, "dsb2018", "2018 Data Science Bowl folders: one PNG per nucleus", dsb2018_example)

    folder = _add_kind(
        kinds,
        "folder",
        "any images and masks, paired by two filename patterns",
        "--input bbbc039/ --images 'images/{name}.tif' --masks 'masks/{name}.png' --encoding regions "
        "--output datasets/BBBC039",
    )
    folder.add_argument("--images", required=True, metavar="PATTERN", help="such as 'images/{name}.tif'; * matches any")
    folder.add_argument("--masks", required=True, metavar="PATTERN", help="such as 'masks/{name}.png'")
    folder.add_argument(
        "--encoding",
        choices=("labels", "regions", "instances"),
        default="labels",
        help="labels: one integer per cell (default); regions: connected regions of one colour or value; "
        "instances: one file per cell ('masks/{name}/{cell}.png')",
    )


def _add_kind(kinds: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser = add_command(kinds, name, summary, f"dinocell dataset {name} {example}")
    parser.set_defaults(run=_run, kind=name)
    parser.add_argument("--input", required=True, type=Path, metavar="FOLDER", help="folder of the images and masks")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the labelled set to write")
    parser.add_argument(
        "--target-size",
        type=whole_number(1),
        metavar="PX",
        help="scale the longer side to this and pad to a square (default: keep sizes, one subfolder per size)",
    )
    parser.add_argument(
        "--channel", type=_channel, metavar="C", help="use one channel, by index (from 0) or name, or 'mean' of all"
    )
    parser.add_argument("--keep-empty", action="store_true", help="keep images without a cell")
    parser.add_argument("--strict", action="store_true", help="stop at the first pair that cannot be used")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing labelled set")
    parser.add_argument("--licence", default="", metavar="TEXT", help="the licence of the data, noted in dataset.json")
    return parser


def _channel(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from dinocell.labelled import layouts
    from dinocell.labelled.build import build_labelled
    from dinocell.runtime.progress import start_progress

    folder, licence, advice = options.input, options.licence, _ADVICE
    if options.kind == "livecell":
        source = "COCO annotations"
        pairs = layouts.livecell_pairs(folder, split=options.split, annotations=options.annotations)
        licence = licence or ("LIVECell: CC BY-NC 4.0, not for commercial use" if options.split else "")
    elif options.kind == "cellpose":
        source = "Cellpose pairs"
        pairs = layouts.cellpose_pairs(folder, split=options.split)
    elif options.kind == "ctc":
        source = f"Cell Tracking Challenge, {options.truth} truth"
        pairs = layouts.ctc_pairs(folder, truth=options.truth, sequences=options.sequence)
    elif options.kind == "dsb2018":
        source = "2018 Data Science Bowl"
        pairs = layouts.dsb2018_pairs(folder)
    else:
        source = f"{options.images} with {options.masks} ({options.encoding})"
        pairs = layouts.folder_pairs(folder, images=options.images, masks=options.masks, encoding=options.encoding)
        advice = _ADVICE | _ENCODING_ADVICE
    bar = start_progress(Console(stderr=True), total_steps=len(pairs), batch_size=1)
    try:
        report = build_labelled(
            pairs,
            options.output,
            source=source,
            licence=licence,
            target_size=options.target_size,
            channel=options.channel,
            keep_empty=options.keep_empty,
            strict=options.strict,
            overwrite=options.overwrite,
            advice=advice,
            progress=bar.advance,
        )
    finally:
        bar.close()
    _print_report(report)


def _print_report(report: "BuildReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("written", str(report.output))
    table.add_row("images", f"{report.num_images:,}")
    table.add_row("cells", f"{report.num_cells:,}")
    sizes = [f"{count:,} of {height} x {width}" for (height, width), count in report.sizes.items()]
    more = f", and {len(sizes) - 12} more sizes" if len(sizes) > 12 else ""
    table.add_row("sizes", ", ".join(sizes[:12]) + more)
    for note, count in report.notes.items():
        table.add_row("note", f"{count:,} {note}")
    table.add_row("skipped", f"{len(report.skipped):,}")
    for kind, count in Counter(skip.kind for skip in report.skipped).most_common(_MAX_SKIPPED_LINES):
        first = next(skip.reason for skip in report.skipped if skip.kind == kind)
        table.add_row("", f"{count:,} x {kind}, such as {first}")
    if report.skipped:
        table.add_row("", f"complete list: {report.output / 'dataset.json'}")
    Console(markup=False, highlight=False, emoji=False).print(table)  # names may hold [brackets]
