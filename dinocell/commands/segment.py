"""``dinocell segment``: segment images, and write label images and on request maps, overlays and tables of cells."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command
from dinocell.errors import DinocellError, ImageError

if TYPE_CHECKING:
    from dinocell.eval.segmentation.batch import ImageTask, SegmentOptions
    from dinocell.eval.segmentation.pipeline import DINOCellPipeline

# For --dry-run: the side of the crop that is timed, and memory by benchmarks/results/segment.md.
_TIMED_PX = 512
_BASE_BYTES, _BYTES_PER_PIXEL = 0.8e9, 32
_PRODUCTS = {
    "--save-viz": "write NAME_overlay.png",
    "--save-dist-map": "write NAME_distance.tif, 32-bit floats; flow models: NAME_flows.tif with the flow along rows, "
    "the flow along columns, and the cell probability",
    "--save-outlines": "write NAME_outlines.png, outlines on a transparent background",
    "--save-geojson": "write NAME_cells.geojson, polygons for QuPath",
    "--save-rois": "write NAME_rois.zip, regions of interest for ImageJ",
    "--save-coco": "write coco.json, run-length masks of all images",
    "--save-ctc": "write FOLDER_RES/mask000.tif for FOLDER/t000.tif, or with --frames NAME_RES/mask000.tif, the "
    "layout of the Cell Tracking Challenge",
    "--csv": "write NAME_cells.csv, one row per cell",
    "--overwrite": "recompute and replace existing results",
    "--dry-run": "list what would be done",
}


def register(subparsers: Any) -> None:
    """Add ``segment`` to the commands."""
    example = "dinocell segment images/ more/*.tif --model best.pt --output results/ --csv --save-viz"
    parser = add_command(subparsers, "segment", "segment cells in images", example)
    parser.description = (
        "Segment cells in images. Labels are written as NAME_labels.tif: 16-bit integers (32-bit for more than 65,535 "
        "cells), 0 is background. Existing results are skipped; results made with other settings or from another image "
        "are an error."
    )
    add = parser.add_argument
    add(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="files, folders (searched recursively), patterns; @FILE: a list of them, one per line",
    )
    add("--list", action="append", default=[], metavar="FILE", help="the same as @FILE")
    add("--model", metavar="M", help="a segmenter: a path, a folder or hf://owner/name (default: the bundled model)")
    add("--output", type=Path, default=Path("results"), metavar="FOLDER", help="results folder (default: results)")
    add("--cells-max", type=float, metavar="T", help="peak threshold (default: the model's)")
    add("--cell-fill", type=float, metavar="T", help="mask threshold (default: the model's)")
    add("--probability", type=float, metavar="T", help="flow models only: minimum cell probability")
    add("--flow-error", type=float, metavar="T", help="flow models only: maximum flow error")
    add("--channel", type=int, metavar="C", help="channel to segment, from 0 (default: the mean of all)")
    add("--pixel-size", type=float, metavar="UM", help="overrides the pixel size in the file metadata")
    add("--frames", action="store_true", help="segment every frame of a stack (NAME_f0000_labels.tif)")
    add(
        "--stride",
        type=int,
        metavar="PX",
        help="distance between tiles (default: three quarters of a tile, 192 of 256; at most seven eighths)",
    )
    add("--device", help="cpu or cuda (default: cuda if available)")
    for option, text in _PRODUCTS.items():
        add(option, action="store_true", help=text)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    inputs = [*arguments.images, *(f"@{file}" for file in arguments.list)]
    if not inputs:
        raise DinocellError("no images: give files, folders, patterns, or a list of them with --list FILE")
    if arguments.pixel_size is not None and not 0 < arguments.pixel_size < math.inf:
        raise DinocellError(f"--pixel-size: expected more than 0 micrometres, got {arguments.pixel_size:g}")
    files = find_images(inputs, without=arguments.output)
    from dinocell.eval.segmentation import batch  # after the quick checks: it imports the network
    from dinocell.eval.segmentation.pipeline import DINOCellPipeline
    from dinocell.finetune.model import DINOCell
    from dinocell.finetune.segmenter_file import DEFAULT_MODEL, DEFAULT_MODEL_NOTICE

    if arguments.model is None:
        print(DEFAULT_MODEL_NOTICE, file=sys.stderr)
    model = DINOCell.from_pretrained(arguments.model or DEFAULT_MODEL)
    thresholds = {name: getattr(arguments, name) for name in ("cells_max", "cell_fill", "probability", "flow_error")}
    pipeline = DINOCellPipeline(model, arguments.device, stride=arguments.stride, **thresholds)
    options = batch.SegmentOptions(
        output=arguments.output,
        products=frozenset(product for product in batch.ENDINGS if getattr(arguments, product)),
        maps=pipeline.model.target,
        save_ctc=arguments.save_ctc,
        save_coco=arguments.save_coco,
        frames=arguments.frames,
        channel=arguments.channel,
        pixel_size_um=arguments.pixel_size,
        overwrite=arguments.overwrite,
        settings=_settings(pipeline, arguments),
    )
    tasks = batch.plan_tasks(files, options)
    pending = batch.find_pending(tasks, options)
    names = {task.name for task in pending}
    for task in tasks:
        if task.name not in names:
            print(f"{task.title}: skipped: results exist (use --overwrite to recompute)")
    if arguments.dry_run:
        for task in pending:
            *others, labels = task.paths.values()
            print(f"{task.title} -> {', '.join(map(str, (labels, *others)))}")
        tables = [batch.SUMMARY, *([batch.COCO] if options.save_coco else [])]
        print(f"all images -> {', '.join(str(options.output / name) for name in tables)}")
        print(f"{len(pending)} images{_cost(pending, pipeline, options)}; nothing was written")
        return
    failed = batch.segment_images(pending, pipeline, options, log=print)
    print(f"results: {options.output}")
    if failed:
        lines = "\n".join(f"  {line}" for line in failed.values())
        raise SystemExit(f"dinocell: {len(failed)} of {len(files)} images could not be segmented:\n{lines}")


def find_images(inputs: Sequence[str], *, without: Path) -> list[Path]:
    """Return the image files of paths, folders, patterns and lists of those (``@list.txt``), each once.

    Folders are searched recursively, through links; hidden files and the results folder ``without`` are skipped,
    unless the input itself is inside that folder. A DinocellError if an input has no image, or cannot be searched.
    """
    from dinocell.images.read import IMAGE_SUFFIXES

    images: dict[str, Path] = {}
    for text in inputs:
        for entry in _read_list(Path(text[1:])) if text.startswith("@") else [text]:
            path = Path(entry)
            matches = [path] if path.exists() else _matching(path, without)
            files = []
            for match in matches:
                is_folder = match.is_dir() and match.suffix.lower() != ".zarr"
                files += _images_in(match, without) if is_folder else [match]
            if not files:
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise DinocellError(f"{entry}: no image found ({suffixes}; not in the results folder {without})")
            for file in files:
                images.setdefault(os.path.abspath(file), file)  # noqa: PTH100 - links keep their names
    return list(images.values())


def _images_in(path: Path, without: Path) -> list[Path]:
    """Return the images in a folder and its subfolders."""
    from dinocell.images.listing import list_files
    from dinocell.images.read import has_image_name

    files = [Path(file.path) for file in list_files(path, folders_as_files=(".zarr",))]
    is_inside = without.resolve() in path.resolve().parents
    return [file for file in files if has_image_name(file.name) and (is_inside or not _is_in(file, without))]


def _matching(pattern: Path, without: Path) -> list[Path]:
    """Return the matches of a pattern such as ``plate*/**/*.tif`` that the shell has passed on; no hidden files."""
    parts = pattern.parts
    num_fixed = next((index for index, part in enumerate(parts) if set("*?[") & set(part)), len(parts))
    try:
        matches = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except (NotImplementedError, ValueError, IndexError):
        return []
    if not any(part.startswith(".") for part in parts[num_fixed:]):
        matches = [match for match in matches if not any(part.startswith(".") for part in match.parts[num_fixed:])]
    is_inside = _is_in(Path(*parts[:num_fixed]) / "file", without)
    return [match for match in matches if is_inside or not _is_in(match, without)]


def _is_in(path: Path, folder: Path) -> bool:
    """Return whether a file is in a folder or below it; a linked file is where the link is."""
    return path.parent.resolve().is_relative_to(folder.resolve())


def _read_list(path: Path) -> list[str]:
    """Return the lines of a list of inputs; ``#`` begins a comment line."""
    entries: list[str] = []
    problem = "is empty; expected images, folders or patterns, one per line"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        entries = [line for line in lines if line and not line.startswith("#")]
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        problem = "cannot be read (not UTF-8 text; is it an image?)"
    if not entries:
        raise DinocellError(f"{path}: the list {problem}")
    return entries


