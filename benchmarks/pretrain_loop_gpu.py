"""Does a real pretraining run keep a GPU busy: reading, views, step and all?

    python benchmarks/pretrain_loop_gpu.py            # writes results/pretrain_loop_gpu.md
    python benchmarks/pretrain_loop_gpu.py --quick    # on a CPU as well: a tiny model, a few steps; writes nothing

`pretrain` itself, on shards of generated fields of five stains, as its log has it: images a second, the share of time
in which the loop waited for a batch, MFU. Beside it the views of a batch alone, as a share of a step.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _harness import synchronise, write_result
from reading import CHANNELS, TILE, Fields, synthetic_fields

from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings
from dinocell.runtime.distributed import World
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    ModelConfig,
    OnlineEvalConfig,
    PretrainConfig,
    ViewsConfig,
)
from dinocell.ssl.data import open_shards
from dinocell.ssl.train import pretrain
from dinocell.ssl.views import make_views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["small"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--wait-for", type=Path, help="train nothing before this file exists: other work may go on")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.variants, options.batch, options.steps, options.workers = ["nano"], 2, 6, [0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        "# A pretraining run on a GPU, reading and views included",
        "",
        f"Patch 8, batch {options.batch}, K 8,192, policy consistency, tiles of {CHANNELS} x {TILE} x {TILE}, uint16; "
        f"compiled, bfloat16; medians of the log after the first third of {options.steps} steps.",
        "",
        "| backbone | loader workers | images/s | MFU | waited for data | views, ms a batch | views, share of a step |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        fields = Fields(synthetic_fields(Path(name) / "tiff", 2 if options.quick else 8))
        build(fields, shards, settings=ShardSettings())
        while options.wait_for and not options.wait_for.exists():
            time.sleep(0.2)
        for variant in options.variants:
            for workers in options.workers:
                config = recipe(options, variant, workers, shards, Path(name) / f"{variant}{workers}")
                lines.append(row(config, device))
                print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if not options.quick:
        write_result("pretrain_loop_gpu", text, ["torch"])


def recipe(options: argparse.Namespace, variant: str, workers: int, shards: Path, output: Path) -> PretrainConfig:
    sizes = {"global_size": 32, "local_size": 16} if options.quick else {}
    return PretrainConfig(
        output=output,
        data=DataConfig(shards=(str(shards),)),
        steps=options.steps,
        batch_size=options.batch,
        views=ViewsConfig(**sizes),
        model=ModelConfig(variant=variant, drop_path=0.0),
        heads=HeadsConfig(num_prototypes=8192),
        log_every=max(1, options.steps // 6),
        image_every=10**9,
        export_every=10**9,
        online_eval=OnlineEvalConfig(every=0),
        compute=ComputeConfig(workers=workers, compile="nothing" if options.quick else "blocks"),
    )


def row(config: PretrainConfig, device: torch.device) -> str:
    pretrain(config)
    log = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    log = log[len(log) // 3 :]

    def median(name: str) -> float:
        return statistics.median(each[name] for each in log if name in each)

    milliseconds = views_ms(config, device)
    rate = median("speed/images_per_s")
    share = milliseconds / (1000 * config.batch_size / rate)
    mfu = f"{median('speed/mfu'):.0%}" if "speed/mfu" in log[-1] else ""
    return (
        f"| {config.model.variant} | {config.compute.workers} | {rate:.0f} | {mfu} | "
        f"{median('speed/data_wait_share'):.1%} | {milliseconds:.1f} | {share:.1%} |"
    )


def views_ms(config: PretrainConfig, device: torch.device) -> float:
    """Return what the views of a batch take by themselves."""
    batch, seconds = next(iter(open_shards(config, World()))), []
    if device.type == "cuda":
        batch = batch.pin_memory()
    for _ in range(8):
        synchronise()
        start = time.perf_counter()
        make_views(batch.tiles, batch.plans, config.views, device=device)
        synchronise()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
