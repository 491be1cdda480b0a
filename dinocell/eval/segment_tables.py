"""The tables of `dinocell segment`, over this run and those before it: the summary, and one COCO file of all images."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocell.data_shards.masks import read_labels
from dinocell.errors import DinocellError, ImageError
from dinocell.eval.coco_file import CocoImage, read_coco_file, write_coco_file
from dinocell.eval.segment_jobs import COCO, SUMMARY, Job, Request, Target
from dinocell.runtime.atomic import replacing

_COLUMNS = ("image", "cells", "covered_share", "file")
_SOURCE = _COLUMNS.index("file")


class Written(NamedTuple):
    """What is kept of a picture after its files were written."""

    name: str
    file: Path
    num_cells: int
    covered_share: float
    coco: CocoImage | None


@dataclass(kw_only=True, eq=False)
class Tables:
    """The summary's rows and the COCO file's entries (None if none is wanted)."""

    rows: dict[str, Sequence[object]]
    coco: dict[str, CocoImage] | None

    @staticmethod
    def read(request: Request) -> "Tables":
        """Return what earlier runs left in the output folder."""
        return Tables(
            rows=_read_summary(request.output / SUMMARY),
            coco=read_coco_file(request.output / COCO) if request.save_coco else None,
        )

    def write(self, output: Path) -> None:
        """Bring the files up to date.

        Raises
        ------
        DinocellError
            If they cannot be written.
        """
        with output_errors(output):
            if self.coco is not None:
                write_coco_file(output / COCO, self.coco)
            with replacing(output / SUMMARY) as part, part.open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file)
                table.writerow(_COLUMNS)
                table.writerows(self.rows[name] for name in sorted(self.rows))

    def add(self, written: Written) -> None:
        """Enter a picture."""
        share = f"{written.covered_share:.4f}"
        self.rows[written.name] = (written.name, written.num_cells, share, _source(written.file))
        if self.coco is not None and written.coco is not None:
            self.coco[written.name] = written.coco

    def is_done(self, target: Target) -> bool:
        """Say whether every result of a picture is there."""
        return target.is_done and (self.coco is None or target.name in self.coco)

    def unlisted(self, job: Job, done: Sequence[Target]) -> Iterator[Written]:
        """Yield what the summary lacks of results that are on the disk: their run was killed."""
        for target in done:
            if target.name not in self.rows:
                labels = read_labels(target.paths["labels"])
                num_cells = int(np.count_nonzero(np.unique(labels)))
                yield Written(target.name, job.file, num_cells, float((labels > 0).mean()), None)

    def check_sources(self, jobs: Sequence[Job], request: Request) -> None:
        """Refuse to take the results of another image, of the same name in another folder, for this one's.

        Raises
        ------
        DinocellError
            If there are such results.
        """
        if request.overwrite:
            return
        for job in jobs:
            row = self.rows.get(f"{job.stem}_f0000" if request.frames else job.stem, ())
            if len(row) > _SOURCE and row[_SOURCE] != _source(job.file):
                raise DinocellError(
                    f"{request.output}: results named {job.stem} are there, of {row[_SOURCE]}, not of {job.file}; "
                    "choose another --output, or replace them with --overwrite"
                )


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
    with path.open(encoding="utf-8", newline="") as file:
        return {row[0]: row for row in list(csv.reader(file))[1:] if row}


def _source(file: Path) -> str:
    """Return what tells an image from others of its name, wherever the folders are moved to: ``01/t000.tif``."""
    return f"{file.resolve().parent.name}/{file.name}"
