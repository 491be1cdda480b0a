"""Threshold search: every grid point scores as the full postprocessing at that point, and the best is found."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.metrics.matching import matching_score
from dinocell.eval.segmentation.refine import PLAIN, Refinement
from dinocell.eval.segmentation.watershed import distance_to_labels
from dinocell.eval.threshold_search import METRICS, GridSearch, search, search_parameters, store_maps
from dinocell.finetune.targets import DistancePostprocessing
from dinocell.labelled.distance import labels_to_distance

RNG = np.random.default_rng(0)


def images() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three fields of different sizes, and their maps as a network might blur them."""
    config = [
        SyntheticConfig(size=size, num_cells=(8, 14), cell_radius_px=11.0) for size in ((90, 80), (64, 100), (70, 70))
    ]
    labels = [make_field(seed, each).labels for seed, each in enumerate(config)]
    maps = []
    for each in labels:
        blurred = ndimage.gaussian_filter(labels_to_distance(each), 1.5) + RNG.normal(0, 0.03, each.shape)
        maps.append(blurred.clip(0, 1).astype(np.float32))
    return maps, labels


MAPS, LABELS = images()


@pytest.mark.parametrize("refinement", [PLAIN, Refinement(), Refinement(min_area_px=40, merge_depth=0.0, blur_px=0.0)])
def test_every_point_scores_as_the_full_postprocessing(refinement: Refinement) -> None:
    merges = [None] if refinement.merge_px is None else [2.0, 5.0, None]
    borders = [refinement.restore_border] if refinement == PLAIN else [False, True]
    found = search(
        MAPS,
        LABELS,
        steps=4,
        merge_px=merges,
        restore_border=borders,
        refinement=refinement,
        cell_fill_range=(0.05, 0.6),
    )
    assert found.scores["seg"].shape == (4, 4, len(merges), len(borders))
    for m, cells_max in enumerate(found.axes["cells_max"]):
        for f, cell_fill in enumerate(found.axes["cell_fill"]):
            for (g, merge_px), (b, restore_border) in itertools.product(enumerate(merges), enumerate(borders)):
                scores = {metric: found.scores[metric][m, f, g, b] for metric in METRICS}
                if cell_fill > cells_max:
                    assert all(np.isnan(score) for score in scores.values())
                    continue
                predicted = [
                    distance_to_labels(
                        distance,
                        cells_max=cells_max,
                        cell_fill=cell_fill,
                        min_area_px=refinement.min_area_px,
                        merge_px=merge_px,
                        merge_depth=refinement.merge_depth,
                        restore_border=restore_border,
                        blur_px=refinement.blur_px,
                    )
                    for distance in MAPS
                ]
                want, matches = ctc_score(LABELS, predicted), matching_score(LABELS, predicted, thresholds=(0.5,))
                expected = {"op_csb": want.op_csb, "seg": want.seg, "det": want.det}
                expected |= {"ap50": matches.at[0].average_precision, "f1_50": matches.at[0].f1}
                assert scores == pytest.approx(expected, nan_ok=True)


def test_workers_do_not_change_the_result_and_progress_counts_floods() -> None:
    seen = []
    one = search(MAPS, LABELS, steps=3, workers=1, progress=lambda done, total: seen.append((done, total)))
    three = search(MAPS, LABELS, steps=3, workers=3)
    for metric in METRICS:
        np.testing.assert_array_equal(one.scores[metric], three.scores[metric])
    assert seen == [(number, 9) for number in range(1, 10)]


def test_the_best_point_is_the_highest_and_beats_the_edges() -> None:
    found = search(MAPS, LABELS, steps=6)
    best = found.best
    assert found.best_score == np.nanmax(found.scores["op_csb"])
    place = tuple(values.index(getattr(best, name)) for name, values in found.axes.items())
    assert found.scores["op_csb"][place] == found.best_score
    assert found.best_score > found.scores["op_csb"][0, 0, 0, 0] + 0.05
    by_seg = search(MAPS, LABELS, steps=6, metric="seg")
    assert by_seg.best_score == np.nanmax(found.scores["seg"])


