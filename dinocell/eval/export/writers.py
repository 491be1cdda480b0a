"""Result files of `dinocell segment` besides labels and maps; all are written atomically.

Overlays, a table of cells, and pixel-exact cells for other programs: GeoJSON for QuPath, regions of interest for
ImageJ, and one COCO file of all images, to which later runs add.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from jaxtyping import Integer, Real, Shaped, UInt8

from dinocell.errors import DinocellError
from dinocell.eval.export.measurements import measure_table
from dinocell.eval.export.outlines import CellOutline, inner_edges
from dinocell.images.image import percentile_range, to_uint8
from dinocell.images.write import write_png
from dinocell.runtime.files import replacing, write_table

# Outlines: a yellow that is visible on dark fluorescence and on bright phase contrast.
_OUTLINE = (255, 210, 0)
_PERCENTILES = (0.5, 99.8)
_COCO_CATEGORY = {"id": 1, "name": "cell", "supercategory": "cell"}


def overlay(image: Real[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"]) -> UInt8[np.ndarray, "3 h w"]:
    """Return the image in grey (percentiles 0.5 to 99.8) with the inner outlines of the cells in yellow."""
    low, high = percentile_range(image, *_PERCENTILES)
    rgb = np.repeat(to_uint8(image, low, high)[None], 3, axis=0)
    rgb[:, inner_edges(labels)] = np.array(_OUTLINE, np.uint8)[:, None]
    return rgb


def write_outlines(path: Path, labels: Integer[np.ndarray, "h w"]) -> None:
    """Write the inner outlines of the cells in yellow as PNG with a transparent background."""
    rgba = np.zeros((4, *labels.shape), np.uint8)
    rgba[:, inner_edges(labels)] = np.array((*_OUTLINE, 255), np.uint8)[:, None]
    write_png(path, rgba)


def write_cells(
    path: Path,
    labels: Integer[np.ndarray, "h w"],
    channels: Shaped[np.ndarray, "c h w"],
    *,
    channel_names: Sequence[str] = (),
    pixel_size_um: float | None = None,
) -> None:
    """Write a CSV with one row per cell; see `CellTable` for the measurements.

    Lengths and areas are in micrometres if the pixel size is known, else in pixels, as the column names say; positions
    are always rows and columns in pixels, with exclusive ends of the bounding box; intensities are in the units of the
    image, ``mean_intensity`` and so on. With several channels the name or index of the channel follows
    (``mean_intensity_DNA``, ``mean_intensity_0``).
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
    for end, intensities in zip(_channel_ends(len(channels), channel_names), table.intensities, strict=True):
        names = (f"{statistic}_intensity{end}" for statistic in ("mean", "min", "max", "std"))
        columns |= zip(names, intensities, strict=True)
    # Integers as they are, floats with eight digits.
    shown = (map("{:.8g}".format, x.tolist()) if x.dtype.kind == "f" else x.tolist() for x in columns.values())
    write_table(path, [columns, *zip(*shown, strict=True)])


def _channel_ends(num_channels: int, names: Sequence[str]) -> list[str]:
    """Return the ends of the column names: nothing for one channel, names if they differ, else indices."""
    if num_channels == 1:
        return [""]
    spelled = ["_".join(name.split()) for name in names]
    if len(set(spelled)) == num_channels and all(spelled):
        return [f"_{name}" for name in spelled]
    return [f"_{index}" for index in range(num_channels)]


def write_geojson(path: Path, cells: Sequence[CellOutline], *, name: str) -> None:
    """Write a FeatureCollection of detections, one feature per cell and line.

    Coordinates are pixels, x before y; the image's upper left corner is (0, 0), as in QuPath. A cell in several
    fragments is a MultiPolygon; holes are inner rings. Ids are derived from ``name`` and the cell's id: the same cells
    always give the same bytes.
    """
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for index, cell in enumerate(cells):
            file.write(",\n" if index else "\n")
            json.dump(_feature(cell, name), file)
        file.write("\n]}\n")


def _feature(cell: CellOutline, name: str) -> dict[str, Any]:
    polygons = [[[*ring.tolist(), ring[0].tolist()] for ring in rings] for rings in cell.fragments]
    kind, coordinates = ("Polygon", polygons[0]) if len(polygons) == 1 else ("MultiPolygon", polygons)
    return {
        "type": "Feature",
        "id": str(uuid5(NAMESPACE_URL, f"{name}#{cell.label}")),
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "detection", "name": f"cell {cell.label}"},
    }


def write_rois(path: Path, cells: Iterable[CellOutline]) -> None:
    """Write a zip of ImageJ regions of interest named by cell id; cells with holes or fragments are composites."""
    from roifile import roiwrite

    with replacing(path) as part:
        roiwrite(part, (_roi(cell) for cell in cells), mode="w")


