"""Outlines are valid polygons that contain exactly the pixels of their cells, as shapely reads them."""

import time

import numpy as np
import pytest
import shapely
from skimage.measure import label
from skimage.segmentation import find_boundaries

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.export.outlines import CellOutline, inner_edges, trace_cells


def polygons(cell: CellOutline) -> list[shapely.Polygon]:
    return [shapely.Polygon(rings[0], rings[1:]) for rings in cell.fragments]


def painted(cells: list[CellOutline], shape: tuple[int, int]) -> np.ndarray:
    """Return the label image of outlines: a pixel belongs to the polygon that its centre lies in."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    labels = np.zeros(shape, np.int32)
    for cell in cells:
        for polygon in polygons(cell):
            inside = shapely.contains_xy(polygon, columns.ravel(), rows.ravel()).reshape(shape)
            assert not labels[inside].any()
            labels[inside] = cell.label
    return labels


def test_a_square_with_a_hole_has_eight_corners() -> None:
    labels = np.zeros((5, 6), np.int32)
    labels[1:4, 2:5] = 7
    labels[2, 3] = 0
    (cell,) = trace_cells(labels)
    assert cell.label == 7
    ((outer, hole),) = cell.fragments
    assert sorted(outer.tolist()) == [[2, 1], [2, 4], [5, 1], [5, 4]]
    assert sorted(hole.tolist()) == [[3, 2], [3, 3], [4, 2], [4, 3]]
    assert shapely.LinearRing(outer).is_ccw  # of x and y, which on the screen is clockwise
    assert not shapely.LinearRing(hole).is_ccw


@pytest.mark.parametrize("seed", range(6))
def test_any_label_image_is_recovered_from_valid_polygons(seed: int) -> None:
    # Three values at random: fragments that touch by corners, holes that touch the outside, cells in holes.
    labels = np.random.default_rng(seed).choice([0, 3, 9], (17, 23), p=[0.3, 0.6, 0.1]).astype(np.int32)
    cells = trace_cells(labels)
    np.testing.assert_array_equal(painted(cells, (17, 23)), labels)
    for cell in cells:
        assert all(polygon.is_valid for polygon in polygons(cell))
        assert shapely.MultiPolygon(polygons(cell)).is_valid
        assert len(cell.fragments) == label(labels == cell.label, connectivity=1).max()


def test_holes_that_touch_the_outside_or_each_other_are_separate_rings() -> None:
    labels = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]], np.int32)
    (cell,) = trace_cells(labels)
    ((_, *holes),) = cell.fragments
    assert len(holes) == 2
    assert shapely.Polygon(cell.fragments[0][0], holes).is_valid
    np.testing.assert_array_equal(painted([cell], (4, 4)), labels)


def test_labels_with_gaps_in_the_ids_are_recovered() -> None:
    labels = make_field(3, SyntheticConfig(size=(96, 130), num_cells=(6, 10), cell_radius_px=12.0)).labels * 3
    cells = trace_cells(labels)
    assert [cell.label for cell in cells] == np.unique(labels[labels > 0]).tolist()
    np.testing.assert_array_equal(painted(cells, (96, 130)), labels)


def test_an_empty_and_a_full_image_have_no_and_one_outline() -> None:
    assert trace_cells(np.zeros((4, 5), np.int32)) == []
    (cell,) = trace_cells(np.full((4, 5), 2, np.uint16))
    assert sorted(cell.fragments[0][0].tolist()) == [[0, 0], [0, 4], [5, 0], [5, 4]]


def test_sixty_thousand_cells_take_seconds() -> None:
    rows, columns = np.mgrid[:2560, :2560]
    labels = (rows // 10 * 256 + columns // 10 + 1).astype(np.int32)
    labels[(rows % 10 == 0) | (columns % 10 == 0)] = 0
    trace_cells(labels[:50, :50])  # compiles
    start = time.perf_counter()
    cells = trace_cells(labels)
    assert time.perf_counter() - start < 20
    assert len(cells) == 65536
    assert {len(cell.fragments[0][0]) for cell in cells} == {4}


def test_inner_edges_are_those_of_scikit_image() -> None:
    labels = np.random.default_rng(0).choice([0, 1, 2], (40, 30), p=[0.3, 0.4, 0.3])
    np.testing.assert_array_equal(inner_edges(labels), find_boundaries(labels, mode="inner"))
