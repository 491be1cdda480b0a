"""What do patch tokens learn from a few minutes of pretraining on a few dozen real images?

    python benchmarks/patch_probe.py --folder RUNS                          # all arms, three seeds; hours on one core
    python benchmarks/patch_probe.py --folder RUNS --arms reconstruction --sets dic --seeds 0
    python benchmarks/patch_probe.py --folder RUNS --table                  # only writes the result file
    python benchmarks/patch_probe.py --quick                                # generated images; writes no result file

Real images of `--data` (``DATA/pairs/bbbc030_cho_dic``, DIC; ``DATA/dsb2018_stage1_train`` and ``DATA/bbbc039``,
fluorescent nuclei; ``DATA/fields/bbbc013_u2os_2ch``, two stains). A backbone of size `nano` is pretrained without
labels on images that are no test images; then `dinocell.eval.probes.patch` reads the distance map from its frozen
patch tokens, fitted on 2 (DIC) or 4 labelled images. Every (set, arm, seed) is one file in RUNS: a second start skips
what is complete, and the result file holds what exists. CPU time is that of the training process.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from _harness import write_result
from _patch_sets import ALL_CHOICES, CHOICES, SETS, ImageSet, generated_images
from _short_runs import mean_and_range, random_backbone, stored, stored_by_seed, train, use_one_thread
from short_pretraining import BATCH_16, FORMER, WINNER, info_nce
from torch import Tensor, nn
from torch.nn import functional as F

from dinocell.configs.load import find_recipe, load_config
from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.files import MultichannelSource
from dinocell.eval.probes.patch import cut_crops, patch_features, patch_means, patch_targets, probe_r2
from dinocell.images.write import write_tiff
from dinocell.models.export import Weights, save_weights
from dinocell.models.vit import VisionTransformer
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.prepare import backbone_of
from dinocell.ssl.student_teacher import StudentTeacher

CROP_PX, PATCH = 64, 8
PENALTY = 0.01
# Name of a measure: whether the whole image is standardised, or each crop by itself.
MEASURES = {"r2": False, "r2_image": True}
SEEDS = (0, 1, 2)
# Tiles of the DINO + iBOT arms: global crops of 0.4 to 1 of 96 x 96 px become 64 px, about the images' own scale.
TILE_PX = 96
ON_NANO = (
    "online_eval.every=0",
    "compute.workers=0",
    "model.variant=nano",
    "batch_size=16",
    "steps=800",
)
WITHOUT_LENGTH = tuple(each for each in WINNER if each not in BATCH_16)
RECONSTRUCTION = "losses.reconstruction.weight=1.0"
TARGET_OTHER, TARGET_MEAN = "losses.reconstruction.target=other", "losses.reconstruction.target=mean"
# 60 % of the patches of every global crop, and nothing but the reconstruction.
ALL_MASKED = ("masking.image_share=1.0", "masking.min_patch_share=0.6", "masking.max_patch_share=0.6")
ALONE = (
    *WITHOUT_LENGTH,
    *ALL_MASKED,
    RECONSTRUCTION,
    *("losses.dino_weight=0", "losses.ibot_weight=0", "losses.koleo_weight=0", "views.num_local=0"),
)


class Report(NamedTuple):
    """A backbone after some seconds of CPU time and a number of images."""

    seconds: float
    images: int
    backbone: VisionTransformer


@dataclass(frozen=True)
class Arm:
    """A way of pretraining: ``run`` gets set, seed and folder for data, and reports; None: no network."""

    words: str
    run: Callable[..., Iterator[Report]] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("patch-probe"), help="data and results are kept here")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="train nothing, write the result file")
    parser.add_argument("--no-table", action="store_true", help="write no result file, for one of several processes")
    parser.add_argument("--quick", action="store_true", help="seconds of CPU time on generated images")
    options = parser.parse_args()
    use_one_thread()
    if options.quick:
        with TemporaryDirectory() as scratch:
            for name, arm in ARMS.items():
                measured = measure_arm(Path(scratch), "generated", generated_images(), name, 0, quick=True)
                print(f"| {arm.words} | {', '.join(f'{key} {value:.2f}' for key, value in measured.items())} |")
        return
    if not options.table:
        missing = [path for name in options.sets for path in SETS[name][1](options.data) if not path.is_dir()]
        if missing:
            raise SystemExit(f"--data: {missing[0]} does not exist; expected the folder with the real images")
        for seed in options.seeds:
            for name in options.sets:
                for arm in options.arms:
                    numbers = run_arm(options.folder, options.data, name, arm, seed)
                    print(name, arm, seed, {key: round(value, 3) for key, value in numbers.items()}, flush=True)
    if options.no_table:
        return
    text = f"{heading()}\n\n{table(options.folder)}"
    print(text)
    print(write_result("patch_probe", text, ["torch", "numpy"]))


def run_arm(folder: Path, data: Path, name: str, arm: str, seed: int) -> dict[str, float]:
    """Return the numbers of an arm, from its file or measured."""
    return stored(
        folder / "results" / f"{name}-{arm}-seed{seed}.json",
        lambda: measure_arm(folder, name, SETS[name][0](data), arm, seed),
    )


def measure_arm(
    folder: Path, name: str, images: ImageSet, arm: str, seed: int, *, quick: bool = False
) -> dict[str, float]:
    """Return R2 by seconds of CPU time, for crops standardised by themselves and by image."""
    run = ARMS[arm].run
    if run is None:
        return probes(images, pixel_statistics, 0.0)
    numbers: dict[str, float] = {}
    backbone: VisionTransformer | None = None
    for seconds, seen, backbone in run(images, seed, folder / name, quick=quick):
        backbone.eval()
        numbers[f"images@{seconds:.0f}"] = seen
        numbers |= probes(images, partial(tokens, backbone), seconds)
        print(name, arm, seed, f"{seconds:.0f} s", {key: round(value, 3) for key, value in numbers.items()}, flush=True)
    assert backbone is not None
    path = folder / "backbones" / f"{name}-{arm}-seed{seed}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, Weights.of(backbone))
    return numbers


def probes(images: ImageSet, features_of: Callable[..., Tensor], seconds: float) -> dict[str, float]:
    """Return R2 after some seconds: mean over the first choices of the labelled images, and over all of them."""
    numbers = {}
    for key, by_image in MEASURES.items():
        found = probe(images, partial(features_of, by_image=by_image))
        numbers[f"{key}@{seconds:.0f}"] = statistics.mean(found[:CHOICES])
        numbers[f"{key}_all@{seconds:.0f}"] = statistics.mean(found)
        numbers[f"{key}_std@{seconds:.0f}"] = statistics.stdev(found)
    return numbers


def probe(images: ImageSet, features_of: Callable[[Tensor], Tensor]) -> list[float]:
    """Return R2 for each choice of labelled images."""
    everyone, first_unseen = [*images.pool, *images.unseen], len(images.pool)

    @cache
    def features(number: int) -> Tensor:
        return features_of(everyone[number].pixels)

    @cache
    def targets(number: int) -> Tensor:
        return patch_targets(everyone[number].distance, patch_size=PATCH, crop_px=CROP_PX)

    unseen = list(range(first_unseen, len(everyone)))
    return [probe_r2(features, targets, labelled, unseen, penalty=PENALTY) for labelled in images.choices()]


def tokens(backbone: VisionTransformer, image: Tensor, *, by_image: bool) -> Tensor:
    return patch_features(backbone, standardised(image, by_image=by_image), crop_px=CROP_PX)


def standardised(image: Tensor, *, by_image: bool) -> Tensor:
    """Return the image (h w) with mean 0 and standard deviation 1, or each crop of the grid of `cut_crops`."""
    if by_image:
        return _standardised(image)
    rows, columns = image.shape[0] // CROP_PX, image.shape[1] // CROP_PX
    crops = _standardised(cut_crops(image, CROP_PX)).unflatten(0, (rows, columns))
    return crops.transpose(1, 2).flatten(2).flatten(0, 1)


def _standardised(images: Tensor) -> Tensor:
    centred = images - images.mean((-2, -1), keepdim=True)
    return centred / (centred.square().mean((-2, -1), keepdim=True).sqrt() + 1e-5)


def pixel_statistics(image: Tensor, *, by_image: bool) -> Tensor:
    """Return mean, standard deviation and edges of each patch and its eight neighbours in the crop, no network."""
    crops = cut_crops(standardised(image, by_image=by_image), CROP_PX)
    return torch.cat([_statistics(crop) for crop in crops])


def _statistics(crop: Tensor) -> Tensor:
    mean = patch_means(crop, PATCH)
    std = (patch_means(crop.square(), PATCH) - mean.square()).clamp_min(0).sqrt()
    edges = F.pad(crop.diff(dim=0).abs(), (0, 0, 0, 1)) + F.pad(crop.diff(dim=1).abs(), (0, 1))
    planes = torch.stack((mean, std, patch_means(edges, PATCH)))[None]
    return F.unfold(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3)[0].T


# The arms.


def untrained(images: ImageSet, seed: int, folder: Path, **_quick: bool) -> Iterator[Report]:
    yield Report(0.0, 0, random_backbone(config_of(folder, images, seed, ())))


def dino(*settings: str) -> Callable[..., Iterator[Report]]:
    """Return an arm of the product's trainer; it reports the teacher."""

    def run(images: ImageSet, seed: int, folder: Path, *, quick: bool) -> Iterator[Report]:
        config = config_of(folder, images, seed, (*settings, "steps=2") if quick else settings)
        kept: list[tuple[float, int, dict[str, Tensor]]] = []

        def keep(seconds: float, step: int, model: StudentTeacher) -> None:
            teacher = backbone_of(model.teacher)
            kept.append(
                (
                    seconds,
                    step * config.batch_size,
                    {name: value.clone() for name, value in teacher.state_dict().items()},
                )
            )

        trained = train(config, marks=() if quick else (60, 120, 240, 480), at_mark=keep)
        between = random_backbone(config)
        for seconds, seen, state in kept:
            between.load_state_dict(state)
            yield Report(seconds, seen, between)
        yield Report(trained.cpu_seconds, config.steps * config.batch_size, trained.teacher)

    return run