def _roi(cell: CellOutline) -> Any:
    from roifile import ROI_TYPE, ImagejRoi

    name = f"{cell.label:05d}"
    rings = [ring for fragment in cell.fragments for ring in fragment]
    if len(rings) == 1:
        roi = ImagejRoi.frompoints(rings[0], name=name)
        roi.roitype = ROI_TYPE.TRACED  # as from ImageJ's wand: integer corners along pixel edges
        return roi
    corners = np.concatenate(rings)
    left, top = (int(side) for side in corners.min(axis=0))
    right, bottom = (int(side) for side in corners.max(axis=0))
    path = np.concatenate([_path(ring) for ring in rings])
    return ImagejRoi(
        roitype=ROI_TYPE.RECT,  # as in ImageJ's own files of composites
        name=name,
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        shape_roi_size=len(path),
        multi_coordinates=path,
    )


def _path(ring: np.ndarray) -> np.ndarray:
    """Return a ring as a path of ImageJ: 0 x y moves, 1 x y draws a line, 4 closes."""
    steps = np.ones((len(ring), 3), np.float32)
    steps[0, 0] = 0
    steps[:, 1:] = ring
    return np.append(steps.ravel(), np.float32(4))


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """One image and its cells, without the ids that they get in a file."""

    image: dict[str, Any]
    annotations: tuple[dict[str, Any], ...]


def coco_image(labels: Integer[np.ndarray, "h w"], *, file_name: str, frame: int | None) -> CocoImage:
    """Return the entries of an image: compressed run lengths (exact, with holes), boxes and areas in pixels.

    ``frame`` is the index in a stack, from 0; None for a file of one image.
    """
    from pycocotools import mask as coco_mask

    height, width = labels.shape
    image = {"file_name": file_name, "height": height, "width": width}
    if frame is not None:
        image["frame"] = frame
    ids, runs = _run_lengths(labels)
    masks = coco_mask.frPyObjects(runs, height, width) if runs else []
    boxes = np.asarray(coco_mask.toBbox(masks) if runs else [], np.int64).tolist()
    annotations = tuple(
        {
            "category_id": _COCO_CATEGORY["id"],
            "iscrowd": 0,
            "bbox": box,
            "area": sum(run["counts"][1::2]),
            "segmentation": {"size": [height, width], "counts": mask["counts"].decode("ascii")},
            "cell": label,
        }
        for label, box, run, mask in zip(ids.tolist(), boxes, runs, masks, strict=True)
    )
    return CocoImage(image=image, annotations=annotations)


def read_coco_file(path: Path) -> dict[str, CocoImage]:
    """Return the entries of earlier runs, by image name; none if there is no file.

    A DinocellError if the file was not written by `write_coco_file`, or is damaged.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        annotations: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            annotations[entry["image_id"]].append({k: v for k, v in entry.items() if k not in ("id", "image_id")})
        return {
            image["name"]: CocoImage(
                image={k: v for k, v in image.items() if k not in ("id", "name")},
                annotations=tuple(annotations[image["id"]]),
            )
            for image in content["images"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DinocellError(
            f"{path}: is not a file of 'dinocell segment', or is damaged; move it away, or choose another --output"
        ) from error


def write_coco_file(path: Path, images: Mapping[str, CocoImage]) -> None:
    """Write images, sorted by name, and their cells, with ids from 1."""
    content: dict[str, Any] = {"info": {"description": "cells found by DINOCell"}, "images": [], "annotations": []}
    content["categories"] = [_COCO_CATEGORY]
    annotation_id = 0
    for image_id, name in enumerate(sorted(images), start=1):
        content["images"].append({"id": image_id, "name": name, **images[name].image})
        for annotation in images[name].annotations:
            annotation_id += 1
            content["annotations"].append({"id": annotation_id, "image_id": image_id, **annotation})
    with replacing(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")


def _run_lengths(labels: Integer[np.ndarray, "h w"]) -> tuple[Integer[np.ndarray, " cells"], list[dict[str, Any]]]:
    """Return the ids, growing, and the masks as uncompressed run lengths: pixels outside and inside in turn."""
    size = labels.size
    # Down the columns, as COCO counts, a run starts wherever the label changes.
    flat = labels.ravel(order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=flat[:1] - 1 if size else 0))
    ends = np.append(starts[1:], size)
    # Sort the runs by cell; the stable sort keeps each cell's runs in order.
    order = np.argsort(flat[starts], kind="stable")
    order = order[flat[starts[order]] > 0]
    ids, first = np.unique(flat[starts[order]], return_index=True)
    masks = []
    for runs in np.split(order, first[1:]) if len(ids) else []:
        bounds = np.stack([starts[runs], ends[runs]], axis=1).ravel()
        counts = np.diff(bounds, prepend=0, append=size)
        masks.append({"size": list(labels.shape), "counts": counts[: len(counts) - (counts[-1] == 0)].tolist()})
    return ids, masks
