"""The untrained baseline on discs whose number and pixels are known."""

import numpy as np
import pytest
from skimage.draw import disk

from dinocell.demo.otsu import otsu_baseline


def discs(*centres: tuple[int, int], radius: int = 9) -> np.ndarray:
    image = np.full((64, 64), 100, np.uint16)
    for centre in centres:
        image[disk(centre, radius, shape=image.shape)] = 900  # type: ignore[no-untyped-call]
    return image


def test_each_disc_apart_is_one_cell_with_exactly_its_pixels() -> None:
    image = discs((15, 15), (45, 40))
    labels = otsu_baseline(image, smoothing_px=0.0)
    assert labels.max() == 2
    np.testing.assert_array_equal(labels > 0, image == 900)
    assert labels[15, 15] != labels[45, 40]


def test_touching_discs_are_divided() -> None:
    labels = otsu_baseline(discs((32, 20), (32, 36)))
    assert labels.max() == 2
    assert labels[32, 20] != labels[32, 36]


def test_an_image_of_one_value_has_no_cells() -> None:
    assert not otsu_baseline(np.full((8, 9), 7, np.uint8)).any()


def test_values_that_are_not_finite_are_refused() -> None:
    image = np.zeros((4, 4), np.float32)
    image[1, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        otsu_baseline(image)
