"""The batch of `dinocell segment`: one thread reads the next image and one writes, while the network works.

The record of an image in ``summary.jsonl`` is written before its first file, and its labels are written last. So:

- Record and labels: the image is done, and is skipped if its settings and source are the recorded ones, else an error.
- A record without labels: the run was interrupted, and all files of the image are written again.
- Any file of an image without a record is the user's own: an error.

These errors come before any work starts, and not with ``--overwrite``. ``summary.csv`` is derived from the records.
"""

import csv
import functools
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from dinocell.errors import DinocellError, ImageError, StackError, one_line, require
from dinocell.eval.export import writers
from dinocell.eval.export.outlines import trace_cells
from dinocell.eval.metrics.ctc import check_ids, write_mask
from dinocell.eval.segmentation.pipeline import DINOCellPipeline, Segmentation
from dinocell.images.image import Image
from dinocell.images.read import IMAGE_SUFFIXES, count_frames, image_stem, read_image, read_stack
from dinocell.images.write import write_labels, write_png, write_tiff
from dinocell.runtime.files import folder_lock, write_table

RECORDS, SUMMARY, COCO = "summary.jsonl", "summary.csv", "coco.json"
# The files of each image, by option: the end of the file name. Maps are named after the model's target.
ENDINGS: dict[str, str] = {
    "csv": "_cells.csv",
    "save_dist_map": "_{maps}.tif",
    "save_viz": "_overlay.png",
    "save_outlines": "_outlines.png",
    "save_geojson": "_cells.geojson",
    "save_rois": "_rois.zip",
}
_MAX_NAME_BYTES = 255  # of most file systems
_COLUMNS = ("image", "cells", "covered_share", "file", "settings")  # of summary.csv
_MAX_WAITING = 2  # images whose results wait to be written: more would only fill the memory
_REPORT_EVERY_S = 10.0  # progress within a large image

Record = dict[str, Any]  # a line of summary.jsonl


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """What to write, and how to read the images."""

    output: Path  # the results folder
    products: frozenset[str] = frozenset()  # files per image in addition to its labels
    maps: str = "distance"  # name of the model's maps: distance or flows
    save_ctc: bool = False  # masks in the layout of the Cell Tracking Challenge
    save_coco: bool = False  # one COCO file of all images
    frames: bool = False  # segment every frame of a stack
    channel: int | None = None  # from 0; None: the mean of all channels
    pixel_size_um: float | None = None  # overrides the file metadata
    overwrite: bool = False
    settings: str = ""  # what the labels depend on besides the image, as text; recorded and compared


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """One image, or one frame of a stack, and its result files.

    ``name`` begins the names of the results; ``paths`` are by product, with the labels last (key ``labels``).
    """

    file: Path
    frame: int | None
    name: str
    paths: dict[str, Path]

    @property
    def title(self) -> str:
        """The file, and the frame of a stack, for messages."""
        return str(self.file) if self.frame is None else f"{self.file}, frame {self.frame}"


def plan_tasks(files: Sequence[Path], options: SegmentOptions) -> list[ImageTask]:
    """Return every image and frame to segment, with the names of its results.

    A DinocellError if two files would write the same results, results would replace an input image, a name is too long
    or not Unicode, or it has no frame number where the challenge's layout needs one.
    """
    inputs = {os.path.abspath(file) for file in files}  # noqa: PTH100 - links keep their names (git-annex, DVC)
    sources: dict[Path, Path] = {}
    tasks = [task for file in files for task in _tasks_of(file, options)]
    for task in tasks:
        for path in task.paths.values():
            source, name = sources.setdefault(path, task.file), os.fsencode(path.name)
            conflict = f"{source} and {task.file} would both write {path}; segment them to two folders"
            require(source == task.file, conflict)
            conflict = f"is given as an image, and results of {task.file} have this name; choose another --output"
            require(os.path.abspath(path) not in inputs, f"{path}: {conflict}")  # noqa: PTH100
            is_usable = len(name) <= _MAX_NAME_BYTES and name == path.name.encode(errors="replace")
            shown = name.decode("utf-8", "backslashreplace")
            require(is_usable, f"{shown}: too long a file name, or not Unicode (UTF-8); rename the image")
    return tasks


