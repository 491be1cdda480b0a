"""Does multi-view channel consistency teach what it claims? `consistency` against `average` and random weights.

    python benchmarks/channel_consistency.py --folder RUNS           # hours on 2 CPU cores; writes a result file
    python benchmarks/channel_consistency.py --folder RUNS --shapes  # classes that differ in shape alone
    python benchmarks/channel_consistency.py --folder RUNS --quick   # a few steps of one seed; writes nothing

Fields of one class of cells each are generated in five stains. One stain (`WITHHELD`) is in no training set: what the
backbone makes of it is what it would make of a stain that it has never met. Each arm is the recipe `tiny_cpu` with
another `views.policy` and nothing else. `no network` names a class by quantiles of standardised pixels: what brightness
alone gives away. `--real` looks at shard sets of real fields as well, with the same backbones. Everything is kept in
RUNS, and a run that was interrupted goes on.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _harness import write_result

from dinocell.commands._probe_options import open_set
from dinocell.configs.load import find_recipe, load_config
from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.files import MultichannelSource
from dinocell.demo.synthetic.field import CELL_SHAPES, CELL_TYPES, SyntheticConfig, make_field
from dinocell.eval.probes.consistency import channel_consistency
from dinocell.eval.probes.features import FeatureSettings, extract
from dinocell.eval.probes.knn import knn_scores
from dinocell.images.write import write_tiff
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import load_backbone
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.train import pretrain

STAINS = ("DNA", "RNA", "ER", "AGP", "Mito")
WITHHELD = "Mito"
NEIGHBOURS = 10
GALLERY, QUERIES = 300, 300
# A field shows a handful of cells, all of one class.
LOOKS = SyntheticConfig(size=(128, 128), num_cells=(6, 12), channels=STAINS, cell_types=CELL_TYPES)
SHAPES = replace(LOOKS, cell_types=CELL_SHAPES)
NUM_CLASSES = len(CELL_TYPES)
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
ARMS = ("consistency", "average")
Probe = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("channel-consistency"), help="data and runs are kept here")
    parser.add_argument("--fields", type=int, default=3000, help="for pretraining")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="several processes may share them")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--shapes", action="store_true", help="classes that differ in shape alone, not in texture")
    parser.add_argument("--real", type=Path, nargs="+", default=[], metavar="SHARDS", help="also look at real fields")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of both arms")
    parser.add_argument("--result", default="channel_consistency", help="name of the result file")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.fields, options.seeds, options.set = 64, [0], [*options.set, "steps=4", "batch_size=4"]
    look = SHAPES if options.shapes else LOOKS
    folder = options.folder / "shapes" if options.shapes else options.folder
    shards = make_shards(folder, options.fields, look)
    few = 40 if options.quick else None
    rows: dict[str, list[Mapping[str, float]]] = {}
    for seed in options.seeds:
        for arm in ("random weights", *options.arms):
            output = folder / f"{arm.replace(' ', '-')}-{seed}"
            policy = arm if arm in options.arms else "consistency"
            overrides = [f"output={output}", f"data.shards=[{shards}]", f"views.policy={policy}", f"seed={seed}"]
            config = load_config(PretrainConfig, find_recipe("pretrain", "tiny_cpu"), [*overrides, *options.set])
            if not rows:
                side = config.views.global_size
                probes = [
                    make_probe_set(folder / name, first, few or count, side, look)
                    for name, first, count in (("gallery.pt", 10**6, GALLERY), ("queries.pt", 2 * 10**6, QUERIES))
                ]
                found = measure(*((quantiles(views), classes) for views, classes in probes))
                rows["no network"] = [{name: value for name, value in found.items() if "class" in name}]
            measured = partial(measure_arm, config, probes, options.real, untrained=arm not in options.arms)
            rows.setdefault(arm, []).append(remembered(output.with_suffix(".json"), measured))
            print(arm, seed, {name: round(value, 3) for name, value in rows[arm][-1].items()}, flush=True)
    text = table(rows)
    print(text)
    if not options.quick:
        write_result(options.result, f"{heading(config, options.fields, look)}\n\n{text}", ["torch", "numpy"])


def measure_arm(
    config: PretrainConfig, probes: Sequence[Probe], real: Sequence[Path], *, untrained: bool
) -> dict[str, float]:
    """Return the numbers of an arm, whose run is taken, or continued if it is not finished."""
    backbone = (
        random_weights(config) if untrained else load_backbone(str(pretrain(config)), patch_size=8, in_channels=1)
    )
    found = measure(*((features(backbone, views), classes) for views, classes in probes))
    return found | real_margins(backbone, real, config.views.global_size)


def remembered(path: Path, measure_now: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what was measured before, or measure and keep it."""
    if not path.exists():
        path.write_text(json.dumps(measure_now()))
    found: dict[str, float] = json.loads(path.read_text())
    return found


def make_shards(folder: Path, fields: int, look: SyntheticConfig) -> Path:
    """Generate the fields for pretraining, without the withheld stain, and build a shard set of them."""
    images, shards = folder / "images", folder / "shards"
    if not (shards / "manifest.json").exists():
        images.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(make_image, images, look), range(fields), chunksize=16))
        settings = ShardSettings(tiles=TileSettings(size=0, min_size=64, min_contrast=0))
        build(MultichannelSource(input=str(images)), shards, settings=settings, samples_per_shard=128)
    return shards


