"""The work of `dinocell segment`: one thread reads the next picture and one writes, while the network works.

All results of a picture come from one pass of the network. Each file is whole or not there. Whatever ends a run, what
has been computed by then is written, and the next run goes on from it.
"""

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocell.data_shards.image_writers import write_labels
from dinocell.data_shards.images import count_frames, read_image, read_stack
from dinocell.data_shards.picture import Picture
from dinocell.errors import DinocellError, ImageError, StackError
from dinocell.eval.coco_file import coco_image
from dinocell.eval.contours import trace_cells
from dinocell.eval.ctc_folders import check_ids, write_mask
from dinocell.eval.exports import write_geojson, write_rois
from dinocell.eval.outputs import write_cells, write_maps, write_outlines, write_overlay
from dinocell.eval.pipeline import DINOCellPipeline
from dinocell.eval.segment_jobs import Job, Request, Target, target_of, targets_of_frames
from dinocell.eval.segment_tables import Tables, Written, output_errors

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
    picture: Picture | None = None
    frame: int | None = None
    error: ImageError | None = None
    is_last: bool = True
    found_done: tuple[Written, ...] = ()


class _Found(NamedTuple):
    """Everything that is known of a picture once it has been segmented."""

    read: _Read
    target: Target
    picture: Picture
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
