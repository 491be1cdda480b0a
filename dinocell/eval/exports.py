"""Cells for other programs: GeoJSON for QuPath, regions of interest for ImageJ; pixel-exact, whole or not at all."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from dinocell.eval.contours import CellOutline
from dinocell.runtime.atomic import replacing

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
