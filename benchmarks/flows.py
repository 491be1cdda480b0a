"""How long do labels take to become flows, flow maps labels, and what does the check of each cell's flows cost of that?

    python benchmarks/flows.py            # 768 px, about 620 cells; writes results/flows.md
    python benchmarks/flows.py --quick    # 256 px, about 60 cells; writes nothing

From labels to flows: generated cells of about 11 and of 45 px radius, ours (compiled, one thread) against a loop over
cells whose heat spreads by OpenCV's box filter, which is what ours was before.

The way back starts on both sides from the flows of generated cells, smoothed and with noise as a network gives them.
The plain side is NumPy and SciPy, all pixels at once: 200 steps through `scipy.ndimage.map_coordinates`, sinks from a
maximum filter, holes filled a cell at a time. The check alone, which asks what flows the found cells should have and
drops those that contradict theirs, is timed on the same labels: ours against heat that spreads by sums of shifted NumPy
arrays. Equality is checked before timing.
"""

import argparse
import os
import statistics
from functools import partial

import cv2
import numpy as np
from _harness import alternate, ratio, write_result
from scipy import ndimage

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.segmentation.flows import find_masks, flow_errors, flows_to_labels
from dinocell.finetune.targets import labels_to_flows

EIGHT_CONNECTED = np.ones((3, 3), bool)
FLOW_ERROR, PROBABILITY = 0.4, 0.5
STEPS, REST_EVERY, REST_PX = 200, 8, 1 / 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="256 px, 2 rounds, no result file")
    options = parser.parse_args()
    size, rounds = (256, 2) if options.quick else (768, options.rounds)
    cells = round(size**2 / 950)
    small, large = cells_of(size, cells, 11.0), cells_of(size, max(4, cells // 16), 45.0)
    flows = as_predicted(small)
    masks = find_masks(flows, probability=PROBABILITY)
    ours, theirs = flows_to_labels(flows), plain_labels(flows)
    differing = np.count_nonzero((ours > 0) != (theirs > 0)) / ours.size
    assert differing < 1e-3, differing
    np.testing.assert_allclose(plain_errors(flows, masks.labels), masks.errors, atol=1e-3)
    for labels in (small, large):
        np.testing.assert_allclose(labels_to_flows(labels), flows_by_box_filter(labels), rtol=0, atol=1e-3)
    forward = {
        f"From labels to flows, {int(labels.max())} cells of about {radius} px radius": alternate(
            {
                "OpenCV, cell by cell": partial(flows_by_box_filter, labels),
                "ours": partial(labels_to_flows, labels),
            },
            rounds=rounds,
        )
        for radius, labels in ((11, small), (45, large))
    }
    whole = alternate(
        {"NumPy and SciPy": lambda: plain_labels(flows), "ours": lambda: flows_to_labels(flows)}, rounds=rounds
    )
    check = alternate(
        {
            "NumPy": lambda: plain_errors(flows, masks.labels),
            "ours": lambda: flow_errors(flows, masks.labels),
        },
        rounds=rounds,
    )
    tables = {**forward, "From flow maps to labels": whole, "The check of flows alone": check}
    lines = [
        f"# Between labels and flow maps, {size} x {size}",
        "",
        f"From labels to flows both sides agree within .001. On the way back {int(masks.labels.max())} cells are",
        f"found, {int(ours.max())} kept; foreground differs in {differing:.4%} of the pixels, flow errors by at most",
        f".001. {rounds} alternated rounds after a warm-up; {os.cpu_count()} cores, which other work may have shared.",
        "Seconds are medians; ratio = the row's time / ours in the same round: median (range).",
        "",
        *(line for title, sides in tables.items() for line in table(title, sides)),
    ]
    print("\n".join(lines))
    if not options.quick:
        print(write_result("flows", "\n".join(lines), ["numpy", "scipy", "numba", "opencv-python-headless"]))


def table(title: str, sides: dict[str, list[float]]) -> list[str]:
    rows = [
        f"| {name} | {statistics.median(each):.4f} | {ratio(each, sides['ours'])} |" for name, each in sides.items()
    ]
    return [f"## {title}", "", "| side | s | ratio |", "|---|---|---|", *rows, ""]


def cells_of(size: int, number: int, radius_px: float) -> np.ndarray:
    config = SyntheticConfig(size=(size, size), channels=("AGP",), num_cells=(number, number), cell_radius_px=radius_px)
    return make_field(0, config).labels


def flows_by_box_filter(labels: np.ndarray) -> np.ndarray:
    flows = np.zeros((3, *labels.shape), np.float32)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        mask = np.pad(labels[box] == number, 1)
        source, inside = middle(mask), mask.astype(np.float64)
        heat, spread = np.zeros(mask.shape), np.empty(mask.shape)
        for _ in range(2 * (mask.shape[0] - 2 + mask.shape[1] - 2)):
            heat[source] += 1
            cv2.blur(heat, (3, 3), spread, borderType=cv2.BORDER_CONSTANT)
            np.multiply(spread, inside, heat)
        inner = mask[1:-1, 1:-1]
        for plane, values in zip(flows, (*directions(heat), mask), strict=True):
            plane[box][inner] = values[1:-1, 1:-1][inner]
    return flows


def middle(mask: np.ndarray) -> tuple[int, ...]:
    places = np.argwhere(mask)
    return tuple(places[((places - np.median(places, axis=0)) ** 2).sum(1).argmin()].tolist())


def directions(heat: np.ndarray) -> np.ndarray:
    wanted = np.stack(np.gradient(np.log1p(heat))) * 2
    length = np.hypot(*wanted)
    return wanted / np.where(length == 0, 1, length)


def as_predicted(labels: np.ndarray) -> np.ndarray:
    smooth = np.stack([ndimage.gaussian_filter(plane, 1.0) for plane in labels_to_flows(labels)])
    noise = np.random.default_rng(0).normal(0, 0.2, smooth.shape) * np.array([1, 1, 0.3])[:, None, None]
    smooth += noise
    smooth[2] = smooth[2].clip(0, 1)
    return smooth.astype(np.float32)


def plain_labels(flows: np.ndarray) -> np.ndarray:
    is_cell = flows[2] > PROBABILITY
    starts = np.argwhere(is_cell)
    ends = np.floor(followed(np.where(is_cell, flows[:2], 0).astype(np.float64), starts) + 0.5).astype(int)
    counts = np.zeros(is_cell.shape, int)
    np.add.at(counts, tuple(ends.T), 1)
    peaks = (counts >= 10) & (counts == ndimage.maximum_filter(counts, 5, mode="constant"))
    sinks, _ = ndimage.label(ndimage.binary_dilation(peaks, EIGHT_CONNECTED), EIGHT_CONNECTED)
    sinks[counts == 0] = 0
    for _ in range(5):
        sinks = np.where((sinks == 0) & (counts > 0), ndimage.maximum_filter(sinks, 3, mode="constant"), sinks)
    labels = np.zeros(is_cell.shape, np.int32)
    labels[is_cell] = sinks[tuple(ends.T)]
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            inside = labels[box]
            inside[ndimage.binary_fill_holes(inside == number) & (inside == 0)] = number
    _, flat = np.unique(labels, return_inverse=True)
    labels = flat.reshape(labels.shape).astype(np.int32)
    kept = np.concatenate([[False], plain_errors(flows, labels) <= FLOW_ERROR])
    return np.where(kept[labels], labels, 0)


def followed(directions: np.ndarray, starts: np.ndarray) -> np.ndarray:
    places = starts.astype(np.float64)
    moving, before = np.arange(len(places)), places.copy()
    limit = np.array(directions.shape[1:]) - 1
    for step in range(1, STEPS + 1):
        here = places[moving]
        moved = np.stack([ndimage.map_coordinates(each, here.T, order=1, mode="nearest") for each in directions], 1)
        places[moving] = np.clip(here + moved, 0, limit)
        if step % REST_EVERY == 0:
            rests = (np.abs(places[moving] - before[moving]) <= REST_PX).all(1)
            before[moving] = places[moving]
            moving = moving[~rests]
    return places


def plain_errors(flows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    errors = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = np.pad(labels[box] == number, 1)
        source, heat = middle(mask), np.zeros(mask.shape)
        for _ in range(2 * (mask.shape[0] - 2 + mask.shape[1] - 2)):
            heat[source] += 1
            padded = np.pad(heat, 1)
            rows, columns = heat.shape
            shifted = [padded[down : down + rows, right : right + columns] for down in range(3) for right in range(3)]
            heat = np.sum(shifted, axis=0) / 9 * mask
        wanted = directions(heat)[:, 1:-1, 1:-1][:, mask[1:-1, 1:-1]]
        inside = flows[:2, box[0], box[1]][:, mask[1:-1, 1:-1]]
        errors.append(((inside - wanted) ** 2).sum(0).mean())
    return np.array(errors)


if __name__ == "__main__":
    main()
