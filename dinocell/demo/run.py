"""The stages of the demo; an interrupted demo resumes after the last complete stage."""

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
from dinocell.demo.data import DemoConfig, DemoData, generate, prepare_generated, prepare_own
from dinocell.demo.otsu import otsu_baseline
from dinocell.demo.report import Result, write_report
from dinocell.errors import ConfigError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.probes.consistency import channel_consistency
from dinocell.eval.probes.features import FeatureSettings, extract
from dinocell.eval.probes.image_sets import ShardImages
from dinocell.eval.probes.knn import knn_scores
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.eval.threshold_search import score_segmenter
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.model import DINOCell
from dinocell.finetune.train import finetune
from dinocell.images.image import as_image
from dinocell.labelled.dataset import open_labelled
from dinocell.models.config import VARIANTS, variant_of
from dinocell.models.vit import VisionTransformer
from dinocell.models.weights import load_backbone
from dinocell.runtime.files import write_atomically
from dinocell.runtime.progress import start_progress
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.train import pretrain

# Number of nearest neighbours for the class of a field.
_NUM_NEIGHBOURS = 5
# Side of the central crop of a field from which features are extracted.
_CROP_PX = 128


def run_demo(config: DemoConfig) -> str:
    """Run the demo and return a summary that ends with the path of its report.

    Raises
    ------
    ConfigError
        If the output folder contains a demo with other settings or other files, or the folder of images does not exist.
    """
    start, console = time.monotonic(), Console()
    size = None if config.weights is None else _size_of(config.weights)
    _claim(config)
    output = config.output

    console.print("[1/5] generating images, shards and labelled sets", highlight=False)
    data = _prepare(config, console)
    console.print("[2/5] pretraining", highlight=False)
    teacher = config.weights or str(_pretrain(config, data))
    console.print("[3/5] evaluating features against random weights (a minute or two)", highlight=False)
    backbone = load_backbone(teacher, patch_size=8, in_channels=1)
    probes = {"pretrained": _probe(backbone, data), "random weights": _probe(_random(config, backbone), data)}
    console.print("[4/5] fine-tuning", highlight=False)
    model = _finetune(config, data, teacher, size)
    console.print("[5/5] segmenting held-out images", highlight=False)
    results = _segment(model, data) if model is not None else []
    page = write_report(output / "report.html", output, config, data, probes, results)

    lines = [f"{_count(data)} fields with {len(data.channels)} channels"]
    for name, (margin, accuracy) in probes.items():
        if margin is not None:
            knn = "" if accuracy is None else f", {_NUM_NEIGHBOURS}-NN accuracy of the cell class {accuracy:.2f}"
            lines.append(f"features, {name}: channel consistency margin {margin:.3f}{knn}")
    for name, scores in _scores(results).items():
        lines.append(
            f"{name}: SEG {scores[0]:.3f}, DET {scores[1]:.3f}, OP_CSB {scores[2]:.3f} on {len(results)} images"
        )
    minutes = (time.monotonic() - start) / 60
    lines.append(
        f"segmenter: {output / 'finetune' / 'best.pt'}" if model is not None else "no masks: no segmenter was trained"
    )
    return "\n".join([*lines, f"{minutes:.1f} minutes", f"report: {page}"])


def _claim(config: DemoConfig) -> None:
    """Create the output folder, or resume in that of the same demo; never replace other files of the user."""
    path = config.output / "demo.yaml"
    if config.data is not None and not config.data.is_dir():
        raise ConfigError(f"data: {config.data}: no such folder")
    if path.exists():
        differing = diff_configs(read_stored(DemoConfig, path), to_dict(config), ())
        if differing:
            raise ConfigError(
                f"{config.output} contains a demo with other settings ({'; '.join(differing)}); "
                "remove it, or choose another output"
            )
    elif config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise ConfigError(f"output: {config.output} exists and contains no demo; choose a new folder")
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_yaml(config))


def _prepare(config: DemoConfig, console: Console) -> DemoData:
    workers = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if config.data is not None:
        return prepare_own(config.data, config.output, workers=workers)
    done = config.output / "images" / "done"
    if not done.exists():
        _generate(config, console, workers)
        done.touch()
    return prepare_generated(config.output, workers=workers)


