"""What segmenting leaves on the disk besides labels: map, overlay, table of cells; each whole or not at all."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from jaxtyping import Float32, Integer, Real, Shaped, UInt8

from dinocell.eval.export.measurements import measure_table
from dinocell.eval.export.outlines import CellOutline, inner_edges
from dinocell.images.image import percentile_range, to_uint8
from dinocell.images.write import write_png, write_tiff
from dinocell.runtime.files import replacing

# Outlines: a yellow that is seen on dark fluorescence and on bright phase contrast.
_OUTLINE = (255, 210, 0)
_PERCENTILES = (0.5, 99.8)


def overlay(image: Real[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"]) -> UInt8[np.ndarray, "3 h w"]:
    """Return the image as grey levels (percentiles 0.5 to 99.8) with the cells' inner outlines in yellow."""
    low, high = percentile_range(image, *_PERCENTILES)
    picture = np.repeat(to_uint8(image, low, high)[None], 3, axis=0)
    picture[:, inner_edges(labels)] = np.array(_OUTLINE, np.uint8)[:, None]
    return picture


def write_overlay(path: Path, image: Real[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"]) -> None:
    """Write `overlay` as PNG."""
    write_png(path, overlay(image, labels))


def write_outlines(path: Path, labels: Integer[np.ndarray, "h w"]) -> None:
    """Write the cells' inner outlines in yellow as PNG, transparent elsewhere: to lay upon any picture."""
    picture = np.zeros((4, *labels.shape), np.uint8)
    picture[:, inner_edges(labels)] = np.array((*_OUTLINE, 255), np.uint8)[:, None]
    write_png(path, picture)


def write_maps(
    path: Path, maps: Float32[np.ndarray, "h w"] | Float32[np.ndarray, "3 h w"], *, pixel_size_um: float | None
) -> None:
    """Write a distance map, or flows and the chance of a cell, as TIFF of 32-bit floats, a channel a map."""
    write_tiff(path, maps if maps.ndim == 3 else maps[None], pixel_size_um=pixel_size_um)


def write_cells(
    path: Path,
    labels: Integer[np.ndarray, "h w"],
    channels: Shaped[np.ndarray, "c h w"],
    *,
    channel_names: Sequence[str] = (),
    pixel_size_um: float | None = None,
) -> None:
    """Write one line a cell; see `measure_table` for what is measured.

    Lengths and areas are in micrometres where the pixel size is known, else in pixels, as the header says; places are
    always rows and columns in pixels, the box's ends exclusive; the orientation is that of the major axis against the
    rows' axis; intensities are those of the image as it was read, ``mean_intensity`` and so on, of several channels
    with the channel's name or number at the end (``mean_intensity_DNA``, ``mean_intensity_0``).
    """
    unit, size = ("um", pixel_size_um) if pixel_size_um is not None else ("px", 1.0)
    table = measure_table(labels, list(channels))
    top, left, bottom, right = table.box.T
    columns: dict[str, np.ndarray] = {
        "cell": table.ids,
        f"area_{unit}2": table.area * size**2 if pixel_size_um is not None else table.area,
        f"perimeter_{unit}": table.perimeter * size,
        "centroid_row_px": table.centroid[:, 0],
        "centroid_column_px": table.centroid[:, 1],
        "box_top_px": top,
        "box_left_px": left,
        "box_bottom_px": bottom,
        "box_right_px": right,
        f"major_axis_{unit}": table.major_axis * size,
        f"minor_axis_{unit}": table.minor_axis * size,
        "eccentricity": table.eccentricity,
        "orientation_rad": table.orientation,
        "solidity": table.solidity,
        "neighbours": table.num_neighbours,
    }
    for end, levels in zip(_channel_ends(len(channels), channel_names), table.intensities, strict=True):
        columns |= {
            f"mean_intensity{end}": levels.mean,
            f"min_intensity{end}": levels.lowest,
            f"max_intensity{end}": levels.highest,
            f"std_intensity{end}": levels.deviation,
        }
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(columns)
        lines.writerows(zip(*(_shown(column) for column in columns.values()), strict=True))


def _channel_ends(num_channels: int, names: Sequence[str]) -> list[str]:
    """Return what tells the channels' columns apart: nothing of one channel, names where they differ, else numbers."""
    if num_channels == 1:
        return [""]
    spelled = ["_".join(name.split()) for name in names]
    if len(set(spelled)) == num_channels and all(spelled):
        return [f"_{name}" for name in spelled]
    return [f"_{number}" for number in range(num_channels)]


def _shown(column: np.ndarray) -> list[object]:
    """Return whole numbers as they are, others with eight digits."""
    return [f"{value:.8g}" for value in column.tolist()] if column.dtype.kind == "f" else column.tolist()


# --- exports -------------------------------------------------------------------------------------------------------
#
# Cells for other programs: GeoJSON for QuPath, regions of interest for ImageJ; pixel-exact, whole or not at all.

_CELL = "cell {}"


def write_geojson(path: Path, cells: Sequence[CellOutline], *, name: str) -> None:
    """Write a FeatureCollection of detections, one feature a cell, one line a feature.

    Coordinates are pixels, x before y, the picture's upper left corner is (0, 0), as QuPath has it. A cell in several
    pieces is a MultiPolygon; holes are inner rings. Ids are drawn from ``name`` and the cell's number: the same picture
    always gives the same bytes.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, cell in enumerate(cells):
            file.write(",\n" if number else "\n")
            json.dump(_feature(cell, name), file)
        file.write("\n]}\n")


def write_rois(path: Path, cells: Iterable[CellOutline]) -> None:
    """Write a zip of ImageJ regions of interest, named by the cells' numbers; holes and pieces make it a composite.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    from roifile import roiwrite

    with replacing(path) as part:
        roiwrite(part, (_roi(cell) for cell in cells), mode="w")


def _feature(cell: CellOutline, name: str) -> dict[str, Any]:
    polygons = [[[*ring.tolist(), ring[0].tolist()] for ring in rings] for rings in cell.pieces]
    is_one = len(polygons) == 1
    return {
        "type": "Feature",
        "id": str(uuid5(NAMESPACE_URL, f"{name}#{cell.label}")),
        "geometry": {
            "type": "Polygon" if is_one else "MultiPolygon",
            "coordinates": polygons[0] if is_one else polygons,
        },
        "properties": {"objectType": "detection", "name": _CELL.format(cell.label)},
    }


def _roi(cell: CellOutline) -> Any:
    from roifile import ROI_TYPE, ImagejRoi

    name = f"{cell.label:05d}"
    rings = [ring for piece in cell.pieces for ring in piece]
    if len(rings) == 1:
        roi = ImagejRoi.frompoints(rings[0], name=name)
        roi.roitype = ROI_TYPE.TRACED  # what ImageJ's wand leaves: integer corners, along the pixels' edges
        return roi
    corners = np.concatenate(rings)
    left, top = (int(side) for side in corners.min(axis=0))
    right, bottom = (int(side) for side in corners.max(axis=0))
    path = np.concatenate([_path(ring) for ring in rings])
    return ImagejRoi(
        roitype=ROI_TYPE.RECT,  # of composites, ImageJ's own files say so
        name=name,
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        shape_roi_size=len(path),
        multi_coordinates=path,
    )


def _path(ring: np.ndarray) -> np.ndarray:
    """Return a ring as ImageJ's path: 0 x y moves there, 1 x y draws a line, 4 closes."""
    steps = np.ones((len(ring), 3), np.float32)
    steps[0, 0] = 0
    steps[:, 1:] = ring
    return np.append(steps.ravel(), np.float32(4))