def reconstruction(images: ImageSet, seed: int, folder: Path, *, quick: bool) -> Iterator[Report]:
    """Regress the standardised pixels of masked patches, 60 % of them, from the visible ones."""
    backbone = random_backbone(config_of(folder, images, seed, ())).train()
    head = nn.Sequential(nn.Linear(backbone.config.width, 512), nn.GELU(), nn.Linear(512, PATCH * PATCH))
    generator = torch.Generator().manual_seed(seed)

    def loss_of(crops: Tensor) -> Tensor:
        num_patches = (CROP_PX // PATCH) ** 2
        order = torch.rand(len(crops), num_patches, generator=generator).argsort(1)
        masks = order < round(0.6 * num_patches)
        masked = masks.flatten().nonzero()[:, 0]
        wanted = F.unfold(crops, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)[masked]
        return F.mse_loss(head(backbone(crops, masks, select=masked).patches), wanted)

    yield from trained_until((1, 2) if quick else (24, 60, 120, 240), images, backbone, head, loss_of, 32, generator)


def patch_info_nce(images: ImageSet, seed: int, folder: Path, *, quick: bool) -> Iterator[Report]:
    """Tell the patches of two photometric views of the same crops apart by InfoNCE: place by place."""
    backbone = random_backbone(config_of(folder, images, seed, ())).train()
    head = nn.Sequential(nn.Linear(backbone.config.width, 512), nn.GELU(), nn.Linear(512, 128))
    generator = torch.Generator().manual_seed(seed)

    def view(crops: Tensor) -> Tensor:
        low = crops.amin((2, 3), keepdim=True)
        unit = (crops - low) / (crops.amax((2, 3), keepdim=True) - low + 1e-5)
        shape = (len(crops), 1, 1, 1)
        bent = unit ** torch.exp(0.3 * torch.randn(shape, generator=generator))
        smooth = F.avg_pool2d(F.pad(bent, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        bent = bent + torch.rand(shape, generator=generator) * (smooth - bent)
        noise = 0.3 * torch.rand(shape, generator=generator) * torch.randn(crops.shape, generator=generator)
        return _standardised(_standardised(bent) + noise)

    def loss_of(crops: Tensor) -> Tensor:
        both = torch.cat([backbone(view(crops)).patches for _ in range(2)])
        # 16 places of each crop: negatives are other places and other crops.
        places = torch.randperm(both.shape[1], generator=generator)[:16]
        return info_nce(F.normalize(head(both[:, places].flatten(0, 1)), dim=1), temperature=0.1)

    yield from trained_until((1, 2) if quick else (60, 120, 240), images, backbone, head, loss_of, 32, generator)


def trained_until(
    marks: Sequence[float],
    images: ImageSet,
    backbone: VisionTransformer,
    head: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[Report]:
    """Minimise a loss of crops by AdamW at 1e-3, and report the backbone at seconds of CPU time."""
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    waiting, start = list(marks), time.process_time()
    for step in count(1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 50)
        loss = loss_of(draw_crops(images, batch_size, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        used = time.process_time() - start
        if used >= waiting[0]:
            yield Report(waiting.pop(0), step * batch_size, backbone.eval())
            if not waiting:
                return
            backbone.train()
            start = time.process_time() - used


def draw_crops(images: ImageSet, number: int, generator: torch.Generator) -> Tensor:
    """Return random crops of the unlabelled images, turned and mirrored, standardised each (n 1 s s)."""
    everyone = [image.pixels for image in (*images.pool, *images.more)]
    areas = torch.tensor([float(pixels.numel()) for pixels in everyone])
    crops = []
    for which in torch.multinomial(areas, number, replacement=True, generator=generator).tolist():
        pixels = everyone[which]
        top, left = (int(torch.randint(side - CROP_PX + 1, (), generator=generator)) for side in pixels.shape)
        turns, mirrored = torch.randint(4, (2,), generator=generator).tolist()
        crop = torch.rot90(pixels[top : top + CROP_PX, left : left + CROP_PX], turns)
        crops.append(crop.flip(0) if mirrored % 2 else crop)
    return _standardised(torch.stack(crops)[:, None])


def config_of(folder: Path, images: ImageSet, seed: int, settings: Sequence[str]) -> PretrainConfig:
    """Return the recipe of the DINO + iBOT arms, whose shards are built if need be."""
    source, shards = folder / "images", folder / "shards"
    if not (shards / "manifest.json").exists():
        source.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate((*images.pool, *images.more)):
            planes = image.pixels[None] if image.stains is None else image.stains
            names = [f"stain{channel}" for channel in range(len(planes))]
            pixels = (planes * 255).round().to(torch.uint8).numpy()
            write_tiff(source / f"image{number:03d}.ome.tif", pixels, channel_names=names)
        tiles = TileSettings(size=TILE_PX, min_size=CROP_PX, min_contrast=0, max_saturated=1.0)
        build(MultichannelSource(input=str(source)), shards, settings=ShardSettings(tiles=tiles), workers=1)
    places = [f"output={folder / 'unused'}", f"data.shards=[{shards}]", f"seed={seed}"]
    return load_config(
        PretrainConfig,
        find_recipe("pretrain", "tiny_cpu"),
        [*places, f"views.policy={images.policy}", *ON_NANO, *settings],
    )


ARMS: dict[str, Arm] = {
    "pixels": Arm("mean, standard deviation and edges of a patch and its neighbours, no network", None),
    "random": Arm("random weights", untrained),
    "winner": Arm("DINO + iBOT, the winner of `short_pretraining`, 800 steps of 16", dino(*WITHOUT_LENGTH)),
    "shipped": Arm("DINO + iBOT, former `tiny_cpu`, 800 steps of 16", dino(*FORMER)),
    "infonce": Arm("InfoNCE between the patches of two photometric views", patch_info_nce),
    "reconstruction": Arm("masked reconstruction, 60 % of the patches", reconstruction),
    "alone": Arm("`losses.reconstruction` alone, 60 % of the patches, 800 steps of 16", dino(*ALONE)),
    "alone_normalised": Arm(
        "the same, `patch_normalised`", dino(*ALONE, "losses.reconstruction.patch_normalised=true")
    ),
    "joint": Arm("the winner and `losses.reconstruction`, 800 steps of 16", dino(*WITHOUT_LENGTH, RECONSTRUCTION)),
    "joint_masked": Arm(
        "the same, 60 % of the patches of all global crops masked", dino(*WITHOUT_LENGTH, RECONSTRUCTION, *ALL_MASKED)
    ),
    "alone_other": Arm("`losses.reconstruction` alone, target `other`", dino(*ALONE, TARGET_OTHER)),
    "alone_mean": Arm("`losses.reconstruction` alone, target `mean`", dino(*ALONE, TARGET_MEAN)),
    "joint_other": Arm(
        "the winner and `losses.reconstruction`, target `other`", dino(*WITHOUT_LENGTH, RECONSTRUCTION, TARGET_OTHER)
    ),
}


def table(folder: Path) -> str:
    """Return the arms that have been measured: mean over seeds, and the range."""
    measures = [f"{key}{which}" for key in MEASURES for which in ("", "_all")]
    heads = [f"R2, {crops}, {number} choices" for crops in ("crops", "images") for number in (CHOICES, ALL_CHOICES)]
    lines = [f"| set | arm | CPU s | images | seeds | {' | '.join(heads)} |", "|---|---|---|---|---|---|---|---|---|"]
    for name in SETS:
        for arm, each in ARMS.items():
            found = stored_by_seed(folder / "results", f"{name}-{arm}")
            times = sorted({int(key.split("@")[1]) for numbers in found for key in numbers})
            # The end of a run comes after another number of seconds for each seed.
            if arm not in ("pixels", "random", "infonce", "reconstruction") and times:
                fixed = [second for second in times if all(f"r2@{second}" in numbers for numbers in found)]
                ends = [max(int(key.split("@")[1]) for key in numbers) for numbers in found]
                rows = [*[(str(second), [second] * len(found)) for second in fixed if second not in ends]]
                rows.append((mean_and_range([float(end) for end in ends], 0), ends))
            else:
                rows = [(str(second), [second] * len(found)) for second in times]
            for words, seconds in rows:
                pairs = list(zip(found, seconds, strict=True))
                seen = mean_and_range([numbers.get(f"images@{at}", 0) for numbers, at in pairs], 0)
                cells = [mean_and_range([numbers[f"{key}@{at}"] for numbers, at in pairs]) for key in measures]
                lines.append(f"| {name} | {each.words} | {words} | {seen} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading() -> str:
    return (
        "# Short pretraining: what patch tokens learn\n\nRidge regression of the patch tokens of a frozen `nano` "
        f"backbone (patch {PATCH}, crops of {CROP_PX} px at the images' own scale) onto the patch means of the "
        f"distance map; R2 over all patches of unseen images, mean of the first {CHOICES} and of {ALL_CHOICES} choices "
        "of the labelled ones. `dic`: BBBC030, 14 images for pretraining, 2 of them labelled, 13 unseen. `nuclei`: 29 "
        "fluorescence images of the 2018 Data Science Bowl, 4 of them labelled, and 12 of BBBC039 for pretraining, 20 "
        "unseen of the former. `stains`: 72 fields of BBBC013 in two stains, 4 of them labelled, 24 unseen; nuclei, "
        "thresholded in the DNA stain, are read from the other stain, policy `bag`. No arm is pretrained on unseen "
        "images. R2, crops: standardised one by one, as in pretraining; images: standardised as a whole, as a "
        "segmenter sees them. Mean over seeds (minimum to maximum). CPU time is that of the training process, one "
        "thread."
    )


if __name__ == "__main__":
    main()
