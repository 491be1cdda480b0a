"""Threshold search: each point of the grid is what running the whole chain at it gives."""

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
from dinocell.eval.threshold_search import METRICS, search, store_maps
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
def test_every_point_is_what_the_whole_chain_gives(refinement: Refinement) -> None:
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
    place = tuple(values.index(value) for values, value in zip(found.axes.values(), best, strict=True))
    assert found.scores["op_csb"][place] == found.best_score
    assert found.best_score > found.scores["op_csb"][0, 0, 0, 0] + 0.05
    by_seg = search(MAPS, LABELS, steps=6, metric="seg")
    assert by_seg.best_score == np.nanmax(found.scores["seg"])


def test_files_hold_every_point_and_a_picture(tmp_path: Path) -> None:
    found = search(MAPS, LABELS, steps=5, merge_px=[3.0, None])
    found.write_csv(tmp_path / "grid.csv")
    with (tmp_path / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    best = max(float(row["op_csb"]) for row in rows if row["op_csb"] != "nan")
    assert best == pytest.approx(found.best_score, abs=1e-6)
    found.write_heat_map(tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (62 + 5 * 32 + 12, 500, 3)
    m, f = (found.axes[name].index(getattr(found.best, name)) for name in ("cells_max", "cell_fill"))
    assert tuple(picture[62 + m * 32 + 1, 84 + f * 32 + 16]) == (255, 0, 0)


def test_maps_kept_on_disk_give_the_same(tmp_path: Path) -> None:
    kept = store_maps(tmp_path / "maps", iter(MAPS))
    assert all(isinstance(each, np.memmap) for each in kept)
    one, other = (search(maps, LABELS, steps=3) for maps in (MAPS, kept))
    np.testing.assert_array_equal(one.scores["op_csb"], other.scores["op_csb"])


def test_images_without_cells_have_no_best_point() -> None:
    empty = search([np.zeros((20, 20), np.float32)], [np.zeros((20, 20), np.int32)], steps=3)
    assert np.isnan(empty.scores["op_csb"]).all()
    with pytest.raises(DinocellError, match="op_csb is undefined everywhere"):
        _ = empty.best


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cells_max_range": (0.5, 1.0)}, "cells_max: expected 0 <= least <= largest < 1"),
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
