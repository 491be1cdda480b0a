"""The demo, stage by stage; each leaves its results on the disk, and a demo that was interrupted goes on from there."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from dinocell.configs.load import find_recipe, load_config, read_stored, text_override, to_dict, to_yaml
from dinocell.configs.schema import diff_configs
from dinocell.data_shards.manifest import read_manifest
from dinocell.demo.data import DemoConfig, Material, generate, generated_material, own_material
from dinocell.demo.otsu import otsu_baseline
from dinocell.demo.report import Result, write_report
from dinocell.errors import ConfigError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.probes.consistency import channel_consistency
from dinocell.eval.probes.features import FeatureSettings, extract
from dinocell.eval.probes.image_sets import ShardImages
from dinocell.eval.probes.knn import knn_scores
from dinocell.eval.scoring import score_segmenter
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.model import DINOCell
from dinocell.finetune.train import finetune
from dinocell.images.image import picture_of
from dinocell.labelled.dataset import open_labelled
from dinocell.models.config import VARIANTS, variant_of
from dinocell.models.vit import VisionTransformer
from dinocell.models.weights import load_backbone
from dinocell.runtime.files import write_atomically
from dinocell.runtime.progress import start_progress
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.train import pretrain

# Neighbours that vote on the class of a field.
_NEIGHBOURS = 5
# Side of the middle of a field that is looked at.
_PROBED_PX = 128


def run_demo(config: DemoConfig) -> str:
    """Run the demo and return a summary that ends with the path of its page.

    Raises
    ------
    ConfigError
        If the folder holds a demo with other settings, or something else, or there is no folder of images.
    """
    start, console = time.monotonic(), Console()
    size = None if config.weights is None else _size_of(config.weights)
    _claim(config)
    output = config.output

    console.print("[1/5] images, shards and labelled sets", highlight=False)
    material = _material(config, console)
    console.print("[2/5] pretraining", highlight=False)
    teacher = config.weights or str(_pretrain(config, material))
    console.print("[3/5] what the features know, beside random weights: a minute or two", highlight=False)
    backbone = load_backbone(teacher, patch_size=8, in_channels=1)
    probes = {"pretrained": _probe(backbone, material), "random weights": _probe(_random(config, backbone), material)}
    console.print("[4/5] fine-tuning", highlight=False)
    model = _finetune(config, material, teacher, size)
    console.print("[5/5] segmenting images that no training has seen", highlight=False)
    results = _segment(model, material) if model is not None else []
    page = write_report(output / "report.html", output, config, material, probes, results)

    lines = [f"{number} fields in {len(material.channels)} stains" for number in [_count(material)]]
    for name, (margin, accuracy) in probes.items():
        known = "" if accuracy is None else f", class of cells by {_NEIGHBOURS} neighbours {accuracy:.2f}"
        lines.append(
            f"features, {name}: margin of channel consistency {margin:.3f}{known}" if margin is not None else ""
        )
    for name, scores in _scores(results).items():
        lines.append(
            f"{name}: SEG {scores[0]:.3f}, DET {scores[1]:.3f}, OP_CSB {scores[2]:.3f} on {len(results)} images"
        )
    minutes = (time.monotonic() - start) / 60
    lines.append(
        f"segmenter: {output / 'finetune' / 'best.pt'}" if model is not None else "no masks: nothing to learn from"
    )
    return "\n".join([*filter(None, lines), f"{minutes:.1f} minutes", f"report: {page}"])


def _claim(config: DemoConfig) -> None:
    """Take a new folder, or go on in one of the same demo; in any other, what a demo replaces may be the user's."""
    path = config.output / "demo.yaml"
    if config.data is not None and not config.data.is_dir():
        raise ConfigError(f"data: {config.data}: no such folder")
    if path.exists():
        differing = diff_configs(read_stored(DemoConfig, path), to_dict(config), ())
        if differing:
            raise ConfigError(
                f"{config.output} holds a demo with other settings ({'; '.join(differing)}); "
                "remove it, or choose another output"
            )
    elif config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise ConfigError(f"output: {config.output} exists and holds no demo; choose a new folder")
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_yaml(config))


def _material(config: DemoConfig, console: Console) -> Material:
    workers = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if config.data is not None:
        return own_material(config.data, config.output, workers=workers)
    done = config.output / "images" / "done"
    if not done.exists():
        _generate(config, console, workers)
        done.touch()
    return generated_material(config.output, workers=workers)


