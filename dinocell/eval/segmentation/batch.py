"""The work of `dinocell segment`: one thread reads the next picture and one writes, while the network works.

All results of a picture come from one pass of the network. Each file is whole or not there. Whatever ends a run, what
has been computed by then is written, and the next run goes on from it.
"""

import csv
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocell.errors import DinocellError, ImageError, StackError
from dinocell.eval.export.coco import CocoImage, coco_image, read_coco_file, write_coco_file
from dinocell.eval.export.outlines import trace_cells
from dinocell.eval.export.writers import (
    write_cells,
    write_geojson,
    write_maps,
    write_outlines,
    write_overlay,
    write_rois,
)
from dinocell.eval.metrics.ctc_files import check_ids, write_mask
from dinocell.eval.segmentation.jobs import (
    COCO,
    SUMMARY,
    Job,
    Request,
    Target,
    first_target,
    target_of,
    targets_of_frames,
)
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.images.image import Image
from dinocell.images.read import count_frames, read_image, read_stack
from dinocell.images.write import write_labels
from dinocell.labelled.masks import read_labels
from dinocell.runtime.files import folder_lock, replacing

# --- segment_tables ------------------------------------------------------------------------------------------------
#
# The tables of `dinocell segment`, over this run and those before it: the summary, and one COCO file of all images.

_COLUMNS = ("image", "cells", "covered_share", "file", "settings")
_SOURCE, _SETTINGS = _COLUMNS.index("file"), _COLUMNS.index("settings")


class Written(NamedTuple):
    """What is kept of a picture after its files were written."""

    name: str
    file: Path
    num_cells: int
    covered_share: float
    coco: CocoImage | None
    settings: str


@dataclass(kw_only=True, eq=False)
class Tables:
    """The summary's rows and the COCO file's entries (None if none is wanted): those that were there, and new ones."""

    output: Path
    rows: dict[str, Sequence[object]]
    coco: dict[str, CocoImage] | None
    new_rows: dict[str, Sequence[object]] = field(default_factory=dict)
    new_coco: dict[str, CocoImage] = field(default_factory=dict)

    @staticmethod
    def read(request: Request) -> "Tables":
        """Return what earlier runs left in the output folder.

        Raises
        ------
        DinocellError
            If a file of that name is another program's, or damaged.
        """
        return Tables(
            output=request.output,
            rows=_read_summary(request.output / SUMMARY),
            coco=read_coco_file(request.output / COCO) if request.save_coco else None,
        )

    def write(self) -> None:
        """Add what is new to the files, as they are now: another run may have added to them meanwhile.

        Raises
        ------
        DinocellError
            If they cannot be written.
        """
        with output_errors(self.output), folder_lock(self.output, wait=True):
            if self.coco is not None:
                write_coco_file(self.output / COCO, read_coco_file(self.output / COCO) | self.new_coco)
            rows = _read_summary(self.output / SUMMARY) | self.new_rows
            with replacing(self.output / SUMMARY) as part, part.open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file)
                table.writerow(_COLUMNS)
                table.writerows(rows[name] for name in sorted(rows))

    def add(self, written: Written) -> None:
        """Enter a picture."""
        share = f"{written.covered_share:.4f}"
        self.new_rows[written.name] = (
            written.name,
            written.num_cells,
            share,
            self._source(written.file),
            written.settings,
        )
        if written.coco is not None:
            self.new_coco[written.name] = written.coco

    def is_done(self, target: Target) -> bool:
        """Say whether every result of a picture is there."""
        return target.is_done and (self.coco is None or target.name in self.coco)

    def check_ours(self, target: Target) -> None:
        """Refuse to replace labels that no run has entered: somebody's own, drawn by hand perhaps.

        Labels are written last. So of a run that was killed, either all files of a picture are there or no labels.

        Raises
        ------
        ImageError
            If there are such labels.
        """
        labels = target.paths["labels"]
        if labels.exists() and not target.is_done and target.name not in self.rows:
            raise ImageError(
                f"{labels}: is there, and not by {SUMMARY}; move it away, choose another --output, or replace it with "
                "--overwrite"
            )

    def unlisted(self, job: Job, done: Sequence[Target]) -> Iterator[Written]:
        """Yield what the summary lacks of results on the disk: their run was killed, and its settings are not known."""
        for target in done:
            if target.name not in self.rows:
                labels = read_labels(target.paths["labels"])
                num_cells = int(np.count_nonzero(np.unique(labels)))
                yield Written(target.name, job.file, num_cells, float((labels > 0).mean()), None, "")

    def check_sources(self, jobs: Sequence[Job], request: Request) -> None:
        """Refuse to take the results of another image or of other settings for what is asked for.

        Raises
        ------
        DinocellError
            If there are such results.
        """
        if request.overwrite:
            return
        for job in jobs:
            target = first_target(job, request)
            row = self.rows.get(target.name, ())
            if len(row) > _SOURCE and not self._is_of(str(row[_SOURCE]), job.file):
                raise DinocellError(
                    f"{request.output}: results named {job.stem} are there, of {row[_SOURCE]}, not of {job.file}; "
                    "choose another --output, or replace them with --overwrite"
                )
            settings = str(row[_SETTINGS]) if len(row) > _SETTINGS else ""
            if settings and request.settings not in ("", settings) and target.paths["labels"].exists():
                raise DinocellError(
                    f"{request.output}: results named {job.stem} are there, by {settings}, not by {request.settings}; "
                    "choose another --output, or replace them with --overwrite"
                )

    def _source(self, file: Path) -> str:
        """Return where an image lies, seen from the results: they may be moved or copied together."""
        return Path(os.path.relpath(file.parent.resolve() / file.name, self.output.resolve())).as_posix()

    def _is_of(self, source: str, file: Path) -> bool:
        """Say whether an image is the one of a row; where that is no longer in its place, by its name and folder."""
        recorded = self.output / source
        if recorded.exists():
            return recorded.samefile(file)
        place = file.parent.resolve() / file.name
        return recorded.name == place.name and recorded.parent.name in ("..", place.parent.name)


@contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Whatever keeps results from the disk ends the run: the next picture would only fail as well."""
    try:
        yield
    except OSError as error:
        raise DinocellError(f"{output}: cannot be written ({error.strerror or error})") from error
    except ImageError as error:  # the picture writers' own, which name the file and the cause
        raise DinocellError(str(error)) from error


def _read_summary(path: Path) -> dict[str, Sequence[object]]:
    """Return the rows of earlier runs, by image."""
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DinocellError(
            f"{path}: cannot be added to ({error}); move it away, or choose another --output"
        ) from error
    if rows and tuple(rows[0]) not in (_COLUMNS, _COLUMNS[:_SETTINGS]):
        raise DinocellError(
            f"{path}: cannot be added to (not a table of 'dinocell segment', or saved by another program in its own "
            "way); move it away, or choose another --output"
        )
    return {row[0]: row for row in rows[1:]}


# Pictures whose results wait to be written: more would only fill the memory.
_MOST_WAITING = 2
# A picture that takes longer says how far it is, as often.
_WORD_EVERY_S = 10.0


class _Read(NamedTuple):
    """A picture that was read; without one, its file is done (or was before), or cannot be read.

    ``found_done`` is what the summary lacks of results that are on the disk: their run was killed.
    """

    job: Job
    target: Target | None = None
    picture: Image | None = None
    frame: int | None = None
    error: ImageError | None = None
    is_last: bool = True
    found_done: tuple[Written, ...] = ()


class _Found(NamedTuple):
    """Everything that is known of a picture once it has been segmented."""

    read: _Read
    target: Target
    picture: Image
    plane: np.ndarray
    labels: np.ndarray
    maps: np.ndarray
    pixel_size_um: float | None


class _Waiting(NamedTuple):
    """A picture that was dealt with, or whose results are being written."""

    read: _Read
    writing: Future[Written] | None = None
    error: ImageError | None = None


def segment_files(
    jobs: Sequence[Job], pipeline: DINOCellPipeline, request: Request, *, say: Callable[[str], None]
) -> dict[Path, str]:
    """Segment files, say a line about each, bring summary and COCO file up to date; return what failed, and why.

    Raises
    ------
    DinocellError
        If results cannot be written.
    """
    with output_errors(request.output):
        request.output.mkdir(parents=True, exist_ok=True)
        if not os.access(request.output, os.W_OK):  # before the network's long work, not after it
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    tables = Tables.read(request)
    tables.check_sources(jobs, request)
    progress = _Progress(num_files=len(jobs), say=say)
    try:
        _segment(jobs, pipeline, request, tables, progress)
    except BaseException:
        # Told to stop, or the disk is full: keep what is done if that can be, and report what happened first.
        with suppress(DinocellError):
            tables.write()
        raise
    tables.write()
    say(f"results: {request.output}")
    return progress.failed


@dataclass(kw_only=True, eq=False)
class _Progress:
    """Counts files, whose pictures come in order, and says a line when one is finished."""

    num_files: int
    say: Callable[[str], None]
    failed: dict[Path, str] = field(default_factory=dict)
    num_finished: int = 0
    num_pictures: int = 0
    num_cells: int = 0

    def add(self, read: _Read, num_cells: int | None, error: ImageError | None) -> None:
        file = read.job.file
        if error is not None:
            text = str(error) if str(file) in str(error) else f"{file}: {error}"
            self.failed.setdefault(file, text)
        elif num_cells is not None:
            self.num_pictures += 1
            self.num_cells += num_cells
        if read.is_last:
            self.num_finished += 1
            there = f"{file}: there already (--overwrite computes it again)"
            done = f"{file}: {self.num_cells} cells" if self.num_pictures else there
            self.say(f"[{self.num_finished}/{self.num_files}] {self.failed.get(file, done)}")
            self.num_pictures = self.num_cells = 0


def _segment(
    jobs: Sequence[Job], pipeline: DINOCellPipeline, request: Request, tables: Tables, progress: _Progress
) -> None:
    pictures = _pictures(jobs, request, tables)
    waiting: deque[_Waiting] = deque()
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        try:
            coming = reader.submit(next, pictures, None)
            while (read := coming.result()) is not None:
                coming = reader.submit(next, pictures, None)
                waiting.append(_compute(read, pipeline, request, writer, progress.say))
                while len(waiting) > _MOST_WAITING:
                    _settle(waiting, tables, progress)
            while waiting:
                _settle(waiting, tables, progress)
        except KeyboardInterrupt:
            while waiting:  # computed already: the next run need not do it again
                _settle(waiting, tables, progress)
            raise
        except BaseException:
            writer.shutdown(cancel_futures=True)
            raise


def _settle(waiting: deque[_Waiting], tables: Tables, progress: _Progress) -> None:
    """Wait until the first picture's results are written, and book them."""
    first = waiting.popleft()
    for each in first.read.found_done:
        tables.add(each)
    written = first.writing.result() if first.writing is not None else None
    if written is not None:
        tables.add(written)
    progress.add(first.read, written.num_cells if written is not None else None, first.error)