def _tasks_of(file: Path, options: SegmentOptions) -> list[ImageTask]:
    stem = image_stem(file.name) if file.name.lower().endswith(IMAGE_SUFFIXES) else file.stem
    frames: list[tuple[int | None, str, str]]  # index, name and mask in the challenge's layout
    if options.frames:
        try:
            num_frames = count_frames(file)
        except ImageError:  # reported when the file is read
            num_frames = 1
        digits = max(3, len(str(num_frames - 1)))
        frames = [(k, f"{stem}_f{k:04d}", f"{stem}_RES/mask{k:0{digits}d}.tif") for k in range(num_frames)]
    else:
        number = stem[len(stem.rstrip("0123456789")) :]
        needed = "--save-ctc needs the frame number at the end of the name, such as t007.tif; for a stack, add --frames"
        require(number or not options.save_ctc, f"{file}: {needed}")
        folder = Path(os.path.abspath(file)).parent.name  # noqa: PTH100
        frames = [(None, stem, f"{folder}_RES/mask{number}.tif")]
    tasks = []
    for frame, name, mask in frames:
        results = {
            product: f"{name}{ending.format(maps=options.maps)}"
            for product, ending in ENDINGS.items()
            if product in options.products
        }
        results |= ({"save_ctc": mask} if options.save_ctc else {}) | {"labels": f"{name}_labels.tif"}
        paths = {product: options.output / result for product, result in results.items()}
        tasks.append(ImageTask(file=file, frame=frame, name=name, paths=paths))
    return tasks


def find_pending(tasks: Sequence[ImageTask], options: SegmentOptions) -> list[ImageTask]:
    """Return the images that are not done, by the rules above; existing files that are errors raise a DinocellError."""
    records = read_records(options.output)
    coco = writers.read_coco_file(options.output / COCO) if options.save_coco else None
    content_hash = functools.cache(_content_hash)  # once per stack
    pending = []
    for task in tasks:
        existing, record = [path for path in task.paths.values() if path.exists()], records.get(task.name)
        is_interrupted = record is not None and task.paths["labels"] not in existing
        if options.overwrite or not existing or is_interrupted:
            pending.append(task)
            continue
        if record is None:
            reason = f"is not recorded in {RECORDS}"
        elif record["settings"] != options.settings:
            reason = f"was made with {record['settings'] or 'unknown settings'}, not with {options.settings}"
        elif not _is_source(record, task.file, options.output, content_hash):
            reason = f"was made from {record['file']}, not from {task.file}"
        else:
            if len(existing) < len(task.paths) or (coco is not None and task.name not in coco):
                pending.append(task)
            continue
        advice = "choose another --output, or replace it with --overwrite"
        raise DinocellError(f"{existing[-1]}: exists and {reason}; {advice}")
    return pending


def segment_images(
    tasks: Sequence[ImageTask], pipeline: DINOCellPipeline, options: SegmentOptions, *, log: Callable[[str], None]
) -> dict[Path, str]:
    """Segment images, log a line for each, and return the files that failed, with the reason.

    A DinocellError ends the run if results cannot be written.
    """
    with _output_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        is_new = not (options.output / RECORDS).exists()
        # Fails in a folder without write permission before the network's long work; takes over an older summary.csv.
        _append(options.output, read_records(options.output).values() if is_new else [])
    batch = _Batch(tasks=tasks, pipeline=pipeline, options=options, log=log)
    try:
        batch.run()
    finally:
        batch.write_tables()
    return batch.failed


