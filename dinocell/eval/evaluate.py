"""Score methods on labelled sets, each image and all images pooled.

A `Method` returns the labels of an image. `segmenter_methods` makes methods of a segmenter, which predicts every image
once: with its own postprocessing, and with the plain rule, so that the effect of the refinement can be told apart.
`search_methods` adds the thresholds that score best on these images, and `tool_method` reads another tool's label
images. `score` scores methods and draws error images of the worst segmentations (false cells red, missed cells blue,
outlines of correct cells green); `score_with_programs` also runs the Cell Tracking Challenge's own programs.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Integer, Real, UInt8
from skimage.segmentation import find_boundaries

from dinocell.errors import DinocellError, ImageError, require
from dinocell.eval.evaluation_sets import EvaluationSet, PairSet, find_predictions
from dinocell.eval.metrics.ctc import MAX_ID, check_programs, official_scores_of
from dinocell.eval.metrics.matching import find_matches
from dinocell.eval.metrics.overlaps import ContingencyTable, contingency_table
from dinocell.eval.metrics.summary import ImageScores, PooledScores, Scores, pool, score_tables
from dinocell.eval.segmentation.pipeline import Axes, DINOCellPipeline, decode
from dinocell.eval.threshold_search import GridSearch, search_parameters, store_maps
from dinocell.finetune.targets import Postprocessing
from dinocell.images.image import as_image, percentile_range, to_uint8
from dinocell.labelled.dataset import LabelledImage
from dinocell.labelled.masks import read_labels

ALL_SETS = "all"
OURS, PLAIN, FOUND = "DINOCell", "DINOCell, plain rule", "DINOCell, thresholds found here"

# Colours, percentiles and opacity of error images; a report with six of this size stays below a few MB.
FALSE, MISSED, CORRECT = (235, 40, 40), (50, 110, 255), (90, 210, 90)
_PERCENTILES, _OPACITY, _MAX_SIDE_PX = (0.5, 99.8), 0.4, 1000

Progress = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and their total."""
Sets = Mapping[str, EvaluationSet]
"""Labelled sets, by the name that tables show. Crowd regions count as background."""


def _no_progress(_what: str, _done: int, _total: int) -> None: ...


@dataclass(frozen=True)
class Item:
    """An image of one of several sets, its place among the images of all sets, and its index in its own."""

    place: int
    dataset: str
    index: int
    image: LabelledImage


def items(sets: Sets) -> Iterator[Item]:
    """Yield the images of all sets in order."""
    place = 0
    for name, data_set in sets.items():
        for index in range(len(data_set)):
            yield Item(place, name, index, data_set[index])
            place += 1


@runtime_checkable
class Method(Protocol):
    """What is scored."""

    @property
    def name(self) -> str:
        """The name in tables."""

    @property
    def description(self) -> str:
        """How the labels are made."""

    def labels(self, item: Item) -> Integer[np.ndarray, "h w"]:
        """Return the labels of an image; images come in order."""


class _Predictor:
    """Maps of a segmenter; those of the last image are kept for the next method."""

    def __init__(self, pipeline: DINOCellPipeline) -> None:
        self._pipeline, self._place = pipeline, -1

    def __call__(self, item: Item) -> Float32[np.ndarray, "..."]:
        if item.place != self._place:
            image = item.image
            self._maps = self._pipeline.maps(np.asarray(image.pixels), pixel_size_um=image.pixel_size_um)
            self._place = item.place
        return self._maps


@dataclass(frozen=True, kw_only=True)
class _SegmenterMethod:
    name: str
    maps: Callable[[Item], Float32[np.ndarray, "..."]]
    parameters: Postprocessing

    @property
    def description(self) -> str:
        return str(self.parameters)

    def labels(self, item: Item) -> Integer[np.ndarray, "h w"]:
        return decode(self.maps(item), self.parameters)


