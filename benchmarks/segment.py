"""What does `dinocell segment` spend beside the network, and how much memory does a giant image take?

    python benchmarks/segment.py            # ViT-S/8 on 1024 px; a 10,000 px image; writes results/segment.md
    python benchmarks/segment.py --quick    # the nano network on 256 px, a 1,024 px image; writes nothing

Share: the whole command, from reading to the last file, with labels, table and overlay; and in it the time inside the
network. Its maps are replaced by the prepared windows, whose bright cells on dark ground make maps like a trained
network's; an untrained one would give no cells, and nothing to do afterwards. In the giant image the network works on
the first batch alone: memory is what is asked for there, not time.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _harness import write_result

from dinocell.cli import main as dinocell
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.finetune.model import DINOCell, create_dinocell_model
from dinocell.images.write import write_tiff
from dinocell.labelled.distance import labels_to_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small; no result file")
    parser.add_argument("--giant", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size, side, giant = ("nano", 256, 1024) if options.quick else ("small", 1024, 10_000)
    if options.giant:
        segment(options.giant, batches=1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        create_dinocell_model(size, pretrained=False).save_pretrained(folder / "model.pt")
        write_field(folder / "image.tif", side)
        total, inside, cells = segment(folder)
        (folder / "image.tif").unlink()
        write_field(folder / "image.tif", giant)
        line = [sys.executable, __file__, *sys.argv[1:], "--giant", str(folder)]
        peak = int(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1])
    text = "\n".join(
        [
            "# Segmenting",
            "",
            "| what | figure |",
            "|---|---|",
            f"| share of the network ({size}, patch 8) in the whole command, {side} px, {cells} cells (target 85 %) | "
            f"{inside / total:.1%} |",
            f"| peak memory, one image of {giant:,} x {giant:,} px, 16 bit (target 4 GB) | {peak / 1e9:.2f} GB |",
        ]
    )
    print(text)
    if not options.quick:
        write_result("segment", text, ["torch", "numpy", "numba"])


def write_field(path: Path, side: int) -> None:
    """Write a picture of cells, the same 1,024 px over and over."""
    tile = min(side, 1024)
    config = SyntheticConfig(size=(tile, tile), num_cells=(tile**2 // 1000,) * 2, cell_radius_px=14.0)
    pixels = (labels_to_distance(make_field(0, config).labels) * 60_000).astype(np.uint16)
    repeats = -(-side // tile)
    write_tiff(path, np.tile(pixels, (repeats, repeats))[None, :side, :side])


def segment(folder: Path, *, batches: int | None = None) -> tuple[float, float, int]:
    """Run the command in this process; return its seconds, those of the network, and how many cells came out."""
    forward, inside, calls = DINOCell.forward, [0.0], [0]

    def timed(self: DINOCell, images: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        if batches is None or calls[0] < batches:
            forward(self, images)
        calls[0] += 1
        inside[0] += time.perf_counter() - start
        low, high = images.aminmax()
        return (images - low) / (high - low).clamp(min=1e-6)

    DINOCell.forward = timed
    output = folder / f"results{time.time_ns()}"
    line = ["segment", str(folder / "image.tif"), "--model", str(folder / "model.pt"), "--output", str(output)]
    start = time.perf_counter()
    try:
        dinocell([*line, "--csv", "--save-viz"])
    finally:
        DINOCell.forward = forward
    seconds = time.perf_counter() - start
    return seconds, inside[0], int((output / "summary.csv").read_text().splitlines()[1].split(",")[1])


if __name__ == "__main__":
    main()