def make_image(folder: Path, look: SyntheticConfig, number: int) -> None:
    """Write a field without the withheld stain, if it is not there."""
    path = folder / f"field{number:05d}.ome.tif"
    if not path.exists():
        keep = [channel for channel, name in enumerate(STAINS) if name != WITHHELD]
        names = tuple(STAINS[channel] for channel in keep)
        write_tiff(path, field(number, look)[keep], channel_names=names, pixel_size_um=0.65)


def field(number: int, look: SyntheticConfig) -> np.ndarray:
    """Return a field of cells of one class, number modulo 4 (c h w)."""
    weights = tuple(float(each == number % NUM_CLASSES) for each in range(NUM_CLASSES))
    pixels: np.ndarray = make_field(number, replace(look, class_weights=weights)).pixels
    return pixels


def make_probe_set(path: Path, first: int, count: int, side: int, look: SyntheticConfig) -> Probe:
    """Return standardised fields, every stain alone and the mean of the trained ones last (b 6 h w), and classes.

    They are scaled to ``side`` pixels, that of a global crop.
    """
    if not path.exists():
        made = np.stack([field(first + number, look) for number in range(count)]).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save((torch.from_numpy(made), torch.arange(first, first + count) % NUM_CLASSES), fresh)
        fresh.replace(path)
    pixels, classes = torch.load(path)
    # The levels of the pretraining: percentiles of all images of a stain are 0 and 1.
    sample = pixels[:64].transpose(0, 1).flatten(1)
    low, high = (torch.quantile(sample[:, ::7], q, dim=1)[:, None, None] for q in (0.001, 0.999))
    unit = ((pixels - low) / (high - low)).clamp(0, 1)
    trained = [number for number, name in enumerate(STAINS) if name != WITHHELD]
    views = torch.cat((unit, unit[:, trained].mean(1, keepdim=True)), dim=1)
    # As a global crop of the whole field: the scale that the training has seen.
    return standardised(views, side), classes


def standardised(views: torch.Tensor, side: int) -> torch.Tensor:
    """Scale to ``side`` pixels and standardise each (b c h w)."""
    views = torch.nn.functional.interpolate(views, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return (views - views.mean((2, 3), keepdim=True)) / (views.std((2, 3), keepdim=True) + 1e-5)


def quantiles(views: torch.Tensor) -> torch.Tensor:
    """Return what is known of standardised views without a network (b c d), each number in its own deviations."""
    found = torch.quantile(views.flatten(2), torch.tensor(QUANTILES), dim=2).permute(1, 2, 0)
    return (found - found.mean(0)) / found.std(0)


def real_margins(backbone: VisionTransformer, sets: Sequence[Path], side: int) -> dict[str, float]:
    """Return the margin of channel consistency on real fields, by shard set."""
    settings = FeatureSettings(channels="each", crop_size=0, resize_size=side)
    found = {path.name: extract(backbone, open_set(str(path)), settings).tensor() for path in sets}
    return {f"margin, {name}": channel_consistency(of_set).margin for name, of_set in found.items()}


def random_weights(config: PretrainConfig) -> VisionTransformer:
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


def measure(gallery: Probe, queries: Probe) -> dict[str, float]:
    """Return the numbers of a row of the table; ``gallery`` and ``queries`` hold features (b c d), not views."""
    (known, classes), (asked, wanted) = gallery, queries
    withheld, mean = STAINS.index(WITHHELD), len(STAINS)
    trained = [channel for channel in range(len(STAINS)) if channel != withheld]
    centre = known.mean((0, 1))  # what all images share says nothing
    known, asked = known - centre, asked - centre

    def accuracy(train: int, test: int) -> float:
        votes = knn_scores(known[:, train], classes, asked[:, test], ks=[NEIGHBOURS], num_classes=NUM_CLASSES)
        return float((votes[NEIGHBOURS].argmax(1) == wanted).float().mean())

    seen, everything = channel_consistency(asked[:, trained]), channel_consistency(asked[:, : len(STAINS)])
    return {
        "margin, trained stains": seen.margin,
        "margin, with the withheld": everything.margin,
        "retrieval, with the withheld": everything.retrieval,
        "class, stain among itself": statistics.mean(accuracy(channel, channel) for channel in trained),
        "class, stain among means": statistics.mean(accuracy(mean, channel) for channel in trained),
        "class, withheld among means": accuracy(mean, withheld),
        "class, withheld among withheld": accuracy(withheld, withheld),
    }


def table(rows: Mapping[str, list[Mapping[str, float]]]) -> str:
    """Return the table: mean over seeds, and the range."""
    names = list(next(row for row in reversed(rows.values()))[0])
    lines = [f"| arm | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, measured in rows.items():
        cells = []
        for name in names:
            values = [each[name] for each in measured if name in each]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(config: PretrainConfig, fields: int, look: SyntheticConfig) -> str:
    views = config.views
    return (
        f"# Channel consistency\n\n{fields:,} generated fields of 128 px in {len(STAINS) - 1} stains, crops of "
        f"{views.global_size} and {views.local_size} px, ViT-{config.model.variant}, {config.steps:,} steps of "
        f"{config.batch_size}; {GALLERY} known and {QUERIES} asked fields, classes: "
        f"{', '.join(kind.name for kind in look.cell_types)}; {NEIGHBOURS} neighbours, CLS tokens less their "
        f"mean. {WITHHELD} is in no training set."
    )


if __name__ == "__main__":
    main()
