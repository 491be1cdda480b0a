"""Segmentations in the folders of the Cell Tracking Challenge: written, read and scored.

::

    01/t000.tif                     the images
    01_GT/SEG/man_seg000.tif        reference masks (gold; silver ones lie in 01_ST/SEG)
    01_GT/TRA/man_track000.tif      reference markers, in every frame; man_track.txt: label, first, last frame, parent
    01_RES/mask000.tif              predicted masks, 16 bit

SEG is measured on SEG, DET on TRA, as the challenge does. Sets with one mask a cell have the same images in both.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from dinocell.errors import DinocellError, ImageError
from dinocell.eval.metrics.ctc import CTCScore, ctc_score_from
from dinocell.eval.metrics.overlaps import ContingencyTable, LabelImage, contingency_table
from dinocell.labelled.masks import read_labels
from dinocell.runtime.files import replacing, write_atomically

_MAX_ID = 2**16 - 1  # the challenge's masks have 16 bits


@dataclass(frozen=True, kw_only=True)
class SequenceScore:
    """A sequence's scores: SEG from the masks in SEG, DET from the markers in TRA."""

    segmentation: CTCScore
    """Against SEG; in many gold sets that holds only some frames, or some cells of them."""
    detection: CTCScore
    """Against TRA, or against SEG where there is no TRA."""

    @property
    def seg(self) -> float:
        """SEG, NaN without a reference cell."""
        return self.segmentation.seg

    @property
    def det(self) -> float:
        """DET, NaN without a reference marker."""
        return self.detection.det

    @property
    def op_csb(self) -> float:
        """The mean of the two."""
        return (self.seg + self.det) / 2


def score_sequence(folder: Path, sequence: str, *, truth: Literal["gold", "silver"] = "gold") -> SequenceScore:
    """Score ``01_RES`` against ``01_GT`` (or the masks of ``01_ST``), one frame at a time.

    Every reference frame needs its ``mask`` file; predicted frames without a reference are not looked at.

    Raises
    ------
    ImageError
        If files are missing, or cannot be read.
    """
    if truth not in ("gold", "silver"):
        raise ValueError(f"truth: expected gold or silver, got {truth!r}")
    seg_folder = folder / f"{sequence}_{'GT' if truth == 'gold' else 'ST'}" / "SEG"
    masks = frame_files(seg_folder, "man_seg")
    if not masks:
        raise ImageError(f"{seg_folder}: no man_seg*.tif; expected reference masks such as man_seg000.tif")
    markers = frame_files(folder / f"{sequence}_GT" / "TRA", "man_track")
    results = folder / f"{sequence}_RES"
    predicted = frame_files(results, "mask")
    segmentation = ctc_score_from(_tables(masks, predicted, results))
    detection = ctc_score_from(_tables(markers, predicted, results)) if markers else segmentation
    return SequenceScore(segmentation=segmentation, detection=detection)


def write_results(folder: Path, sequence: str, frames: Iterable[LabelImage], *, num_digits: int = 3) -> None:
    """Write predicted label images as ``01_RES/mask000.tif``, ...; ids stay what they are.

    Raises
    ------
    ImageError
        If there are frames there already, an id exceeds 65,535, there are more frames than ``num_digits`` can number,
        or a file cannot be written.
    """
    _write_frames(_new_folder(folder / f"{sequence}_RES", "mask"), "mask", frames, num_digits)


