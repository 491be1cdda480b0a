"""Every cell of a label image as COCO's compressed run lengths, in three sweeps over the image for all of them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from dinocell.runtime.compiled import compiled

_Array = np.ndarray


class CellRuns(NamedTuple):
    """One cell: id, box (left, top, width, height) and area in pixels, and ``counts`` as pycocotools writes them."""

    label: int
    box: tuple[int, int, int, int]
    area: int
    counts: str


def cell_runs(labels: Integer[np.ndarray, "h w"]) -> list[CellRuns]:
    """Return the run lengths of every cell, in the order of their ids; see `dinocell.data_shards.coco.uncompressed`."""
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
