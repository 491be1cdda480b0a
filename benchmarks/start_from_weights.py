"""Does pretraining that starts from a good teacher harm it? Fresh heads could: by default the backbone rests at first.

    python benchmarks/start_from_weights.py           # 3 seeds, some minutes on a core; writes a result file
    python benchmarks/start_from_weights.py --quick   # 1 seed of 40 steps; writes nothing

Four kinds of textures in three channels, 32 px. The start is a teacher that knows the kinds, because it was told them;
runs of 200 steps start from its file, with new heads: as shipped (`schedules.backbone`, the default rate), and at a
hundred times that rate with and without rest. What counts is the kNN accuracy of the kind, of every sample the mean of
its channels. The noise is that of the queries: the standard error of the difference of two accuracies, from the answers
themselves.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _harness import write_result
from scipy.ndimage import gaussian_filter

from dinocell.data_shards.build import build
from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import stream
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.field import Field, FieldFile
from dinocell.eval.probes.knn import knn_scores
from dinocell.images.write import write_tiff
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import Weights, load_backbone, save_weights
from dinocell.runtime.schedules import Freeze, Schedule
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    OnlineEvalConfig,
    PretrainConfig,
    Schedules,
    ViewsConfig,
)
from dinocell.ssl.train import pretrain

SIDE, NEIGHBOURS = 32, 5
NUM_KINDS = 4
_TAUGHT = 150
_START, _SHIPPED = "the teacher that they start from", "as shipped"
HIGH_RATE = Schedules(
    learning_rate=Schedule(peak=0.05, end=1e-5, warmup=0.1),
    teacher_momentum=Schedule(peak=0.98, end=1.0),
    teacher_temperature=Schedule(peak=0.02),
)


@dataclass(frozen=True)
class Textures:
    """Fields of one texture each, number modulo 4 says which; a source of shards."""

    folder: str
    first: int
    count: int

    def fields(self) -> Iterator[Field]:
        """Draw them."""
        for number in range(self.first, self.first + self.count):
            path = Path(self.folder) / f"{number}.tif"
            write_tiff(path, texture(number), pixel_size_um=0.65)
            yield Field(
                id=str(number),
                files=(FieldFile(path=str(path), channels=("DNA", "ER", "AGP")),),
                labels={"kind": str(number % NUM_KINDS)},
            )


def texture(number: int) -> np.ndarray:
    """Return three channels of one kind, (3 h w) uint16: fine or coarse noise, stripes, patches with sharp edges.

    None is another one turned, mirrored or enlarged: views of a kind stay of that kind.
    """
    rng = np.random.default_rng(number)
    kind = number % NUM_KINDS
    sigma = (((0.7, 0.7), (2.5, 2.5), (0.5, 4.0), (2.0, 2.0))[kind])[:: rng.choice((1, -1))]
    planes = [gaussian_filter(rng.normal(size=(SIDE, SIDE)), sigma) for _ in range(3)]
    if kind == NUM_KINDS - 1:
        planes = [np.sign(plane) for plane in planes]
    pixels = np.stack([1000 + 300 * plane / plane.std() for plane in planes]) + rng.normal(0, 150, (3, SIDE, SIDE))
    found: np.ndarray = pixels.clip(0).round().astype(np.uint16)
    return found


def standardised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - pixels.mean((-2, -1), keepdim=True)) / pixels.std((-2, -1), keepdim=True)


def teach(path: Path, *, steps: int, seed: int) -> Path:
    """Train a backbone to name the kinds, and write it as a teacher's file."""
    torch.manual_seed(seed)
    vit = VisionTransformer(variant_config("nano", patch_size=8, in_channels=1))
    vit.init_weights(layer_scale=0.5)
    head = torch.nn.Linear(vit.config.width, NUM_KINDS)
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-3)
    for step in range(steps):
        numbers = range(3 * 10**6 + 32 * step, 3 * 10**6 + 32 * (step + 1))
        pixels = torch.from_numpy(np.stack([texture(number)[:1].astype(np.float32) for number in numbers]))
        logits = head(vit(standardised(pixels)).cls)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([number % NUM_KINDS for number in numbers]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    settings = replace(vit.card.input, convention="standardised")
    vit.card = replace(vit.card, input=settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, Weights.of(vit))
    return path


def make_sets(folder: Path, *, train: int, known: int, asked: int) -> dict[str, Path]:
    """Build a shard set for training, and labelled ones whose samples vote and are asked."""
    sets = {}
    for name, first, count in (("train", 0, train), ("known", 10**6, known), ("asked", 2 * 10**6, asked)):
        sets[name] = folder / f"{name}-set"
        (folder / name).mkdir(parents=True)
        settings = ShardSettings(tiles=TileSettings(size=SIDE, min_size=SIDE, min_contrast=0))
        build(Textures(str(folder / name), first, count), sets[name], settings=settings, workers=1)
    return sets


def recipe(shards: Path, output: Path, *, steps: int, seed: int, start: Path) -> PretrainConfig:
    """Return a small run from a teacher, with the default schedules and the default rest."""
    return PretrainConfig(
        output=output,
        data=DataConfig(shards=(str(shards),)),
        seed=seed,
        steps=steps,
        batch_size=6,
        views=ViewsConfig(global_size=32, local_size=16, num_local=2, local_area=(0.2, 0.5)),
        model=ModelConfig(variant="nano", drop_path=0.0, weights=str(start)),
        heads=HeadsConfig(num_prototypes=128, hidden=64, bottleneck=32, weight_norm=True),
        losses=LossConfig(centring="softmax"),
        log_every=steps,
        image_every=10**9,
        export_every=10**9,
        checkpoint_every=10**9,
        online_eval=OnlineEvalConfig(every=0),
        compute=ComputeConfig(workers=0),
    )


@torch.no_grad()
def answers(teacher: Path, sets: Mapping[str, Path]) -> torch.Tensor:
    """Return which of the asked samples are named rightly."""
    backbone = load_backbone(str(teacher))
    features, kinds = [], []
    for name in ("known", "asked"):
        count = read_manifest(sets[name]).num_samples
        batch = next(iter(stream(sets[name], batch_size=count, shuffle=False)))
        pixels = torch.stack([batch.tile(number).float() for number in range(len(batch))])
        views = standardised(pixels)
        cls = backbone(views.flatten(0, 1)[:, None]).cls.unflatten(0, views.shape[:2])
        features.append(cls.mean(1))
        kinds.append(torch.tensor([int(info.labels["kind"]) for info in batch.infos]))
    votes = knn_scores(features[0], kinds[0], features[1], ks=[NEIGHBOURS], num_classes=NUM_KINDS)
    return votes[NEIGHBOURS].argmax(1) == kinds[1]


def standard_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return that of the difference of two accuracies on the same samples."""
    return float((after.float() - before.float()).std()) / math.sqrt(len(before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    known, asked = (60, 120) if options.quick else (240, 600)
    if options.quick:
        options.seeds, options.steps = 1, 40
    rows: dict[str, list[float]] = {}
    errors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = make_sets(folder, train=120, known=known, asked=asked)
        for seed in range(options.seeds):
            found = run_seed(folder / str(seed), sets, seed=seed, steps=options.steps)
            errors.append(standard_error(found[_START], found[_SHIPPED]))
            for arm, right in found.items():
                rows.setdefault(arm, []).append(float(right.float().mean()))
            print(seed, {arm: round(values[-1], 3) for arm, values in rows.items()}, flush=True)
    lines = [
        "# Starting from weights",
        "",
        f"ViT-nano/8, {NUM_KINDS} kinds of textures, {known} known and {asked} asked samples, {NEIGHBOURS} "
        f"neighbours; runs of {options.steps} steps of 6 tiles, learning rate of the schedule "
        f"{Schedules().learning_rate.peak:g} as shipped and {HIGH_RATE.learning_rate.peak:g} at the high rate. "
        f"Accuracy: mean over {options.seeds} seeds and range; chance is {1 / NUM_KINDS:.2f}. "
        f"Standard error of a difference of one seed, from the asked samples: {statistics.mean(errors):.3f}.",
        "",
        "| teacher | accuracy | less that of the start |",
        "|---|---|---|",
    ]
    start = rows[_START]
    for arm, values in rows.items():
        difference = [value - before for value, before in zip(values, start, strict=True)]
        lines.append(f"| {arm} | {spread(values)} | {spread(difference)} |")
    text = "\n".join(lines)
    print(text)
    if not options.quick:
        write_result("start_from_weights", text, ["torch", "numpy"])


def run_seed(folder: Path, sets: Mapping[str, Path], *, seed: int, steps: int) -> dict[str, torch.Tensor]:
    """Train a teacher and the runs from it; return which asked samples each names rightly."""
    start = teach(folder / "start.pth", steps=_TAUGHT, seed=seed)
    shipped = recipe(sets["train"], folder / "shipped", steps=steps, seed=seed, start=start)
    rested = replace(shipped, output=folder / "rested", schedules=HIGH_RATE)
    restless = replace(rested, output=folder / "restless", schedules=replace(HIGH_RATE, backbone=Freeze()))
    return {
        "random weights": answers(teach(folder / "random.pth", steps=0, seed=seed), sets),
        _START: answers(start, sets),
        _SHIPPED: answers(pretrain(shipped), sets),
        "at a high rate": answers(pretrain(rested), sets),
        "at a high rate, without rest": answers(pretrain(restless), sets),
    }


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