def write_reference(
    folder: Path, sequence: str, frames: Iterable[LabelImage], *, tracked: bool = False, num_digits: int = 3
) -> None:
    """Write reference label images to ``01_GT/SEG`` and ``01_GT/TRA``, with ``man_track.txt``.

    Parameters
    ----------
    tracked
        Whether an id means the same cell in all frames. If not (images of a set that are no time series), every cell
        of every frame gets an id of its own, and lives for that frame.
    num_digits
        Of the frame numbers in the file names.

    Raises
    ------
    ImageError
        As ``write_results``.
    """
    masks = _new_folder(folder / f"{sequence}_GT" / "SEG", "man_seg")
    markers = _new_folder(folder / f"{sequence}_GT" / "TRA", "man_track")
    lives: dict[int, tuple[int, int]] = {}

    def numbered() -> Iterator[np.ndarray]:
        used = 0
        for number, frame in enumerate(frames):
            ids, inverse = np.unique(frame, return_inverse=True)
            if not tracked:
                new_ids = np.zeros(len(ids), np.int64)
                new_ids[ids != 0] = used + 1 + np.arange(np.count_nonzero(ids))
                frame, ids = new_ids[inverse].reshape(frame.shape), new_ids
                used = max(used, int(new_ids.max(initial=0)))
            for label in ids[ids != 0].tolist():
                first, last = lives.get(label, (number, number - 1))
                if last != number - 1:
                    raise ImageError(
                        f"cell {label} is in frame {last} and again in frame {number}, not between; the challenge "
                        "wants another id after a gap (or tracked=False, if ids do not follow cells)"
                    )
                lives[label] = (first, number)
            yield frame

    _write_frames(masks, "man_seg", numbered(), num_digits, also=(markers, "man_track"))
    lines = [f"{label} {first} {last} 0\n" for label, (first, last) in sorted(lives.items())]
    write_atomically(markers / "man_track.txt", "".join(lines))


def check_ids(labels: LabelImage, path: Path, *, where: str = "") -> None:
    """Raise, naming the path, if ids do not fit into the challenge's 16 bits.

    Raises
    ------
    ImageError
        If an id exceeds 65,535.
    """
    if labels.size and int(labels.max()) > _MAX_ID:
        raise ImageError(
            f"{path}: id {int(labels.max())}{where}; the challenge's masks have 16 bits: "
            f"expected ids up to {_MAX_ID}, renumber the cells or split the set"
        )


def write_mask(path: Path, labels: LabelImage) -> None:
    """Write one mask with ids up to 65,535.

    Raises
    ------
    ImageError
        If the file cannot be written.
    """
    import tifffile

    try:
        with replacing(path) as temporary:
            # LZW as in the challenge's own masks, and nothing that an old libtiff could stumble over.
            tifffile.imwrite(temporary, labels.astype(np.uint16), photometric="minisblack", compression="lzw")
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error.strerror or error})") from error


def _tables(references: dict[int, Path], predicted: dict[int, Path], results: Path) -> Iterator[ContingencyTable]:
    for number, path in references.items():
        if number not in predicted:
            raise ImageError(f"{results}: no mask of frame {number}, which {path} is the reference of")
        reference, prediction = read_labels(path), read_labels(predicted[number])
        if reference.shape != prediction.shape:
            raise ImageError(f"{predicted[number]} is {prediction.shape}, {path} {reference.shape}; expected one size")
        yield contingency_table(reference, prediction)


def frame_files(folder: Path, prefix: str) -> dict[int, Path]:
    """Return the files by their frame number, growing. Masks of single slices (man_seg_000_001.tif) are refused."""
    frames: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{prefix}*.tif")):
        match = re.fullmatch(rf"{prefix}(\d+)", path.stem)
        if match is None:
            raise ImageError(
                f"{path}: expected {prefix} and a frame number; three-dimensional sequences are not scored"
            )
        if int(match[1]) in frames:
            raise ImageError(f"{path}: frame {int(match[1])} twice, also as {frames[int(match[1])].name}")
        frames[int(match[1])] = path
    return dict(sorted(frames.items()))


