"""Compare fine-tuned runs on images that none was trained on: one table, with intervals.

    python benchmarks/_compare_runs.py RUN [RUN ...]     # folders of `dinocell finetune`; writes results/real_run.md
    python benchmarks/_compare_runs.py RUN --picture validation.png    # and draws the first run's images
    python benchmarks/_compare_runs.py RUN SEGMENTER --sets datasets/test/*     # on labelled sets; segmenters as well

Without ``--sets`` the runs must have been trained on the same sets with the same seed: then their validation images,
chosen by image and never trained on, are the same, and this checks it. The thresholds are those in each run's file,
which fine-tuning found on these same images: all rows profit alike. With ``--sets`` the numbers stand alone, if neither
a run's training nor its validation has seen those images.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from _harness import write_result

from dinocell.configs.load import load_config
from dinocell.demo.otsu import otsu_baseline
from dinocell.eval.export.writers import overlay
from dinocell.eval.metrics.overlaps import contingency_table
from dinocell.eval.metrics.summary import ctc_intervals, matching_intervals
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import open_sets, split
from dinocell.finetune.model import DINOCell
from dinocell.images.write import write_png
from dinocell.labelled.dataset import LabelledImage, open_labelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET", help="labelled sets to compare on")
    parser.add_argument("--picture", type=Path, help="PNG: the first run's images, truth above prediction")
    parser.add_argument("--result", default="real_run", help="name of the result file")
    options = parser.parse_args()
    images = [image for path in options.sets for image in open_labelled(path)] or validation_images(options.runs[0])
    names = [image.name for image in images]
    kinds = [is_phase_contrast(image) for image in images]
    lines = [row("Otsu + watershed, no training", images, [otsu(image) for image in images], kinds, "")]
    for run in options.runs:
        if not options.sets and [image.name for image in validation_images(run)] != names:
            raise SystemExit(f"{run}: has other validation images than {options.runs[0]}")
        pipeline = DINOCellPipeline(DINOCell.from_pretrained(run if run.is_file() else run / "best.pt"))
        predicted = [pipeline.run(np.asarray(image.pixels)) for image in images]
        if run == options.runs[0] and options.picture:
            write_png(options.picture, sheet(images, predicted))
        lines.append(row(describe(run), images, predicted, kinds, trained(run)))
        print(lines[-1], flush=True)
    text = "\n".join(
        [
            "# Fine-tuned on real images",
            "",
            f"{len(images)} {'test' if options.sets else 'validation'} images: {len(images) - sum(kinds)} of nuclei, "
            f"{sum(kinds)} of whole cells in phase contrast, "
            f"{sum(int(len(np.unique(image.labels)) - 1) for image in images):,} cells. Intervals are 95 %, drawn over "
            "images.",
            "",
            "| run | OP_CSB | SEG | DET | AP at IoU 0.5 | OP_CSB, nuclei | OP_CSB, phase contrast | training |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
        ]
    )
    print(text)
    print(write_result(options.result, text, ["torch", "numpy"]))


def validation_images(run: Path) -> list[LabelledImage]:
    config = load_config(FinetuneConfig, run / "config.yaml", [])
    chosen = split(open_sets(config.data, config.output), config.data, seed=config.seed, record=None)
    return chosen.validation_images()


def describe(run: Path) -> str:
    if run.is_file():
        return run.name
    config = load_config(FinetuneConfig, run / "config.yaml", [])
    weights = "random" if config.model.weights is None else f"pretrained ({Path(config.model.weights).parts[-4]})"
    if config.model.segmenter is not None:
        weights = f"from {Path(config.model.segmenter).name}"
    how = "frozen" if config.model.freeze_backbone else "free"
    return f"{run.name}: {config.model.size}, patch {config.model.patch_size}, {weights}, {how}"


def trained(run: Path) -> str:
    if run.is_file():
        return ""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return f"{max(entry['step'] for entry in entries)} steps"


def is_phase_contrast(image: LabelledImage) -> bool:
    return "set" in image.name and image.pixels.shape[-1] >= 1000


def otsu(image: LabelledImage) -> np.ndarray:
    grey = np.asarray(image.pixels, np.float32).mean(0)
    # Its rule knows bright cells on a dark ground only: a picture that is mostly bright is turned over for it.
    return otsu_baseline(grey if np.median(grey) < (grey.min() + grey.max()) / 2 else -grey)


def row(name: str, images: list[LabelledImage], labels: list[np.ndarray], kinds: list[bool], note: str) -> str:
    tables = [contingency_table(np.asarray(i.labels, np.int32), found) for i, found in zip(images, labels, strict=True)]
    all_ctc, all_ap = ctc_intervals(tables), matching_intervals(tables)
    cells = [shown(all_ctc["op_csb"]), shown(all_ctc["seg"]), shown(all_ctc["det"])]
    cells.append(shown(all_ap["average_precision"]))
    for kind in (False, True):
        some = [table for table, this in zip(tables, kinds, strict=True) if this is kind]
        cells.append(f"{ctc_intervals(some)['op_csb'].value:.3f}" if some else "")
    return f"| {name} | {' | '.join(cells)} | {note} |"


def shown(interval: object) -> str:
    return f"{interval.value:.3f} ({interval.low:.2f} to {interval.high:.2f})"


def sheet(images: list[LabelledImage], predicted: list[np.ndarray], side: int = 256) -> np.ndarray:
    """Return the middle of each image, truth above, prediction below."""
    columns = []
    for image, found in zip(images, predicted, strict=True):
        grey = np.asarray(image.pixels, np.float32).mean(0)
        parts = []
        for labels in (np.asarray(image.labels, np.int32), found):
            drawn = overlay(grey, labels)
            top, left = (max(0, (length - side) // 2) for length in drawn.shape[1:])
            cut = drawn[:, top : top + side, left : left + side]
            parts.append(np.pad(cut, ((0, 0), (0, side - cut.shape[1]), (0, side + 4 - cut.shape[2]))))
        columns.append(np.concatenate(parts, axis=1))
    return np.concatenate(columns, axis=2)


if __name__ == "__main__":
    main()
