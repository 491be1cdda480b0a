"""How much faster than a straight loop does a decoder learn on a frozen backbone, and where does the time go?

    python benchmarks/finetune_frozen.py            # ViT-S/8, 256 px, batch 8; writes results/finetune_frozen.md
    python benchmarks/finetune_frozen.py --ways     # what else could save time; writes results/finetune_frozen_ways.md
    python benchmarks/finetune_frozen.py --quick    # both with tiny, 64 px, batch 2, 2 rounds; writes nothing

A round is one optimiser step of each side, from images and labels in memory to changed weights, everything in one
process. Sides:

- ours: `dinocell finetune` itself: backbone in eval mode without autograd, one affine map a crop by OpenCV, distance
  maps computed anew from the warped labels;
- straight: SAMCell's way of training. The backbone is "frozen" by a learning rate of 0 alone, so it is in train mode
  and autograd goes through it; whole images and their float maps are turned and scaled with SciPy, then cut;
- straight, no autograd: the same without gradients of the backbone, to tell the two causes apart.

``--ways`` measures, with batch 4, what a frozen backbone allows beyond that: larger batches for the backbone
than for the decoder, and for the decoder the memory format and torch.compile. (Features of fixed crops that are kept
on disk were measured in the same way; the option was removed later.)
"""

import argparse
import copy
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _harness import alternate, ratio, write_result
from scipy import ndimage

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.finetune.config import AugmentConfig, ComputeConfig, DataConfig, FinetuneConfig, ModelConfig
from dinocell.finetune.data import prepare_labelled
from dinocell.finetune.model import DINOCell, create_dinocell_model
from dinocell.finetune.train import Training, World
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.distance import labels_to_distance
from dinocell.labelled.layouts import folder_pairs

TARGET_RATIO, TARGET_SHARE = 1.5, 0.35
NUM_IMAGES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", action="store_true", help="measure what else could save time")
    parser.add_argument("--quick", action="store_true", help="tiny, 64 px, batch 2, 2 rounds, no result file")
    options = parser.parse_args()
    if options.ways or options.quick:
        lines = measure_ways(*(("tiny", 64, 2, 2) if options.quick else ("small", 256, 4, options.rounds)))
        print("\n".join(lines))
    if options.ways and not options.quick:
        print(write_result("finetune_frozen_ways", "\n".join(lines), ["torch", "numpy"]))
    if options.ways:
        return
    size, crop, batch, rounds = ("tiny", 64, 2, 2) if options.quick else ("small", 256, 8, options.rounds)
    shape = (160, 200) if options.quick else (520, 704)  # LIVECell's
    with tempfile.TemporaryDirectory() as scratch:
        labelled = make_set(Path(scratch), shape)
        training = Training(config_of(Path(scratch) / "run", labelled, size, crop, batch), World(), is_dry=True)
        ours = our_step(training)
        images = [
            prepare_labelled(each, training.learner.model.settings)
            for each in (training.split.sets[0][n] for n in range(3))
        ]
        maps = [labels_to_distance(labels) for _, labels, _ in images]  # the float maps, whole in memory
        sides = {"ours": ours}
        for name, through in (("straight", True), ("straight, no autograd", False)):
            model = create_dinocell_model(size, pretrained=False, freeze_backbone=False)
            model.backbone.requires_grad_(through)
            sides[name] = straight_step(model, images, maps, crop, batch)
        seconds = alternate(sides, rounds=rounds, warmup=1 if options.quick else 0)
        share, forwards = decoder_share(training.learner.model.eval(), crop, batch, rounds)
        data = data_seconds(training, images, maps, crop, batch)
    lines = [
        f"# Fine-tuning on a frozen backbone: ViT {size}, patch 8, {crop} px, batch {batch}, CPU",
        "",
        f"{rounds} alternated rounds of one step a side; {os.cpu_count()} cores, which other work may have shared.",
        "Seconds and crops/s are medians; ratio = the side's time / ours in the same round: median (range). Steps take",
        "so long that there is no warm-up: the first step of the first side, ours, pays for what comes up only once.",
        "",
        "| side | s a step | crops/s | ratio |",
        "|---|---|---|---|",
        *(
            f"| {name} | {statistics.median(each):.2f} | {batch / statistics.median(each):.2f} "
            f"| {ratio(each, seconds['ours'])} |"
            for name, each in seconds.items()
        ),
        "",
        f"Target: {TARGET_RATIO} times the straight loop's crops/s. What counts is not to go through the backbone with",
        "autograd; augmentation is a small share of a step on the CPU, see below.",
        "",
        f"Forward of a batch without gradients: backbone {forwards['backbone']:.2f} s, "
        f"decoder {forwards['decoder']:.2f} s:",
        f"the decoder has {share:.0%} of it. Target: at most {TARGET_SHARE:.0%}.",
        "",
        f"Crops and targets of a batch alone: ours {data['ours']:.3f} s, straight {data['straight']:.3f} s. Memory for",
        "targets: ours none (labels are read by memory map), straight 4 bytes a pixel of the whole data set.",
    ]
    print("\n".join(lines))
    if not options.quick:
        packages = ["torch", "numpy", "scipy", "opencv-python-headless", "edt"]
        print(write_result("finetune_frozen", "\n".join(lines), packages))


