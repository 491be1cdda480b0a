"""Score a segmenter, and the label images of any other tool, on labelled sets: each image, and all images pooled.

A segmenter is scored twice: with its mended watershed, and with the plain one (``merge_px=None``,
``restore_border=False``), so that what the network gives and what the mending adds can be told apart. For one of target
``flows`` the plain rule drops no cell for its flow error. The network sees every image once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Float32, Integer

from dinocell.errors import DinocellError, ImageError
from dinocell.eval.error_images import ErrorImage, WorstImages
from dinocell.eval.evaluation_sets import EvaluationSet, PairSet, find_predictions
from dinocell.eval.metrics.ctc_files import OfficialScores, check_programs, official_scores_of
from dinocell.eval.metrics.overlaps import ContingencyTable, contingency_table
from dinocell.eval.metrics.summary import ImageScores, PooledScores, pool, score_tables
from dinocell.eval.scoring import FOUND, OURS, PLAIN, FoundThresholds, rules_of
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.eval.segmentation.refine import Mending
from dinocell.eval.threshold_search import CELL_FILL_RANGE, CELLS_MAX_RANGE, STEPS, keep_maps, search, search_flows
from dinocell.labelled.dataset import LabelledImage
from dinocell.labelled.masks import read_labels

ALL_SETS = "all"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What came out.

    Attributes
    ----------
    methods
        Name of each method, and how its labels were made.
    images, pooled
        Scores, in the order of the sets, then of their images, then of the methods.
    worst
        The images with the lowest F1 of the first method, the lowest first.
    threshold_search
        None if none was asked for.
    """

    methods: dict[str, str]
    images: tuple[ImageScores, ...]
    pooled: tuple[PooledScores, ...]
    worst: tuple[ErrorImage, ...]
    threshold_search: FoundThresholds | None


@dataclass(frozen=True, kw_only=True)
class SearchGrid:
    """Least and largest value of each threshold of distance maps to try, and how many of each.

    Flows have a grid of their own, see `dinocell.eval.threshold_search`; any other than this default is refused then.
    """

    cells_max_range: tuple[int | float, int | float] = CELLS_MAX_RANGE
    cell_fill_range: tuple[int | float, int | float] = CELL_FILL_RANGE
    steps: int = STEPS


def evaluate_sets(
    sets: Mapping[str, EvaluationSet],
    *,
    pipeline: DINOCellPipeline | None = None,
    predictions: Mapping[str, Path] | None = None,
    grid: SearchGrid | None = None,
    scratch: Path | None = None,
    binary_path: Path | None = None,
    num_worst: int = 6,
    progress: Progress = lambda _what, _done, _total: None,
) -> Evaluation:
    """Score each method on each image of each set.

    Parameters
    ----------
    sets
        Labelled sets, by the name that tables show. Crowd regions count as background.
    pipeline
        A segmenter; None scores ``predictions`` alone.
    predictions
        Folders of label images by other tools, by the tool's name; see `find_predictions` for the files' names.
    grid
        Search thresholds, and score those that are best for these images as a method of their own. They are fitted to
        the images that they are scored on: only for choosing, not for comparing.
    scratch
        A folder for the maps of a search (flows: 12 bytes a pixel of all images) and the label images for the official
        programs, 4 bytes a pixel each.
    binary_path
        The folder of the Cell Tracking Challenge's ``SEGMeasure`` and ``DETMeasure``: they are run on each set.
    num_worst
        Pictures of mistakes to draw.
    progress
        Called with what is done, how much of it, and of how much.

    Raises
    ------
    DinocellError
        If there is nothing to score, names collide, or files are missing or do not fit. All files are read once before
        the network runs.
    """
    predictions = dict(predictions or {})
    _check(sets, pipeline, predictions, grid, scratch)
    if binary_path is not None and scratch is None:
        raise ValueError("scratch: the official programs need a folder for the label images")
    store = None
    if binary_path is not None and scratch is not None:
        check_programs(binary_path)
        for name, each in sets.items():
            check_few_enough(name, each)
        store = LabelStore(scratch / "labels")
    files = {tool: _files(sets, folder) for tool, folder in predictions.items()}
    if pipeline is not None:  # a file that does not fit is found before the network's long work, not after it
        for of_sets in files.values():
            for dataset, index, image in _all_images(sets):
                _read(of_sets[dataset][index], image.labels.shape)
    found: FoundThresholds | None = None
    maps = _maps(sets, pipeline, progress) if pipeline is not None else None
    if grid is not None and maps is not None and pipeline is not None and scratch is not None:
        kept = keep_maps(scratch, maps)
        found = _search(sets, kept, pipeline, grid, progress)
        maps = iter(kept)
    rules = rules_of(pipeline, found) if pipeline is not None else {}
    methods = {name: rule.description for name, rule in rules.items()}
    methods |= {tool: f"label images in {folder}" for tool, folder in predictions.items()}

    tables: dict[tuple[str, str], list[ContingencyTable]] = {(name, method): [] for name in sets for method in methods}
    images: list[ImageScores] = []
    worst = WorstImages(num_worst)
    total = sum(map(len, sets.values()))
    for number, (dataset, index, image) in enumerate(_all_images(sets)):
        reference = np.ascontiguousarray(image.labels)
        predicted = np.asarray(next(maps)) if maps is not None else None
        for method in methods:
            if method in rules and predicted is not None:
                labels = rules[method].labels(predicted)
            else:
                labels = _read(files[method][dataset][index], reference.shape)
            table = contingency_table(reference, labels)
            tables[dataset, method].append(table)
            if store is not None:
                store.add(dataset, method, labels)
            row = ImageScores(method=method, dataset=dataset, image=image.name, scores=score_tables([table]))
            images.append(row)
            if method == next(iter(methods)):
                worst.add(row, image, labels, table)
        progress("scored", number + 1, total)
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in sets}
    if len(sets) > 1:
        groups[ALL_SETS] = tuple(sets)
    official: dict[tuple[str, str], OfficialScores] = {}
    if store is not None and binary_path is not None:
        for number, (dataset, method) in enumerate(tables):
            official[dataset, method] = store.scores(dataset, method, sets[dataset], binary_path=binary_path)
            progress("scored by the official programs", number + 1, len(tables))
    pooled = [
        pool(
            method,
            group,
            [table for name in names for table in tables[name, method]],
            official=official.get((group, method)),
        )
        for group, names in groups.items()
        for method in methods
    ]
    return Evaluation(
        methods=methods, images=tuple(images), pooled=tuple(pooled), worst=tuple(worst.mistakes), threshold_search=found
    )


