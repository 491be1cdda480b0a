"""The cells of all images of a run in one COCO file, which a later run adds to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from dinocell.errors import DinocellError
from dinocell.eval.run_lengths import cell_runs
from dinocell.runtime.atomic import replacing

_CATEGORY = {"id": 1, "name": "cell", "supercategory": "cell"}


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """One image and its cells, without the numbers that it gets in a file."""

    image: dict[str, Any]
    annotations: tuple[dict[str, Any], ...]


def coco_image(labels: Integer[np.ndarray, "h w"], *, file_name: str, frame: int | None) -> CocoImage:
    """Return the entries of an image: run lengths (exact, holes and all), boxes and areas in pixels.

    Parameters
    ----------
    frame
        Of a stack, from 0; None for a file of one picture.
    """
    height, width = labels.shape
    image = {"file_name": file_name, "height": height, "width": width}
    if frame is not None:
        image["frame"] = frame
    annotations = tuple(
        {
            "category_id": _CATEGORY["id"],
            "iscrowd": 0,
            "bbox": list(cell.box),
            "area": cell.area,
            "segmentation": {"size": [height, width], "counts": cell.counts},
            "cell": cell.label,
        }
        for cell in cell_runs(labels)
    )
    return CocoImage(image=image, annotations=annotations)


def read_coco_file(path: Path) -> dict[str, CocoImage]:
    """Return what earlier runs have written, by the images' names; nothing if there is no file.

    Raises
    ------
    DinocellError
        If the file was not written by this module, or is damaged.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        annotations: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for each in content["annotations"]:
            annotations[each["image_id"]].append({k: v for k, v in each.items() if k not in ("id", "image_id")})
        return {
            image["name"]: CocoImage(
                image={k: v for k, v in image.items() if k not in ("id", "name")},
                annotations=tuple(annotations[image["id"]]),
            )
            for image in content["images"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DinocellError(
            f"{path}: cannot be added to (not a file of 'dinocell segment', or damaged); move it away"
        ) from error


def write_coco_file(path: Path, images: Mapping[str, CocoImage]) -> None:
    """Write images, sorted by name, and their cells, numbered from 1.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    content: dict[str, Any] = {"info": {"description": "cells found by DINOCell"}, "images": [], "annotations": []}
    content["categories"] = [_CATEGORY]
    number = 0
    for image_id, name in enumerate(sorted(images), start=1):
        content["images"].append({"id": image_id, "name": name, **images[name].image})
        for annotation in images[name].annotations:
            number += 1
            content["annotations"].append({"id": number, "image_id": image_id, **annotation})
    with replacing(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
