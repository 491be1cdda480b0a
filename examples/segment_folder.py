"""Segment every image of a folder from Python, and write labels and a table of cells beside one another.

    python examples/segment_folder.py images/ best.pt results/
    python examples/segment_folder.py --quick     # two generated images and a network that has learned nothing

The command line does the same with more outputs: ``dinocell segment images/ --model best.pt --csv``.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dinocell import DINOCell, DINOCellPipeline
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.images.read import IMAGE_SUFFIXES, read_image
from dinocell.images.write import write_labels, write_tiff


def segment_folder(folder: Path, model: Path, output: Path) -> int:
    """Segment the images of a folder; return how many cells were found in all."""
    output.mkdir(parents=True, exist_ok=True)
    pipeline = DINOCellPipeline(DINOCell.from_pretrained(model))  # the best device there is; thresholds of the model
    total = 0
    with (output / "cells.csv").open("w", encoding="utf-8") as table:
        table.write("image,cell,area_px\n")
        for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
            picture = read_image(path)
            # Of several stains each is brought to its own range, then they are averaged.
            labels = pipeline.run(picture.plane(), pixel_size_um=picture.pixel_size_um)
            write_labels(output / f"{path.stem}_labels.tif", labels, pixel_size_um=picture.pixel_size_um)
            areas = np.bincount(labels.ravel())[1:]
            table.writelines(f"{path.name},{cell},{area}\n" for cell, area in enumerate(areas, start=1) if area)
            total += int((areas > 0).sum())
            print(f"{path.name}: {int((areas > 0).sum())} cells")
    return total


def quick() -> None:
    """Go through it on generated images, with random weights: what is found means nothing."""
    with TemporaryDirectory() as scratch:
        folder, model = Path(scratch) / "images", Path(scratch) / "model.pt"
        folder.mkdir()
        DINOCell("vitt8", pretrained=False).save_pretrained(model)
        for seed in range(2):
            write_tiff(folder / f"{seed}.tif", make_field(seed, SyntheticConfig(size=(128, 128))).pixels)
        segment_folder(folder, model, Path(scratch) / "results")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("images"))
    parser.add_argument("model", nargs="?", type=Path, default=Path("best.pt"))
    parser.add_argument("output", nargs="?", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="generated images, random weights")
    options = parser.parse_args()
    if options.quick:
        quick()
    else:
        print(f"{segment_folder(options.folder, options.model, options.output)} cells in all")
