"""What does saving the training state cost the loop?

    python benchmarks/checkpointing.py           # ViT-S/8, K 8,192; writes results/checkpointing.md
    python benchmarks/checkpointing.py --quick   # ViT-tiny/8; writes nothing

One process. A save holds the loop while the state is copied in main memory; the writing goes on in the background. The
cost of a save is the loop's time with one save among its steps, less that of as many steps without.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _harness import write_result

from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.runtime.checkpoint import Checkpointer
from dinocell.runtime.distributed import World
from dinocell.ssl.config import DataConfig, HeadsConfig, ModelConfig, PretrainConfig, ViewsConfig
from dinocell.ssl.masking import draw_masks
from dinocell.ssl.prepare import build_model
from dinocell.ssl.trainer import Trainer
from dinocell.ssl.views import Views

EVERY = PretrainConfig(output=Path("x"), data=DataConfig(shards=("x",))).checkpoint_every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=6, help="around each save")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    variant, prototypes = ("tiny", 1024) if options.quick else ("small", 8192)
    steps, rounds = (2, 2) if options.quick else (options.steps, options.rounds)
    config = PretrainConfig(
        output=Path("none"),
        data=DataConfig(shards=("none",)),
        batch_size=2,
        views=ViewsConfig(global_size=96, local_size=48, num_local=4),
        model=ModelConfig(variant=variant),
        heads=HeadsConfig(num_prototypes=prototypes),
    )
    model = build_model(config, World())
    trainer = Trainer(config, model, World())
    views = Views(torch.randn(2, 2, 1, 96, 96), torch.randn(4, 2, 1, 48, 48))
    masks = draw_masks(range(2), config.mask_grid, config.masking, seed=0)
    number = 0

    def run(saving: Checkpointer | None) -> float:
        nonlocal number
        start = time.perf_counter()
        if saving is not None:
            trainer.save(saving, number)
        for _ in range(steps):
            trainer.step(number, [(views, masks)], measure=False)
            number += 1
        if saving is not None:
            saving.wait()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder))
        run(checkpointer)
        plain, saved = [], []
        for _ in range(rounds):
            plain.append(run(None))
            saved.append(run(checkpointer))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.distcp")) / len(checkpointer.steps())
        checkpointer.close()
    step_s, cost_s = statistics.median(plain) / steps, statistics.median(saved) - statistics.median(plain)
    whole = VisionTransformer(variant_config(variant, patch_size=8, in_channels=1))
    millions = sum(each.numel() for each in whole.parameters()) / 1e6
    lines = [
        "# Saving the training state",
        "",
        f"ViT-{variant}/8 ({millions:.0f} M parameters), K {prototypes:,}; "
        f"the state takes {size / 1e6:,.0f} MB; one process; median of {rounds} alternated rounds of {steps} steps.",
        "",
        "| | |",
        "|---|---|",
        f"| cost of a save, in steps (of two images of 96 px) | {cost_s / step_s:.2f} |",
        f"| share of the time at the default, a save every {EVERY:,} such steps | {cost_s / step_s / EVERY:.3%} |",
        f"| a save every so many such steps costs 2 % | {cost_s / step_s / 0.02:.0f} |",
    ]
    text = "\n".join(lines)
    print(text)
    if not options.quick:
        write_result("checkpointing", text, ["torch"])


if __name__ == "__main__":
    main()