@dataclass(frozen=True, kw_only=True)
class ToolMethod:
    """Label images in a folder, by set; see `find_predictions` for their names."""

    name: str
    description: str
    files: Mapping[str, Sequence[Path]]

    def labels(self, item: Item) -> Integer[np.ndarray, "h w"]:
        """Read the labels of an image."""
        file, expected = self.files[item.dataset][item.index], item.image.labels.shape
        labels = read_labels(file)
        if labels.shape != expected:
            sizes = (" x ".join(map(str, shape)) for shape in (expected, labels.shape))
            raise ImageError("{}: expected the labelled set's size, {}, got {}".format(file, *sizes))
        return labels

    def check(self, sets: Sets) -> None:
        """Read every file once, to fail before a long computation if one does not fit."""
        for item in items(sets):
            self.labels(item)


def segmenter_methods(
    sets: Sets, pipeline: DINOCellPipeline, maps: Callable[[Item], Float32[np.ndarray, "..."]] | None = None
) -> list[Method]:
    """Return a segmenter's own postprocessing and the plain rule as methods; ``maps`` are those predicted already.

    A DinocellError if a set has masks without images.
    """
    _check_images(sets)
    maps, parameters = maps or _Predictor(pipeline), pipeline.parameters
    return [
        _SegmenterMethod(name=OURS, maps=maps, parameters=parameters),
        _SegmenterMethod(name=PLAIN, maps=maps, parameters=parameters.plain()),
    ]


def search_methods(
    sets: Sets,
    pipeline: DINOCellPipeline,
    scratch: Path,
    *,
    axes: Axes | None = None,
    progress: Progress = _no_progress,
) -> tuple[list[Method], GridSearch]:
    """Search thresholds; return `segmenter_methods`, the best thresholds as one more method, and the search.

    The best thresholds are fitted to the images that they are scored on: for choosing, not for comparing.

    Parameters
    ----------
    scratch
        Folder for the maps of all images (flows: 12 bytes per pixel).
    axes
        Values to search, see `dinocell.eval.threshold_search.search_parameters`.
    """
    _check_images(sets)
    total = sum(map(len, sets.values()))
    predict = _Predictor(pipeline)

    def predicted() -> Iterator[Float32[np.ndarray, "..."]]:
        for item in items(sets):
            yield predict(item)
            progress("predicted", item.place + 1, total)

    maps = store_maps(scratch, predicted())
    search = search_parameters(
        maps,
        [np.asarray(item.image.labels) for item in items(sets)],
        pipeline.model.settings.postprocessing,
        axes,
        progress=lambda done, number: progress("searched", done, number),
    )
    read: Callable[[Item], Float32[np.ndarray, ...]] = lambda item: np.asarray(maps[item.place])  # noqa: E731
    found = _SegmenterMethod(name=FOUND, maps=read, parameters=search.best)
    return [*segmenter_methods(sets, pipeline, read), found], search


def _check_images(sets: Sets) -> None:
    for name, data_set in sets.items():
        if isinstance(data_set, PairSet) and not data_set.has_images:
            raise DinocellError(f"{name}: masks without images; a model cannot be scored on them, --predictions can")


def tool_method(name: str, folder: Path, sets: Sets) -> ToolMethod:
    """Return the label images in a folder as a method.

    A DinocellError if a label image is missing, or several images of the sets would have the same one.
    """
    files = {dataset: find_predictions(folder, dataset, data_set.names) for dataset, data_set in sets.items()}
    counts = Counter(file for of_set in files.values() for file in of_set)
    for file, number in counts.items():
        require(number == 1, f"{file}: several images have this name; sort the label images into {folder}/SET")
    return ToolMethod(name=name, description=f"label images in {folder}", files=files)


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorImage:
    """An image that a method segmented badly, with its errors drawn by `draw_errors`."""

    dataset: str
    image: str
    method: str
    scores: Scores
    image_rgb: UInt8[np.ndarray, "3 h w"]