def _generate(config: DemoConfig, console: Console, workers: int) -> None:
    """Generate the images, with a bar on a terminal and ten lines elsewhere."""
    total = sum(vars(config.counts).values())
    progress = start_progress(console, total_steps=total, batch_size=1)

    def show(done: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            progress.report(done, {})
        else:
            progress.advance(done)

    try:
        generate(config.output, config.counts, config.field, seed=config.seed, workers=workers, progress=show)
    finally:
        progress.close()


def _pretrain(config: DemoConfig, material: Material) -> Path:
    output = config.output / "pretrain"
    checkpoint = output / "eval" / f"training_{config.pretrain_steps}" / "teacher_checkpoint.pth"
    if checkpoint.exists():
        return checkpoint
    shutil.rmtree(output, ignore_errors=True)  # a few steps: they are taken again
    policy = "consistency" if len(material.channels) > 1 else "average"
    overrides = [text_override("output", output), text_override("data.shards", material.shards)]
    overrides += [f"steps={config.pretrain_steps}", f"seed={config.seed}", f"views.policy={policy}"]
    return pretrain(load_config(PretrainConfig, find_recipe("pretrain", "demo"), overrides))


def _finetune(config: DemoConfig, material: Material, teacher: str, size: str | None) -> DINOCell | None:
    if material.train is None:
        return None
    overrides = [text_override("output", config.output / "finetune"), text_override("data.sets", [material.train])]
    overrides += [text_override("model.weights", teacher)]
    overrides += [f"epochs={config.finetune_epochs}", f"seed={config.seed}"]
    if size is not None:
        overrides.append(f"model.size={size}")
    recipe = load_config(FinetuneConfig, find_recipe("finetune", "demo"), overrides)
    return DINOCell.from_pretrained(finetune(recipe, score=score_segmenter))


def _size_of(source: str) -> str:
    got = load_backbone(source, patch_size=8, in_channels=1).config
    size = variant_of(got)
    if size is None:
        raise ConfigError(
            f"weights: {source} has width {got.width} and {got.depth} blocks; expected a size of {', '.join(VARIANTS)}"
        )
    return size


def _random(config: DemoConfig, like: VisionTransformer) -> VisionTransformer:
    torch.manual_seed(config.seed)
    return VisionTransformer(like.config).eval()


class Probe(NamedTuple):
    """Margin of channel consistency, and accuracy of the nearest neighbours; None where there is nothing to measure."""

    margin: float | None
    accuracy: float | None


def _probe(backbone: VisionTransformer, material: Material) -> Probe:
    margin = accuracy = None
    if material.class_shards is not None:
        train, train_classes = _features(backbone, material.class_shards[0])
        test, test_classes = _features(backbone, material.class_shards[1])
        names = sorted(set(train_classes) | set(test_classes))
        number = {name: index for index, name in enumerate(names)}
        # A field is looked up through each single stain among the means of the others.
        known = torch.tensor([number[name] for name in train_classes])
        wanted = torch.tensor([number[name] for name in test_classes])
        votes = [
            knn_scores(train.mean(1), known, test[:, channel], ks=[_NEIGHBOURS], num_classes=len(names))[_NEIGHBOURS]
            for channel in range(test.shape[1])
        ]
        accuracy = float(torch.stack([(each.argmax(1) == wanted).float().mean() for each in votes]).mean())
        margin = channel_consistency(test).margin
    elif len(material.channels) > 1:
        features, _ = _features(backbone, material.shards[0])
        margin = channel_consistency(features).margin if len(features) > 1 else None
    return Probe(margin, accuracy)


def _features(backbone: VisionTransformer, shards: Path) -> tuple[torch.Tensor, list[str]]:
    """Return CLS and mean patch token of the middle of every field through each channel alone (b c d), its class."""
    settings = FeatureSettings(channels="each", crop_size=_PROBED_PX, avgpool=True)
    found = extract(backbone, ShardImages(shards), settings)
    return found.tensor(), [str(labels.get("cell_class", "")) for labels in found.labels]


def _segment(model: DINOCell, material: Material) -> list[Result]:
    pipeline = DINOCellPipeline(model)
    results = []
    assert material.unseen is not None
    opened = open_labelled(material.unseen)
    for image in (opened[index] for index in range(len(opened))):
        plane = picture_of(np.asarray(image.pixels)).plane()
        distance = pipeline.distance(plane)
        reference = np.ascontiguousarray(image.labels, dtype=np.int32)
        results.append(Result(image.name, plane, reference, pipeline.cells(distance), distance, otsu_baseline(plane)))
    return results


def _scores(results: Sequence[Result]) -> dict[str, tuple[float, float, float]]:
    if not results:
        return {}
    truth = [result.reference for result in results]
    found = {
        "DINOCell": ctc_score(truth, [result.labels for result in results]),
        "Otsu + watershed": ctc_score(truth, [result.baseline for result in results]),
    }
    return {name: (score.seg, score.det, score.op_csb) for name, score in found.items()}


def _count(material: Material) -> int:
    return sum(read_manifest(shards).num_samples for shards in material.shards)
