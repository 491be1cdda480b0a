"""The Cell Tracking Challenge's own programs, SEGMeasure and DETMeasure: run on its folders, their scores read."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dinocell.errors import DinocellError, ImageError
from dinocell.eval.ctc_folders import frame_files, write_reference, write_results
from dinocell.eval.overlaps import LabelImage

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
