"""Are views made on the CPU as fast as a plain crop-by-crop way makes them, and what share of a step do they take?

    python benchmarks/views.py           # 5 alternated rounds, writes results/views.md
    python benchmarks/views.py --quick   # 2 rounds, without the step; writes nothing

Both sides get the same decoded tiles, draw the same plans and give the same pixels, which is checked. The plain way
cuts a crop's channels out, applies levels, gain and contrast, mixes, resizes with an antialiased ``F.interpolate``,
turns and standardises, one expression after the other, one crop after the other. Reading and decoding is not in it:
`reading.py`. A step is that of `pretrain_step.py`, with as many threads.
"""

import argparse
import statistics
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _harness import alternate, ratio, write_result
from pretrain_step import our_step
from reading import CHANNELS, TILE, Fields, synthetic_fields

from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings
from dinocell.runtime.distributed import World
from dinocell.ssl.config import DataConfig, Policy, PretrainConfig, ViewsConfig
from dinocell.ssl.data import PlannedBatch, open_shards
from dinocell.ssl.views import Views, make_views

_BATCH, _NUM_BATCHES = 4, 6
_POLICIES: tuple[Policy, ...] = ("consistency", "average", "bag")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prototypes", type=int, default=65_536, help="of the step")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    torch.set_num_threads(options.threads)
    lines = [
        "# Views on the CPU",
        "",
        f"2 x 224 + 8 x 96 px from generated tiles of {CHANNELS} x {TILE} x {TILE}, uint16, batch {_BATCH}, "
        f"{options.threads} thread(s), {options.rounds} alternated rounds of {_NUM_BATCHES} batches after one to warm "
        "up. A ratio is the plain way's time over that of dinocell in the same round: median and range.",
        "",
        "| policy | plain way, ms/image | dinocell, ms/image | plain way / dinocell |",
        "|---|---|---|---|",
    ]
    milliseconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = build(Fields(synthetic_fields(folder / "tiff", 6)), folder / "set", settings=ShardSettings())
        assert manifest is not None
        for policy in _POLICIES:
            config = ViewsConfig(policy=policy)
            recipe = PretrainConfig(
                output=folder, data=DataConfig(shards=(str(folder / "set"),)), batch_size=_BATCH, views=config
            )
            batches = list(islice(open_shards(recipe, World()), _NUM_BATCHES))
            check(batches[0], config)
            sides = {
                "plain": partial(all_batches, plain_views, batches, config),
                "dinocell": partial(all_batches, our_views, batches, config),
            }
            seconds = alternate(sides, rounds=options.rounds)
            each = {side: 1000 * statistics.median(found) / (_BATCH * _NUM_BATCHES) for side, found in seconds.items()}
            milliseconds[policy] = each["dinocell"]
            lines.append(
                f"| {policy} | {each['plain']:.1f} | {each['dinocell']:.1f} | "
                f"{ratio(seconds['plain'], seconds['dinocell'])} |"
            )
    if not options.quick:
        step = argparse.Namespace(quick=False, batch=_BATCH, prototypes=options.prototypes)
        taken = alternate({"step": our_step(step, straight=False, again="nothing")}, rounds=3)["step"]
        median, ours = statistics.median(taken), _BATCH * milliseconds["consistency"] / 1000
        lines += [
            "",
            f"A ViT-S/8 step of this batch (K {options.prototypes:,}, float32, as many threads) takes {median:.2f} s "
            f"({min(taken):.2f} to {max(taken):.2f}); its views, {ours:.3f} s, are {100 * ours / median:.2f} % of it.",
        ]
    text = "\n".join(lines)
    print(text)
    if not options.quick:
        write_result("views", text, ["torch", "numpy"])


def all_batches(make: object, batches: list[PlannedBatch], config: ViewsConfig) -> None:
    assert callable(make)
    for batch in batches:
        make(batch, config)


def our_views(batch: PlannedBatch, config: ViewsConfig) -> Views:
    return make_views(batch.tiles, batch.plans, config, device=torch.device("cpu"))


def check(batch: PlannedBatch, config: ViewsConfig) -> None:
    """Assert that both ways give the same pixels."""
    for ours, plain in zip(our_views(batch, config), plain_views(batch, config), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def plain_views(batch: PlannedBatch, config: ViewsConfig) -> Views:
    """Make every crop by itself, as one would write it down."""
    made: list[list[torch.Tensor]] = []
    for number, plan in enumerate(batch.plans):
        tile, decoded, crops = batch.tiles.tile(number), list(batch.tiles.channels[number]), []
        for view, (top, left, height, width) in enumerate(plan.boxes.tolist()):
            needed = np.flatnonzero(plan.mixing[view, 0])
            places = [decoded.index(channel) for channel in needed]
            crop = tile[places, top : top + height, left : left + width].float()
            factor, offset, contrast, mixing = (
                torch.from_numpy(each[needed])[:, None, None]
                for each in (plan.factor[view], plan.offset[view], plan.contrast[view], plan.mixing[view, 0])
            )
            crop = (crop * factor + offset).clamp(0, 1)
            mean = crop.mean((1, 2), keepdim=True)
            crop = ((crop - mean) * contrast + mean).clamp(0, 1)
            crop = (crop * mixing).sum(0, keepdim=True)
            size = config.global_size if view < config.num_global else config.local_size
            crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
            if plan.mirrored[view]:
                crop = crop.flip(1)
            crop = torch.rot90(crop, int(plan.turned[view]), (1, 2))
            crops.append((crop - crop.mean()) / (crop.std(correction=0) + 1e-5))
        made.append(crops)
    views = [torch.stack(crops) for crops in zip(*made, strict=True)]
    return Views(torch.stack(views[: config.num_global]), torch.stack(views[config.num_global :]))


if __name__ == "__main__":
    main()
