"""``dinocell linear``: train a grid of linear classifiers on frozen features."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command
from dinocell.commands._probe_options import (
    ProbeData,
    add_feature_arguments,
    add_set_arguments,
    add_task_arguments,
    describe,
    metric_name,
    open_probe_data,
)
from dinocell.errors import DinocellError

if TYPE_CHECKING:
    from dinocell.eval.probes.linear import LinearSettings, Loss


def register(subparsers: Any) -> None:
    """Add ``linear`` to the commands."""
    parser = add_command(
        subparsers,
        "linear",
        "train linear classifiers on the features of a backbone, a whole grid at once",
        "dinocell linear --weights W --hpaone D --task PROTEIN_LOCALIZATION --loss binary_cross_entropy --avgpool "
        "--n-last-blocks 4 --output probes/linear",
    )
    add_feature_arguments(parser)
    add_set_arguments(parser)
    add_task_arguments(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--loss", choices=("cross_entropy", "binary_cross_entropy"), help="(by the task)")
    group.add_argument("--epochs", type=int, default=30, metavar="N", help="(30)")
    group.add_argument("--epoch-steps", type=int, default=145, metavar="N", help="batches per epoch; 0: one pass (145)")
    group.add_argument("--train-batch-size", type=int, default=64, metavar="N", help="(64)")
    group.add_argument("--learning-rates", type=float, nargs="+", metavar="X", help="(16 from 1e-5 to 1)")
    group.add_argument("--weight-decays", type=float, nargs="+", metavar="X", help="(0 1e-5 1e-4)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--validation-share",
        type=float,
        default=0.1,
        help="share of the training images for selecting the classifier (0.1)",
    )
    group.add_argument(
        "--choose-on-test",
        action="store_true",
        help="choose the classifier on the test images, as Cell-DINO does; stated in the report",
    )
    group.add_argument(
        "--classifier", type=Path, metavar="FILE", help="score a saved classifier; --train is not needed"
    )
    parser.set_defaults(run=_run_linear)


def _run_linear(options: argparse.Namespace) -> None:
    settings = _settings(options)  # checked before the features are extracted
    data = open_probe_data(options, learn=options.classifier is None)
    if not data.world.is_main:  # other ranks only extract features
        return
    if options.classifier is not None:
        _score_saved(options, data)
    else:
        loss: Loss = "binary_cross_entropy" if data.task.multilabel else "cross_entropy"
        _train(options, data, replace(settings, loss=options.loss or loss))


def _settings(options: argparse.Namespace) -> "LinearSettings":
    from dinocell.eval.probes.linear import LEARNING_RATES, WEIGHT_DECAYS, LinearSettings

    return LinearSettings(
        learning_rates=tuple(options.learning_rates or LEARNING_RATES),
        weight_decays=tuple(options.weight_decays or WEIGHT_DECAYS),
        epochs=options.epochs,
        epoch_steps=options.epoch_steps or None,
        batch_size=options.train_batch_size,
        validation_share=options.validation_share,
        seed=options.seed,
    )


def _train(options: argparse.Namespace, data: ProbeData, settings: "LinearSettings") -> None:
    import torch

    from dinocell.eval.metrics.classification import confusion, metric_of
    from dinocell.eval.probes.linear import Classifier, choose, split_off, train_grid
    from dinocell.eval.probes.report import log_to_run, write_classes, write_scores

    task = data.task
    name = metric_name(options, task)
    metric = metric_of(name, multilabel=task.multilabel, logits=True)
    train, rows = data.train.stored(), task.train_kept.nonzero()[:, 0]
    test = data.test.tensor(task.test_kept)
    learn, held = split_off(len(rows), settings.validation_share, seed=settings.seed)
    if options.choose_on_test:
        learn = torch.arange(len(rows))
    count = len(settings.grid)

    def progress(done: int, of: int) -> None:
        if done == of or done % max(1, of // 10) == 0:
            print(f"{count} classifiers, step {done}/{of}", flush=True)

    classifiers = train_grid(
        train, task.train[learn], settings, num_classes=len(task.classes), rows=rows[learn], progress=progress
    )
    by = (test, task.test) if options.choose_on_test else (train[rows[held]], task.train[held])
    choice = choose(classifiers, *by, settings, metric)
    scores = classifiers.scores(test, which=choice.which)
    result = metric(scores, task.test)
    chosen_on = "the test images (as Cell-DINO)" if options.choose_on_test else f"{len(held)} held-out training images"
    about = describe(options, data) | {
        "trained": f"{settings.epochs} epochs of {settings.epoch_steps or 'one pass'}, batch {settings.batch_size}, "
        f"{settings.loss}",
        "chosen": f"learning rate {choice.learning_rate:g}, weight decay {choice.weight_decay:g}; there were {count}",
        "chosen on": chosen_on,
        name: f"{result.value:.4f}",
    }
    grid = [
        {"learning_rate": rate, "weight_decay": decay, f"{name}, where chosen": value}
        for (rate, decay), value in zip(settings.grid, choice.all_scores, strict=True)
    ]
    paths = write_scores(options.output, "linear", about, grid, note=f"The classifier was chosen on {chosen_on}.")
    table = None if task.multilabel else confusion(scores, task.test)
    figures = write_classes(options.output, "linear", task.classes, result, table)
    saved = options.output / "classifier.safetensors"
    Classifier(
        weight=classifiers.weight[choice.which],
        bias=classifiers.bias[choice.which],
        classes=task.classes,
        task=options.task,
        features=_features_of(options, data),
    ).save(saved)
    logged = log_to_run(
        options.weights,
        {f"linear/{options.task}_{name}": result.value},
        {f"linear/{options.task}_{shown}": path for shown, path in figures.items()},
    )
    print(f"{name} {result.value:.4f}; chosen on {chosen_on}: {choice.chosen_by:.4f}")
    print(f"scores: {paths[2]}; classifier: {saved}" + (f"; TensorBoard: {logged}" if logged else ""))


def _features_of(options: argparse.Namespace, data: ProbeData) -> dict[str, object]:
    """Return the properties of features that must match those of a saved classifier."""
    from dinocell.eval.probes.feature_files import fingerprint

    settings = data.settings
    return {
        "weights": fingerprint(options.weights),
        "channels": settings.channels,
        "n_last_blocks": settings.n_last_blocks,
        "avgpool": settings.avgpool,
    }


def _score_saved(options: argparse.Namespace, data: ProbeData) -> None:
    import torch

    from dinocell.eval.metrics.classification import confusion, metric_of
    from dinocell.eval.probes.linear import Classifier
    from dinocell.eval.probes.report import write_classes, write_scores

    task, saved = data.task, Classifier.load(options.classifier)
    given = _features_of(options, data)
    for key, expected in saved.features.items():
        if given.get(key) != expected:
            raise DinocellError(
                f"{options.classifier}: was trained on features with {key} {expected}, these have {given.get(key)}"
            )
    unknown = (
        sorted({task.classes[label] for label in task.test.tolist()} - set(saved.classes))
        if not task.multilabel
        else []
    )
    if unknown or (task.multilabel and task.classes != saved.classes):
        raise DinocellError(f"{options.classifier}: was trained on other classes: {', '.join(saved.classes)}")
    name = metric_name(options, task)
    labels = task.test
    if not task.multilabel:
        labels = torch.tensor([saved.classes.index(task.classes[label]) for label in task.test.tolist()])
    scores = saved.scores(data.test.tensor(task.test_kept))
    result = metric_of(name, multilabel=task.multilabel, logits=True)(scores, labels)
    about = describe(options, data) | {"classifier": str(options.classifier)}
    del about["trained on"]
    paths = write_scores(options.output, "linear", about, [{name: result.value}])
    table = None if task.multilabel else confusion(scores, labels)
    write_classes(options.output, "linear", saved.classes, result, table)
    print(f"{name} {result.value:.4f}; scores: {paths[2]}")