class WorstImages:
    """The ``max_images`` images of the lowest F1 so far, the lowest first, without perfect and empty ones."""

    def __init__(self, max_images: int) -> None:
        self.errors: list[ErrorImage] = []
        self._max_images = max_images

    def add(
        self, row: ImageScores, image: LabelledImage, labels: Integer[np.ndarray, "h w"], table: ContingencyTable
    ) -> None:
        """Add an image if it is among the worst; only then it is drawn."""
        score = row.scores.f1
        is_full = len(self.errors) >= self._max_images
        if math.isnan(score) or score == 1 or (is_full and not (self.errors and score < self.errors[-1].scores.f1)):
            return
        plane = as_image(np.asarray(image.pixels)).plane()
        drawn = draw_errors(plane, np.asarray(image.labels), labels, table)
        error = ErrorImage(dataset=row.dataset, image=row.image, method=row.method, scores=row.scores, image_rgb=drawn)
        self.errors = sorted([*self.errors, error], key=lambda error: error.scores.f1)[: self._max_images]


def draw_errors(
    image: Real[np.ndarray, "h w"],
    reference: Integer[np.ndarray, "h w"],
    predicted: Integer[np.ndarray, "h w"],
    table: ContingencyTable,
) -> UInt8[np.ndarray, "3 rows columns"]:
    """Draw the cells that are not matched at an IoU of 0.5 over the image as RGB; false and missed cells may overlap.

    ``table`` is that of the two label images. Images with a side of more than 1,000 px are subsampled.
    """
    pairs = find_matches(table, 0.5)
    correct_ids = table.predicted_ids[table.predicted_index[pairs]]
    matched_ids = table.reference_ids[table.reference_index[pairs]]
    step = -(-max(image.shape) // _MAX_SIDE_PX)
    image, reference, predicted = (
        np.ascontiguousarray(plane[::step, ::step]) for plane in (image, reference, predicted)
    )
    low, high = percentile_range(image, *_PERCENTILES)
    rgb = np.repeat(to_uint8(image, low, high)[None], 3, axis=0)
    is_correct = np.isin(predicted, correct_ids)
    is_false = (predicted != 0) & ~is_correct
    is_missed = (reference != 0) & ~np.isin(reference, matched_ids)
    for mask, colour in ((is_false, FALSE), (is_missed, MISSED)):
        tinted = (1 - _OPACITY) * rgb[:, mask] + _OPACITY * np.array(colour, np.float32)[:, None]
        rgb[:, mask] = tinted.round().astype(np.uint8)
    for labels, mask, colour in (
        (predicted, is_correct, CORRECT),
        (predicted, is_false, FALSE),
        (reference, is_missed, MISSED),
    ):
        edges = find_boundaries(np.where(mask, labels, 0), mode="inner")  # type: ignore[no-untyped-call]
        rgb[:, edges] = np.array(colour, np.uint8)[:, None]
    return rgb


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Scores of methods on sets.

    Attributes
    ----------
    methods
        Description of each method, by name.
    images, pooled
        Scores, in the order of the sets, then of their images, then of the methods.
    worst
        The images with the lowest F1 of the first method, the lowest first.
    threshold_search
        The search, if there was one.
    """

    methods: dict[str, str]
    images: tuple[ImageScores, ...]
    pooled: tuple[PooledScores, ...]
    worst: tuple[ErrorImage, ...]
    threshold_search: GridSearch | None = None


def score(
    sets: Sets, methods: Sequence[Method], *, num_worst: int = 6, progress: Progress = _no_progress
) -> Evaluation:
    """Score each method on each image of each set, and on all images pooled.

    A DinocellError if the sets have no images, or a file is missing or does not fit.

    Parameters
    ----------
    num_worst
        Number of error images to draw.
    """
    total = sum(map(len, sets.values()))
    require(total and methods, "nothing to score: expected a labelled set with images, and a model or predictions")
    is_unique = ALL_SETS not in sets or len(sets) == 1
    require(is_unique, f"a set cannot be called {ALL_SETS!r}, as pooled scores; rename the folder")
    tables: dict[tuple[str, str], list[ContingencyTable]] = {
        (dataset, method.name): [] for dataset in sets for method in methods
    }
    images: list[ImageScores] = []
    worst = WorstImages(num_worst)
    for item in items(sets):
        reference = np.ascontiguousarray(item.image.labels)
        for method in methods:
            labels = method.labels(item)
            table = contingency_table(reference, labels)
            tables[item.dataset, method.name].append(table)
            row = ImageScores(
                method=method.name, dataset=item.dataset, image=item.image.name, scores=score_tables([table])
            )
            images.append(row)
            if method is methods[0]:
                worst.add(row, item.image, labels, table)
        progress("scored", item.place + 1, total)
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in sets}
    if len(sets) > 1:
        groups[ALL_SETS] = tuple(sets)
    pooled = [
        pool(method.name, group, [table for name in names for table in tables[name, method.name]])
        for group, names in groups.items()
        for method in methods
    ]
    return Evaluation(
        methods={method.name: method.description for method in methods},
        images=tuple(images),
        pooled=tuple(pooled),
        worst=tuple(worst.errors),
    )


def score_with_programs(
    sets: Sets,
    methods: Sequence[Method],
    scratch: Path,
    *,
    binary_path: Path,
    progress: Progress = _no_progress,
) -> Evaluation:
    """Do what `score` does, and run the Cell Tracking Challenge's programs on each set as one sequence.

    The programs get the labels that `score` gets: the masks as SEG and as TRA, every reference cell with its own id. A
    DinocellError as `score`, or if a program cannot be run, or a set has more cells than the programs' 65,535 ids.

    Parameters
    ----------
    scratch
        Folder for the label images, 4 bytes per pixel.
    binary_path
        The folder of the programs ``SEGMeasure`` and ``DETMeasure``.
    """
    check_programs(binary_path)
    for name, data_set in sets.items():
        num_cells = sum(np.count_nonzero(np.unique(data_set[index].labels)) for index in range(len(data_set)))
        problem = f"{num_cells} cells, the official programs distinguish {MAX_ID}"
        require(num_cells <= MAX_ID, f"{name}: {problem}; split the set, or remove --binary-path")
    scratch.mkdir(parents=True, exist_ok=True)
    recorded = [
        _Recorded(method.name, method.description, method, scratch / str(index)) for index, method in enumerate(methods)
    ]
    evaluation = score(sets, recorded, progress=progress)
    official = {}
    for done, (name, method) in enumerate(((name, method) for name in sets for method in recorded), start=1):
        references = (np.ascontiguousarray(sets[name][index].labels) for index in range(len(sets[name])))
        predictions = (np.load(file, allow_pickle=False) for file in method.files[name])
        digits = max(3, len(str(len(sets[name]) - 1)))
        official[name, method.name] = official_scores_of(
            references, predictions, binary_path=binary_path, num_digits=digits
        )
        progress("scored by the official programs", done, len(sets) * len(recorded))
    pooled = (replace(row, official=official.get((row.dataset, row.method))) for row in evaluation.pooled)
    return replace(evaluation, pooled=tuple(pooled))


@dataclass(frozen=True)
class _Recorded:
    """A method whose labels are also written to files."""

    name: str
    description: str
    method: Method
    folder: Path
    files: dict[str, list[Path]] = field(default_factory=dict)

    def labels(self, item: Item) -> Integer[np.ndarray, "h w"]:
        labels = self.method.labels(item)
        path = self.folder / f"{item.place}.npy"
        self.folder.mkdir(exist_ok=True)
        np.save(path, labels)
        self.files.setdefault(item.dataset, []).append(path)
        return labels