def test_the_table_has_every_point_and_the_heat_map_marks_the_best(tmp_path: Path) -> None:
    found = search(MAPS, LABELS, steps=5, merge_px=[3.0, None])
    found.write_csv(tmp_path / "grid.csv")
    with (tmp_path / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    best = max(float(row["op_csb"]) for row in rows if row["op_csb"] != "nan")
    assert best == pytest.approx(found.best_score, abs=1e-6)
    found.write_heat_map(tmp_path / "grid.png")
    image = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    assert min(image.shape[:2]) > 100
    assert (image == (255, 0, 0)).all(axis=-1).any(), "the best point is marked in red"


def test_maps_stored_on_disk_score_the_same(tmp_path: Path) -> None:
    stored = store_maps(tmp_path / "maps", iter(MAPS))
    assert all(isinstance(each, np.memmap) for each in stored)
    one, other = (search(maps, LABELS, steps=3) for maps in (MAPS, stored))
    np.testing.assert_array_equal(one.scores["op_csb"], other.scores["op_csb"])


def test_images_without_cells_have_no_best_point() -> None:
    empty = search([np.zeros((20, 20), np.float32)], [np.zeros((20, 20), np.int32)], steps=3)
    assert np.isnan(empty.scores["op_csb"]).all()
    with pytest.raises(DinocellError, match="op_csb is undefined everywhere"):
        _ = empty.best


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cells_max_range": (0.5, 1.0)}, "cells_max: expected"),
        ({"cell_fill_range": (0.4, 0.1)}, "cell_fill: expected"),
        ({"steps": 0}, "at least 1 step"),
    ],
)
def test_impossible_searches_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(DinocellError, match=message):
        search(MAPS, LABELS, **wrong)


def test_maps_and_references_must_fit() -> None:
    with pytest.raises(DinocellError, match="as many maps as references, got 3 and 2"):
        search(MAPS, LABELS[:2])
    with pytest.raises(ValueError, match=r"shape|size|64 x 100"):
        search(MAPS[:1], LABELS[1:2], steps=2)


def test_the_search_of_a_target_varies_only_its_own_parameters() -> None:
    parameters = DistancePostprocessing(min_area_px=40)
    found = search_parameters(MAPS, LABELS, parameters, {"cells_max": (0.4, 0.5), "cell_fill": (0.1,)})
    same = search(
        MAPS,
        LABELS,
        cells_max_range=(0.4, 0.5),
        cell_fill_range=(0.1, 0.1),
        steps=2,
        restore_border=(True, False),
        refinement=Refinement(min_area_px=40),
    )
    np.testing.assert_array_equal(found.scores["op_csb"], same.scores["op_csb"])
    assert found.best == same.best
    assert found.best.min_area_px == 40
    with pytest.raises(DinocellError, match="flow_error: not a parameter of target distance"):
        search_parameters(MAPS, LABELS, parameters, {"flow_error": (0.4,)})


def grid_search(scores: np.ndarray, **axes: tuple[float | bool | None, ...]) -> GridSearch:
    return GridSearch(
        parameters=DistancePostprocessing(),
        axes=axes,
        metric="seg",
        scores=dict.fromkeys(METRICS, scores),
        num_images=1,
    )


def test_the_table_has_one_row_per_point_and_an_empty_cell_for_none(tmp_path: Path) -> None:
    axes = {"cells_max": (0.4,), "cell_fill": (0.1,), "merge_px": (None, 3.0), "restore_border": (True, False)}
    grid_search(np.full((1, 1, 2, 2), 0.5), **axes).write_csv(tmp_path / "grid.csv")
    with (tmp_path / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["merge_px"], row["restore_border"]) for row in rows] == [
        ("", "yes"),
        ("", "no"),
        ("3", "yes"),
        ("3", "no"),
    ]
    assert list(rows[0]) == ["cells_max", "cell_fill", "merge_px", "restore_border", *METRICS]


def test_ties_are_broken_by_the_scores_of_neighbours() -> None:
    scores = np.full((5, 5), 0.2)
    scores[0, 4] = scores[2, 2] = 0.9
    scores[1:4, 1:4][scores[1:4, 1:4] < 0.9] = 0.8
    values = tuple(np.linspace(0.1, 0.5, 5).tolist())
    best = grid_search(scores, cells_max=values, cell_fill=values).best_point
    assert best == {"cells_max": values[2], "cell_fill": values[2]}


def test_heat_map_resolves_scores_near_the_best_although_one_point_found_nothing(tmp_path: Path) -> None:
    found = grid_search(np.array([[0.0, 0.80], [0.86, np.nan]]), cells_max=(0.4, 0.5), cell_fill=(0.1, 0.2))
    found.write_heat_map(tmp_path / "map.png")
    image = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    is_grey = np.ptp(colours, axis=1) == 0
    nothing, fair, best = (colours[~is_grey][i] for i in sorted(np.argsort(counts[~is_grey])[-3:]))
    assert min(np.abs(a - b).max() for a, b in ((nothing, fair), (fair, best), (nothing, best))) > 40
    assert (211, 211, 211) in map(tuple, colours.tolist()), "undefined points are grey"