def _check(
    sets: Mapping[str, EvaluationSet],
    pipeline: DINOCellPipeline | None,
    predictions: Mapping[str, Path],
    grid: SearchGrid | None,
    scratch: Path | None,
) -> None:
    if not any(len(each) for each in sets.values()):
        raise DinocellError("expected a labelled set with an image in it, got none")
    if pipeline is None and not predictions:
        raise DinocellError("nothing to score: give a model, or predictions")
    if grid is not None and pipeline is None:
        raise DinocellError("a threshold search needs a model: label images of other tools have no thresholds")
    if grid is not None and scratch is None:
        raise ValueError("scratch: a threshold search needs a folder for the maps")
    for name, each in sets.items():
        if pipeline is not None and isinstance(each, PairSet) and not each.has_images:
            raise DinocellError(f"{name}: masks without images; a model cannot be scored on them, --predictions can")
    if grid is not None and pipeline is not None and pipeline.model.settings.target == "flows" and grid != SearchGrid():
        raise DinocellError(
            "a model of target flows has no cells_max and cell_fill: leave out their ranges (--cells-max-range, "
            "--cell-fill-range)"
        )
    ours = {OURS, PLAIN, FOUND} & set(predictions) if pipeline is not None else set()
    if ours:
        raise DinocellError(f"predictions: {ours.pop()!r} is what the model's own scores are called; take another name")
    if ALL_SETS in sets and len(sets) > 1:
        raise DinocellError(
            f"a set cannot be called {ALL_SETS!r}: the pooled scores of all sets are; rename the folder"
        )


def _files(sets: Mapping[str, EvaluationSet], folder: Path) -> dict[str, list[Path]]:
    """Find a tool's label image of each image of each set; one that would be that of two images is refused."""
    files = {name: find_predictions(folder, name, each.names) for name, each in sets.items()}
    twice = [file for file, times in Counter(file for each in files.values() for file in each).items() if times > 1]
    if twice:
        raise DinocellError(
            f"{twice[0]}: several images have this name; sort the label images into {folder}/SET, one folder a set"
        )
    return files


def _all_images(sets: Mapping[str, EvaluationSet]) -> Iterator[tuple[str, int, LabelledImage]]:
    for name, each in sets.items():
        for index in range(len(each)):
            yield name, index, each[index]


def _maps(
    sets: Mapping[str, EvaluationSet], pipeline: DINOCellPipeline, progress: Progress
) -> Iterator[Float32[np.ndarray, "*_"]]:
    total = sum(map(len, sets.values()))
    for number, (_, _, image) in enumerate(_all_images(sets)):
        yield pipeline.maps(np.asarray(image.pixels), pixel_size_um=image.pixel_size_um)
        progress("predicted", number + 1, total)


def _search(
    sets: Mapping[str, EvaluationSet],
    maps: Sequence[np.ndarray],
    pipeline: DINOCellPipeline,
    grid: SearchGrid,
    progress: Progress,
) -> FoundThresholds:
    settings = pipeline.model.settings
    references = [np.asarray(image.labels) for _, _, image in _all_images(sets)]
    if settings.target == "flows":
        return search_flows(
            maps,
            references,
            min_area_px=settings.min_area_px,
            progress=lambda done, total: progress("searched", done, total),
        )
    return search(
        maps,
        references,
        cells_max_range=grid.cells_max_range,
        cell_fill_range=grid.cell_fill_range,
        steps=grid.steps,
        restore_border=(True, False),
        mending=Mending(min_area_px=settings.min_area_px, merge_px=settings.merge_px),
        progress=lambda done, total: progress("searched", done, total),
    )


def _read(file: Path, shape: tuple[int, ...]) -> Integer[np.ndarray, "h w"]:
    labels = read_labels(file)
    if labels.shape != shape:
        raise ImageError(f"{file}: expected the labelled set's size, {_size(shape)}, got {_size(labels.shape)}")
    return labels


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# --- official ------------------------------------------------------------------------------------------------------
#
# The Cell Tracking Challenge's own programs on an evaluation's label images: their numbers beside ours.
#
# The programs see what our scores saw: each set as one sequence, its masks as SEG and as TRA, every reference cell with
# an id of its own.

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
