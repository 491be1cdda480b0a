"""``dinocell info`` and ``dinocell export``: describe and convert checkpoints."""

import argparse
from pathlib import Path
from typing import Any

from dinocell.commands._parser import add_command, whole_number
from dinocell.errors import DinocellError


def register(commands: Any) -> None:
    """Add ``info`` and ``export`` to the commands."""
    info = add_command(commands, "info", "describe a checkpoint or a segmenter", "dinocell info dinov3_vits16.pth")
    export = add_command(
        commands,
        "export",
        "convert a checkpoint to another layout, patch size or number of channels",
        "dinocell export teacher_checkpoint.pth --layout meta --in-channels 3 --output for_meta.pth",
    )
    for parser in (info, export):
        parser.add_argument(
            "source",
            metavar="CHECKPOINT",
            help="a path, a folder, hf://owner/name, a URL with #sha256=..., or a bare name such as dinov3_vits16",
        )
    info.add_argument(
        "--image-size", type=whole_number(1), default=224, metavar="PX", help="image size for the cost (default 224)"
    )
    info.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    info.set_defaults(run=_run_info)
    _add_export_options(export)


def _run_info(options: argparse.Namespace) -> None:
    from dinocell.finetune.segmenter_file import describe_segmenter, is_segmenter, read_segmenter
    from dinocell.models.weights import describe, read_weights

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


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a .pth, .pt or .safetensors file")
    parser.add_argument(
        "--layout",
        choices=("dinocell", "meta", "meta-flat", "huggingface"),
        default="dinocell",
        help="dinocell: our file (default); meta: the same, for Meta's evaluators; meta-flat: the bare state dict "
        "for Meta's model classes; huggingface: a folder for transformers",
    )
    parser.add_argument(
        "--in-channels", type=whole_number(1), metavar="C", help="fold the patch embedding to C channels"
    )
    parser.add_argument("--patch-size", type=whole_number(1), metavar="PX", help="resample the patch embedding")
    parser.add_argument(
        "--input",
        choices=("unit", "standardised", "imagenet"),
        help="input convention to convert to (default: that of the file; with --in-channels 3 and a layout other than "
        "dinocell: imagenet)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.set_defaults(run=_run_export)


def _run_export(options: argparse.Namespace) -> None:
    from dinocell.models.weights import fit_weights, read_weights, save_weights

    if options.output.exists() and not options.overwrite:
        raise DinocellError(f"{options.output} exists already; add --overwrite to replace it")
    target = options.input
    if target is None and options.in_channels == 3 and options.layout != "dinocell":
        target = "imagenet"  # of Meta's and Hugging Face's own preprocessing
    weights = read_weights(options.source)
    fitted = fit_weights(weights, patch_size=options.patch_size, in_channels=options.in_channels, input=target)
    save_weights(options.output, fitted, layout=options.layout)
    print(f"wrote {options.output} ({options.layout} layout)")
    for note in fitted.card.derived_from[len(weights.card.derived_from) :]:
        print(f"  {note}")
    if fitted.card.licence:
        print(f"  licence: {fitted.card.licence}")