@dataclass(kw_only=True, eq=False)
class _Batch:
    """A run over images: what it works with, and what it has done so far."""

    tasks: Sequence[ImageTask]
    pipeline: DINOCellPipeline
    options: SegmentOptions
    log: Callable[[str], None]
    failed: dict[Path, str] = field(default_factory=dict)
    coco: dict[str, writers.CocoImage] = field(default_factory=dict)
    num_done: int = 0
    last_report_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Read, predict and write; on an interrupt, what has been predicted is still written."""
        images = self._read()
        writing: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            coming = reader.submit(next, images, None)
            while (item := coming.result()) is not None:
                coming = reader.submit(next, images, None)
                task, image, source = item
                try:
                    if isinstance(image, ImageError):
                        raise image
                    result = self.pipeline.run(
                        image.plane(self.options.channel),
                        return_dist_map=True,
                        pixel_size_um=image.pixel_size_um,
                        progress=functools.partial(self._report_tiles, task),
                    )
                    if self.options.save_ctc:
                        check_ids(result.labels, task.paths["save_ctc"])
                    writing.append(writer.submit(self._write, task, image, result, source))
                except ImageError as error:
                    writing.append(writer.submit(self._report_failure, task, error))
                while len(writing) > _MAX_WAITING:
                    writing.popleft().result()
            for future in writing:
                future.result()

    def write_tables(self) -> None:
        """Derive ``summary.csv`` from the records and add to the COCO file; other runs may have added to both."""
        output = self.options.output
        with _output_errors(output), folder_lock(output, wait=True):
            if self.options.save_coco:
                writers.write_coco_file(output / COCO, writers.read_coco_file(output / COCO) | self.coco)
            records = read_records(output)
            shown = [
                records[name] | {"covered_share": f"{records[name]['covered_share']:.4f}"} for name in sorted(records)
            ]
            write_table(output / SUMMARY, [_COLUMNS, *([row[column] for column in _COLUMNS] for row in shown)])

    def _read(self) -> Iterator[tuple[ImageTask, Image | ImageError, Record]]:
        """Yield each image or the reason why it cannot be read, and the record of its file."""
        size = self.options.pixel_size_um
        for file, group in groupby(self.tasks, key=lambda task: task.file):
            waiting = deque(group)
            error = ImageError(f"{file}: has fewer frames than before")
            try:
                source = _source(file, self.options.output) | {"sha256": _content_hash(file)}
                for frame, image in enumerate(read_stack(file) if self.options.frames else [read_image(file)]):
                    if waiting[0].frame in (None, frame):
                        yield waiting.popleft(), image if size is None else replace(image, pixel_size_um=size), source
                    if not waiting:
                        break
            except StackError:
                error = ImageError(
                    f"{file}: several frames (time, depth or pages); add --frames to segment all of them"
                )
            except (ImageError, OSError) as reason:
                error = reason if isinstance(reason, ImageError) else ImageError(f"{file}: cannot be read ({reason})")
            for task in waiting:
                yield task, error, {}

    def _write(self, task: ImageTask, image: Image, result: Segmentation, source: Record) -> None:
        paths, (labels, maps), size = task.paths, result, image.pixel_size_um
        num_cells = int(labels.max())
        record = {"image": task.name, "cells": num_cells, "covered_share": float((labels > 0).mean())}
        with _output_errors(self.options.output):
            # A record without labels marks all files until they are complete, those of an earlier run too.
            paths["labels"].unlink(missing_ok=True)
            _append(self.options.output, [record | source | {"settings": self.options.settings}])
            if "csv" in paths:
                grey = image.grey()
                writers.write_cells(
                    paths["csv"], labels, grey.pixels, channel_names=grey.channel_names, pixel_size_um=size
                )
            if "save_dist_map" in paths:
                write_tiff(paths["save_dist_map"], maps, pixel_size_um=size)
            if "save_viz" in paths:
                write_png(paths["save_viz"], writers.overlay(image.plane(self.options.channel), labels))
            if "save_outlines" in paths:
                writers.write_outlines(paths["save_outlines"], labels)
            outlines = trace_cells(labels) if {"save_geojson", "save_rois"} & paths.keys() else []
            if "save_geojson" in paths:
                writers.write_geojson(paths["save_geojson"], outlines, name=task.name)
            if "save_rois" in paths:
                writers.write_rois(paths["save_rois"], outlines)
            if "save_ctc" in paths:
                paths["save_ctc"].parent.mkdir(exist_ok=True)
                write_mask(paths["save_ctc"], labels)
            if self.options.save_coco:
                self.coco[task.name] = writers.coco_image(labels, file_name=task.file.name, frame=task.frame)
            write_labels(paths["labels"], labels, pixel_size_um=size)
        self._report(f"{task.title}: {num_cells} cells")

    def _report_failure(self, task: ImageTask, error: ImageError) -> None:
        text = str(error) if str(task.file) in str(error) else f"{task.title}: {error}"
        self.failed.setdefault(task.file, text)
        self._report(text)

    def _report(self, text: str) -> None:
        self.num_done += 1
        self.log(f"[{self.num_done}/{len(self.tasks)}] {text}")

    def _report_tiles(self, task: ImageTask, done: int, total: int) -> None:
        if done < total and time.monotonic() - self.last_report_s >= _REPORT_EVERY_S:
            self.last_report_s = time.monotonic()
            self.log(f"{task.title}: {done} of {total} tiles")


def read_records(output: Path) -> dict[str, Record]:
    """Return the records of a results folder by image, from ``summary.jsonl`` or an older version's ``summary.csv``.

    A DinocellError if one of the files was written by another program, or is damaged.
    """
    path = output / SUMMARY
    try:
        records = []
        if path.exists():
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, restval="")  # the first versions had no settings
                if tuple(rows.fieldnames or _COLUMNS) not in (_COLUMNS, _COLUMNS[:4]):
                    raise ValueError(f"expected the columns {', '.join(_COLUMNS)}")
                numbers = {"cells": int, "covered_share": float}
                records = [{name: numbers.get(name, str)(row.get(name, "")) for name in _COLUMNS} for row in rows]
        path = output / RECORDS
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            # A line without an end was being written when its run was killed; there are no labels then.
            records = [json.loads(line) for line in lines if line.endswith("}")]
            records = [{name: record[name] for name in (*_COLUMNS, *record)} for record in records]
        return {record["image"]: record for record in records}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DinocellError(
            f"{path}: is not a table of 'dinocell segment', or was changed by another program ({error}); move it away, "
            "or choose another --output"
        ) from error


def _append(output: Path, records: Iterable[Record]) -> None:
    """Add lines to ``summary.jsonl``, after the end of one that a killed run may have left unfinished."""
    with folder_lock(output, wait=True), (output / RECORDS).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def _source(file: Path, output: Path) -> Record:
    """Return where an image is relative to the results (they may be moved together), its size and time of change."""
    stats = [path.stat() for path in _files_of(file)]
    place = os.path.relpath(file.parent.resolve() / file.name, output.resolve())
    return {
        "file": Path(place).as_posix(),
        "bytes": sum(stat.st_size for stat in stats),
        "modified_ns": max((stat.st_mtime_ns for stat in stats), default=0),
    }


def _is_source(record: Record, file: Path, output: Path, content_hash: Callable[[Path], str]) -> bool:
    """Return whether a record is of this image: the same unchanged file, or another one with the same content."""
    if "sha256" not in record:  # by an older version, which recorded the path alone
        recorded = output / str(record["file"])
        return recorded.exists() and recorded.samefile(file)
    return _source(file, output).items() <= record.items() or content_hash(file) == str(record["sha256"])


def _content_hash(file: Path) -> str:
    """Return the SHA-256 of a file, of an OME-Zarr folder that of all its files one after the other."""
    digest = hashlib.sha256()
    for path in _files_of(file):
        with path.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()


def _files_of(file: Path) -> list[Path]:
    return sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """Turn what keeps results from being written into an error that ends the run: the next image would fail as well."""
    try:
        yield
    except (OSError, ImageError) as error:  # the image writers' names the file and the cause
        named = error if isinstance(error, ImageError) else f"{output}: cannot be written ({one_line(error)})"
        raise DinocellError(str(named)) from error
