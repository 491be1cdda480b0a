"""The Cell Tracking Challenge: its scores SEG, DET and OP_CSB of a segmentation, its mask files, and its own programs.

Definitions: https://celltrackingchallenge.net/evaluation-methodology; SEG in Maska et al. 2014 (Bioinformatics
30:1609), DET as the detection part of the graph measure of Matula et al. 2015 (PLoS ONE 10:e0144959). A reference cell
is matched by the predicted cell that covers more than half of it. So it has at most one match, and a predicted cell may
match several.

- SEG: mean over reference cells of the intersection over union with the match, 0 without one.
- DET: 1 - min(cost, cost of an empty prediction) / cost of an empty prediction, where cost is 5 for each split that a
  predicted cell needs (k - 1 if it matches k), 10 for each reference cell without a match, 1 for each predicted one.
- OP_CSB: the mean of SEG and DET.

The challenge's files::

    01/t000.tif                     the images
    01_GT/SEG/man_seg000.tif        reference masks (gold; silver ones are in 01_ST/SEG)
    01_GT/TRA/man_track000.tif      reference markers, in every frame; man_track.txt: label, first, last frame, parent
    01_RES/mask000.tif              predicted masks, 16 bit

Its programs measure SEG on SEG and DET on TRA. Sets with one mask per cell have the same images in both.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from dinocell.errors import DinocellError, ImageError, require
from dinocell.eval.metrics.overlaps import ContingencyTable, LabelImage, contingency_tables
from dinocell.runtime.files import replacing, write_atomically

# The challenge's weights of a split, a missing and an extra vertex (Matula et al. 2015).
SPLIT_COST, MISSED_COST, SPURIOUS_COST = 5, 10, 1
MAX_ID = 2**16 - 1  # its masks have 16 bits
_SYSTEM_FOLDERS = {"linux": "Linux", "darwin": "Mac", "win32": "Win"}  # in its archive of programs


@dataclass(frozen=True, kw_only=True)
class ImageMeans:
    """Unweighted mean of the scores of single images."""

    seg: float
    det: float
    op_csb: float
    num_images: int
    """Images with a reference cell; the scores of the others are undefined and excluded."""


@dataclass(frozen=True, kw_only=True)
class CTCScore:
    """Scores in [0, 1], higher is better, and the counts they are computed from.

    All cells of all frames have equal weight (pooled, as in the challenge); the mean of single images is
    ``mean_over_images``. Without a reference cell the three scores are undefined: NaN.

    OP_CSB penalises merging less than missing (5 against 10 per cell): one prediction that covers the whole image has a
    DET near 0.5. Read the counts too.

    Attributes
    ----------
    num_splits
        Splits needed to separate merged cells (the challenge's NS): k - 1 for a predicted cell that matches k.
    num_missed, num_spurious
        False negatives and false positives: reference cells, and predicted cells, without a match.
    images
        One score per frame, each without ``images``.
    """

    seg: float
    det: float
    op_csb: float
    num_splits: int
    num_missed: int
    num_spurious: int
    num_reference: int
    num_predicted: int
    images: tuple["CTCScore", ...] = ()

    @property
    def mean_over_images(self) -> ImageMeans:
        """The unweighted mean of ``images``; NaN if no image has a reference cell."""
        defined = [image for image in self.images if image.num_reference]
        if not defined:
            return ImageMeans(seg=np.nan, det=np.nan, op_csb=np.nan, num_images=0)
        seg, det, op_csb = np.mean([(image.seg, image.det, image.op_csb) for image in defined], axis=0).tolist()
        return ImageMeans(seg=seg, det=det, op_csb=op_csb, num_images=len(defined))


def ctc_score(reference: LabelImage | Sequence[LabelImage], prediction: LabelImage | Sequence[LabelImage]) -> CTCScore:
    """Score one label image, or a list of frames (pooled).

    0 is background, every other id one cell; the ids of the two sides need not agree. An id in two places is one cell.

    Raises ValueError if a frame is not two-dimensional, is not of an integer type, or has negative ids; if sizes or
    numbers of frames differ.
    """
    return ctc_score_from(contingency_tables(reference, prediction))


def ctc_score_from(tables: Iterable[ContingencyTable]) -> CTCScore:
    """Return `ctc_score` from contingency tables, one per frame."""
    counts = [count(table) for table in tables]
    total = Counts(*(sum(column) for column in zip(Counts(), *counts, strict=True)))
    return _score(total, images=tuple(map(_score, counts)))


def is_matched(table: ContingencyTable) -> Bool[np.ndarray, " k"]:
    """Return which overlapping pairs are matches: more than half of the reference cell, in integer arithmetic."""
    return np.asarray(2 * table.intersections > table.reference_areas[table.reference_index])


def seg_and_det(
    jaccard: Float64[np.ndarray, " n"], cost: Float64[np.ndarray, " n"], num_reference: Float64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Return SEG and DET from sums over cells; NaN where there is no reference cell."""
    num_cells = np.where(num_reference > 0, num_reference, np.nan)
    cost_of_nothing = MISSED_COST * num_cells
    return jaccard / num_cells, 1 - np.minimum(cost, cost_of_nothing) / cost_of_nothing


class Counts(NamedTuple):
    """Quantities that are summed over frames; numbers, or arrays of them."""

    jaccard: float = 0.0
    num_splits: int = 0
    num_missed: int = 0
    num_spurious: int = 0
    num_reference: int = 0
    num_predicted: int = 0

    @property
    def cost(self) -> Any:
        """The cost of DET."""
        return SPLIT_COST * self.num_splits + MISSED_COST * self.num_missed + SPURIOUS_COST * self.num_spurious


def count(table: ContingencyTable) -> Counts:
    """Return the counts of one frame."""
    matched = is_matched(table)
    num_matched = int(matched.sum())
    num_matching = len(np.unique(table.predicted_index[matched]))
    return Counts(
        jaccard=float(table.ious[matched].sum()),
        num_splits=num_matched - num_matching,
        num_missed=table.num_reference - num_matched,
        num_spurious=table.num_predicted - num_matching,
        num_reference=table.num_reference,
        num_predicted=table.num_predicted,
    )


def _score(counts: Counts, *, images: tuple[CTCScore, ...] = ()) -> CTCScore:
    sums = np.array([[counts.jaccard], [counts.cost], [counts.num_reference]], np.float64)
    seg, det = (float(score[0]) for score in seg_and_det(*sums))
    numbers = {name: value for name, value in counts._asdict().items() if name != "jaccard"}
    return CTCScore(seg=seg, det=det, op_csb=(seg + det) / 2, images=images, **numbers)


def write_results(folder: Path, sequence: str, frames: Iterable[LabelImage], *, num_digits: int = 3) -> None:
    """Write predicted label images as ``01_RES/mask000.tif``, ..., with the same ids.

    An ImageError if an id exceeds 65,535, or a file cannot be written.
    """
    _write_frames({"mask": folder / f"{sequence}_RES"}, frames, num_digits)


def write_reference(folder: Path, sequence: str, frames: Iterable[LabelImage], *, num_digits: int = 3) -> None:
    """Write reference label images to ``01_GT/SEG`` and ``01_GT/TRA``, with ``man_track.txt``.

    The frames are independent images, not a time series: every cell of every frame gets an id of its own. An ImageError
    as in `write_results`.
    """
    tracks: list[str] = []

    def relabelled() -> Iterator[LabelImage]:
        used = 0
        for number, frame in enumerate(frames):
            ids, inverse = np.unique(frame, return_inverse=True)
            new_ids = np.where(ids != 0, used + np.cumsum(ids != 0), 0)
            used = max(used, int(new_ids.max(initial=0)))
            tracks.extend(f"{label} {number} {number} 0\n" for label in new_ids[ids != 0])
            yield new_ids[inverse].reshape(frame.shape)

    truth = folder / f"{sequence}_GT"
    _write_frames({"man_seg": truth / "SEG", "man_track": truth / "TRA"}, relabelled(), num_digits)
    write_atomically(truth / "TRA" / "man_track.txt", "".join(tracks))


def check_ids(labels: LabelImage, path: Path, *, where: str = "") -> None:
    """Raise an ImageError that names the path if an id exceeds 65,535, the maximum in 16 bits."""
    largest = int(labels.max(initial=0))
    problem = f"expected ids up to {MAX_ID} (masks have 16 bits), got {largest}{where}"
    require(largest <= MAX_ID, f"{path}: {problem}; relabel the cells or split the set", ImageError)


def write_mask(path: Path, labels: LabelImage) -> None:
    """Write one mask with ids up to 65,535; raise an ImageError if the file cannot be written."""
    import tifffile

    try:
        with replacing(path) as temporary:
            # LZW as in the challenge's own masks; readable by old versions of libtiff.
            tifffile.imwrite(temporary, labels.astype(np.uint16), photometric="minisblack", compression="lzw")
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error.strerror or error})") from error


