"""Does multi-view channel consistency teach what it claims? `consistency` against `average` and random weights.

    python benchmarks/channel_consistency.py --folder RUNS          # hours on 2 CPU cores; writes a result file
    python benchmarks/channel_consistency.py --folder RUNS --quick  # a few steps of one seed; writes nothing

Fields of one class of cells each are generated in five stains. One stain (`WITHHELD`) is in no training set: what the
backbone makes of it is what it would make of a stain that it has never met. Each arm is the recipe `tiny_cpu` with
another `views.policy` and nothing else. Everything is kept in RUNS, and a run that was interrupted goes on.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _harness import write_result

from dinocell.configs.load import find_recipe, load_config
from dinocell.data_shards.images import write_tiff
from dinocell.data_shards.shard import ShardSettings
from dinocell.data_shards.sources_images import MultichannelSource
from dinocell.data_shards.synthetic import CELL_TYPES, SyntheticConfig, make_field
from dinocell.data_shards.tiles import TileSettings
from dinocell.data_shards.write import build
from dinocell.eval.consistency import channel_consistency
from dinocell.eval.knn import knn_scores
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import load_backbone
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.train import pretrain

STAINS = ("DNA", "RNA", "ER", "AGP", "Mito")
WITHHELD = "Mito"
NEIGHBOURS = 10
GALLERY, QUERIES = 300, 300
# A field shows a handful of cells, all of one class.
FIELD = SyntheticConfig(size=(128, 128), num_cells=(6, 12), channels=STAINS, num_classes=len(CELL_TYPES))
ARMS = ("consistency", "average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("channel-consistency"), help="data and runs are kept here")
    parser.add_argument("--fields", type=int, default=3000, help="for pretraining")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="several processes may share them")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of both arms")
    parser.add_argument("--result", default="channel_consistency", help="name of the result file")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.fields, options.seeds, options.set = 64, [0], [*options.set, "steps=4", "batch_size=4"]
    shards = make_shards(options.folder, options.fields)
    few = 40 if options.quick else None
    rows: dict[str, list[Mapping[str, float]]] = {}
    for seed in options.seeds:
        for arm in ("random weights", *options.arms):
            output = options.folder / f"{arm.replace(' ', '-')}-{seed}"
            policy = arm if arm in options.arms else "consistency"
            overrides = [f"output={output}", f"data.shards=[{shards}]", f"views.policy={policy}", f"seed={seed}"]
            config = load_config(PretrainConfig, find_recipe("pretrain", "tiny_cpu"), [*overrides, *options.set])

            def measured(arm: str = arm, config: PretrainConfig = config) -> dict[str, float]:
                backbone = untrained(config) if arm not in options.arms else trained(config)
                side = config.views.global_size
                gallery = make_probe_set(options.folder / "gallery.pt", 10**6, few or GALLERY, side)
                queries = make_probe_set(options.folder / "queries.pt", 2 * 10**6, few or QUERIES, side)
                return measure(backbone, gallery, queries)

            rows.setdefault(arm, []).append(remembered(output.with_suffix(".json"), measured))
            print(arm, seed, {name: round(value, 3) for name, value in rows[arm][-1].items()}, flush=True)
    text = table(rows)
    print(text)
    if not options.quick:
        write_result(options.result, f"{heading(config, options.fields)}\n\n{text}", ["torch", "numpy"])


def trained(config: PretrainConfig) -> VisionTransformer:
    """Return the teacher of a run, which is taken or continued if it is not finished."""
    return load_backbone(str(pretrain(config)), patch_size=8, in_channels=1)


def remembered(path: Path, measure_now: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what was measured before, or measure and keep it."""
    if not path.exists():
        path.write_text(json.dumps(measure_now()))
    found: dict[str, float] = json.loads(path.read_text())
    return found


def make_shards(folder: Path, fields: int) -> Path:
    """Generate the fields for pretraining, without the withheld stain, and build a shard set of them."""
    images, shards = folder / "images", folder / "shards"
    if not (shards / "manifest.json").exists():
        images.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(make_image, images), range(fields), chunksize=16))
        settings = ShardSettings(tiles=TileSettings(size=0, min_size=64, min_structure=0))
        build(MultichannelSource(input=str(images)), shards, settings=settings, samples_per_shard=128)
    return shards


def make_image(folder: Path, number: int) -> None:
    """Write a field without the withheld stain, if it is not there."""
    path = folder / f"field{number:05d}.ome.tif"
    if not path.exists():
        keep = [channel for channel, name in enumerate(STAINS) if name != WITHHELD]
        names = tuple(STAINS[channel] for channel in keep)
        write_tiff(path, field(number)[keep], channel_names=names, pixel_size_um=0.65)


