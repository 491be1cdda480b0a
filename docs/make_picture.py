"""Draw docs/demo.png from a demo that has run: ``python docs/make_picture.py DEMO [INDEX]``."""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from skimage.segmentation import find_boundaries

from dinocell import DINOCell, DINOCellPipeline
from dinocell.labelled.dataset import open_labelled


def draw(demo: Path, index: int, output: Path) -> None:
    """Draw an unseen image of the demo, its cells, the network's map, and the cells that were found."""
    image = open_labelled(demo / "sets" / "unseen")[index]
    plane = np.asarray(image.pixels[0])  # grey: red, green and blue are the same
    found = DINOCellPipeline(DINOCell.from_pretrained(demo / "finetune" / "best.pt")).run(plane, return_dist_map=True)
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    panels = figure.subplots(1, 4)
    grey = plane / max(1, np.percentile(plane, 99.8))
    shown = {
        "image": grey,
        "true cells": _outlined(grey, image.labels, (0.2, 1.0, 0.4)),
        "distance map": found.maps,
        "found cells": _outlined(grey, found.labels, (1.0, 0.75, 0.1)),
    }
    for axes, (title, picture) in zip(panels, shown.items(), strict=True):
        axes.imshow(picture, cmap="viridis" if title == "distance map" else "gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.savefig(output, dpi=110)


def _outlined(grey: np.ndarray, labels: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    picture = np.repeat(np.clip(grey, 0, 1)[..., None], 3, axis=2)
    picture[find_boundaries(labels, mode="inner")] = colour
    return picture


if __name__ == "__main__":
    draw(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(__file__).with_name("demo.png"))