def config_of(output: Path, labelled: Path, size: str, crop: int, batch: int) -> FinetuneConfig:
    return FinetuneConfig(
        output=output,
        data=DataConfig(sets=(str(labelled),), crops_per_image=100),
        batch_size=batch,
        model=ModelConfig(size=size, pretrained=False),
        augment=AugmentConfig(crop=crop),
        compute=ComputeConfig(device="cpu", workers=0),
    )


def measure_ways(size: str, crop: int, batch: int, rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        labelled = make_set(root, (160, 200) if size == "tiny" else (520, 704))
        plain = Training(config_of(root / "plain", labelled, size, crop, batch), World(), is_dry=True)
        model = plain.learner.model.train()
        backbones = backbone_batches(model, crop, (1, batch, 2 * batch), rounds)
        decoders = decoder_ways(model, crop, batch, rounds)
    first = {"backbones": f"{batch} at a time", "decoders": "as it is"}
    lines = [
        f"# What a frozen backbone allows: ViT {size}, patch 8, {crop} px, batch {batch}, CPU",
        "",
        f"{rounds} alternated rounds after one to warm up; {os.cpu_count()} cores, which other work may have shared.",
        "ratio = the first row's time / the row's in the same round: median (range).",
    ]
    for title, name, sides in (
        (f"The backbone's forward of {2 * batch} crops", "backbones", backbones),
        (f"The decoder, forwards and backwards, {batch} crops", "decoders", decoders),
    ):
        ordered = sorted(sides, key=lambda side, name=name: side != first[name])
        lines += ["", f"## {title}", "", "| side | s | ratio |", "|---|---|---|"]
        lines += [
            f"| {side} | {statistics.median(sides[side]):.3f} | {ratio(sides[first[name]], sides[side])} |"
            for side in ordered
        ]
    return lines


def backbone_batches(model: DINOCell, crop: int, sizes: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    images = torch.randn(max(sizes), 1, crop, crop)

    def run(number: int) -> None:
        for part in images.split(number):
            model.tokens(part)

    sides: dict[str, Callable[[], object]] = {f"{number} at a time": partial(run, number) for number in sizes}
    return alternate(sides, rounds=rounds)


def decoder_ways(model: DINOCell, crop: int, batch: int, rounds: int) -> dict[str, list[float]]:
    images = torch.randn(batch, 1, crop, crop)
    tokens = model.tokens(images)
    last = [each.contiguous(memory_format=torch.channels_last) for each in tokens]
    decoder = model.decoder
    laid_out = copy.deepcopy(decoder).to(memory_format=torch.channels_last)
    compiled = torch.compile(copy.deepcopy(decoder))

    def run(module: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
        module(inputs, images).sigmoid().square().mean().backward()

    return alternate(
        {
            "as it is": lambda: run(decoder, tokens),
            "tokens laid out channels last": lambda: run(decoder, last),
            "tokens and weights laid out channels last": lambda: run(laid_out, last),
            "torch.compile": lambda: run(compiled, tokens),
        },
        rounds=rounds,
    )


def make_set(root: Path, shape: tuple[int, int]) -> Path:
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    cells = round(shape[0] * shape[1] / 1800)
    config = SyntheticConfig(size=shape, channels=("AGP",), num_cells=(cells, cells))
    for number in range(NUM_IMAGES):
        field = make_field(number, config)
        write_tiff(root / "images" / f"f{number}.tif", field.pixels)
        write_labels(root / "masks" / f"f{number}.tif", field.labels)
    build_labelled(folder_pairs(root, images="images/{name}.tif", masks="masks/{name}.tif"), root / "set")
    return root / "set"


def our_step(training: Training) -> Callable[[], object]:
    batches = enumerate(training.batches(0))
    return lambda: float(training.step(*next(batches))["loss/train"])


def straight_step(
    model: DINOCell, images: list[tuple], maps: list[np.ndarray], crop: int, batch: int
) -> Callable[[], object]:
    generator = np.random.default_rng(0)
    groups = (
        [{"params": [p for p in model.backbone.parameters() if p.requires_grad], "lr": 0.0}]
        if any(p.requires_grad for p in model.backbone.parameters())
        else []
    )
    optimizer = torch.optim.AdamW([*groups, {"params": list(model.decoder.parameters())}], lr=1e-4)

    def step() -> float:
        model.train()
        pixels, targets = straight_batch(images, maps, crop, batch, generator)
        loss = (model(pixels) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def straight_batch(
    images: list[tuple], maps: list[np.ndarray], crop: int, batch: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a batch, a sample after the other: turn, scale and mirror whole images and maps, then cut."""
    pixels, targets = [], []
    for _ in range(batch):
        number = int(generator.integers(len(images)))
        grey, _, levels = images[number]
        both = [levels.apply(grey), maps[number]]
        angle, scale = float(generator.uniform(-180, 180)), float(generator.uniform(0.8, 1.2))
        both = [ndimage.rotate(each, angle, reshape=False, order=1, mode="reflect") for each in both]
        both = [ndimage.zoom(each, scale, order=1) for each in both]
        if generator.random() < 0.5:
            both = [each[:, ::-1] for each in both]
        top, left = (int(generator.integers(max(1, side - crop))) for side in both[0].shape)
        cut = [np.ascontiguousarray(each[top : top + crop, left : left + crop]) for each in both]
        sign = -1 if generator.random() < 0.5 else 1
        pixels.append(torch.from_numpy(sign * cut[0] * np.float32(generator.uniform(0.95, 1.05))))
        targets.append(torch.from_numpy(cut[1]))
    return torch.stack(pixels)[:, None], torch.stack(targets)[:, None]


@torch.no_grad()
def decoder_share(model: DINOCell, crop: int, batch: int, rounds: int) -> tuple[float, dict[str, float]]:
    images = torch.randn(batch, 1, crop, crop)
    tokens = model.tokens(images)
    sides: dict[str, Callable[[], object]] = {
        "backbone": lambda: model.tokens(images),
        "decoder": lambda: model.decoder(tokens, images),
    }
    seconds = {name: statistics.median(each) for name, each in alternate(sides, rounds=rounds).items()}
    return seconds["decoder"] / sum(seconds.values()), seconds


def data_seconds(
    training: Training, images: list[tuple], maps: list[np.ndarray], crop: int, batch: int
) -> dict[str, float]:
    generator = np.random.default_rng(1)
    batches = iter(training.batches(training.total_steps // 2))
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: next(batches),
        "straight": lambda: straight_batch(images, maps, crop, batch, generator),
    }
    return {name: statistics.median(each) for name, each in alternate(sides, rounds=5).items()}


if __name__ == "__main__":
    main()
