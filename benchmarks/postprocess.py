"""How long does a distance map take to become labels, and how much faster is that than scikit-image's watershed?

    python benchmarks/postprocess.py            # 2048 px, about 5,000 cells; writes results/postprocess.md
    python benchmarks/postprocess.py --quick    # 512 px, about 310 cells; writes nothing

Four maps: cells in clumps and cells nearly side by side; each as the perfect map of its labels, which is full of ties,
and smoothed with noise, as a network gives it. Both sides take a float32 map and give int32 labels. Equality is checked
before timing: plain labels are scikit-image's, pixel for pixel.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _harness import alternate, ratio, write_result
from labels_to_distance import touching_cells
from scipy import ndimage
from skimage.segmentation import watershed

from dinocell.eval.export.measurements import measure_table
from dinocell.eval.segmentation.tiling import predict
from dinocell.eval.segmentation.watershed import CELL_FILL, CELLS_MAX, distance_to_labels
from dinocell.images.write import write_labels
from dinocell.labelled.distance import labels_to_distance

TARGET_RATIO = 3
BLUR_PX, NOISE = 1.5, 0.02
EIGHT_CONNECTED = np.ones((3, 3), bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="512 px, 3 rounds, no result file")
    options = parser.parse_args()
    size, rounds = (512, 3) if options.quick else (2048, options.rounds)
    lines = [
        "# From distance maps to scores",
        "",
        f"## Map to labels, {size} x {size} float32",
        "",
        f"{rounds} alternated rounds after a warm-up; {os.cpu_count()} cores, which other work may have shared.",
        "Seconds are medians; ratio = scikit-image's time / ours in the same round: median (range). Plain labels equal",
        "scikit-image's on each of these maps, 0 pixels differ. Blurred = Gaussian of sigma "
        f"{BLUR_PX} px and noise of {NOISE}.",
        "",
        "| map | cells | foreground | scikit-image, s | ours, plain, s | ratio | ours, mended, s |",
        "|---|---|---|---|---|---|---|",
        *(row(name, distance, rounds) for name, distance in maps(size).items()),
        "",
        "scikit-image's path: two thresholds, `scipy.ndimage.label` of the peaks, `skimage.segmentation.watershed`",
        f"with marker components and a mask. Target: plain at least {TARGET_RATIO} times as fast.",
        "",
        f"## The whole chain, {size} x {size}",
        "",
        "What comes after the network: windows blended, labels with merging and borders, the table of all cells, the",
        "label TIFF. First call: labels in a process whose kernels are not compiled yet; then in the process after it.",
        "",
        "| map | chain, s: median of 5 (target 1.2) | first call, s (target 3) | the same in the next process, s |",
        "|---|---|---|---|",
        f"| crowded, blurred | {chain_seconds(blurred(labels_to_distance(crowded_cells(size)))):.2f} | "
        + " | ".join(f"{each:.2f}" for each in first_calls())
        + " |",
    ]
    print("\n".join(lines))
    if not options.quick:
        print(write_result("postprocess", "\n".join(lines), ["numba", "numpy", "scikit-image", "scipy", "edt"]))


def chain_seconds(distance: np.ndarray) -> float:
    """Time everything but the network: its place is taken by a lookup of the map, which costs next to nothing."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(6):
            start = time.perf_counter()
            blended = predict(distance[None], lambda windows: windows, batch_size=8)
            labels = distance_to_labels(blended[0], min_area_px=5)
            measure_table(labels)
            write_labels(Path(folder) / "labels.tif", labels)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def first_calls() -> list[float]:
    """Return the seconds of the first call of a process that finds no compiled kernels, and of the next process."""
    code = (
        "import time, numpy as np; from dinocell.eval.segmentation.watershed import distance_to_labels; "
        "start = time.perf_counter(); distance_to_labels(np.random.default_rng(0).random((64, 64), np.float32)); "
        "print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        line, environment = [sys.executable, "-c", code], {**os.environ, "NUMBA_CACHE_DIR": folder}
        runs = [subprocess.run(line, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    return [float(run.stdout) for run in runs]


def maps(size: int) -> dict[str, np.ndarray]:
    clumps = labels_to_distance(touching_cells(size, num_cells=round(5000 * (size / 2048) ** 2)))
    crowd = labels_to_distance(crowded_cells(size))
    return {
        "clumps, perfect": clumps,
        "clumps, blurred": blurred(clumps),
        "crowded, perfect": crowd,
        "crowded, blurred": blurred(crowd),
    }


def crowded_cells(size: int, pitch_px: int = 28) -> np.ndarray:
    """Draw discs of radius 12 to 14.5 px near the nodes of a grid: some touch or overlap, 5,184 at 2048 px."""
    generator = np.random.default_rng(1)
    labels = np.zeros((size, size), np.int32)
    rows, columns = np.mgrid[-15:16, -15:16]
    label = 0
    for row in range(pitch_px // 2, size - pitch_px // 2, pitch_px):
        for column in range(pitch_px // 2, size - pitch_px // 2, pitch_px):
            label += 1
            disc = rows**2 + columns**2 < generator.uniform(12, 14.5) ** 2
            centre = np.clip(np.array([row, column]) + generator.integers(-3, 4, 2), 15, size - 16)
            labels[centre[0] - 15 : centre[0] + 16, centre[1] - 15 : centre[1] + 16][disc] = label
    return labels


def blurred(distance: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, NOISE, distance.shape)
    return np.clip(ndimage.gaussian_filter(distance, BLUR_PX) + noise, 0, 1).astype(np.float32)


def plain(distance: np.ndarray) -> np.ndarray:
    return distance_to_labels(distance, merge_px=None, restore_border=False)


def library(distance: np.ndarray) -> np.ndarray:
    peaks, _ = ndimage.label(distance > CELLS_MAX, EIGHT_CONNECTED)
    return watershed(-distance, peaks, mask=distance > CELL_FILL)


def row(name: str, distance: np.ndarray, rounds: int) -> str:
    np.testing.assert_array_equal(plain(distance), library(distance))
    sides: dict[str, Callable[[], object]] = {
        "library": lambda: library(distance),
        "plain": lambda: plain(distance),
        "mended": lambda: distance_to_labels(distance),
    }
    seconds = alternate(sides, rounds=rounds)
    median = {side: statistics.median(each) for side, each in seconds.items()}
    return (
        f"| {name} | {distance_to_labels(distance).max()} | {(distance > CELL_FILL).mean():.0%} "
        f"| {median['library']:.3f} | {median['plain']:.3f} | {ratio(seconds['library'], seconds['plain'])} "
        f"| {median['mended']:.3f} |"
    )


if __name__ == "__main__":
    main()
