"""How much does one flood a peak threshold save in the threshold search, and does it change a pixel?

    python benchmarks/thresholds.py           # 3 alternated rounds, writes results/thresholds.md
    python benchmarks/thresholds.py --quick   # 1 round on a smaller map, writes nothing

A generated map, blurred and noisy as a network gives it; the 20 x 20 grid of `dinocell.eval.threshold_search` (points
with compared at every point. Whole search: with merging, border restoring and scores, against the straight way, which
floods with scikit-image, refines and scores at every point. scikit-image's sides are timed on 21 points of the grid and
scaled.
"""

import argparse
import itertools
import time

import numpy as np
from _harness import ratio, write_result
from scipy import ndimage
from skimage.segmentation import watershed

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.segmentation.refine import Refinement, refine_labels
from dinocell.eval.segmentation.watershed import cut, distance_to_labels, flood
from dinocell.eval.threshold_search import CELL_FILL_RANGE, CELLS_MAX_RANGE, STEPS, search
from dinocell.labelled.distance import labels_to_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1 round on a smaller map, no result file")
    options = parser.parse_args()
    rounds, side = (1, 256) if options.quick else (options.rounds, 2048)
    labels = make_field(
        0, SyntheticConfig(size=(side, side), num_cells=(side**2 // 1000,) * 2, cell_radius_px=14.0)
    ).labels
    distance = ndimage.gaussian_filter(labels_to_distance(labels), 1.5)
    distance = (distance + np.random.default_rng(0).normal(0, 0.02, distance.shape)).clip(0, 1).astype(np.float32)
    peaks, fills = (np.linspace(*pair, STEPS).round(9).tolist() for pair in (CELLS_MAX_RANGE, CELL_FILL_RANGE))
    points = [(peak, fill) for peak, fill in itertools.product(peaks, fills) if fill <= peak]
    sample = points[:: max(1, len(points) // 20)]
    distance_to_labels(distance)  # compiles

    seconds: dict[str, list[float]] = {}
    differing = 0
    for _ in range(rounds):
        start = time.perf_counter()
        cuts = {}
        for peak in peaks:
            flooded = flood(distance, cells_max=peak, lowest_fill=fills[0])
            cuts |= {(peak, fill): cut(flooded, fill) for fill in fills if fill <= peak}
        note(seconds, "cuts", start)
        start = time.perf_counter()
        for point, cutting in cuts.items():
            plain = distance_to_labels(
                distance, cells_max=point[0], cell_fill=point[1], merge_px=None, restore_border=False
            )
            differing += int(np.count_nonzero(plain != cutting))
        note(seconds, "floods", start)
        del cuts
        start = time.perf_counter()
        found = search([distance], [labels])
        note(seconds, "search", start)
        start = time.perf_counter()
        for peak, fill in sample:
            refined = refine_labels(library(distance, peak, fill), distance, cell_fill=fill, refinement=Refinement())
            ctc_score(labels, refined)
        seconds.setdefault("straight", []).append((time.perf_counter() - start) * len(points) / len(sample))
        start = time.perf_counter()
        for peak, fill in sample:
            library(distance, peak, fill)
        seconds.setdefault("library", []).append((time.perf_counter() - start) * len(points) / len(sample))
    lines = [
        "# Threshold search",
        "",
        f"One map of {side} x {side} px with {labels.max()} cells, {len(points)} points; {rounds} alternated rounds.",
        "",
        "| what | ratio: median (range) |",
        "|---|---|",
        f"| plain labels: scikit-image's flood a point (scaled from {len(sample)}) / cuts of {STEPS} floods | "
        f"{ratio(seconds['library'], seconds['cuts'])} |",
        f"| plain labels: one of our floods a point / cuts of {STEPS} floods ({differing} px differ) | "
        f"{ratio(seconds['floods'], seconds['cuts'])} |",
        f"| whole search: straight way (scaled from {len(sample)} points) / ours | "
        f"{ratio(seconds['straight'], seconds['search'])} |",
        "",
        f"Best: {found.best.cells_max:.3f}, {found.best.cell_fill:.3f}, OP_CSB {found.best_score:.3f}.",
    ]
    print("\n".join(lines))
    if not options.quick:
        print(write_result("thresholds", "\n".join(lines), ["numpy", "numba", "scikit-image"]))


def library(distance: np.ndarray, cells_max: float, cell_fill: float) -> np.ndarray:
    """Return the labels of scikit-image's watershed."""
    peaks = np.empty(distance.shape, np.int32)
    ndimage.label(distance > np.float32(cells_max), np.ones((3, 3), bool), output=peaks)
    return watershed(-distance, peaks, mask=distance > np.float32(cell_fill))


def note(seconds: dict[str, list[float]], name: str, start: float) -> None:
    """Keep the time since ``start``."""
    seconds.setdefault(name, []).append(time.perf_counter() - start)


if __name__ == "__main__":
    main()