def _generate(config: DemoConfig, console: Console, workers: int) -> None:
    """Generate the images; progress is a bar on a terminal and ten lines elsewhere."""
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


def _pretrain(config: DemoConfig, data: DemoData) -> Path:
    output = config.output / "pretrain"
    checkpoint = output / "eval" / f"training_{config.pretrain_steps}" / "teacher_checkpoint.pth"
    if checkpoint.exists():
        return checkpoint
    shutil.rmtree(output, ignore_errors=True)  # an interrupted pretraining takes seconds to repeat
    policy = "consistency" if len(data.channels) > 1 else "average"
    overrides = [text_override("output", output), text_override("data.shards", data.shards)]
    overrides += [f"steps={config.pretrain_steps}", f"seed={config.seed}", f"views.policy={policy}"]
    return pretrain(load_config(PretrainConfig, find_recipe("pretrain", "demo"), overrides))


def _finetune(config: DemoConfig, data: DemoData, teacher: str, size: str | None) -> DINOCell | None:
    if data.train is None:
        return None
    overrides = [text_override("output", config.output / "finetune"), text_override("data.sets", [data.train])]
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
    """Margin of channel consistency and kNN accuracy; None where they cannot be measured."""

    margin: float | None
    accuracy: float | None


def _probe(backbone: VisionTransformer, data: DemoData) -> Probe:
    margin = accuracy = None
    if data.class_shards is not None:
        train, train_classes = _features(backbone, data.class_shards[0])
        test, test_classes = _features(backbone, data.class_shards[1])
        names = sorted(set(train_classes) | set(test_classes))
        index = {name: position for position, name in enumerate(names)}
        # Each single channel of a test field is a query among the channel means of the training fields.
        train_targets = torch.tensor([index[name] for name in train_classes])
        test_targets = torch.tensor([index[name] for name in test_classes])
        scores = [
            knn_scores(train.mean(1), train_targets, test[:, channel], ks=[_NUM_NEIGHBOURS], num_classes=len(names))[
                _NUM_NEIGHBOURS
            ]
            for channel in range(test.shape[1])
        ]
        accuracy = float(torch.stack([(score.argmax(1) == test_targets).float().mean() for score in scores]).mean())
        margin = channel_consistency(test).margin
    elif len(data.channels) > 1:
        features, _ = _features(backbone, data.shards[0])
        margin = channel_consistency(features).margin if len(features) > 1 else None
    return Probe(margin, accuracy)


def _features(backbone: VisionTransformer, shards: Path) -> tuple[torch.Tensor, list[str]]:
    """Return CLS and mean patch token of the centre of each field, per channel (b c d), and the classes."""
    settings = FeatureSettings(channels="each", crop_size=_CROP_PX, avgpool=True)
    features = extract(backbone, ShardImages(shards), settings)
    return features.tensor(), [str(labels.get("cell_class", "")) for labels in features.labels]


def _segment(model: DINOCell, data: DemoData) -> list[Result]:
    pipeline = DINOCellPipeline(model)
    results = []
    assert data.unseen is not None
    unseen = open_labelled(data.unseen)
    for image in (unseen[index] for index in range(len(unseen))):
        plane = as_image(np.asarray(image.pixels)).plane()
        distance = pipeline.distance(plane)
        reference = np.ascontiguousarray(image.labels, dtype=np.int32)
        results.append(Result(image.name, plane, reference, pipeline.cells(distance), distance, otsu_baseline(plane)))
    return results


def _scores(results: Sequence[Result]) -> dict[str, tuple[float, float, float]]:
    if not results:
        return {}
    references = [result.reference for result in results]
    scores = {
        "DINOCell": ctc_score(references, [result.labels for result in results]),
        "Otsu + watershed": ctc_score(references, [result.baseline for result in results]),
    }
    return {name: (score.seg, score.det, score.op_csb) for name, score in scores.items()}


def _count(data: DemoData) -> int:
    return sum(read_manifest(shards).num_samples for shards in data.shards)
