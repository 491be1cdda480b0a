"""The stages of the demo; an interrupted demo resumes after the last complete stage."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from dinocell.configs.load import find_recipe, load_config, read_stored, text_override, to_dict, to_yaml
from dinocell.configs.schema import diff_configs
from dinocell.data_shards.manifest import read_manifest
from dinocell.demo.data import DemoConfig, DemoData, generate, prepare_generated, prepare_own
from dinocell.demo.otsu import otsu_baseline
from dinocell.demo.report import FeatureScores, Result, SegmentationScores, Summary, write_report
from dinocell.errors import ConfigError
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.probes.consistency import channel_consistency
from dinocell.eval.probes.features import FeatureSettings, extract
from dinocell.eval.probes.image_sets import ShardImages
from dinocell.eval.probes.knn import knn_scores
from dinocell.eval.probes.patch import labelled_r2
from dinocell.eval.segmentation.pipeline import DINOCellPipeline
from dinocell.eval.threshold_search import score_segmenter
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.model import DINOCell
from dinocell.finetune.train import finetune
from dinocell.images.image import as_image
from dinocell.labelled.dataset import open_labelled
from dinocell.models.config import VARIANTS, variant_of
from dinocell.models.vit import VisionTransformer
from dinocell.models.weights import Weights, load_backbone, save_weights
from dinocell.runtime.files import write_atomically
from dinocell.runtime.progress import start_progress
from dinocell.ssl.config import PretrainConfig
from dinocell.ssl.prepare import initial_backbone
from dinocell.ssl.train import pretrain

# Number of nearest neighbours for the class of a field.
_NUM_NEIGHBOURS = 5
# Side to which a field is resized for its features: about the scale of the training's views (0.4 to 1 of it in 64 px).
_FIELD_PX = 96
# What is compared, by the names in summary.json; `dinocell.demo.report.NAMES` has those of the page.
_PRETRAINED, _RANDOM, _OTSU = "pretrained", "random", "otsu"


def run_demo(config: DemoConfig) -> str:
    """Run the demo and return a summary that ends with the path of its report.

    Raises ConfigError if the output folder contains a demo with other settings or other files, or the folder of images
    does not exist.
    """
    start, console = time.monotonic(), Console()
    size = None if config.weights is None else _size_of(config.weights)
    _claim(config)
    output = config.output

    console.print("[1/5] generating images, shards and labelled sets", highlight=False)
    data = _prepare(config, console)
    random_weights = output / "random_weights.pth"
    if not random_weights.exists():
        save_weights(random_weights, Weights.of(_random_backbone(config, data)))

    def settings(weights: str, folder: str) -> list[str]:
        return _finetune_settings(config, data, weights, output / folder, size)

    random_run = settings(str(random_weights), "finetune_random")
    console.print("[2/5] pretraining", highlight=False)
    with _finetuning_beside(random_run, output / "finetune_random.log") if data.train else nullcontext():
        teacher = config.weights or str(_pretrain(config, data))
        console.print("[3/5] evaluating features against random weights", highlight=False)
        sources = {_PRETRAINED: teacher, _RANDOM: str(random_weights)}
        backbones = {name: load_backbone(source, patch_size=8, in_channels=1) for name, source in sources.items()}
        features = {name: _probe(network, data) for name, network in backbones.items()}
    results: list[Result] = []
    if data.train is None:
        console.print("[4/5] no masks: no segmenter is trained", highlight=False)
    else:
        console.print("[4/5] fine-tuning a segmenter on each backbone", highlight=False)
        models = {_PRETRAINED: _finetune(settings(teacher, "finetune")), _RANDOM: _finetune(random_run)}
        console.print("[5/5] segmenting held-out images", highlight=False)
        results = _segment(models, data)
    summary = Summary(features, _scores(results), (time.monotonic() - start) / 60)
    write_atomically(output / "summary.json", summary.to_json())
    page = write_report(output / "report.html", output, config, data, summary, results)

    lines = [f"{_count(data)} fields with {len(data.channels)} channels", *summary.lines(len(results))]
    if results:
        lines.append(f"segmenter: {output / 'finetune' / 'best.pt'}")
    return "\n".join([*lines, f"{summary.minutes:.1f} minutes", f"report: {page}"])


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
    checkpoint = config.output / "pretrain" / "eval" / f"training_{config.pretrain_steps}" / "teacher_checkpoint.pth"
    if checkpoint.exists():
        return checkpoint
    return pretrain(_pretrain_recipe(config, data))


def _pretrain_recipe(config: DemoConfig, data: DemoData) -> PretrainConfig:
    policy = "consistency" if len(data.channels) > 1 else "average"
    overrides = [text_override("output", config.output / "pretrain"), text_override("data.shards", data.shards)]
    overrides += [f"steps={config.pretrain_steps}", f"seed={config.seed}", f"views.policy={policy}"]
    return load_config(PretrainConfig, find_recipe("pretrain", "demo"), overrides)


def _finetune_settings(config: DemoConfig, data: DemoData, weights: str, output: Path, size: str | None) -> list[str]:
    """Return the overrides of the recipe ``demo`` for a fine-tuning on these weights."""
    settings = [text_override("output", output), text_override("data.sets", [str(data.train)])]
    settings += [text_override("model.weights", weights), f"epochs={config.finetune_epochs}", f"seed={config.seed}"]
    return settings if size is None else [*settings, f"model.size={size}"]


def _finetune(settings: Sequence[str]) -> DINOCell:
    recipe = load_config(FinetuneConfig, find_recipe("finetune", "demo"), settings)
    return DINOCell.from_pretrained(finetune(recipe, score=score_segmenter))


@contextmanager
def _finetuning_beside(settings: Sequence[str], log: Path) -> Iterator[None]:
    """Fine-tune in a process of its own while the block runs: a network as small as the demo's uses one core.

    The block's end waits for it. Its errors are in the log; `_finetune` with the same settings continues and reports.
    """
    threads = torch.get_num_threads()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dinocell", "finetune", "demo", *settings],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
        torch.set_num_threads(threads)


def _size_of(source: str) -> str:
    got = load_backbone(source, patch_size=8, in_channels=1).config
    size = variant_of(got)
    if size is None:
        raise ConfigError(
            f"weights: {source} has width {got.width} and {got.depth} blocks; expected a size of {', '.join(VARIANTS)}"
        )
    return size


def _random_backbone(config: DemoConfig, data: DemoData) -> VisionTransformer:
    """Return the network with which the pretraining starts, or one like the given weights."""
    if config.weights is None:
        return initial_backbone(_pretrain_recipe(config, data))
    vit = VisionTransformer(load_backbone(config.weights, patch_size=8, in_channels=1).config)
    vit.init_weights(layer_scale=1.0, generator=torch.Generator().manual_seed(config.seed))
    return vit.eval()


def _probe(backbone: VisionTransformer, data: DemoData) -> FeatureScores:
    knn = margin = retrieval = None
    if data.class_shards is not None or len(data.channels) > 1:
        features, classes = _features(backbone, (data.class_shards or data.shards)[-1])
        if len(features) > 1:
            consistency = channel_consistency(features)
            margin, retrieval = consistency.margin, consistency.retrieval
        if data.class_shards is not None:
            knn = _knn_accuracy(_features(backbone, data.class_shards[0]), (features, classes))
    return FeatureScores(knn, margin, retrieval, _patch_r2(backbone, data))


def _knn_accuracy(train: tuple[torch.Tensor, list[str]], test: tuple[torch.Tensor, list[str]]) -> float:
    """Return the accuracy of the class of a field; queries are single channels, among the means of the channels."""
    (gallery, gallery_classes), (queries, classes) = train, test
    index = {name: position for position, name in enumerate(sorted({*gallery_classes, *classes}))}
    targets, expected = (torch.tensor([index[name] for name in names]) for names in (gallery_classes, classes))
    correct = []
    for channel in range(queries.shape[1]):
        votes = knn_scores(gallery.mean(1), targets, queries[:, channel], ks=[_NUM_NEIGHBOURS], num_classes=len(index))
        correct.append((votes[_NUM_NEIGHBOURS].argmax(1) == expected).float().mean())
    return float(torch.stack(correct).mean())


def _patch_r2(backbone: VisionTransformer, data: DemoData) -> float | None:
    """Return how much of the distance map a linear readout of the patch tokens predicts; fitted on the labelled set."""
    if data.train is None or data.unseen is None:
        return None
    train, unseen = open_labelled(data.train), open_labelled(data.unseen)
    images = [labelled[index] for labelled in (train, unseen) for index in range(len(labelled))]
    return labelled_r2(backbone, images.__getitem__, range(len(train)), range(len(train), len(images)))


def _features(backbone: VisionTransformer, shards: Path) -> tuple[torch.Tensor, list[str]]:
    """Return the CLS token of each field and channel (b c d), and the classes."""
    settings = FeatureSettings(channels="each", resize_size=_FIELD_PX, crop_size=_FIELD_PX)
    features = extract(backbone, ShardImages(shards), settings)
    return features.tensor(), [str(labels.get("cell_class", "")) for labels in features.labels]


def _segment(models: Mapping[str, DINOCell], data: DemoData) -> list[Result]:
    pipelines = {name: DINOCellPipeline(model) for name, model in models.items()}
    results = []
    assert data.unseen is not None
    unseen = open_labelled(data.unseen)
    smoothing_px, min_distance_px = (1.0, 7) if data.class_shards is None else (2.0, 12)  # generated cells are large
    for image in (unseen[index] for index in range(len(unseen))):
        plane = as_image(np.asarray(image.pixels)).plane()
        labels = {name: pipeline.cells(pipeline.distance(plane)) for name, pipeline in pipelines.items()}
        labels[_OTSU] = otsu_baseline(plane, smoothing_px=smoothing_px, min_distance_px=min_distance_px)
        results.append(Result(image.name, plane, np.ascontiguousarray(image.labels, dtype=np.int32), labels))
    return results


def _scores(results: Sequence[Result]) -> dict[str, SegmentationScores]:
    references = [result.reference for result in results]
    methods = list(results[0].labels) if results else []
    scores = {name: ctc_score(references, [result.labels[name] for result in results]) for name in methods}
    return {name: SegmentationScores(score.seg, score.det, score.op_csb) for name, score in scores.items()}


def _count(data: DemoData) -> int:
    return sum(read_manifest(shards).num_samples for shards in data.shards)
