"""``dinocell segment``: images become label images, and on request maps, overlays and tables of cells."""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.errors import DinocellError, ImageError

if TYPE_CHECKING:
    from dinocell.eval.segmentation.jobs import Request
    from dinocell.eval.segmentation.pipeline import DINOCellPipeline
    from dinocell.images.image import Picture

# For --dry-run: the side of the piece that is tried, and memory by benchmarks/results/segment.md.
_TRIED_PX = 512
_BASE_BYTES, _BYTES_PER_PIXEL = 0.8e9, 32


def register(subparsers: Any) -> None:
    """Add ``segment`` to the commands."""
    summary = "find the cells of images"
    parser = subparsers.add_parser(
        "segment",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Labels are written as NAME_labels.tif: 16-bit numbers "
        "(32-bit where 65,535 do not suffice), 0 is background. What is there already is not computed again.",
        epilog="example:\n  dinocell segment images/ more/*.tif --model best.pt --output results/ --csv --save-viz",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="files, folders (searched all through) or patterns; @FILE: a list of those, one a line",
    )
    parser.add_argument("--list", action="append", default=[], metavar="FILE", help="the same as @FILE")
    parser.add_argument(
        "--model",
        metavar="M",
        help="a segmenter: a path, a folder or hf://owner/name (default: the small one that is shipped with DINOCell)",
    )
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="FOLDER", help="(results)")
    parser.add_argument("--cells-max", type=float, metavar="T", help="threshold of peaks (default: the model's)")
    parser.add_argument("--cell-fill", type=float, metavar="T", help="threshold of cells (default: the model's)")
    parser.add_argument("--probability", type=float, metavar="T", help="of a model of target flows: chance of a cell")
    parser.add_argument("--flow-error", type=float, metavar="T", help="of a model of target flows: largest flow error")
    parser.add_argument("--channel", type=int, metavar="C", help="the channel to look at, from 0 (default: their mean)")
    parser.add_argument("--pixel-size", type=float, metavar="UM", help="of the images, whatever their files say")
    parser.add_argument("--frames", action="store_true", help="segment every frame of a stack (NAME_f0000_labels.tif)")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="PX",
        help="from window to window (three quarters of the model's window: 192 of 256; up to seven eighths is faster)",
    )
    parser.add_argument("--device", default=None, help="cpu or cuda (default: the best there is)")
    parser.add_argument("--save-viz", action="store_true", help="write NAME_overlay.png")
    parser.add_argument(
        "--save-dist-map",
        action="store_true",
        help="write NAME_distance.tif, 32-bit floats; by a model of target flows NAME_flows.tif: flow along rows, "
        "along columns, and the chance of a cell",
    )
    parser.add_argument("--save-outlines", action="store_true", help="write NAME_outlines.png, transparent elsewhere")
    parser.add_argument("--save-geojson", action="store_true", help="write NAME_cells.geojson, polygons for QuPath")
    parser.add_argument("--save-rois", action="store_true", help="write NAME_rois.zip, regions of interest for ImageJ")
    parser.add_argument("--save-coco", action="store_true", help="write coco.json, all images with run lengths")
    parser.add_argument(
        "--save-ctc",
        action="store_true",
        help="write FOLDER_RES/mask000.tif for FOLDER/t000.tif, or with --frames NAME_RES/mask000.tif for a stack, as "
        "the Cell Tracking Challenge has it",
    )
    parser.add_argument("--csv", action="store_true", help="write NAME_cells.csv, one line a cell")
    parser.add_argument("--overwrite", action="store_true", help="compute again what is there")
    parser.add_argument("--dry-run", action="store_true", help="list what would be done")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from dinocell.eval.segmentation.jobs import (
        COCO,
        ENDINGS,
        SUMMARY,
        Request,
        find_images,
        names_of_results,
        plan_jobs,
    )

    inputs = [*options.images, *(f"@{file}" for file in options.list)]
    if not inputs:
        raise DinocellError("no images: give files, folders, patterns, or a list of them with --list FILE")
    if options.pixel_size is not None and not 0 < options.pixel_size < math.inf:
        raise DinocellError(f"--pixel-size: expected more than 0 micrometres, got {options.pixel_size:g}")
    files = find_images(inputs, without=options.output)
    pipeline = _pipeline(options)
    request = Request(
        output=options.output,
        products=frozenset(product for product in ENDINGS if getattr(options, product)),
        maps=pipeline.model.target,
        save_ctc=options.save_ctc,
        save_coco=options.save_coco,
        frames=options.frames,
        channel=options.channel,
        pixel_size_um=options.pixel_size,
        overwrite=options.overwrite,
        settings=_settings(pipeline, options),
    )
    jobs = plan_jobs(files, request)
    if options.dry_run:
        for job in jobs:
            print(f"{job.file} -> {', '.join(names_of_results(job, request))}")
        tables = [SUMMARY, *([COCO] if request.save_coco else [])]
        print(f"all images -> {', '.join(str(request.output / name) for name in tables)}")
        print(f"{len(jobs)} images; {_cost(files, pipeline, request)}; nothing was written")
        return
    from dinocell.eval.segmentation.batch import segment_files

    failed = segment_files(jobs, pipeline, request, say=print)
    if failed:
        listed = "\n".join(f"  {line}" for line in failed.values())
        raise SystemExit(f"dinocell: {len(failed)} of {len(jobs)} images could not be segmented:\n{listed}")


