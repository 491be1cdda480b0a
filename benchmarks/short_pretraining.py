"""What do the CLS tokens of a short pretraining run learn, and which settings decide about it?

    python benchmarks/short_pretraining.py --folder RUNS                      # all arms, three seeds; hours on one core
    python benchmarks/short_pretraining.py --folder RUNS --arms winner --seeds 0
    python benchmarks/short_pretraining.py --folder RUNS --table              # only writes the result file
    python benchmarks/short_pretraining.py --quick                            # a few steps; writes no result file

Eight classes of generated textures, a ViT of width 64 with 3 blocks, the recipe `tiny_cpu` with some settings changed,
the product's trainer on one thread, 9,600 images per arm. kNN and a linear probe classify the CLS tokens of held-out
images. Every (arm, seed) is one file in RUNS: a second start skips what is complete, and the result file holds what
exists.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from _harness import write_result
from _short_runs import (
    WIDTH_64,
    Batches,
    mean_and_range,
    random_backbone,
    stored,
    stored_by_seed,
    train,
    use_one_thread,
)
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from dinocell.configs.load import find_recipe, load_config
from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.files import ImagesSource
from dinocell.demo.synthetic.cells import SHEET_PX, blurred, sheets, smooth_noise
from dinocell.eval.probes.knn import knn_scores
from dinocell.images.write import write_tiff
from dinocell.models.vit import VisionTransformer
from dinocell.runtime.schedules import Schedule, value_at
from dinocell.ssl.config import PretrainConfig

IMAGES = 9600
FIELDS = 2400
FIELD_PX = 96
TRAIN, TEST = 800, 800
NEIGHBOURS = 10
SEEDS = (0, 1, 2)
# Sheet of the product's generator, pixels of the sheet per pixel of the image (small: coarse), stretch along the axis.
CLASSES = (
    ("grain", 1.0, 1.0),
    ("grain", 0.4, 1.0),
    ("filaments", 1.0, 1.0),
    ("filaments", 0.5, 1.0),
    ("fibres", 0.5, 1.0),
    ("net", 1.0, 1.0),
    ("specks", 1.0, 1.0),
    ("specks", 0.5, 1.0),
)

SHORT = ("views.policy=average", "online_eval.every=0", "compute.workers=0", f"model.variant={WIDTH_64}")
BATCH_64, BATCH_16 = ("batch_size=64", "steps=150"), ("batch_size=16", "steps=600")


def momentum(first: float, last: float) -> tuple[str, str]:
    return f"schedules.teacher_momentum.peak={first}", f"schedules.teacher_momentum.end={last}"


# The settings of `tiny_cpu` until December 2026.
FORMER = (
    "losses.centring=softmax",
    "heads.num_prototypes=1024",
    *momentum(0.99, 1.0),
    "optim.layer_decay=0.9",
    "optim.patch_embedding_factor=0.2",
)
EVEN_RATES = ("optim.layer_decay=1.0", "optim.patch_embedding_factor=1.0")
SHARED = ("losses.centring=sinkhorn", "schedules.teacher_temperature.peak=0.02", *EVEN_RATES)
WINNER = (*BATCH_16, *SHARED, "heads.num_prototypes=32", *momentum(0.97, 0.997))
LARGE_BATCH = (*BATCH_64, *SHARED, "heads.num_prototypes=128", *momentum(0.9, 0.99))
# Name in file names: words in the table, settings of the recipe (later ones override earlier ones).
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "random": ("random weights", BATCH_16),
    "shipped_64": ("former `tiny_cpu`, batch 64 x 150 steps", (*BATCH_64, *FORMER)),
    "shipped_16": ("former `tiny_cpu`, batch 16 x 600 steps", (*BATCH_16, *FORMER)),
    "winner": (
        "**16 x 600, Sinkhorn, 32 prototypes, temperature .02, teacher momentum .97 to .997, `layer_decay` and "
        "`patch_embedding_factor` 1**",
        WINNER,
    ),
    "simclr": ("SimCLR (InfoNCE of the CLS tokens of two global views), batch 64 x 150", BATCH_64),
    "simclr_time": (
        "the same for the CPU time of the winner, batch 64 x 250 (16,000 images)",
        ("batch_size=64", "steps=250"),
    ),
    "winner_momentum": ("winner with momentum .99 to 1 (as formerly)", (*WINNER, *momentum(0.99, 1.0))),
    "winner_centre": ("winner with the running centre (as formerly)", (*WINNER, "losses.centring=softmax")),
    "winner_decay": ("winner with `layer_decay` .9", (*WINNER, "optim.layer_decay=0.9")),
    "winner_128": ("winner with 128 prototypes", (*WINNER, "heads.num_prototypes=128")),
    "winner_1024": ("winner with 1,024 prototypes", (*WINNER, "heads.num_prototypes=1024")),
    "winner_reconstruction": (
        "winner with `losses.reconstruction.weight` 1",
        (*WINNER, "losses.reconstruction.weight=1.0"),
    ),
    "large": ("batch 64 x 150, Sinkhorn, 128 prototypes, momentum .9 to .99", LARGE_BATCH),
    "large_temperature": (
        "the same with temperature .05",
        (*LARGE_BATCH, "schedules.teacher_temperature.peak=0.05"),
    ),
    "large_koleo": ("the same with KoLeo weight 1", (*LARGE_BATCH, "losses.koleo_weight=1.0")),
    "large_momentum": ("the same with momentum .5 throughout", (*LARGE_BATCH, *momentum(0.5, 0.5))),
    "large_rate": ("the same with twice the learning rate", (*LARGE_BATCH, "schedules.learning_rate.peak=0.008")),
}
UNTRAINED, PIXELS = "random", "pixels"
Probe = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("short-pretraining"), help="data and results are kept here")
    parser.add_argument("--arms", nargs="+", choices=[PIXELS, *ARMS], default=[PIXELS, *ARMS])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="train nothing, write the result file")
    parser.add_argument("--no-table", action="store_true", help="write no result file, for one of several processes")
    parser.add_argument("--quick", action="store_true", help="a few steps of three arms in a temporary folder")
    options = parser.parse_args()
    use_one_thread()
    if options.quick:
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for arm in (PIXELS, UNTRAINED, "winner", "simclr"):
                run_arm(folder, arm, 0, fields=64, images=128, probe_size=64)
            print(table(folder))
        return
    if not options.table:
        for seed in options.seeds:
            for arm in options.arms:
                numbers = run_arm(options.folder, arm, seed, fields=FIELDS, images=IMAGES, probe_size=TRAIN)
                print(arm, seed, {name: round(value, 3) for name, value in numbers.items()}, flush=True)
    if options.no_table:
        return
    text = f"{heading()}\n\n{table(options.folder)}"
    print(text)
    print(write_result("short_pretraining", text, ["torch", "numpy", "scikit-learn"]))


def run_arm(folder: Path, arm: str, seed: int, *, fields: int, images: int, probe_size: int) -> dict[str, float]:
    """Return the numbers of an arm, from its file or measured."""
    return stored(
        folder / "results" / f"{arm}-seed{seed}.json",
        lambda: measure_arm(folder, arm, seed, fields=fields, images=images, probe_size=probe_size),
    )


def measure_arm(folder: Path, arm: str, seed: int, *, fields: int, images: int, probe_size: int) -> dict[str, float]:
    shards = make_shards(folder, fields)
    settings = ARMS[arm][1] if arm in ARMS else BATCH_16
    places = [f"output={folder / 'unused'}", f"data.shards=[{shards}]", f"seed={seed}"]
    recipe = find_recipe("pretrain", "tiny_cpu")
    config = load_config(PretrainConfig, recipe, [*places, *SHORT, *settings])
    if images != IMAGES:
        short = f"steps={images // config.batch_size}"
        config = load_config(PretrainConfig, recipe, [*places, *SHORT, *settings, short])
    # The seed draws the held-out images, too: the range over seeds includes what the choice of images makes.
    probes = [
        make_probe(first + 10_000 * seed, probe_size, config.views.global_size) for first in (1_000_000, 2_000_000)
    ]
    if arm == PIXELS:
        return scores(*((pixel_quantiles(views), classes) for views, classes in probes))
    backbones: dict[str, VisionTransformer]
    seconds = 0.0
    if arm == UNTRAINED:
        backbones = {"": random_backbone(config)}
    elif arm.startswith("simclr"):
        backbone, seconds = train_simclr(config)
        backbones = {"": backbone}
    else:
        trained = train(config)
        seconds = trained.cpu_seconds
        backbones = {"": trained.teacher, "student ": trained.student}
    numbers = {"cpu_seconds": seconds}
    for name, backbone in backbones.items():
        found = scores(*((cls_tokens(backbone, views), classes) for views, classes in probes))
        numbers |= {f"{name}{measure}": value for measure, value in found.items()}
    return numbers


def make_shards(folder: Path, fields: int) -> Path:
    """Generate the unlabelled images, and build a shard set of them."""
    images, shards = folder / "images", folder / "shards"
    if not (shards / "manifest.json").exists():
        images.mkdir(parents=True, exist_ok=True)
        for number in range(fields):
            path = images / f"field{number:05d}.tif"
            if not path.exists():
                write_tiff(path, texture(number)[None], channel_names=("texture",))
        settings = ShardSettings(tiles=TileSettings(size=0, min_size=32, min_contrast=0))
        build(ImagesSource(input=str(images)), shards, settings=settings, samples_per_shard=128, workers=1)
    return shards


def texture(number: int) -> np.ndarray:
    """Return an image of class ``number % 8`` (h w): a turned piece of a sheet with uneven light, blur, noise."""
    generator = np.random.default_rng([12, number])
    name, grain, stretch = CLASSES[number % len(CLASSES)]
    angle = generator.uniform(0, 2 * np.pi)
    grain = grain * np.exp(generator.normal(0, 0.08))
    rows, columns = (np.arange(FIELD_PX, dtype=np.float32) - FIELD_PX / 2 for _ in range(2))
    along = np.cos(angle) * columns[None, :] + np.sin(angle) * rows[:, None]
    across = -np.sin(angle) * columns[None, :] + np.cos(angle) * rows[:, None]
    first_row, first_column = generator.uniform(0, SHEET_PX, 2)
    laid = cv2.remap(
        sheets()[name],
        (along * grain / stretch + first_column).astype(np.float32),
        (across * grain + first_row).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    size = (FIELD_PX, FIELD_PX)
    scene = (laid - laid.mean()) / (laid.std() + 1e-6) * generator.uniform(0.4, 0.8)
    scene = scene + 0.05 * smooth_noise(generator, size, 30.0)
    light = 1 + 0.2 * smooth_noise(generator, size, FIELD_PX)
    scene = blurred(np.clip(1.5 + scene, 0.05, None) * light, generator.uniform(0.7, 1.4))
    photons = generator.uniform(1000, 2000)
    noisy = generator.poisson(np.clip(scene, 0.01, None) * photons) + generator.normal(0, 3, size)
    counts: np.ndarray = np.clip(noisy / photons * 10_000, 0, 65535).astype(np.uint16)
    return counts


def make_probe(first: int, count: int, side: int) -> Probe:
    """Return standardised images at the size of a global crop (b 1 s s), and their classes."""
    pixels = torch.from_numpy(np.stack([texture(first + number) for number in range(count)]).astype(np.float32))
    views = F.interpolate(pixels[:, None], (side, side), mode="bilinear", antialias=True, align_corners=False)
    views = (views - views.mean((2, 3), keepdim=True)) / (views.std((2, 3), keepdim=True) + 1e-5)
    return views, torch.arange(first, first + count) % len(CLASSES)


def pixel_quantiles(views: Tensor) -> Tensor:
    """Return what brightness alone says of standardised images, no network (b d)."""
    quantiles = torch.tensor((0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98))
    found = torch.quantile(views.flatten(1), quantiles, dim=1).T
    return (found - found.mean(0)) / found.std(0)


@torch.no_grad()
def cls_tokens(backbone: VisionTransformer, views: Tensor) -> Tensor:
    return torch.cat([backbone(batch).cls for batch in views.split(100)])


def scores(train_set: Probe, test_set: Probe) -> dict[str, float]:
    """Return the accuracies of kNN (cosine, features less their mean) and of logistic regression."""
    (known, classes), (queries, wanted) = train_set, test_set
    centre = known.mean(0)
    votes = knn_scores(known - centre, classes, queries - centre, ks=[NEIGHBOURS], num_classes=len(CLASSES))
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    linear.fit(known.numpy(), classes.numpy())
    return {
        "knn": float((votes[NEIGHBOURS].argmax(1) == wanted).float().mean()),
        "linear": float(linear.score(queries.numpy(), wanted.numpy())),
    }


def train_simclr(config: PretrainConfig) -> tuple[VisionTransformer, float]:
    """Train by InfoNCE between the CLS tokens of the two global views (Chen et al. 2020), and return the CPU time."""
    backbone = random_backbone(config).train()
    width = backbone.config.width
    torch.manual_seed(config.seed)
    head = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=0.0, weight_decay=0.04)
    schedule = Schedule(peak=2e-3, end=1e-5, warmup=0.1)
    start = time.process_time()
    for step, (views, _) in enumerate(Batches(config)):
        for group in optimizer.param_groups:
            group["lr"] = value_at(schedule, step, config.steps)
        rows = F.normalize(head(backbone(views.global_views[:2].flatten(0, 1)).cls), dim=1)
        loss = info_nce(rows, temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone.eval(), time.process_time() - start


def info_nce(rows: Tensor, *, temperature: float) -> Tensor:
    """Return the NT-Xent loss of (2 b) unit rows, of which ``i`` and ``i + b`` show one image."""
    count = len(rows)
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(count).roll(count // 2))


def table(folder: Path) -> str:
    """Return the arms that have been measured: mean over seeds, and the range."""
    lines = ["| arm | seeds | kNN | kNN, student | linear | linear, student | CPU s |", "|---|---|---|---|---|---|---|"]
    words: Mapping[str, str] = {PIXELS: "pixel quantiles, no network"} | {name: arm[0] for name, arm in ARMS.items()}
    for arm, description in words.items():
        found = stored_by_seed(folder / "results", arm)
        if found:
            columns = [column(found, name) for name in ("knn", "student knn", "linear", "student linear")]
            seconds = column(found, "cpu_seconds", digits=0)
            lines.append(f"| {description} | {len(found)} | {' | '.join(columns)} | {seconds} |")
    return "\n".join(lines)


def column(found: Sequence[Mapping[str, float]], name: str, digits: int = 3) -> str:
    return mean_and_range([each[name] for each in found if name in each], digits)


def heading() -> str:
    return (
        f"# Short pretraining: what CLS tokens learn\n\n{FIELDS:,} generated images of {FIELD_PX} px in "
        f"{len(CLASSES)} classes of texture, ViT of width 64 with 3 blocks, recipe `tiny_cpu` with policy `average`, "
        f"{IMAGES:,} images per arm, one thread. {TRAIN} training and {TEST} test images for the probes, other ones "
        f"for each seed; kNN with {NEIGHBOURS} neighbours on centred CLS tokens of the teacher, logistic regression on "
        f"standardised ones; chance {1 / len(CLASSES):.3f}. Mean over seeds (minimum to maximum). CPU time is that of "
        "the training process."
    )


if __name__ == "__main__":
    main()
