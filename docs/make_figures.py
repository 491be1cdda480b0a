"""Draw the figures of the documentation.

python docs/make_figures.py demo DEMO [INDEX]     # docs/demo.png from a finished demo
python docs/make_figures.py segment IMAGE ...     # docs/segment.png: real images and the default model's cells
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from skimage.segmentation import find_boundaries

from dinocell import DINOCell, DINOCellPipeline
from dinocell.finetune.segmenter_file import DEFAULT_MODEL
from dinocell.images.read import read_image
from dinocell.labelled.dataset import open_labelled

DOCS = Path(__file__).parent
SIDE = 256
YELLOW, GREEN = (1.0, 0.75, 0.1), (0.2, 1.0, 0.4)


def draw_demo(demo: Path, index: int, output: Path) -> None:
    """Draw an unseen image of the demo, its cells, the predicted distance map, and the predicted cells."""
    image = open_labelled(demo / "sets" / "unseen")[index]
    plane = np.asarray(image.pixels[0])  # a grey image: red, green and blue are equal
    result = DINOCellPipeline(DINOCell.from_pretrained(demo / "finetune" / "best.pt")).run(plane, return_dist_map=True)
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    panels = figure.subplots(1, 4)
    grey = plane / max(1, np.percentile(plane, 99.8))
    contents = {
        "image": grey,
        "reference": outlined(grey, image.labels, GREEN),
        "predicted distance map": result.maps,
        "predicted cells": outlined(grey, result.labels, YELLOW),
    }
    for axes, (title, content) in zip(panels, contents.items(), strict=True):
        axes.imshow(content, cmap="viridis" if title == "predicted distance map" else "gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.savefig(output, dpi=110)


def draw_segmentation(paths: list[Path], output: Path) -> None:
    """Draw the centre of each image above the cells that the default model finds in it."""
    pipeline = DINOCellPipeline(DINOCell.from_pretrained(DEFAULT_MODEL))
    figure = Figure(figsize=(2.4 * len(paths), 4.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    panels = figure.subplots(2, len(paths), squeeze=False)
    for column, path in enumerate(paths):
        pixels = read_image(path).pixels
        labels = pipeline.run(pixels)
        plane = pixels.astype(np.float32).mean(0)
        low, high = np.percentile(plane, (0.5, 99.7))
        top, left = ((size - SIDE) // 2 for size in plane.shape)
        window = np.s_[max(0, top) : max(0, top) + SIDE, max(0, left) : max(0, left) + SIDE]
        grey = np.clip((plane - low) / (high - low), 0, 1)[window]
        panels[0, column].imshow(grey, cmap="gray", vmin=0, vmax=1)
        panels[1, column].imshow(outlined(grey, labels[window], YELLOW))
        for axes in panels[:, column]:
            axes.axis("off")
    figure.savefig(output, dpi=110)


def outlined(grey: np.ndarray, labels: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """Return a grey image as RGB with the inner boundaries of the labels in a colour."""
    image = np.repeat(np.clip(grey, 0, 1)[..., None], 3, axis=2)
    image[find_boundaries(labels, mode="inner")] = colour
    return image


if __name__ == "__main__":
    kind, first, *more = sys.argv[1:]
    if kind == "demo":
        draw_demo(Path(first), int(more[0]) if more else 0, DOCS / "demo.png")
    else:
        draw_segmentation([Path(path) for path in (first, *more)], DOCS / "segment.png")
