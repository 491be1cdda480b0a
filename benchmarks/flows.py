"""How long do flow maps take to become labels, and what does the check of each cell's flows cost of it?

    python benchmarks/flows.py            # 768 px, about 620 cells; writes results/flows.md
    python benchmarks/flows.py --quick    # 256 px, about 60 cells; writes nothing

Both sides start from the flows of generated cells, smoothed and with noise as a network gives them. The plain side is
NumPy and SciPy, all pixels at once: 200 steps through `scipy.ndimage.map_coordinates`, sinks from a maximum filter,
holes filled a cell at a time. The check alone, which asks what flows the found cells should have and drops those that
contradict theirs, is timed on the same labels: ours against heat that spreads by sums of shifted NumPy arrays.
Equality is checked before timing.
"""

import argparse
import os
import statistics

import numpy as np
from _harness import alternate, ratio, write_result
from scipy import ndimage

from dinocell.data_shards.flows import labels_to_flows
from dinocell.data_shards.synthetic import SyntheticConfig, make_field
from dinocell.eval.flows import find_masks, flow_errors, flows_to_labels

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
    config = SyntheticConfig(size=(size, size), channels=("AGP",), num_cells=(cells, cells), cell_radius_px=11.0)
    flows = as_predicted(make_field(0, config).labels)
    masks = find_masks(flows, probability=PROBABILITY)
    ours, theirs = flows_to_labels(flows), plain_labels(flows)
    differing = np.count_nonzero((ours > 0) != (theirs > 0)) / ours.size
    assert differing < 1e-3, differing
    np.testing.assert_allclose(plain_errors(flows, masks.labels), masks.errors, atol=1e-3)
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
    lines = [
        f"# From flow maps to labels, {size} x {size}",
        "",
        f"{int(masks.labels.max())} cells found, {int(ours.max())} kept; {rounds} alternated rounds after a warm-up;",
        f"{os.cpu_count()} cores, which other work may have shared. Seconds are medians; ratio = the row's time / ours",
        f"in the same round: median (range). Foreground differs in {differing:.4%} of the pixels, flow errors by",
        "at most .001.",
        "",
        *(line for title, sides in (("All of it", whole), ("The check alone", check)) for line in table(title, sides)),
    ]
    print("\n".join(lines))
    if not options.quick:
        print(write_result("flows", "\n".join(lines), ["numpy", "scipy", "numba", "opencv-python-headless"]))


def table(title: str, sides: dict[str, list[float]]) -> list[str]:
    rows = [
        f"| {name} | {statistics.median(each):.3f} | {ratio(each, sides['ours'])} |" for name, each in sides.items()
    ]
    return [f"## {title}", "", "| side | s | ratio |", "|---|---|---|", *rows, ""]


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
        places = np.argwhere(mask)
        source = tuple(places[((places - np.median(places, axis=0)) ** 2).sum(1).argmin()])
        heat = np.zeros(mask.shape)
        for _ in range(2 * (mask.shape[0] - 2 + mask.shape[1] - 2)):
            heat[source] += 1
            padded = np.pad(heat, 1)
            rows, columns = heat.shape
            shifted = [padded[down : down + rows, right : right + columns] for down in range(3) for right in range(3)]
            heat = np.sum(shifted, axis=0) / 9 * mask
        wanted = np.stack(np.gradient(np.log1p(heat))) * 2
        wanted /= np.maximum(np.hypot(*wanted), 1e-12)
        wanted = wanted[:, 1:-1, 1:-1][:, mask[1:-1, 1:-1]]
        inside = flows[:2, box[0], box[1]][:, mask[1:-1, 1:-1]]
        errors.append(((inside - wanted) ** 2).sum(0).mean())
    return np.array(errors)


if __name__ == "__main__":
    main()
