"""Distance maps against the plain loop over labels with SciPy's exact transform."""

import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from dinocell.labelled.distance import check_labels, distance_to_boundary, labels_to_distance

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"

# Without the checks of annotations at run time, which would raise before our own.
unchecked = inspect.unwrap(check_labels)


def plain_loop(labels: np.ndarray, *, divide: bool = True) -> np.ndarray:
    """Transform each label's mask by itself; the image's edge is no boundary, because SciPy looks for zeros alone."""
    result = np.zeros(labels.shape)
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        distance = ndimage.distance_transform_edt(mask)
        result[mask] = distance[mask] / (distance[mask].max() if divide else 1)
    return result


def touching_labels(seed: int, size: tuple[int, int], num_cells: int, foreground: float = 0.6) -> np.ndarray:
    """Assign each pixel of smooth blobs to the nearest of random points."""
    generator = np.random.default_rng(seed)
    points = generator.uniform(0, 1, (num_cells, 2)) * size
    rows, columns = np.mgrid[: size[0], : size[1]]
    squared = (rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2
    blobs = ndimage.gaussian_filter(generator.normal(size=size), 3, mode="reflect")
    return np.where(blobs < np.quantile(blobs, foreground), squared.argmin(-1) + 1, 0)


@pytest.mark.parametrize("seed", range(6))
def test_touching_cells_equal_the_plain_loop(seed: int) -> None:
    labels = touching_labels(seed, (97, 131), 40)
    np.testing.assert_allclose(labels_to_distance(labels), plain_loop(labels), rtol=0, atol=1e-6)
    np.testing.assert_allclose(distance_to_boundary(labels), plain_loop(labels, divide=False), rtol=1e-6)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_small_label_image_equals_the_plain_loop(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    ids = st.lists(st.integers(0, 3), min_size=height * width, max_size=height * width)
    labels = np.array(data.draw(ids), np.uint8).reshape(height, width)
    if labels.all() and (labels == labels[0, 0]).all():
        return  # fills the image: its own test
    np.testing.assert_allclose(labels_to_distance(labels), plain_loop(labels), rtol=0, atol=1e-6)


def test_touching_cells_keep_a_valley_between_them() -> None:
    labels = np.repeat(np.array([[0, *[1] * 9, *[2] * 5, 0]]), 40, axis=0)
    distance = labels_to_distance(labels)[20]
    np.testing.assert_allclose(distance[1:10], np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 5, rtol=1e-6)
    np.testing.assert_allclose(distance[10:15], np.array([1, 2, 3, 2, 1]) / 3, rtol=1e-6)


def test_edge_of_the_image_is_not_a_boundary() -> None:
    labels = np.zeros((10, 12), int)
    labels[:, :6] = 7
    np.testing.assert_allclose(labels_to_distance(labels)[:, :6], np.tile(np.arange(6, 0, -1) / 6, (10, 1)), rtol=1e-6)


def test_label_in_two_pieces_has_one_maximum() -> None:
    labels = np.zeros((20, 30), int)
    labels[2:13, 2:13] = 1
    labels[15:18, 20:23] = 1
    distance = labels_to_distance(labels)
    assert distance[7, 7] == 1
    assert distance[16, 21] == pytest.approx(2 / 6)
    np.testing.assert_allclose(distance, plain_loop(labels), rtol=0, atol=1e-6)


def test_one_pixel_cells_become_one() -> None:
    labels = np.zeros((5, 6), np.uint16)
    labels[0, 0], labels[2, 3], labels[2, 4], labels[4, 5] = 1, 2, 3, 4
    np.testing.assert_array_equal(labels_to_distance(labels), labels > 0)


@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (1, 8)])
def test_label_that_fills_the_image_is_one_everywhere_with_a_warning(shape: tuple[int, int]) -> None:
    labels = np.full(shape, 5)
    with pytest.warns(UserWarning, match=f"label 5 fills the whole {shape[0]} x {shape[1]} image"):
        distance = labels_to_distance(labels)
    assert distance.dtype == np.float32
    np.testing.assert_array_equal(distance, np.ones(shape))
    assert np.isinf(distance_to_boundary(labels)).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (4, 6)])
def test_image_without_cells_gives_zeros(shape: tuple[int, int]) -> None:
    distance = labels_to_distance(np.zeros(shape, int))
    assert distance.shape == shape
    assert distance.dtype == np.float32
    assert not distance.any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, ">u2", ">i4", np.uint32, np.int64, np.uint64])
def test_every_integer_type_gives_the_same_map(dtype: str | type) -> None:
    labels = touching_labels(1, (40, 50), 12)
    np.testing.assert_array_equal(labels_to_distance(labels.astype(dtype)), labels_to_distance(labels))


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_ids_up_to_the_end_of_their_type_give_the_same_map(dtype: type) -> None:
    labels = touching_labels(2, (40, 50), 12)
    largest = int(np.iinfo(dtype).max)
    ids = np.array([largest - (12 - i) * (largest // 13) if i else 0 for i in range(13)], dtype)
    np.testing.assert_array_equal(labels_to_distance(ids[labels]), labels_to_distance(labels))


def test_views_give_the_map_of_their_copy_and_are_not_changed() -> None:
    whole = touching_labels(3, (60, 80), 30)
    for view in (whole.T, whole[::2, 1::3], whole[::-1, ::-1], np.asfortranarray(whole)):
        view.flags.writeable = False
        np.testing.assert_array_equal(labels_to_distance(view), labels_to_distance(view.copy(order="C")))
        assert labels_to_distance(view).flags.c_contiguous


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 4)), "labels: .*float64"),
        (np.zeros((4, 4), bool), "labels: .*bool"),
        (np.array([[0, -3]]), "labels: .* -3"),
        (np.zeros((2, 4, 4), int), r"labels: .*\(2, 4, 4\)"),
    ],
)
def test_other_arrays_are_rejected_in_one_line(labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        unchecked(labels)
    assert "\n" not in str(caught.value)


def test_deep_cells_of_a_large_image_stay_exact() -> None:
    labels = np.ones((600, 2500), int)
    labels[130, 17] = 0
    labels[:, 2000:] = 2
    np.testing.assert_allclose(distance_to_boundary(labels), plain_loop(labels, divide=False), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern", ["stardist_2d/**/*mask*.tif", "usiigaci_t98g/set*/instances_ids.png", "ctc_layout_ipsc/02_GT/SEG/*.tif"]
)
def test_real_masks_equal_the_plain_loop(pattern: str) -> None:
    paths = sorted(REAL_DATA.glob(pattern))[:2]
    if not paths:
        pytest.skip(f"no real masks at ../shared/data/{pattern}")
    for path in paths:
        labels = np.array(Image.open(path))[:400, :400].astype(np.int32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(labels_to_distance(labels), plain_loop(labels), rtol=0, atol=1e-6)
