"""Would batches of windows from several images make a folder of small images faster?

    python benchmarks/window_batches.py           # writes results/window_batches.md
    python benchmarks/window_batches.py --quick   # the smallest network, 2 rounds; writes nothing

A small image has few windows (one up to 192 px of height and width, four up to 384), so segmenting
one image after the other gives the network batches of one or of four. What batches across images could
save is what the network needs more for eight windows in such batches than in one of eight.
"""

import argparse
from functools import partial
from statistics import median

import torch
from _harness import alternate, ratio, write_result

from dinocell.finetune.model import DINOCell, create_dinocell_model

WINDOWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest network, 2 rounds, no result file")
    options = parser.parse_args()
    cases = [("tiny", 128), ("tiny", 256), ("small", 256)]
    lines = [
        "# Batches of windows across images",
        "",
        f"{WINDOWS} windows through the segmenter, {options.rounds} alternated rounds on a machine that other work may "
        "have",
        "shared; ratio = time in smaller batches / time in one batch: median (range). Above 1 batches across images "
        "would",
        "gain.",
        "",
        "| segmenter | s in one batch | ratio in batches of 4 | ratio in batches of 1 |",
        "|---|---|---|---|",
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size, side in cases[:1] if options.quick else cases:
        model = create_dinocell_model(size, pretrained=False).eval().to(device)
        windows = torch.randn(WINDOWS, 1, side, side, device=device)
        sides = {str(number): partial(run, model, windows, number) for number in (WINDOWS, 4, 1)}
        seconds = alternate(sides, rounds=2 if options.quick else options.rounds)
        whole = seconds[str(WINDOWS)]
        lines.append(
            f"| ViT-{size}/8, {side} px | {median(whole):.2f} | {ratio(seconds['4'], whole)} | "
            f"{ratio(seconds['1'], whole)} |"
        )
    print("\n".join(lines))
    if not options.quick:
        print(write_result("window_batches", "\n".join(lines), ["torch"]))


@torch.inference_mode()
def run(model: DINOCell, windows: torch.Tensor, number: int) -> None:
    """Take the windows through the network, so many at a time."""
    for part in windows.split(number):
        model(part)


if __name__ == "__main__":
    main()
