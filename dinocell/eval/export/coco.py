"""The cells of all images of a run in one COCO file, which a later run adds to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from dinocell.errors import DinocellError
from dinocell.runtime.files import replacing
from dinocell.runtime.jit import compiled

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


# --- run_lengths ---------------------------------------------------------------------------------------------------
#
# Every cell of a label image as COCO's compressed run lengths, in three sweeps over the image for all of them.

_Array = np.ndarray


class CellRuns(NamedTuple):
    """One cell: id, box (left, top, width, height) and area in pixels, and ``counts`` as pycocotools writes them."""

    label: int
    box: tuple[int, int, int, int]
    area: int
    counts: str


def cell_runs(labels: Integer[np.ndarray, "h w"]) -> list[CellRuns]:
    """Return the run lengths of every cell, in the order of their ids; see `dinocell.labelled.masks.uncompressed`."""
    ids, numbers = np.unique(labels, return_inverse=True)
    numbers = numbers.reshape(labels.shape).astype(np.int32)
    if ids[0] > 0:  # a picture without background
        ids, numbers = np.concatenate([[0], ids]), numbers + 1
    num_runs, boxes = _count(numbers, len(ids))
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(2 * num_runs + 1, out=starts[1:])
    runs, ends = _fill(numbers, starts)
    text, text_ends = _compress(runs, starts, ends)
    areas = np.bincount(numbers.ravel(), minlength=len(ids))
    found, content = [], text.tobytes().decode("ascii")
    for number in range(1, len(ids)):
        top, left, bottom, right = (int(side) for side in boxes[number])
        counts = content[text_ends[number - 1] : text_ends[number]]
        box = (left, top, right - left, bottom - top)
        found.append(CellRuns(label=int(ids[number]), box=box, area=int(areas[number]), counts=counts))
    return found


@compiled
def _count(numbers: _Array, num_ids: int) -> tuple[_Array, _Array]:
    """Return for each id its vertical runs, and its box: top, left, and bottom, right exclusive."""
    height, width = numbers.shape
    num_runs = np.zeros(num_ids, np.int64)
    boxes = np.zeros((num_ids, 4), np.int64)
    boxes[:, 0], boxes[:, 1] = height, width
    for row in range(height):
        for column in range(width):
            number = numbers[row, column]
            if number == 0:
                continue
            if row == 0 or numbers[row - 1, column] != number:
                num_runs[number] += 1
            boxes[number, 0] = min(boxes[number, 0], row)
            boxes[number, 1] = min(boxes[number, 1], column)
            boxes[number, 2] = max(boxes[number, 2], row + 1)
            boxes[number, 3] = max(boxes[number, 3], column + 1)
    return num_runs, boxes


@compiled
def _fill(numbers: _Array, starts: _Array) -> tuple[_Array, _Array]:
    """Return gaps and runs in turn, down the columns, of each id from its start on, and where its last one is."""
    height, width = numbers.shape
    num_ids = len(starts) - 1
    runs = np.zeros(starts[-1], np.int64)
    ends = starts[:-1].copy()
    reached = np.zeros(num_ids, np.int64)
    for column in range(width):
        for row in range(height):
            number = numbers[row, column]
            if number == 0:
                continue
            position = column * height + row
            if ends[number] > starts[number] and reached[number] == position:
                runs[ends[number] - 1] += 1  # from the foot of one column to the head of the next, too
            else:
                runs[ends[number]], runs[ends[number] + 1] = position - reached[number], 1
                ends[number] += 2
            reached[number] = position + 1
    for number in range(1, num_ids):
        rest = height * width - reached[number]
        if rest > 0:
            runs[ends[number]] = rest
            ends[number] += 1
    return runs, ends


@compiled
def _compress(runs: _Array, starts: _Array, ends: _Array) -> tuple[_Array, _Array]:
    """Return the characters of all ids, and where each id's end."""
    text = np.empty(13 * len(runs) + 1, np.uint8)
    text_ends = np.zeros(len(ends), np.int64)
    used = 0
    for number in range(1, len(ends)):
        for index in range(starts[number], ends[number]):
            value = runs[index]
            if index - starts[number] > 2:
                value -= runs[index - 2]
            while True:
                five_bits = value & 31
                value >>= 5
                is_last = value == -1 if five_bits & 16 else value == 0
                text[used] = 48 + five_bits + (0 if is_last else 32)
                used += 1
                if is_last:
                    break
        text_ends[number] = used
    return text[:used], text_ends
