"""What do the probes say of a backbone before and after pretraining, and of no backbone at all?

    python benchmarks/pretrained_probes.py                # 12 minutes of one core; writes a result file
    python benchmarks/pretrained_probes.py --quick        # a few steps, fewer fields; writes nothing
    python benchmarks/pretrained_probes.py --steps 1500   # longer runs; writes nothing

Generated fields of cells of one class each, in five stains. Rows: mean, deviation and nine quantiles of each stain's
pixels, without any network; a backbone with random weights; the same after pretraining on other fields of the same kind
without their classes. Each stain alone goes through the network, features of the stains are concatenated. The interval
is of the asked fields (bootstrap), not of the training: there are few seeds, and each is a row.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _harness import write_result
from channel_consistency import STAINS, field

from dinocell.configs.load import find_recipe, load_config
from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.field import Field, FieldFile
from dinocell.demo.synthetic.field import CELL_TYPES
from dinocell.eval.probes.classification import multiclass_f1
from dinocell.eval.probes.consistency import channel_consistency
from dinocell.eval.probes.features import FeatureSettings, extract
from dinocell.eval.probes.image_sets import ShardImages
from dinocell.eval.probes.knn import knn_scores
from dinocell.eval.probes.linear import LinearSettings, choose, split_off, train_grid
from dinocell.images.write import write_tiff
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import load_backbone
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.train import pretrain

NEIGHBOURS, RESAMPLES = 10, 1000
NAMES = tuple(each.name for each in CELL_TYPES)
# Pixels to which a field is scaled: the recipe's global crops.
SETTINGS = FeatureSettings(channels="each", resize_size=64, avgpool=True)
QUANTILES = np.linspace(0.1, 0.9, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, help="of each training (240)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--policies", nargs="+", default=["average", "consistency"])
    options = parser.parse_args()
    fields, probed, steps, seeds = (48, 24, 4, 1) if options.quick else (1000, 300, options.steps or 240, options.seeds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_set(folder / "unlabelled", 0, fields)
        known, asked = (ShardImages(make_set(folder / f"{each}m", each * 10**6, probed)) for each in (1, 2))
        rows = {"pixel statistics, no network": probe(statistics_of(known), statistics_of(asked))}
        for seed in range(seeds):
            config = config_of(folder, shards, "average", seed, steps)
            rows[f"random weights, seed {seed}"] = probe_backbone(untrained(config, seed), known, asked)
            for policy in options.policies:
                teacher = pretrain(config_of(folder, shards, policy, seed, steps))
                backbone = load_backbone(str(teacher), patch_size=8, in_channels=1)
                rows[f"pretrained with `{policy}`, seed {seed}"] = probe_backbone(backbone, known, asked)
    columns = list(next(iter(reversed(rows.values()))))
    lines = [
        "# Probes before and after pretraining",
        "",
        f"{fields:,} generated fields of 128 px in {len(STAINS)} stains without classes; recipe `tiny_cpu` with the "
        f"nano backbone, {steps} steps of {config.batch_size}. {probed} known and {probed} asked fields of "
        f"{len(NAMES)} classes (guessing: F1 {1 / len(NAMES):.2f}; retrieval {1 / probed:.4f}). Macro F1 of the "
        f"{NEIGHBOURS} nearest and of a linear classifier, chosen on a tenth of the known fields; in brackets, 95 % "
        "intervals over asked fields.",
        "",
        f"| features | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {each} | {' | '.join(row.get(column, '') for column in columns)} |" for each, row in rows.items()),
    ]
    text = "\n".join(lines)
    print(text)
    if options == parser.parse_args([]):
        write_result("pretrained_probes", text, ["torch", "numpy"])


@dataclass(frozen=True)
class Generated:
    """Fields whose number modulo 4 is the class of their cells; a source of shards."""

    folder: Path
    first: int
    count: int

    def fields(self) -> Iterator[Field]:
        """Draw them."""
        self.folder.mkdir()
        for number in range(self.first, self.first + self.count):
            path = self.folder / f"{number}.tif"
            write_tiff(path, field(number), pixel_size_um=0.65)
            label = NAMES[number % len(NAMES)]
            yield Field(
                id=str(number), files=(FieldFile(path=str(path), channels=STAINS),), labels={"cell_class": label}
            )


def make_set(folder: Path, first: int, count: int) -> Path:
    settings = ShardSettings(tiles=TileSettings(size=0, min_size=64, min_contrast=0))
    build(Generated(folder.with_suffix(".images"), first, count), folder, settings=settings, workers=1)
    return folder


def config_of(folder: Path, shards: Path, policy: str, seed: int, steps: int) -> PretrainConfig:
    overrides = [f"output={folder / policy}-{seed}", f"data.shards=[{shards}]", f"views.policy={policy}"]
    overrides += [
        f"seed={seed}",
        f"steps={steps}",
        f"export_every={steps}",
        "model.variant=nano",
        "online_eval.every=0",
    ]
    return load_config(PretrainConfig, find_recipe("pretrain", "tiny_cpu"), [*overrides, "compute.workers=0"])


def untrained(config: PretrainConfig, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    vit = VisionTransformer(variant_config(config.model.variant, patch_size=8, in_channels=1))
    vit.init_weights(layer_scale=config.model.layer_scale)
    return vit.eval()


Labelled = tuple[torch.Tensor, torch.Tensor]


def features_of(backbone: VisionTransformer, images: ShardImages) -> Labelled:
    """Return features of each stain (n c d), and classes."""
    found = extract(backbone, images, SETTINGS)
    return found.tensor(), classes([row["cell_class"] for row in found.labels])


def statistics_of(images: ShardImages) -> Labelled:
    """Return mean, deviation and quantiles of each stain's pixels, (n c 11), each brought to deviation 1."""
    rows, names = [], []
    for image in images.images(0, len(images)):
        assert image.pixels is not None
        flat = image.pixels.reshape(len(STAINS), -1)
        rows.append(np.concatenate([flat.mean(1)[None], flat.std(1)[None], np.quantile(flat, QUANTILES, axis=1)]).T)
        names.append(image.labels["cell_class"])
    values = np.stack(rows)
    return torch.from_numpy((values - values.mean(0)) / (values.std(0) + 1e-6)).float(), classes(names)


