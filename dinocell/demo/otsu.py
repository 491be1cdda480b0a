"""A baseline without training: Otsu's threshold, then a watershed of the distance transform."""

import numpy as np
from jaxtyping import Int32, Shaped
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed


def otsu_baseline(
    image: Shaped[np.ndarray, "h w"], *, smoothing_px: float = 1.0, min_distance_px: int = 7
) -> Int32[np.ndarray, "h w"]:
    """Segment bright cells of one channel by Otsu's threshold and a watershed; labels from 1, 0 is background.

    ``smoothing_px`` is the standard deviation of the blur of the image and of the distance transform (without it, noise
    over-segments cells and weakens the baseline), ``min_distance_px`` the minimum distance of two seeds of one object.
    A constant image has no cells. Raises ValueError if a value is not finite.
    """
    if not np.isfinite(image).all():
        raise ValueError("expected an image of finite values, got NaN or infinity: replace them first")
    values = image.astype(np.float64)
    if image.size == 0 or values.min() == values.max():
        return np.zeros(image.shape, np.int32)
    values = ndimage.gaussian_filter(values, smoothing_px)
    foreground = ndimage.binary_fill_holes(values > threshold_otsu(values))  # type: ignore[no-untyped-call]
    objects, _ = ndimage.label(foreground)
    depth = ndimage.distance_transform_edt(foreground)
    smooth = ndimage.gaussian_filter(depth, smoothing_px)
    peaks = peak_local_max(smooth, min_distance=min_distance_px, labels=objects, exclude_border=False)  # type: ignore[no-untyped-call]
    seeds = np.zeros(image.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels: np.ndarray = watershed(-depth, seeds, mask=foreground).astype(np.int32)  # type: ignore[no-untyped-call]
    return labels
