"""Shards, pretraining and a probe in a few lines, on generated fields of four classes of cells.

    python examples/pretrain_and_probe.py runs/example    # the recipe tiny_cpu: 300 steps
    python examples/pretrain_and_probe.py --quick         # a few steps: the numbers mean nothing

The class of a field is in its file's name and is never used for training: the probe asks whether the nearest neighbours
in the features know it, for the trained backbone and for one with random weights.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dinocell.configs.load import find_recipe, load_config
from dinocell.data_shards.build import build
from dinocell.data_shards.sources.files import PatternSource
from dinocell.demo.synthetic.field import CELL_TYPES, SyntheticConfig, make_field
from dinocell.eval.probes.features import FeatureSettings, extract
from dinocell.eval.probes.image_sets import ShardImages
from dinocell.eval.probes.knn import knn_scores
from dinocell.images.write import write_tiff
from dinocell.models.vit import VisionTransformer
from dinocell.models.weights import load_backbone
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.train import pretrain


def write_fields(folder: Path, seeds: range, size: int) -> None:
    """Write a five-stain field of each class for each seed, as NAME_SEED.ome.tif."""
    folder.mkdir(parents=True)
    for kind, cell in enumerate(CELL_TYPES):
        pure = tuple(float(kind == other) for other in range(len(CELL_TYPES)))
        look = SyntheticConfig(size=(size, size), num_classes=len(CELL_TYPES), class_weights=pure, num_cells=(8, 16))
        for seed in seeds:
            field = make_field(1000 * kind + seed, look)
            write_tiff(folder / f"{cell.name}_{seed}.ome.tif", field.pixels, channel_names=field.channel_names)


def build_shards(folder: Path, output: Path) -> Path:
    """Turn the files into a shard set; ``{cell}`` becomes a label of each sample."""
    build(PatternSource(input=str(folder), pattern="{cell}_{site}.ome.tif"), output, workers=1)
    return output


def knn_accuracy(backbone: VisionTransformer, known: Path, asked: Path) -> float:
    """Return the share of fields whose 5 nearest neighbours among the known ones vote for their class."""
    settings = FeatureSettings(channels="bag", crop_size=128)
    train, test = (extract(backbone, ShardImages(shards), settings) for shards in (known, asked))
    names = [cell.name for cell in CELL_TYPES]
    wanted = [torch.tensor([names.index(str(row["cell"])) for row in found.labels]) for found in (train, test)]
    votes = knn_scores(train.tensor(), wanted[0], test.tensor(), ks=[5], num_classes=len(names))[5]
    return float((votes.argmax(1) == wanted[1]).float().mean())


def main(output: Path, *, fields: int, size: int, overrides: list[str]) -> None:
    """Generate, build, pretrain, probe."""
    write_fields(output / "fields", range(fields), size)
    write_fields(output / "unseen", range(500, 500 + max(2, fields // 3)), size)
    shards = build_shards(output / "fields", output / "shards")
    unseen = build_shards(output / "unseen", output / "unseen_shards")
    settings = [f"data.shards=[{shards}]", f"output={output / 'run'}", *overrides]
    teacher = pretrain(load_config(PretrainConfig, find_recipe("pretrain", "tiny_cpu"), settings))
    backbone = load_backbone(teacher)
    torch.manual_seed(0)
    print(f"random weights: {knn_accuracy(VisionTransformer(backbone.config).eval(), shards, unseen):.2f}")
    print(f"pretrained:     {knn_accuracy(backbone, shards, unseen):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=Path("runs/example"))
    parser.add_argument("--quick", action="store_true", help="few small fields, three steps")
    options = parser.parse_args()
    if options.quick:
        small = [
            "model.variant=nano",
            "steps=3",
            "batch_size=4",
            "views.global_size=64",
            "views.local_size=32",
            "compute.workers=0",
        ]
        small += ["image_every=100", "export_every=3", "log_every=1"]
        with TemporaryDirectory() as scratch:
            main(Path(scratch) / "example", fields=3, size=128, overrides=small)
    else:
        main(options.output, fields=30, size=256, overrides=[])
