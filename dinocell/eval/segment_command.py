"""``dinocell segment``: images become label images, and on request maps, overlays and tables of cells."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinocell.errors import DinocellError, ImageError


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
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (searched all through) or patterns")
    parser.add_argument("--model", required=True, metavar="M", help="a segmenter: a path, a folder or hf://owner/name")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="FOLDER", help="(results)")
    parser.add_argument("--cells-max", type=float, metavar="T", help="threshold of peaks (default: the model's)")
    parser.add_argument("--cell-fill", type=float, metavar="T", help="threshold of cells (default: the model's)")
    parser.add_argument("--probability", type=float, metavar="T", help="of a model of target flows: chance of a cell")
    parser.add_argument("--flow-error", type=float, metavar="T", help="of a model of target flows: largest flow error")
    parser.add_argument("--channel", type=int, metavar="C", help="the channel to look at, from 0 (default: their mean)")
    parser.add_argument("--pixel-size", type=float, metavar="UM", help="of the images, where their files do not say")
    parser.add_argument("--frames", action="store_true", help="segment every frame of a stack (NAME_f0000_labels.tif)")
    parser.add_argument("--stride", type=int, metavar="PX", help="from window to window (192; 224 is faster)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: the best there is)")
    parser.add_argument("--save-viz", action="store_true", help="write NAME_overlay.png")
    parser.add_argument(
        "--save-dist-map",
        action="store_true",
        help="write NAME_distance.tif, 32-bit floats; by a model of target flows NAME_flows.tif: flow along rows, "
        "along columns, and the chance of a cell",
    )
    parser.add_argument("--csv", action="store_true", help="write NAME_cells.csv, one line a cell")
    parser.add_argument("--overwrite", action="store_true", help="compute again what is there")
    parser.add_argument("--dry-run", action="store_true", help="list what would be done")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    files = find_images(options.images, without=options.output)
    jobs = _jobs(files, options.output)
    if options.dry_run:
        for file, stem in jobs.items():
            print(f"{file} -> {options.output / stem}_labels.tif")
        print(f"{len(jobs)} images; nothing was written")
        return
    from dinocell.eval.pipeline import DINOCellPipeline
    from dinocell.finetune.model import DINOCell

    pipeline = DINOCellPipeline(
        DINOCell.from_pretrained(options.model),
        device=options.device,
        cells_max=options.cells_max,
        cell_fill=options.cell_fill,
        probability=options.probability,
        flow_error=options.flow_error,
        stride=options.stride,
    )
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinocellError(f"{options.output}: cannot be made ({error.strerror})") from error
    failed: list[str] = []
    rows: list[tuple[str, int, float]] = []
    for number, (file, stem) in enumerate(jobs.items(), start=1):
        try:
            found = _segment_file(file, options.output / stem, pipeline, options)
        except ImageError as error:
            failed.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            print(f"[{number}/{len(jobs)}] {failed[-1]}")
            continue
        rows += found
        cells = sum(count for _, count, _ in found)
        print(f"[{number}/{len(jobs)}] {file}: " + (f"{cells} cells" if found else "there already"))
    _write_summary(options.output / "summary.csv", rows)
    if failed:
        listed = "\n".join(f"  {line}" for line in failed)
        raise SystemExit(f"dinocell: {len(failed)} of {len(jobs)} images could not be segmented:\n{listed}")


def find_images(inputs: Sequence[str], *, without: Path) -> list[Path]:
    """Return the image files that paths, folders and patterns mean, each once; what lies below ``without`` is left out.

    Raises
    ------
    DinocellError
        If an input means nothing.
    """
    from dinocell.data_shards.images import IMAGE_SUFFIXES

    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir() and path.suffix.lower() != ".zarr":
            inside = (each for each in path.rglob("*") if without.resolve() not in each.resolve().parents)
            matches = [each for each in inside if each.name.lower().endswith(IMAGE_SUFFIXES) and each.name[0] != "."]
        else:
            matches = [path] if path.exists() else _matching(path)
        if not matches:
            raise DinocellError(f"{text}: no image there ({', '.join(IMAGE_SUFFIXES)})")
        found |= dict.fromkeys(sorted(matches))
    return list(found)


def _matching(pattern: Path) -> list[Path]:
    """Return what a pattern such as ``plate*/**/*.tif`` means: a shell that does not expand it hands it on as it is."""
    try:
        return list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except (NotImplementedError, ValueError, IndexError):
        return []


def _jobs(files: Sequence[Path], output: Path) -> dict[Path, str]:
    """Return the stem of each file's results; two files that would write the same are an error."""
    stems: dict[str, Path] = {}
    for file in files:
        stem = file.name.split(".")[0] if file.name.lower().endswith((".ome.tif", ".ome.tiff")) else file.stem
        if stem in stems:
            raise DinocellError(
                f"{stems[stem]} and {file} would both write {output / stem}_labels.tif; segment them to two folders"
            )
        stems[stem] = file
    return {file: stem for stem, file in stems.items()}


