"""How much faster is measuring all cells in a few sweeps than scikit-image's regionprops_table, one picture a cell?

    python benchmarks/cell_table.py            # 2048 px, 2,000 cells; writes results/cell_table.md
    python benchmarks/cell_table.py --quick    # 512 px, about 125 cells; writes nothing

The same columns on both sides, two channels of 16 bits; neighbours, which scikit-image does not count, are measured by
ours on top. Equality is checked before timing.
"""

import argparse
import os
import statistics

import numpy as np
from _harness import alternate, ratio, write_result
from scipy.spatial import cKDTree
from skimage.measure import regionprops_table

from dinocell.eval.export.measurements import CellTable, measure_table

TARGET_RATIO = 10
SHAPES = (
    "label",
    "area",
    "perimeter",
    "centroid",
    "bbox",
    "axis_major_length",
    "axis_minor_length",
    "eccentricity",
    "orientation",
    "solidity",
)
LEVELS = ("intensity_mean", "intensity_min", "intensity_max", "intensity_std")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="512 px, 3 rounds, no result file")
    options = parser.parse_args()
    size, rounds = (512, 3) if options.quick else (2048, options.rounds)
    labels = touching_cells(size, num_cells=round(2000 * (size / 2048) ** 2))
    channels = np.random.default_rng(1).integers(0, 60000, (2, size, size)).astype(np.uint16)
    last = np.ascontiguousarray(np.moveaxis(channels, 0, -1))
    check_equal(measure_table(labels, list(channels)), theirs(labels, last, SHAPES + LEVELS))

    seconds = alternate(
        {
            "theirs": lambda: theirs(labels, last, SHAPES + LEVELS),
            "theirs without solidity": lambda: theirs(labels, last, SHAPES[:-1] + LEVELS),
            "ours": lambda: measure_table(labels, list(channels)),
        },
        rounds=rounds,
    )
    num_cells, foreground = len(np.unique(labels)) - 1, (labels > 0).mean()
    lines = [
        "# The table of cells against scikit-image's `regionprops_table`",
        "",
        f"One {size} x {size} int32 label image, {num_cells} touching cells, {foreground:.0%} foreground, two channels",
        f"of 16 bits; one thread a side; {rounds} alternated rounds after a warm-up; {os.cpu_count()} cores, which",
        "other work may have shared. Ratio = their time / ours in the same round.",
        "",
        "| side | median, s | fastest, s | ratio: median (range) |",
        "|---|---|---|---|",
        row("regionprops_table", seconds["theirs"], seconds["ours"]),
        row("regionprops_table without solidity (ours with it)", seconds["theirs without solidity"], seconds["ours"]),
        row("ours, with neighbours", seconds["ours"], None),
        "",
        "Area, box, solidity, lowest and highest intensity are equal, everything else to rounding.",
        f"Target: at least {TARGET_RATIO} times.",
    ]
    print("\n".join(lines))
    if not options.quick:
        print(write_result("cell_table", "\n".join(lines), ["numba", "numpy", "scikit-image"]))


def touching_cells(size: int, num_cells: int) -> np.ndarray:
    """Give every pixel to the nearest of random points, if that is within 24 px: clumps of cells with gaps."""
    points = np.random.default_rng(0).uniform(0, size, (num_cells, 2))
    pixels = np.stack(np.mgrid[:size, :size], -1).reshape(-1, 2)
    distance, nearest = cKDTree(points).query(pixels, distance_upper_bound=24)
    return np.where(np.isfinite(distance), nearest + 1, 0).reshape(size, size).astype(np.int32)


def theirs(labels: np.ndarray, channels: np.ndarray, properties: tuple[str, ...]) -> dict[str, np.ndarray]:
    return regionprops_table(labels, channels, properties=properties)


def check_equal(ours: CellTable, table: dict[str, np.ndarray]) -> None:
    for name, values in (("label", ours.ids), ("area", ours.area), ("solidity", ours.solidity)):
        np.testing.assert_array_equal(values, table[name])
    np.testing.assert_array_equal(ours.box.T, [table[f"bbox-{side}"] for side in range(4)])
    np.testing.assert_allclose(ours.centroid.T, [table["centroid-0"], table["centroid-1"]])
    for name, values in (
        ("perimeter", ours.perimeter),
        ("axis_major_length", ours.major_axis),
        ("axis_minor_length", ours.minor_axis),
        ("eccentricity", ours.eccentricity),
    ):
        np.testing.assert_allclose(values, table[name], rtol=1e-6, atol=1e-6)
    # The same axis after half a turn, as rounding decides.
    np.testing.assert_allclose(np.sin(ours.orientation - table["orientation"]), 0, atol=1e-6)
    for number, levels in enumerate(ours.intensities):
        for name, values in zip(LEVELS, (levels.mean, levels.minimum, levels.maximum, levels.std), strict=True):
            np.testing.assert_allclose(values, table[f"{name}-{number}"])


def row(name: str, seconds: list[float], ours: list[float] | None) -> str:
    against = ratio(seconds, ours) if ours else ""
    return f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {against} |"


if __name__ == "__main__":
    main()
