"""The batch of `dinocell segment`: one thread reads the next image and one writes, while the network works.

An image is skipped if its labels exist and ``summary.jsonl`` records the same settings and the same image for them. Any
other labels in their place are an error before any work starts, unless ``--overwrite`` is given. Labels are written
last: where they exist, so do the other files of the image. ``summary.csv`` is derived from ``summary.jsonl``.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from dinocell.errors import DinocellError, ImageError, StackError
from dinocell.eval.export import writers
from dinocell.eval.export.coco import CocoImage, coco_image, read_coco_file, write_coco_file
from dinocell.eval.export.outlines import trace_cells
from dinocell.eval.metrics.ctc import check_ids, write_mask
from dinocell.eval.segmentation.jobs import COCO, SUMMARY, ImageTask, SegmentOptions
from dinocell.eval.segmentation.pipeline import DINOCellPipeline, Segmentation
from dinocell.images.image import Image
from dinocell.images.read import read_image, read_stack
from dinocell.images.write import write_labels
from dinocell.runtime.files import folder_lock, replacing

RECORDS = "summary.jsonl"
_COLUMNS = ("image", "cells", "covered_share", "file", "settings")  # of summary.csv
_MAX_WAITING = 2  # images whose results wait to be written: more would only fill the memory
_REPORT_EVERY_S = 10.0  # progress within a large image

Record = dict[str, Any]  # a line of summary.jsonl


def find_pending(tasks: Sequence[ImageTask], options: SegmentOptions) -> list[ImageTask]:
    """Return the images without results; those with labels by the same settings from the same image are skipped.

    Raises
    ------
    DinocellError
        If labels exist that are not recorded, or were made with other settings or from another image.
    """
    records = read_records(options.output)
    coco = read_coco_file(options.output / COCO) if options.save_coco else None
    content_hash = functools.cache(_content_hash)  # once per stack
    pending = []
    for task in tasks:
        labels, record = task.paths["labels"], records.get(task.name)
        if options.overwrite or not labels.exists():
            pending.append(task)
            continue
        if record is None:
            reason = f"is not recorded in {RECORDS}"
        elif record["settings"] != options.settings:
            reason = f"was made with {record['settings'] or 'unknown settings'}, not with {options.settings}"
        elif not _is_source(record, task.file, options.output, content_hash):
            reason = f"was made from {record['file']}, not from {task.file}"
        else:
            if not all(path.exists() for path in task.paths.values()) or (coco is not None and task.name not in coco):
                pending.append(task)
            continue
        raise DinocellError(f"{labels}: exists and {reason}; choose another --output, or replace it with --overwrite")
    return pending


def segment_images(
    tasks: Sequence[ImageTask], pipeline: DINOCellPipeline, options: SegmentOptions, *, log: Callable[[str], None]
) -> dict[Path, str]:
    """Segment images, log a line for each, and return the files that failed, with the reason.

    Raises
    ------
    DinocellError
        If results cannot be written.
    """
    with _output_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        is_new = not (options.output / RECORDS).exists()
        # Fails in a folder without write permission before the network's long work; takes over an older summary.csv.
        _append(options.output, read_records(options.output).values() if is_new else [])
    batch = _Batch(tasks=tasks, pipeline=pipeline, options=options, log=log)
    try:
        batch.run()
    except BaseException:  # interrupted, or the disk is full: report that rather than what follows from it
        with suppress(DinocellError):
            batch.write_tables()
        raise
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
    coco: dict[str, CocoImage] = field(default_factory=dict)
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
                    result = self._predict(task, image)
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
                write_coco_file(output / COCO, read_coco_file(output / COCO) | self.coco)
            records = read_records(output)
            with replacing(output / SUMMARY) as part, part.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
                table.writeheader()
                for name in sorted(records):
                    table.writerow(records[name] | {"covered_share": f"{records[name]['covered_share']:.4f}"})

    def _read(self) -> Iterator[tuple[ImageTask, Image | ImageError, Record]]:
        """Yield each image or the reason why it cannot be read, and the record of its file."""
        for file, group in groupby(self.tasks, key=lambda task: task.file):
            waiting = deque(group)
            error = ImageError(f"{file}: has fewer frames than before")
            try:
                source = _source(file, self.options.output) | {"sha256": _content_hash(file)}
                for frame, image in enumerate(read_stack(file) if self.options.frames else [read_image(file)]):
                    if waiting[0].frame in (None, frame):
                        yield waiting.popleft(), image, source
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

    def _predict(self, task: ImageTask, image: Image) -> Segmentation:
        result = self.pipeline.run(
            image.plane(self.options.channel),
            return_dist_map=True,
            pixel_size_um=self._pixel_size_um(image),
            progress=functools.partial(self._report_tiles, task),
        )
        if self.options.save_ctc:
            check_ids(result.labels, task.paths["save_ctc"])
        return result

    def _write(self, task: ImageTask, image: Image, result: Segmentation, source: Record) -> None:
        paths, (labels, maps), size = task.paths, result, self._pixel_size_um(image)
        num_cells = int(labels.max())
        record = {"image": task.name, "cells": num_cells, "covered_share": float((labels > 0).mean())}
        with _output_errors(self.options.output):
            # Labels mean that all files are complete: those of an earlier run must not vouch for a mixture.
            paths["labels"].unlink(missing_ok=True)
            if "csv" in paths:
                grey = image.grey()
                writers.write_cells(
                    paths["csv"], labels, grey.pixels, channel_names=grey.channel_names, pixel_size_um=size
                )
            if "save_dist_map" in paths:
                writers.write_maps(paths["save_dist_map"], maps, pixel_size_um=size)
            if "save_viz" in paths:
                writers.write_overlay(paths["save_viz"], image.plane(self.options.channel), labels)
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
                self.coco[task.name] = coco_image(labels, file_name=task.file.name, frame=task.frame)
            # Before the labels: a run that is killed in between leaves a record without labels, which is recomputed.
            _append(self.options.output, [record | source | {"settings": self.options.settings}])
            write_labels(paths["labels"], labels, pixel_size_um=size)
        self._report(f"{task.title}: {num_cells} cells")

    def _pixel_size_um(self, image: Image) -> float | None:
        return image.pixel_size_um if self.options.pixel_size_um is None else self.options.pixel_size_um

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

    Raises
    ------
    DinocellError
        If one of the files was written by another program, or is damaged.
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
            while chunk := content.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _files_of(file: Path) -> list[Path]:
    return sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """Turn what keeps results from being written into an error that ends the run: the next image would fail as well."""
    try:
        yield
    except OSError as error:
        raise DinocellError(f"{output}: cannot be written ({error.strerror or error})") from error
    except ImageError as error:  # of the image writers; it names the file and the cause
        raise DinocellError(str(error)) from error