def _segment_file(file: Path, target: Path, pipeline: Any, options: argparse.Namespace) -> list[tuple[str, int, float]]:
    """Segment one file, or each of its frames; return name, cells and covered share of what was computed."""
    from dinocell.data_shards.images import read_image, read_stack

    maps = pipeline.model.target
    if not options.frames:
        if _is_done(target, options, maps):
            return []
        return [_segment_picture(read_image(file), target, pipeline, options)]
    found = []
    for number, picture in enumerate(read_stack(file)):
        each = target.with_name(f"{target.name}_f{number:04d}")
        if not _is_done(each, options, maps):
            found.append(_segment_picture(picture, each, pipeline, options))
    return found


def _outputs(target: Path, options: argparse.Namespace, maps: str) -> dict[str, Path]:
    """Return where what is wanted goes; ``maps`` is the model's target."""
    wanted = {
        "csv": (options.csv, "_cells.csv"),
        "maps": (options.save_dist_map, f"_{maps}.tif"),
        "overlay": (options.save_viz, "_overlay.png"),
        "labels": (True, "_labels.tif"),  # last: where it is, all is
    }
    return {kind: target.with_name(target.name + end) for kind, (is_wanted, end) in wanted.items() if is_wanted}


def _is_done(target: Path, options: argparse.Namespace, maps: str) -> bool:
    return not options.overwrite and all(path.exists() for path in _outputs(target, options, maps).values())


def _segment_picture(picture: Any, target: Path, pipeline: Any, options: argparse.Namespace) -> tuple[str, int, float]:
    from dinocell.data_shards.image_writers import write_labels
    from dinocell.eval.outputs import write_cells, write_maps, write_overlay

    plane = (picture.mean() if options.channel is None else picture.select(options.channel)).pixels[0]
    size = options.pixel_size if options.pixel_size is not None else picture.pixel_size_um
    labels, maps = pipeline.run(plane, return_dist_map=True, pixel_size_um=size)
    outputs = _outputs(target, options, pipeline.model.target)
    try:
        if "csv" in outputs:
            write_cells(outputs["csv"], labels, plane, pixel_size_um=size)
        if "maps" in outputs:
            write_maps(outputs["maps"], maps, pixel_size_um=size)
        if "overlay" in outputs:
            write_overlay(outputs["overlay"], plane, labels)
        write_labels(outputs["labels"], labels, pixel_size_um=size)
    except OSError as error:
        raise DinocellError(f"{target.parent}: cannot be written ({error.strerror or error})") from error
    return target.name, int(labels.max()), float((labels > 0).mean())


def _write_summary(path: Path, rows: Sequence[tuple[str, int, float]]) -> None:
    """Write one line an image; lines of earlier calls for other images stay."""
    from dinocell.runtime.atomic import replacing

    known: dict[str, Sequence[object]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            known = {row[0]: row for row in list(csv.reader(file))[1:] if row}
    known |= {name: (name, cells, f"{share:.4f}") for name, cells, share in rows}
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "cells", "covered_share"))
        table.writerows(known[name] for name in sorted(known))