def _pictures(jobs: Sequence[Job], request: Request, tables: Tables) -> Iterator[_Read]:
    """Read what is not done yet, one picture whenever one is asked for; every job ends with an entry."""
    for job in jobs:
        try:
            if request.frames:
                yield from _frames(job, request, tables)
                continue
            target = target_of(job, request)
            if tables.is_done(target) and not request.overwrite:
                yield _Read(job, found_done=tuple(tables.unlisted(job, [target])))
                continue
            if not request.overwrite:
                tables.check_ours(target)
            yield _Read(job, target, read_image(job.file))
        except StackError:
            several = "several frames (time, depth or pages); add --frames to segment each of them"
            yield _Read(job, error=ImageError(f"{job.file}: {several}"))
        except ImageError as error:
            yield _Read(job, error=error)


def _frames(job: Job, request: Request, tables: Tables) -> Iterator[_Read]:
    targets = list(targets_of_frames(job, count_frames(job.file), request))
    is_done = [tables.is_done(target) and not request.overwrite for target in targets]
    if not all(is_done):
        for number, picture in enumerate(read_stack(job.file)):
            if not is_done[number]:
                if not request.overwrite:
                    tables.check_ours(targets[number])
                yield _Read(job, targets[number], picture, frame=number, is_last=False)
    done = [target for target, is_one in zip(targets, is_done, strict=True) if is_one]
    yield _Read(job, found_done=tuple(tables.unlisted(job, done)))


def _compute(
    read: _Read,
    pipeline: DINOCellPipeline,
    request: Request,
    writer: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> _Waiting:
    """Segment a picture and hand its results to the writer."""
    picture, target = read.picture, read.target
    if picture is None or target is None:
        return _Waiting(read, error=read.error)
    try:
        plane = picture.plane(request.channel)
        size = request.pixel_size_um if request.pixel_size_um is not None else picture.pixel_size_um
        labels, maps = pipeline.run(
            plane, return_dist_map=True, pixel_size_um=size, progress=_words_of_windows(read.job.file, say)
        )
        if "save_ctc" in target.paths:
            check_ids(labels, target.paths["save_ctc"])
    except ImageError as error:
        return _Waiting(read, error=error)
    found = _Found(read, target, picture, plane, labels, maps, size)
    return _Waiting(read, writing=writer.submit(_write, found, request))


def _words_of_windows(file: Path, say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return what says now and then how many windows of a large picture are done."""
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= _WORD_EVERY_S:
            last = time.monotonic()
            say(f"{file}: {done} of {total} windows")

    return tell


def _write(found: _Found, request: Request) -> Written:
    paths, labels, size = found.target.paths, found.labels, found.pixel_size_um
    file = found.read.job.file
    with output_errors(request.output):
        # Where labels are, all is: those of an earlier run would vouch for a mixture if this one were stopped here.
        paths["labels"].unlink(missing_ok=True)
        if "csv" in paths:
            shown = found.picture.grey()
            names = shown.channel_names
            write_cells(paths["csv"], labels, shown.pixels, channel_names=names, pixel_size_um=size)
        if "save_dist_map" in paths:
            write_maps(paths["save_dist_map"], found.maps, pixel_size_um=size)
        if "save_viz" in paths:
            write_overlay(paths["save_viz"], found.plane, labels)
        if "save_outlines" in paths:
            write_outlines(paths["save_outlines"], labels)
        if {"save_geojson", "save_rois"} & paths.keys():
            cells = trace_cells(labels)
            if "save_geojson" in paths:
                write_geojson(paths["save_geojson"], cells, name=found.target.name)
            if "save_rois" in paths:
                write_rois(paths["save_rois"], cells)
        if "save_ctc" in paths:
            paths["save_ctc"].parent.mkdir(exist_ok=True)
            write_mask(paths["save_ctc"], labels)
        write_labels(paths["labels"], labels, pixel_size_um=size)
    coco = coco_image(labels, file_name=file.name, frame=found.read.frame) if request.save_coco else None
    share = float((labels > 0).mean())
    return Written(found.target.name, file, int(labels.max()), share, coco, request.settings)
