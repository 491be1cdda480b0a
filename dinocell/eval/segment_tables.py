"""The tables of `dinocell segment`, over this run and those before it: the summary, and one COCO file of all images."""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocell.data_shards.masks import read_labels
from dinocell.errors import DinocellError, ImageError
from dinocell.eval.coco_file import CocoImage, read_coco_file, write_coco_file
from dinocell.eval.segment_jobs import COCO, SUMMARY, Job, Request, Target, first_target
from dinocell.runtime.atomic import replacing
from dinocell.runtime.locks import folder_lock

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