def classes(names: list[object]) -> torch.Tensor:
    return torch.tensor([NAMES.index(str(each)) for each in names])


def probe(known: Labelled, asked: Labelled) -> dict[str, str]:
    """Return the cells of a row that any features have."""
    (train, labels), (test, wanted) = ((values.flatten(1), names) for values, names in (known, asked))
    votes = knn_scores(train, labels, test, ks=[NEIGHBOURS], num_classes=len(NAMES))[NEIGHBOURS]
    settings = LinearSettings(epochs=10, epoch_steps=100)
    learn, held = split_off(len(train), settings.validation_share, seed=0)
    grid = train_grid(train[learn], labels[learn], settings, num_classes=len(NAMES))
    choice = choose(grid, train[held], labels[held], settings, multiclass_f1)
    logits = grid.scores(test, which=choice.which)
    return {"kNN": interval(votes, wanted), "linear": interval(logits, wanted)}


def probe_backbone(backbone: VisionTransformer, known: ShardImages, asked: ShardImages) -> dict[str, str]:
    """Return the cells of a backbone's row: it can be asked for the same field through another stain, too."""
    first, second = (features_of(backbone, each) for each in (known, asked))
    found = channel_consistency(second[0])
    said = {"margin over stains": f"{found.margin:.3f}", "retrieval over stains": f"{found.retrieval:.3f}"}
    return probe(first, second) | said


def interval(scores: torch.Tensor, wanted: torch.Tensor) -> str:
    rng = np.random.default_rng(0)
    drawn = (torch.from_numpy(rng.integers(len(wanted), size=len(wanted))) for _ in range(RESAMPLES))
    low, high = np.quantile([multiclass_f1(scores[which], wanted[which]).value for which in drawn], (0.025, 0.975))
    return f"{multiclass_f1(scores, wanted).value:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
