"""The Cell Tracking Challenge's own programs on an evaluation's label images: their numbers beside ours.

The programs see what our scores saw: each set as one sequence, its masks as SEG and as TRA, every reference cell with
an id of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from dinocell.errors import DinocellError
from dinocell.eval.ctc_programs import OfficialScores, official_scores_of
from dinocell.eval.evaluation_sets import EvaluationSet

_MAX_CELLS = 2**16 - 1  # the challenge's masks have 16 bits


class LabelStore:
    """Label images of each set and method, in files of a scratch folder until the programs are run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, str], list[Path]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, dataset: str, method: str, labels: np.ndarray) -> None:
        """Keep the next image's labels."""
        files = self._files.setdefault((dataset, method), [])
        path = self._folder / f"{list(self._files).index((dataset, method))}_{len(files)}.npy"
        np.save(path, labels)
        files.append(path)

    def scores(self, dataset: str, method: str, reference: EvaluationSet, *, binary_path: Path) -> OfficialScores:
        """Run the programs on all images of a set."""
        files = self._files[dataset, method]
        predicted = _Lazy(len(files), lambda index: np.load(files[index], allow_pickle=False))
        expected = _Lazy(len(reference), lambda index: np.ascontiguousarray(reference[index].labels))
        return official_scores_of(expected, predicted, binary_path=binary_path)


def check_few_enough(name: str, reference: EvaluationSet) -> None:
    """Raise if a set has more cells than the programs can tell apart.

    Raises
    ------
    DinocellError
        If there are more than 65,535.
    """
    num_cells = sum(np.count_nonzero(np.unique(reference[index].labels)) for index in range(len(reference)))
    if num_cells > _MAX_CELLS:
        raise DinocellError(
            f"{name}: {num_cells} cells; the official programs tell {_MAX_CELLS} apart: split the set, or leave out "
            "--binary-path"
        )


class _Lazy(Sequence[np.ndarray]):
    """Arrays that are read when they are asked for."""

    def __init__(self, length: int, read: Callable[[int], np.ndarray]) -> None:
        self._length, self._read = length, read

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(index, slice):
            return [self._read(each) for each in range(self._length)[index]]
        return self._read(range(self._length)[index])
