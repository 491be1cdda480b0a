"""The walk over a grid, whatever is evaluated on it: sums over images, the best point, impossible points, the table."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dinocell.errors import DinocellError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.metrics.overlaps import contingency_table
from dinocell.eval.threshold_search import METRICS, GridSearch, Sums, Thresholds, search_grid, sums_of

LABELS = np.kron(np.arange(12).reshape(3, 4), np.ones((5, 5), np.int32)).astype(np.int32)


class Toy(NamedTuple):
    """Keep the cells up to a number, of those from a number on."""

    last: float
    first: float


def evaluate(cells: np.ndarray, reference: np.ndarray, last: float) -> np.ndarray:
    found = np.full((2, len(Sums._fields)), np.nan)
    for place, first in enumerate((1, 6)):
        if first <= last:
            kept = np.where((cells >= first) & (cells <= last), cells, 0).astype(np.int32)
            found[place] = sums_of(contingency_table(reference, kept))
    return found


REFERENCES = [LABELS, np.where(LABELS > 8, 0, LABELS)]


def toy() -> GridSearch[Toy]:
    return search_grid(
        [LABELS.astype(np.float32)] * 2,
        REFERENCES,
        Toy,
        {"last": (4.0, 8.0, 11.0), "first": (1.0, 6.0)},
        evaluate,
        metric="op_csb",
        workers=None,
        progress=lambda _done, _total: None,
    )


def test_scores_are_pooled_over_images_and_impossible_points_have_none() -> None:
    found = toy()
    for row, last in enumerate((4, 8, 11)):
        for column, first in enumerate((1, 6)):
            kept = np.where((first <= LABELS) & (last >= LABELS), LABELS, 0)
            wanted = ctc_score(REFERENCES, [kept, kept]).op_csb if first <= last else np.nan
            assert found.scores["op_csb"][row, column] == pytest.approx(wanted, nan_ok=True)
    assert all(np.isnan(found.scores[metric][0, 1]) for metric in METRICS)
    assert found.best == Toy(last=11.0, first=1.0)
    assert found.best_score == np.nanmax(found.scores["op_csb"])


def test_the_table_has_a_line_a_point_and_nothing_where_nothing_was_set(tmp_path: Path) -> None:
    scores = dict.fromkeys(METRICS, np.full((1, 1, 2, 2), 0.5))
    axes = {"cells_max": (0.4,), "cell_fill": (0.1,), "merge_px": (None, 3.0), "restore_border": (True, False)}
    found = GridSearch(point=Thresholds, axes=axes, metric="seg", scores=scores, num_images=1)
    found.write_csv(tmp_path / "grid.csv")
    with (tmp_path / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["merge_px"], row["restore_border"]) for row in rows] == [
        ("", "yes"),
        ("", "no"),
        ("3", "yes"),
        ("3", "no"),
    ]
    assert list(rows[0]) == ["cells_max", "cell_fill", "merge_px", "restore_border", *METRICS]


@pytest.mark.parametrize("num_references", [0, 1])
def test_maps_and_references_go_together(num_references: int) -> None:
    with pytest.raises(DinocellError, match=f"as many maps as references, got 2 and {num_references}"):
        search_grid(
            [LABELS.astype(np.float32)] * 2,
            [LABELS] * num_references,
            Toy,
            {"last": (4.0,), "first": (1.0, 6.0)},
            evaluate,
            metric="seg",
            workers=1,
            progress=lambda _done, _total: None,
        )


def test_of_equal_points_the_one_among_good_neighbours_is_chosen() -> None:
    scores = np.full((5, 5, 1, 1), 0.2)
    scores[0, 4] = scores[2, 2] = 0.9
    scores[1:4, 1:4][scores[1:4, 1:4] < 0.9] = 0.8
    values = tuple(np.linspace(0.1, 0.5, 5).tolist())
    found = GridSearch(
        point=Thresholds,
        axes={"cells_max": values, "cell_fill": values, "merge_px": (3.0,), "restore_border": (True,)},
        metric="seg",
        scores=dict.fromkeys(METRICS, scores),
        num_images=1,
    )
    assert found.best[:2] == pytest.approx((values[2], values[2]))