def _settings(pipeline: "DINOCellPipeline", arguments: argparse.Namespace) -> str:
    """Return what the labels depend on, besides the image; earlier runs have recorded it in this form."""
    parameters = pipeline.parameters
    values = {name.replace("_", " "): getattr(parameters, name) for name in parameters.thresholds}
    values |= {"channel": arguments.channel, "pixel size": arguments.pixel_size, "stride": pipeline.stride}
    texts = [f"{name} {value:g}" for name, value in values.items() if value is not None]
    return ", ".join([f"model {pipeline.model.fingerprint()}", *texts])


def _cost(tasks: "list[ImageTask]", pipeline: "DINOCellPipeline", options: "SegmentOptions") -> str:
    """Estimate memory and time if all images are as large as the first, from a crop of that."""
    from datetime import timedelta
    from time import perf_counter

    from dinocell.images.read import read_image, read_stack

    for task in tasks:
        with suppress(ImageError):
            image = next(read_stack(task.file)) if options.frames else read_image(task.file)
            break
    else:
        return "; none of them can be read" if tasks else ""
    plane = image.plane(options.channel)
    crop = plane[:_TIMED_PX, :_TIMED_PX]
    size = image.pixel_size_um if options.pixel_size_um is None else options.pixel_size_um
    for _ in range(2):  # the first run compiles, and allocates the network's memory
        start = perf_counter()
        pipeline.run(crop, pixel_size_um=size)
    seconds = (perf_counter() - start) * plane.size / crop.size * len(tasks)
    gigabytes = (_BASE_BYTES + _BYTES_PER_PIXEL * plane.size) / 1e9
    return (
        f"; the first has {plane.shape[0]} x {plane.shape[1]} pixels, and {len(tasks)} like it take about "
        f"{timedelta(seconds=round(seconds))} and {gigabytes:.1f} GB on {pipeline.device}"
    )
