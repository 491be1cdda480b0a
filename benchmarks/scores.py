"""What do the scores of an image with thousands of cells cost, in time and in memory, beside py-ctcmetrics?

    python benchmarks/scores.py            # ours at 2048 px and 1024 px, theirs at 1024 px; writes results/scores.md
    python benchmarks/scores.py --quick    # 1024 px and 512 px; writes nothing

Both sides get the same two uncompressed TIFFs and return SEG, DET and the counts, which are compared first. Theirs runs
at a quarter of the area: its table grows with the square of the number of cells. Memory is measured in a process a
side: the most that it held during the call, less what it held before, when its packages were loaded.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
from _harness import alternate, ratio, write_result
from labels_to_distance import touching_cells

from dinocell.eval.metrics.ctc import CTCScore, ctc_score, ctc_score_from
from dinocell.eval.metrics.matching import matching_score_from
from dinocell.eval.metrics.overlaps import contingency_table

TARGET_SECONDS, TARGET_MB = 0.15, 200
CELLS_AT_2048 = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="half the sizes, 3 rounds, no result file")
    parser.add_argument("--memory-of", nargs=3, metavar=("SIDE", "REFERENCE", "PREDICTION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_megabytes(*options.memory_of))
        return
    size, rounds = (1024, 3) if options.quick else (2048, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        large, small = (write_pair(Path(folder), side) for side in (size, size // 2))
        report(large, small, size, rounds, quick=options.quick)


def report(large: list[str], small: list[str], size: int, rounds: int, *, quick: bool) -> None:
    score = check_equal(small)
    seconds = alternate(
        {
            "theirs": lambda: theirs(*small),
            "ours, the same": lambda: ours(*small),
            "ours": lambda: ours(*large),
            "ours with IoU scores": lambda: ours_with_iou_scores(*large),
        },
        rounds=rounds,
    )
    megabytes = {
        "theirs": memory_of("theirs", small),
        "ours, the same": memory_of("ours", small),
        "ours": memory_of("ours", large),
        "ours with IoU scores": memory_of("both", large),
    }
    cells = len(np.unique(tifffile.imread(large[0]))) - 1
    half = size // 2
    same, all_scores = seconds["ours, the same"], seconds["ours with IoU scores"]
    lines = [
        "# Scores of label images against py-ctcmetrics",
        "",
        f"{size} x {size} with {cells} touching cells (int32), and {half} x {half} with {score.num_reference}; the",
        "prediction is shifted, 3 % of the cells are missing, 3 % merged, 3 % invented. From uncompressed TIFFs to",
        f"SEG, DET and counts; {rounds} alternated rounds after a warm-up; one thread a side; {os.cpu_count()} cores,",
        "which other work may have shared. Memory: most held during the call, less that before it, a fresh process",
        "each. Ratio = their time / ours in the same round.",
        "",
        "| side | image | median, s | fastest, s | memory, MB | ratio: median (range) |",
        "|---|---|---|---|---|---|",
        row("py-ctcmetrics", half, seconds["theirs"], megabytes["theirs"], ""),
        row("ours", half, same, megabytes["ours, the same"], ratio(seconds["theirs"], same)),
        row(
            "ours",
            size,
            seconds["ours"],
            megabytes["ours"],
            "4 times the area: " + ratio(seconds["theirs"], seconds["ours"]),
        ),
        row("ours, and AP at 10 IoUs, F1, PQ, AJI", size, all_scores, megabytes["ours with IoU scores"], ""),
        "",
        "Scores and counts of the two sides are equal at the smaller size (SEG and DET within 1e-12).",
        f"Target: under {TARGET_SECONDS} s and {TARGET_MB} MB at 2048 x 2048 with {CELLS_AT_2048} cells.",
    ]
    print("\n".join(lines))
    if not quick:
        print(write_result("scores", "\n".join(lines), ["numpy", "py-ctcmetrics", "scikit-learn"]))


def write_pair(folder: Path, size: int) -> list[str]:
    """Draw a reference and a prediction with mistakes, and write both."""
    num_cells = round(CELLS_AT_2048 * (size / 2048) ** 2)
    reference = touching_cells(size, num_cells)
    generator = np.random.default_rng(1)
    fates = generator.random(reference.max() + 1)
    new_ids = np.arange(len(fates), dtype=np.int32)
    new_ids[fates < 0.03] = 0
    merged = np.flatnonzero((fates >= 0.03) & (fates < 0.06))
    new_ids[merged] = np.maximum(merged - 1, 0)
    new_ids[0] = 0
    prediction = np.roll(new_ids[reference], (1, 2), (0, 1))
    for number in range(num_cells // 33):
        top, left = generator.integers(0, size - 6, 2)
        place = prediction[top : top + 6, left : left + 6]
        place[place == 0] = len(fates) + number
    paths = []
    for name, labels in (("reference", reference), ("prediction", prediction)):
        paths.append(str(folder / f"{name}_{size}.tif"))
        tifffile.imwrite(paths[-1], labels)
    return paths


def ours(reference: str, prediction: str) -> CTCScore:
    return ctc_score(tifffile.imread(reference), tifffile.imread(prediction))


def ours_with_iou_scores(reference: str, prediction: str) -> object:
    tables = [contingency_table(tifffile.imread(reference), tifffile.imread(prediction))]
    return ctc_score_from(tables), matching_score_from(tables)


def theirs(reference: str, prediction: str) -> tuple[float, float, int, int, int]:
    from ctc_metrics.metrics import det, seg
    from ctc_metrics.utils.representations import count_acyclic_graph_correction_operations, match

    ids, others, matched, matching, ious = ([each] for each in match(reference, prediction))
    counts = count_acyclic_graph_correction_operations(None, None, ids, others, matched, matching)
    return seg(ids, ious), det(**counts), counts["NS"], counts["FN"], counts["FP"]


def check_equal(paths: list[str]) -> CTCScore:
    score, expected = ours(*paths), theirs(*paths)
    np.testing.assert_allclose((score.seg, score.det), expected[:2], rtol=0, atol=1e-12)
    counts = (score.num_splits, score.num_missed, score.num_spurious)
    assert counts == expected[2:], (counts, expected)
    assert all(counts), "every kind of mistake should be there"
    return score


def memory_of(side: str, paths: list[str]) -> float:
    command = [sys.executable, __file__, "--memory-of", side, *paths]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak_megabytes(side: str, reference: str, prediction: str) -> float:
    """Linux: its count of a process's largest and present memory."""
    import ctc_metrics.metrics
    import ctc_metrics.utils.representations  # noqa: F401

    call = {"ours": ours, "both": ours_with_iou_scores, "theirs": theirs}[side]
    before = memory_status("VmRSS")
    call(reference, prediction)
    return memory_status("VmHWM") - before


def memory_status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def row(name: str, size: int, seconds: list[float], megabytes: float, against: str) -> str:
    times = f"{statistics.median(seconds):.3f} | {min(seconds):.3f}"
    return f"| {name} | {size} x {size} | {times} | {megabytes:.0f} | {against} |"


if __name__ == "__main__":
    main()