def field(number: int) -> np.ndarray:
    """Return a field of cells of one class, number modulo 4 (c h w)."""
    kind = number % len(CELL_TYPES)
    weights = tuple(float(each == kind) for each in range(len(CELL_TYPES)))
    config = SyntheticConfig(**{**vars(FIELD), "class_weights": weights})
    pixels: np.ndarray = make_field(number, config).pixels
    return pixels


def make_probe_set(path: Path, first: int, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return standardised fields, every stain alone and the mean of the trained ones last (b 6 h w), and classes.

    They are scaled to ``side`` pixels, that of a global crop.
    """
    if not path.exists():
        made = np.stack([field(first + number) for number in range(count)]).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save((torch.from_numpy(made), torch.arange(first, first + count) % len(CELL_TYPES)), fresh)
        fresh.replace(path)
    pixels, classes = torch.load(path)
    # The levels of the pretraining: percentiles of all images of a stain are 0 and 1.
    sample = pixels[:64].transpose(0, 1).flatten(1)
    low, high = (torch.quantile(sample[:, ::7], q, dim=1)[:, None, None] for q in (0.001, 0.999))
    unit = ((pixels - low) / (high - low)).clamp(0, 1)
    trained = [number for number, name in enumerate(STAINS) if name != WITHHELD]
    views = torch.cat((unit, unit[:, trained].mean(1, keepdim=True)), dim=1)
    # As a global crop of the whole field: the scale that the training has seen.
    views = torch.nn.functional.interpolate(views, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return (views - views.mean((2, 3), keepdim=True)) / (views.std((2, 3), keepdim=True) + 1e-5), classes


def untrained(config: PretrainConfig) -> VisionTransformer:
    torch.manual_seed(config.seed)
    vit = VisionTransformer(variant_config(config.model.variant, patch_size=8, in_channels=1))
    vit.init_weights(layer_scale=config.model.layer_scale)
    return vit.eval()


@torch.no_grad()
def features(backbone: VisionTransformer, views: torch.Tensor) -> torch.Tensor:
    """Return CLS tokens (b c d)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone, batches = backbone.to(device), views.flatten(0, 1)[:, None].split(100)
    return torch.cat([backbone(batch.to(device)).cls.cpu() for batch in batches]).unflatten(0, views.shape[:2])


def measure(
    backbone: VisionTransformer, gallery: tuple[torch.Tensor, torch.Tensor], queries: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """Return the numbers of a row of the table."""
    (known, classes), (asked, wanted) = ((features(backbone, views), names) for views, names in (gallery, queries))
    withheld, mean = STAINS.index(WITHHELD), len(STAINS)
    trained = [channel for channel in range(len(STAINS)) if channel != withheld]
    centre = known.mean((0, 1))  # what all images share says nothing
    known, asked = known - centre, asked - centre

    def accuracy(train: int, test: int) -> float:
        votes = knn_scores(known[:, train], classes, asked[:, test], ks=[NEIGHBOURS], num_classes=len(CELL_TYPES))
        return float((votes[NEIGHBOURS].argmax(1) == wanted).float().mean())

    seen, everything = channel_consistency(asked[:, trained]), channel_consistency(asked[:, : len(STAINS)])
    return {
        "margin, trained stains": seen.margin,
        "margin, with the withheld": everything.margin,
        "retrieval, with the withheld": everything.retrieval,
        "class, stain among means": statistics.mean(accuracy(mean, channel) for channel in trained),
        "class, withheld among means": accuracy(mean, withheld),
        "class, withheld among withheld": accuracy(withheld, withheld),
    }


def table(rows: Mapping[str, list[Mapping[str, float]]]) -> str:
    """Return the table: mean over seeds, and the range."""
    names = list(next(iter(rows.values()))[0])
    lines = [f"| arm | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, measured in rows.items():
        cells = []
        for name in names:
            values = [each[name] for each in measured]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(config: PretrainConfig, fields: int) -> str:
    views = config.views
    return (
        f"# Channel consistency\n\n{fields:,} generated fields of 128 px in {len(STAINS) - 1} stains, crops of "
        f"{views.global_size} and {views.local_size} px, {config.steps:,} steps of {config.batch_size}; {GALLERY} "
        f"known and {QUERIES} asked fields, {len(CELL_TYPES)} classes, {NEIGHBOURS} neighbours, CLS tokens less their "
        f"mean. {WITHHELD} is in no training set."
    )


if __name__ == "__main__":
    main()
