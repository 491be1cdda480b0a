"""The table of cells equals the measurements of scikit-image."""

import numpy as np
import pytest
from skimage.measure import regionprops_table

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.export.measurements import CellTable, measure_table

PROPERTIES = (
    "label",
    "area",
    "perimeter",
    "centroid",
    "bbox",
    "axis_major_length",
    "axis_minor_length",
    "eccentricity",
    "orientation",
    "solidity",
    "intensity_mean",
    "intensity_min",
    "intensity_max",
    "intensity_std",
)


def random_fragments(seed: int) -> np.ndarray:
    """Cells in fragments, of one pixel, of one line, with holes; some touch the image's edges; ids with gaps."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((60, 70), np.int32)
    for label in range(1, 40):
        top, left = rng.integers(0, 55, 2)
        height, width = rng.integers(1, 16, 2)
        window = labels[top : top + height, left : left + width]
        window[rng.random(window.shape) < rng.choice([0.3, 0.8, 1.0])] = 3 * label
    return labels


def field(seed: int) -> np.ndarray:
    return make_field(seed, SyntheticConfig(size=(256, 300), num_cells=(40, 50), cell_radius_px=14.0)).labels


IMAGES = [random_fragments(seed) for seed in range(4)] + [field(0), field(1), field(2) * 70001]


@pytest.mark.parametrize("labels", IMAGES, ids=str)
def test_all_measurements_equal_regionprops(labels: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    channels = [rng.integers(0, 60000, labels.shape).astype(np.uint16), rng.normal(0, 1, labels.shape)]
    ours = measure_table(labels, channels)
    theirs = regionprops_table(labels, np.stack(channels, axis=-1), properties=PROPERTIES)
    np.testing.assert_array_equal(ours.ids, theirs["label"])
    np.testing.assert_array_equal(ours.area, theirs["area"])
    np.testing.assert_allclose(ours.perimeter, theirs["perimeter"])
    np.testing.assert_array_equal(ours.box, np.stack([theirs[f"bbox-{k}"] for k in range(4)], axis=1))
    np.testing.assert_allclose(ours.centroid, np.stack([theirs["centroid-0"], theirs["centroid-1"]], axis=1))
    np.testing.assert_allclose(ours.major_axis, theirs["axis_major_length"], atol=1e-6)
    np.testing.assert_allclose(ours.minor_axis, theirs["axis_minor_length"], atol=1e-6)
    np.testing.assert_allclose(ours.eccentricity, theirs["eccentricity"], atol=1e-6)
    np.testing.assert_array_equal(ours.solidity, theirs["solidity"])
    for number, levels in enumerate(ours.intensities):
        np.testing.assert_allclose(levels.mean, theirs[f"intensity_mean-{number}"])
        np.testing.assert_array_equal(levels.minimum, theirs[f"intensity_min-{number}"])
        np.testing.assert_array_equal(levels.maximum, theirs[f"intensity_max-{number}"])
        np.testing.assert_allclose(levels.std, theirs[f"intensity_std-{number}"], atol=1e-9)
    # A direction is the same after half a turn; a round cell has none.
    long = ours.eccentricity > 1e-3
    turned = np.abs(np.sin(ours.orientation - theirs["orientation"]))[long]
    assert turned.max() < 1e-6


def brute_neighbours(labels: np.ndarray) -> list[int]:
    padded = np.pad(labels, 1)
    counts = []
    for label in np.unique(labels[labels > 0]):
        near = np.zeros(labels.shape, np.bool_)
        for down in range(3):
            for right in range(3):
                near |= padded[down : down + labels.shape[0], right : right + labels.shape[1]] == label
        counts.append(len(np.setdiff1d(np.unique(labels[near]), [0, label])))
    return counts


@pytest.mark.parametrize("labels", IMAGES, ids=str)
def test_neighbours_equal_a_brute_force_count(labels: np.ndarray) -> None:
    assert measure_table(labels).num_neighbours.tolist() == brute_neighbours(labels)


def test_cells_that_touch_by_a_corner_are_neighbours() -> None:
    assert measure_table(np.array([[1, 0, 0], [0, 2, 0], [0, 0, 0]], np.int32)).num_neighbours.tolist() == [1, 1]


def test_an_image_without_cells_has_an_empty_table() -> None:
    table = measure_table(np.zeros((5, 6), np.int32), [np.zeros((5, 6), np.float32)])
    assert isinstance(table, CellTable)
    assert table.ids.size == table.solidity.size == table.intensities[0].mean.size == 0


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int32, np.float32, np.float16])
def test_any_type_of_image_is_measured(dtype: type) -> None:
    labels = field(0)
    image = np.random.default_rng(0).integers(0, 2, labels.shape).astype(dtype)
    (levels,) = measure_table(labels, [image]).intensities
    expected = regionprops_table(labels, image.astype(np.float64), properties=("intensity_mean",))["intensity_mean"]
    np.testing.assert_allclose(levels.mean, expected)