def _pipeline(options: argparse.Namespace) -> "DINOCellPipeline":
    from dinocell.eval.segmentation.pipeline import DINOCellPipeline
    from dinocell.finetune.model import DINOCell
    from dinocell.finetune.segmenter_file import DEFAULT_MODEL, DEFAULT_MODEL_NOTICE

    if options.model is None:
        print(DEFAULT_MODEL_NOTICE, file=sys.stderr)
    return DINOCellPipeline(
        DINOCell.from_pretrained(options.model or DEFAULT_MODEL),
        device=options.device,
        cells_max=options.cells_max,
        cell_fill=options.cell_fill,
        probability=options.probability,
        flow_error=options.flow_error,
        stride=options.stride,
    )


def _settings(pipeline: "DINOCellPipeline", options: argparse.Namespace) -> str:
    """Return what the cells depend on, besides the image."""
    parameters = pipeline.parameters
    thresholds = {name.replace("_", " "): getattr(parameters, name) for name in parameters.thresholds}
    shown = thresholds | {"channel": options.channel, "pixel size": options.pixel_size, "stride": pipeline.stride}
    said = [f"{name} {value:g}" for name, value in shown.items() if value is not None]
    return ", ".join([f"model {pipeline.model.fingerprint()}", *said])


def _cost(files: Sequence[Path], pipeline: "DINOCellPipeline", request: "Request") -> str:
    """Say what memory and time the images take if all are as large as the first, by trying a piece of that."""
    from datetime import timedelta
    from time import perf_counter

    from dinocell.images.read import count_frames

    picture = _first_picture(files, frames=request.frames)
    if picture is None:
        return "none of them can be read"
    number = len(files)
    if request.frames:
        number = 0
        for file in files:
            with suppress(ImageError):  # the run itself names it
                number += count_frames(file)
    plane = picture.plane(request.channel)
    size = request.pixel_size_um if request.pixel_size_um is not None else picture.pixel_size_um
    height, width = plane.shape
    piece = plane[:_TRIED_PX, :_TRIED_PX]
    pipeline.run(piece, pixel_size_um=size)  # compiles, and sizes the network's memory
    start = perf_counter()
    pipeline.run(piece, pixel_size_um=size)
    seconds = (perf_counter() - start) * plane.size / piece.size
    gigabytes = (_BASE_BYTES + _BYTES_PER_PIXEL * plane.size) / 1e9
    return (
        f"the first has {height} x {width} pixels, and {number} like it take about "
        f"{timedelta(seconds=round(seconds * number))} and {gigabytes:.1f} GB on {pipeline.device}"
    )


def _first_picture(files: Sequence[Path], *, frames: bool) -> "Picture | None":
    from dinocell.images.read import read_image, read_stack

    for file in files:
        with suppress(ImageError):
            return next(iter(read_stack(file))) if frames else read_image(file)
    return None
