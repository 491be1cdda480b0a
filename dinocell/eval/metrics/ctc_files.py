"""Masks in the folders of the Cell Tracking Challenge, and the challenge's own programs, run on them.

::

    01/t000.tif                     the images
    01_GT/SEG/man_seg000.tif        reference masks (gold; silver ones are in 01_ST/SEG)
    01_GT/TRA/man_track000.tif      reference markers, in every frame; man_track.txt: label, first, last frame, parent
    01_RES/mask000.tif              predicted masks, 16 bit

The challenge measures SEG on SEG and DET on TRA. Sets with one mask per cell have the same images in both.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dinocell.errors import DinocellError, ImageError
from dinocell.eval.metrics.overlaps import LabelImage
from dinocell.runtime.files import replacing, write_atomically

MAX_ID = 2**16 - 1  # the challenge's masks have 16 bits


def write_results(folder: Path, sequence: str, frames: Iterable[LabelImage], *, num_digits: int = 3) -> None:
    """Write predicted label images as ``01_RES/mask000.tif``, ..., with the same ids.

    Raises
    ------
    ImageError
        If an id exceeds 65,535, or a file cannot be written.
    """
    _write_frames({"mask": folder / f"{sequence}_RES"}, frames, num_digits)


def write_reference(folder: Path, sequence: str, frames: Iterable[LabelImage], *, num_digits: int = 3) -> None:
    """Write reference label images to ``01_GT/SEG`` and ``01_GT/TRA``, with ``man_track.txt``.

    The frames are independent images, not a time series: every cell of every frame gets an id of its own.

    Raises
    ------
    ImageError
        As `write_results`.
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
    """Raise if ids do not fit into the 16 bits of the challenge's masks; the message names the path.

    Raises
    ------
    ImageError
        If an id exceeds 65,535.
    """
    if labels.size and int(labels.max()) > MAX_ID:
        raise ImageError(
            f"{path}: expected ids up to {MAX_ID} (masks have 16 bits), got {int(labels.max())}{where}; "
            "relabel the cells or split the set"
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


# --- SEGMeasure and DETMeasure, the challenge's own programs --------------------------------------------------------

_SYSTEM_FOLDERS = {"linux": "Linux", "darwin": "Mac", "win32": "Win"}  # in the challenge's archive of programs


@dataclass(frozen=True, kw_only=True)
class OfficialScores:
    """Scores printed by the challenge's own programs, to six digits."""

    seg: float
    det: float


def check_programs(binary_path: Path) -> None:
    """Raise a DinocellError that names the program if one of the two is missing or not executable."""
    for name in ("SEG", "DET"):
        program = _program(binary_path, f"{name}Measure")
        if not os.access(program, os.X_OK):
            raise DinocellError(f"{program}: not executable; run 'chmod +x {program}'")


def official_scores(folder: Path, sequence: str, *, binary_path: Path, num_digits: int = 3) -> OfficialScores:
    """Run the challenge's ``SEGMeasure`` and ``DETMeasure`` on a sequence; they write logs to ``01_RES``.

    Parameters
    ----------
    binary_path
        The folder of the two programs, or the unpacked archive of the challenge (with ``Linux``, ``Mac`` and ``Win``).
    num_digits
        Digits of the frame numbers in the file names.

    Raises
    ------
    DinocellError
        If a program is missing, does not run, or prints no score.
    """
    scores = {}
    for name in ("SEG", "DET"):
        command = [str(_program(binary_path, f"{name}Measure")), str(folder.resolve()), sequence, str(num_digits)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise DinocellError(f"{command[0]}: cannot be run ({error.strerror or error})") from error
        match = re.search(rf"{name} measure:\s*([0-9.]+(?:[eE][-+]?\d+)?)", done.stdout)
        if match is None or done.returncode != 0:
            output = " ".join((done.stdout + " " + done.stderr).split())[:200] or "no output"
            raise DinocellError(
                f"{command[0]}: expected '{name} measure: ...', got exit code {done.returncode}: {output}"
            )
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
    program = next((place for place in places if place.is_file()), None)
    if program is None:
        raise DinocellError(f"{places[0]}: no such program; expected the folder of SEGMeasure and DETMeasure")
    return program.resolve()