def _new_folder(folder: Path, prefix: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{folder}: cannot be made ({error.strerror or error})") from error
    old = next(folder.glob(f"{prefix}*.tif"), None)
    if old is not None:
        raise ImageError(f"{old}: frames of an earlier run; they would be scored with the new ones: remove them first")
    return folder


def _write_frames(
    folder: Path, prefix: str, frames: Iterable[np.ndarray], num_digits: int, *, also: tuple[Path, str] | None = None
) -> None:
    targets = [(folder, prefix)] if also is None else [(folder, prefix), also]
    for number, frame in enumerate(frames):
        if len(str(number)) > num_digits:
            raise ImageError(f"{folder}: more frames than {num_digits} digits can number; ask for more digits")
        check_ids(frame, folder, where=f" in frame {number}")
        for place, name in targets:
            write_mask(place / f"{name}{number:0{num_digits}d}.tif", frame)


# --- ctc_programs --------------------------------------------------------------------------------------------------
#
# The Cell Tracking Challenge's own programs, SEGMeasure and DETMeasure: run on its folders, their scores read.

_SYSTEM_FOLDERS = {"linux": "Linux", "darwin": "Mac", "win32": "Win"}  # in the challenge's archive of programs


@dataclass(frozen=True, kw_only=True)
class OfficialScores:
    """What the challenge's own programs print, to six digits."""

    seg: float
    det: float


def check_programs(binary_path: Path) -> None:
    """Raise unless the challenge's two programs are there and may be run.

    Raises
    ------
    DinocellError
        If not; the message names the program.
    """
    for name in ("SEG", "DET"):
        program = _program(binary_path, f"{name}Measure")
        if not os.access(program, os.X_OK):
            raise DinocellError(f"{program}: not executable; allow it with 'chmod +x {program}'")


def official_scores(folder: Path, sequence: str, *, binary_path: Path) -> OfficialScores:
    """Run the challenge's ``SEGMeasure`` and ``DETMeasure`` on a sequence; they write their logs into ``01_RES``.

    Parameters
    ----------
    binary_path
        The folder of the two programs, or the one that the challenge's archive unpacks to (with ``Linux``, ``Mac`` and
        ``Win`` in it).

    Raises
    ------
    DinocellError
        If a program is not there, does not run, or prints no score.
    """
    masks = frame_files(folder / f"{sequence}_GT" / "SEG", "man_seg")
    if not masks:
        raise ImageError(f"{folder / f'{sequence}_GT' / 'SEG'}: no man_seg*.tif; the official programs need them")
    digits = re.sub(r"\D", "", next(iter(masks.values())).stem)
    scores = {}
    for name in ("SEG", "DET"):
        command = [str(_program(binary_path, f"{name}Measure")), str(folder.resolve()), sequence, str(len(digits))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise DinocellError(f"{command[0]}: does not run here ({error.strerror or error})") from error
        found = re.search(rf"{name} measure:\s*([0-9.]+(?:[eE][-+]?\d+)?)", done.stdout)
        if found is None or done.returncode != 0:
            said = " ".join((done.stdout + " " + done.stderr).split())[:200] or "nothing"
            raise DinocellError(
                f"{command[0]}: expected '{name} measure: ...', got exit code {done.returncode}: {said}"
            )
        scores[name] = float(found[1])
    return OfficialScores(seg=scores["SEG"], det=scores["DET"])


def official_scores_of(
    reference: Sequence[LabelImage], prediction: Sequence[LabelImage], *, binary_path: Path
) -> OfficialScores:
    """Write label images to a temporary folder and run the challenge's programs on it, to compare with ``ctc_score``.

    Raises
    ------
    DinocellError
        As ``write_reference``, ``write_results`` and ``official_scores``.
    """
    num_digits = max(3, len(str(len(reference) - 1)))
    with TemporaryDirectory(prefix="dinocell-") as name:
        folder = Path(name)
        write_reference(folder, "01", reference, num_digits=num_digits)
        write_results(folder, "01", prediction, num_digits=num_digits)
        return official_scores(folder, "01", binary_path=binary_path)


def _program(binary_path: Path, name: str) -> Path:
    file = f"{name}.exe" if sys.platform == "win32" else name
    places = [binary_path / file, binary_path / _SYSTEM_FOLDERS.get(sys.platform, "Linux") / file]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DinocellError(f"{places[0]}: no such program; expected the folder that holds SEGMeasure and DETMeasure")
    return found.resolve()
