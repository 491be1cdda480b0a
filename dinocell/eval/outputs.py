"""What segmenting leaves on the disk besides labels: map, overlay, table of cells; each whole or not at all."""

import csv
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer, Real, UInt8
from skimage.measure import regionprops_table
from skimage.segmentation import find_boundaries

from dinocell.data_shards.image_writers import write_png, write_tiff
from dinocell.data_shards.picture import percentile_range, to_uint8
from dinocell.runtime.atomic import replacing

# Outlines: a yellow that is seen on dark fluorescence and on bright phase contrast.
_OUTLINE = (255, 210, 0)
_PERCENTILES = (0.5, 99.8)
# scikit-image's names, ours with the unit, and by which power of the pixel size they scale.
_COLUMNS = (
    ("label", "cell", 0),
    ("area", "area", 2),
    ("perimeter", "perimeter", 1),
    ("centroid-0", "centroid_row", 0),
    ("centroid-1", "centroid_column", 0),
    ("bbox-0", "box_top", 0),
    ("bbox-1", "box_left", 0),
    ("bbox-2", "box_bottom", 0),
    ("bbox-3", "box_right", 0),
    ("axis_major_length", "major_axis", 1),
    ("axis_minor_length", "minor_axis", 1),
    ("eccentricity", "eccentricity", 0),
    ("orientation", "orientation_rad", 0),
    ("solidity", "solidity", 0),
    ("intensity_mean", "mean_intensity", 0),
    ("intensity_min", "min_intensity", 0),
    ("intensity_max", "max_intensity", 0),
)
_PROPERTIES = tuple(dict.fromkeys(name.split("-")[0] for name, _, _ in _COLUMNS))
_INDICES = ("centroid_row", "centroid_column", "box_top", "box_left", "box_bottom", "box_right")


def overlay(image: Real[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"]) -> UInt8[np.ndarray, "3 h w"]:
    """Return the image as grey levels (percentiles 0.5 to 99.8) with the cells' inner outlines in yellow."""
    low, high = percentile_range(image, *_PERCENTILES)
    picture = np.repeat(to_uint8(image, low, high)[None], 3, axis=0)
    edges = find_boundaries(labels, mode="inner")  # type: ignore[no-untyped-call]
    picture[:, edges] = np.array(_OUTLINE, np.uint8)[:, None]
    return picture


def write_overlay(path: Path, image: Real[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"]) -> None:
    """Write `overlay` as PNG."""
    write_png(path, overlay(image, labels))


def write_maps(
    path: Path, maps: Float32[np.ndarray, "h w"] | Float32[np.ndarray, "3 h w"], *, pixel_size_um: float | None
) -> None:
    """Write a distance map, or flows and the chance of a cell, as TIFF of 32-bit floats, a channel a map."""
    write_tiff(path, maps if maps.ndim == 3 else maps[None], pixel_size_um=pixel_size_um)


def write_cells(
    path: Path,
    labels: Integer[np.ndarray, "h w"],
    image: Real[np.ndarray, "h w"],
    *,
    pixel_size_um: float | None = None,
) -> None:
    """Write one line a cell, measured by scikit-image's ``regionprops_table``.

    Lengths and areas are in micrometres where the pixel size is known, else in pixels, as the header says; places are
    always rows and columns in pixels, the box's ends exclusive; the orientation is that of the major axis against the
    rows' axis; intensities are those of the image as it was read.
    """
    unit, size = ("um", pixel_size_um) if pixel_size_um is not None else ("px", 1.0)
    units = {1: f"_{unit}", 2: f"_{unit}2"}
    measured = regionprops_table(labels, np.asarray(image), properties=_PROPERTIES)  # type: ignore[no-untyped-call]
    header, columns = [], []
    for name, ours, power in _COLUMNS:
        header.append(ours + (units.get(power, "") if ours not in _INDICES else "_px"))
        columns.append(np.asarray(measured[name]) * size**power if power else np.asarray(measured[name]))
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows([[_shown(value) for value in row] for row in zip(*columns, strict=True)])


def _shown(value: object) -> object:
    """Whole numbers as they are, others with six digits."""
    return f"{value:.6g}" if isinstance(value, float | np.floating) else value
