"""All cells of a results folder in one COCO file, to which later runs add."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from dinocell.errors import DinocellError
from dinocell.runtime.files import replacing

_CATEGORY = {"id": 1, "name": "cell", "supercategory": "cell"}


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """One image and its cells, without the ids that they get in a file."""

    image: dict[str, Any]
    annotations: tuple[dict[str, Any], ...]


def coco_image(labels: Integer[np.ndarray, "h w"], *, file_name: str, frame: int | None) -> CocoImage:
    """Return the entries of an image: compressed run lengths (exact, with holes), boxes and areas in pixels.

    Parameters
    ----------
    frame
        Index in a stack, from 0; None for a file of one image.
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
            "category_id": _CATEGORY["id"],
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
    """Write images, sorted by name, and their cells, with ids from 1.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    content: dict[str, Any] = {"info": {"description": "cells found by DINOCell"}, "images": [], "annotations": []}
    content["categories"] = [_CATEGORY]
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
