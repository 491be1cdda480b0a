"""How much of the truth survives labels -> distance map -> labels, plain and mended, on perfect and blurred maps?

    python benchmarks/round_trip.py                  # the real masks of ../shared/data; writes results/round_trip.md
    python benchmarks/round_trip.py --data FOLDER    # elsewhere
    python benchmarks/round_trip.py --quick          # every eighth image; writes nothing

No network takes part: this is the ceiling that the representation and its thresholds set. Scores are pooled over all
cells of a group (Cell Tracking Challenge measures), against the masks as they are.
"""

import argparse
from pathlib import Path

import numpy as np
from _harness import write_result
from PIL import Image
from scipy import ndimage

from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.segmentation.watershed import distance_to_labels
from dinocell.labelled.distance import labels_to_distance

DATA = Path(__file__).parents[2] / "shared" / "data"
TARGET_SEG, TARGET_DET = 0.975, 0.98
BLUR_PX = 1.5
NOISES = (0.02, 0.05)
RULES: dict[str, dict[str, object]] = {
    "plain (SAMCell's rule)": {"merge_px": None, "restore_border": False},
    "plain + ring of cell_fill x radius": {"merge_px": None, "blur_px": 0},
    "merged above 3 px + that ring": {"merge_depth": 0, "blur_px": 0},
    "... + peaks of rise < 0.1 merged": {"blur_px": 0},
    "**mended (default)**: ... + ring fitted to the blur": {},
    "mended, merge_px 1.5": {"merge_px": 1.5},
    "mended, merge_px 2": {"merge_px": 2},
    "mended, merge_px 4": {"merge_px": 4},
}
DEFAULT = "**mended (default)**: ... + ring fitted to the blur"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--quick", action="store_true", help="every eighth image, no result file")
    options = parser.parse_args()
    step = 8 if options.quick else 1
    groups = {
        "nuclei": [
            *dsb2018(options.data),
            *bbbc039(options.data),
            *label_images(options.data, "stardist_2d/*/mask*.tif"),
        ],
        "phase contrast": list(label_images(options.data, "usiigaci_t98g/*/instances_ids.png")),
    }
    lines = [
        "# Round trip: labels, distance map, labels",
        "",
        "Real masks (nuclei: dsb2018_stage1_train, bbbc039, stardist_2d; phase contrast: usiigaci_t98g), thresholds",
        "0.47 and 0.09. OP_CSB (SEG, DET), pooled over cells; splits, missed, spurious are counts. Blurred = perfect",
        f"map smoothed with sigma {BLUR_PX} px, plus normal noise of the deviation named, clipped to [0, 1].",
    ]
    met = True
    for group, images in groups.items():
        masks = images[::step]
        perfect = [labels_to_distance(labels) for labels in masks]
        num_cells = sum(len(np.unique(labels[labels > 0])) for labels in masks)
        kinds = {"perfect maps": perfect}
        for noise in NOISES:
            kinds[f"blurred, noise {noise}"] = [blurred(each, noise, seed) for seed, each in enumerate(perfect)]
        for kind, distances in kinds.items():
            lines += ["", f"## {group}, {kind} ({len(masks)} images, {num_cells} cells)", ""]
            lines += ["| rule | OP_CSB (SEG, DET) | splits | missed | spurious |", "|---|---|---|---|---|"]
            for name, rule in RULES.items():
                score = ctc_score(masks, [distance_to_labels(each, **rule) for each in distances])
                lines.append(
                    f"| {name} | {score.op_csb:.3f} ({score.seg:.3f}, {score.det:.3f}) "
                    f"| {score.num_splits} | {score.num_missed} | {score.num_spurious} |"
                )
                if name == DEFAULT and kind == "perfect maps":
                    met &= score.seg >= TARGET_SEG and score.det >= TARGET_DET
    lines += [
        "",
        f"Target, mended on perfect maps: SEG >= {TARGET_SEG}, DET >= {TARGET_DET}: {'met' if met else 'missed'}.",
    ]
    print("\n".join(lines))
    if not options.quick:
        print(write_result("round_trip", "\n".join(lines), ["numpy", "scipy", "numba", "edt"]))
    raise SystemExit(0 if met else 1)


def blurred(distance: np.ndarray, noise: float, seed: int) -> np.ndarray:
    error = np.random.default_rng(seed).normal(0, noise, distance.shape)
    return np.clip(ndimage.gaussian_filter(distance, BLUR_PX) + error, 0, 1).astype(np.float32)


def dsb2018(data: Path) -> list[np.ndarray]:
    """Read one mask file a nucleus."""
    images = []
    for folder in sorted((data / "dsb2018_stage1_train").glob("*/masks")):
        masks = [np.array(Image.open(path).convert("L")) > 0 for path in sorted(folder.glob("*.png"))]
        labels = np.zeros(masks[0].shape, np.int32)
        for number, mask in enumerate(masks, start=1):
            labels[mask] = number
        images.append(labels)
    return found(images, data, "dsb2018_stage1_train")


def bbbc039(data: Path) -> list[np.ndarray]:
    """Read the red plane: an object is a 4-connected piece of one value."""
    images = []
    for path in sorted((data / "bbbc039" / "masks").glob("*.png")):
        red = np.array(Image.open(path))[..., 0]
        labels = np.zeros(red.shape, np.int32)
        for value in np.unique(red[red > 0]):
            pieces, _ = ndimage.label(red == value)
            labels[pieces > 0] = pieces[pieces > 0] + labels.max()
        images.append(labels)
    return found(images, data, "bbbc039")


def label_images(data: Path, pattern: str) -> list[np.ndarray]:
    return found([np.array(Image.open(path)).astype(np.int32) for path in sorted(data.glob(pattern))], data, pattern)


def found(images: list[np.ndarray], data: Path, what: str) -> list[np.ndarray]:
    if not images:
        raise SystemExit(f"{data / what}: no masks there; name the folder of real data with --data")
    return images


if __name__ == "__main__":
    main()
