"""How much faster is one pass over all labels than a loop of SciPy's distance transform over cells?

    python benchmarks/labels_to_distance.py            # 2048 px, 5,000 cells; writes results/labels_to_distance.md
    python benchmarks/labels_to_distance.py --quick    # 512 px, about 310 cells; writes nothing

Two opponents: the straight loop, one mask of the whole image a cell, timed on a sample of the cells and scaled to all
of them; and the loop that crops each cell to its bounding box first, timed in full. Equality is checked before timing.
"""

import argparse
import os
import statistics

import numpy as np
from _harness import alternate, ratio, write_result
from scipy import ndimage
from scipy.spatial import cKDTree

from dinocell.labelled.distance import labels_to_distance

TARGET_RATIO, TARGET_SECONDS = 50, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sample", type=int, default=30, help="cells of the straight loop that are timed a round")
    parser.add_argument("--quick", action="store_true", help="512 px, 3 rounds, no result file")
    options = parser.parse_args()
    size, rounds = (512, 3) if options.quick else (2048, options.rounds)
    labels = touching_cells(size, num_cells=round(5000 * (size / 2048) ** 2))
    ids = np.unique(labels[labels > 0])
    sample = np.random.default_rng(1).choice(ids, min(options.sample, len(ids)), replace=False)
    check_equal(labels, sample)

    seconds = alternate(
        {
            "straight": lambda: straight_loop(labels, sample),
            "cropped": lambda: cropped_loop(labels),
            "ours": lambda: labels_to_distance(labels),
        },
        rounds=rounds,
    )
    scale = len(ids) / len(sample)
    straight = [scale * each for each in seconds["straight"]]
    foreground = (labels > 0).mean()
    lines = [
        "# `labels_to_distance` against a loop over cells",
        "",
        f"One {size} x {size} int32 label image, {len(ids)} touching cells, {foreground:.0%} foreground; one thread a",
        f"side; {rounds} alternated rounds after a warm-up; {os.cpu_count()} cores, which other work may have shared.",
        "Ratio = their time / ours in the same round.",
        "",
        "| side | median, s | fastest, s | ratio: median (range) |",
        "|---|---|---|---|",
        row(f"straight SciPy loop, **extrapolated** from {len(sample)} cells", straight, seconds["ours"]),
        row("SciPy loop cropped to bounding boxes, in full", seconds["cropped"], seconds["ours"]),
        row("ours", seconds["ours"], None),
        "",
        f"The straight loop transforms one full-image mask a cell. Only {len(sample)} of the {len(ids)} cells were",
        f"timed, and their time was multiplied by {scale:.1f}: each turn of the loop does the same work for any cell.",
        "Cropping leaves one pixel of margin, where the image has it, so that the result is the same.",
        "The maps agree within 1e-6 (the straight loop's on its sample).",
        f"Target: at least {TARGET_RATIO} times the straight loop, under {TARGET_SECONDS} s.",
    ]
    print("\n".join(lines))
    if not options.quick:
        print(write_result("labels_to_distance", "\n".join(lines), ["edt", "numpy", "scipy"]))


def touching_cells(size: int, num_cells: int) -> np.ndarray:
    """Give every pixel to the nearest of random points, if that is within 11 px: clumps of cells with gaps."""
    points = np.random.default_rng(0).uniform(0, size, (num_cells, 2))
    pixels = np.stack(np.mgrid[:size, :size], -1).reshape(-1, 2)
    distance, nearest = cKDTree(points).query(pixels, distance_upper_bound=11)
    return np.where(np.isfinite(distance), nearest + 1, 0).reshape(size, size).astype(np.int32)


def straight_loop(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    result = np.zeros(labels.shape, np.float32)
    for label in ids:
        mask = labels == label
        distance = ndimage.distance_transform_edt(mask)
        result[mask] = distance[mask] / distance.max()
    return result


def cropped_loop(labels: np.ndarray) -> np.ndarray:
    result = np.zeros(labels.shape, np.float32)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        around = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        mask = labels[around] == label
        distance = ndimage.distance_transform_edt(mask)
        result[around][mask] = distance[mask] / distance.max()
    return result


def check_equal(labels: np.ndarray, sample: np.ndarray) -> None:
    ours = labels_to_distance(labels)
    np.testing.assert_allclose(ours, cropped_loop(labels), rtol=0, atol=1e-6)
    some = np.isin(labels, sample)
    np.testing.assert_allclose(ours[some], straight_loop(labels, sample)[some], rtol=0, atol=1e-6)


def row(name: str, seconds: list[float], ours: list[float] | None) -> str:
    against = ratio(seconds, ours) if ours else ""
    return f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {against} |"


if __name__ == "__main__":
    main()