def frame_files(folder: Path, prefix: str) -> dict[int, Path]:
    """Return the files by frame number, ascending; slices of a volume (man_seg_000_001.tif) are an error."""
    frames: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{prefix}*.tif")):
        match = re.fullmatch(rf"{prefix}(\d+)", path.stem)
        if match is None or int(match[1]) in frames:
            raise ImageError(f"{path}: expected one two-dimensional {prefix}NNN.tif per frame, NNN its number")
        frames[int(match[1])] = path
    return dict(sorted(frames.items()))


def _write_frames(folders: dict[str, Path], frames: Iterable[LabelImage], num_digits: int) -> None:
    """Write each frame to every folder, under the prefix of the folder."""
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        for prefix, folder in folders.items():
            check_ids(frame, folder, where=f" in frame {number}")
            write_mask(folder / f"{prefix}{number:0{num_digits}d}.tif", frame)


@dataclass(frozen=True, kw_only=True)
class OfficialScores:
    """Scores printed by the challenge's own programs, to six digits."""

    seg: float
    det: float


def check_programs(binary_path: Path) -> None:
    """Raise a DinocellError that names the program if one of the two is missing or not executable."""
    for name in ("SEG", "DET"):
        _program(binary_path, f"{name}Measure")


def official_scores(folder: Path, sequence: str, *, binary_path: Path, num_digits: int = 3) -> OfficialScores:
    """Run the challenge's ``SEGMeasure`` and ``DETMeasure`` on a sequence; they write logs to ``01_RES``.

    A DinocellError if a program is missing, does not run, or prints no score.

    Parameters
    ----------
    binary_path
        The folder of the two programs, or the unpacked archive of the challenge (with ``Linux``, ``Mac`` and ``Win``).
    num_digits
        Digits of the frame numbers in the file names.
    """
    scores = {}
    for name in ("SEG", "DET"):
        command = [str(_program(binary_path, f"{name}Measure")), str(folder.resolve()), sequence, str(num_digits)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:  # of another platform
            raise DinocellError(f"{command[0]}: cannot be run ({error.strerror or error})") from error
        match = re.search(rf"{name} measure:\s*([0-9.]+(?:[eE][-+]?\d+)?)", done.stdout)
        if match is None or done.returncode != 0:
            output = " ".join((done.stdout + " " + done.stderr).split())[:200] or "no output"
            got = f"got exit code {done.returncode}: {output}"
            raise DinocellError(f"{command[0]}: expected '{name} measure: ...', {got}")
        scores[name] = float(match[1])
    return OfficialScores(seg=scores["SEG"], det=scores["DET"])


def official_scores_of(
    reference: Iterable[LabelImage], prediction: Iterable[LabelImage], *, binary_path: Path, num_digits: int = 3
) -> OfficialScores:
    """Write label images to a temporary folder and run the challenge's programs on it, to compare with ``ctc_score``.

    ``num_digits`` of the frame numbers must suffice for all frames.
    """
    with TemporaryDirectory(prefix="dinocell-") as name:
        folder = Path(name)
        write_reference(folder, "01", reference, num_digits=num_digits)
        write_results(folder, "01", prediction, num_digits=num_digits)
        return official_scores(folder, "01", binary_path=binary_path, num_digits=num_digits)


def _program(binary_path: Path, name: str) -> Path:
    file = f"{name}.exe" if sys.platform == "win32" else name
    places = [binary_path / file, binary_path / _SYSTEM_FOLDERS.get(sys.platform, "Linux") / file]
    program = next((place for place in places if place.is_file()), places[0]).resolve()
    if not os.access(program, os.X_OK):
        missing = "no such program; expected the folder of SEGMeasure and DETMeasure"
        problem = f"not executable; run 'chmod +x {program}'" if program.is_file() else missing
        raise DinocellError(f"{program}: {problem}")
    return program
