"""Score a segmenter, and the label images of any other tool, on labelled sets: each image, and all images pooled.

A segmenter is scored twice: with its mended watershed, and with the plain one (``merge_px=None``,
``restore_border=False``), so that what the network gives and what the mending adds can be told apart. For one of target
``flows`` the plain rule drops no cell for its flow error. The network sees every image once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer

from dinocell.data_shards.labelled import LabelledImage
from dinocell.data_shards.masks import read_labels
from dinocell.errors import DinocellError, ImageError
from dinocell.eval.ctc_programs import OfficialScores, check_programs
from dinocell.eval.evaluation_sets import EvaluationSet, PairSet
from dinocell.eval.flow_thresholds import search_flows
from dinocell.eval.grid_search import keep_maps
from dinocell.eval.mending import Mending
from dinocell.eval.mistakes import Mistakes, WorstImages
from dinocell.eval.official import LabelStore, check_few_enough
from dinocell.eval.overlaps import Overlaps, find_overlaps
from dinocell.eval.pipeline import DINOCellPipeline
from dinocell.eval.predicted_files import find_predictions
from dinocell.eval.rules import FOUND, OURS, PLAIN, FoundThresholds, rules_of
from dinocell.eval.score_rows import ImageScores, PooledScores, pool, score_tables
from dinocell.eval.thresholds import CELL_FILL_RANGE, CELLS_MAX_RANGE, STEPS, search

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
    worst: tuple[Mistakes, ...]
    threshold_search: FoundThresholds | None


@dataclass(frozen=True, kw_only=True)
class SearchGrid:
    """Least and largest value of each threshold of distance maps to try, and how many of each.

    Flows have a grid of their own, see `dinocell.eval.flow_thresholds`; any other than this default is refused then.
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

    tables: dict[tuple[str, str], list[Overlaps]] = {(name, method): [] for name in sets for method in methods}
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
            table = find_overlaps(reference, labels)
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
