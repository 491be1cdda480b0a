"""``dinocell knn`` and ``dinocell linear``: classification with the features of a frozen backbone."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command
from dinocell.commands._probe_options import (
    add_feature_arguments,
    add_set_arguments,
    extractor,
    open_pair,
    open_queries,
)
from dinocell.errors import ConfigError, DinocellError, require

if TYPE_CHECKING:
    from torch import Tensor

    from dinocell.eval.probes.classification import ClassScores, Task
    from dinocell.eval.probes.features import Features, FeatureSettings
    from dinocell.eval.probes.linear import LinearSettings, Loss
    from dinocell.runtime.distributed import World


def register(subparsers: Any) -> None:
    """Add ``knn`` and ``linear`` to the commands."""
    parser = add_command(
        subparsers,
        "knn",
        "classify images by their nearest neighbours in the features of a backbone",
        "dinocell knn --weights W --hpaone D --task CELL_TYPE --metric mean_per_class_multiclass_f1 --nb-knn 1 10 "
        "--output probes/knn",
    )
    _add_data_arguments(parser)
    parser.add_argument(
        "--nb-knn", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K", help="(10 20 100 200)"
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="temperature of the votes (0.07)")
    parser.add_argument(
        "--leave-one-out",
        metavar="COLUMN",
        help="classify each group of test images by the training images and the other groups; scored on the classes "
        "that are not in the training images (CHAMMI's HPA Task_three: cell_type, CP Task_four: plate)",
    )
    parser.set_defaults(run=_run_knn)

    parser = add_command(
        subparsers,
        "linear",
        "train linear classifiers on the features of a backbone, a whole grid at once",
        "dinocell linear --weights W --hpaone D --task PROTEIN_LOCALIZATION --loss binary_cross_entropy --avgpool "
        "--n-last-blocks 4 --output probes/linear",
    )
    _add_data_arguments(parser)
    add = parser.add_argument_group("training").add_argument
    add("--loss", choices=("cross_entropy", "binary_cross_entropy"), help="(by the task)")
    add("--epochs", type=int, default=30, metavar="N", help="(30)")
    add("--epoch-steps", type=int, default=145, metavar="N", help="batches per epoch; 0: one pass (145)")
    add("--train-batch-size", type=int, default=64, metavar="N", help="(64)")
    add("--learning-rates", type=float, nargs="+", metavar="X", help="(16 from 1e-5 to 1)")
    add("--weight-decays", type=float, nargs="+", metavar="X", help="(0 1e-5 1e-4)")
    add("--seed", type=int, default=0)
    share = "share of the training images for selecting the classifier (0.1)"
    add("--validation-share", type=float, default=0.1, help=share)
    chosen = "choose the classifier on the test images, as Cell-DINO does; stated in the report"
    add("--choose-on-test", action="store_true", help=chosen)
    add("--classifier", type=Path, metavar="FILE", help="score a saved classifier; --train is not needed")
    parser.set_defaults(run=_run_linear)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the backbone, the sets, the task and its metric."""
    add_feature_arguments(parser)
    add_set_arguments(parser)
    add = parser.add_argument_group("task").add_argument
    add(
        "--task",
        default="class",
        metavar="COLUMN",
        help="a label column, or PROTEIN_LOCALIZATION or CELL_TYPE of the Human Protein Atlas (class: of folders)",
    )
    add("--columns", nargs="+", default=[], metavar="COLUMN", help="several labels per image: their columns")
    add(
        "--metric",
        metavar="NAME",
        help="mean_per_class_multilabel_f1, mean_per_class_multiclass_f1, accuracy, top-5 (an F1, by the task)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="features, scores and figures")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Data:
    """Features of two sets, the task, and the name of its metric."""

    train: "Features"
    test: "Features"
    task: "Task"
    metric: str
    settings: "FeatureSettings"
    names: tuple[str, str]
    world: "World"


def _open_data(options: argparse.Namespace, *, learn: bool = True) -> _Data:
    """Open both sets and extract missing features; the result is the same on every rank.

    Without ``learn`` only the test set is opened and used for both.
    """
    from dinocell.eval.probes.classification import MULTICLASS, MULTILABEL, make_task

    train_set, test_set = open_pair(options) if learn else [open_queries(options)] * 2
    with extractor(options) as (extract, settings, world):
        test = extract(options.output / "features" / "test", test_set)
        train = extract(options.output / "features" / "train", train_set) if learn else test
    names = (train_set.name, test_set.name)
    task = make_task(
        options.task, train.labels, test.labels, train_name=names[0], test_name=names[1], columns=options.columns
    )
    metric = options.metric or (MULTILABEL if task.multilabel else MULTICLASS)
    return _Data(train=train, test=test, task=task, metric=metric, settings=settings, names=names, world=world)


def _write(
    options: argparse.Namespace,
    data: _Data,
    command: str,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    shown: "Task",
    scores: "Tensor",
    result: "ClassScores",
    numbers: Mapping[str, float],
    note: str = "",
) -> str:
    """Write the tables and figures of a probe and log ``numbers`` to the run; return their paths for the terminal.

    ``shown`` has the classes and test images whose ``scores`` and ``result`` are drawn.
    """
    from dinocell.eval.probes.classification import confusion
    from dinocell.eval.probes.report import log_to_run, write_classes, write_scores

    settings, task = data.settings, data.task
    measured = {
        "weights": options.weights,
        "trained on": f"{data.names[0]} ({len(task.train)} images)",
        "tested on": f"{data.names[1]} ({len(task.test)} images)",
        "task": f"{options.task}, {len(task.classes)} classes",
        "features": f"channels {settings.channels}, resize {settings.resize_size}, crop {settings.crop_size}, "
        f"{settings.n_last_blocks} last blocks" + (", mean patch token" if settings.avgpool else ""),
    }
    if "classifier" in about:
        del measured["trained on"]
    paths = write_scores(options.output, command, measured | dict(about), rows, note=note)
    table = None if shown.multilabel else confusion(scores, shown.test)
    figures = write_classes(options.output, command, shown.classes, result, table)
    if not numbers:
        return f"scores: {paths[2]}"
    prefix = f"{command}/{options.task}_"
    logged = log_to_run(
        options.weights,
        {f"{prefix}{name}": value for name, value in numbers.items()},
        {f"{prefix}{content}": path for content, path in figures.items()},
    )
    return f"scores: {paths[2]}" + (f"; TensorBoard: {logged}" if logged else "")


def _run_knn(options: argparse.Namespace) -> None:
    from dinocell.eval.probes.classification import metric_of
    from dinocell.runtime.distributed import together

    if not 0 < options.temperature < math.inf:
        raise ConfigError(f"--temperature: expected more than 0, got {options.temperature:g}")
    with together(options.device) as world:
        data = _open_data(options)
        metric = metric_of(data.metric, multilabel=data.task.multilabel)
        scores, test, train_size = (_leave_one_out if options.leave_one_out else _knn)(options, data)
    if not world.is_main:
        return
    results = {k: metric(score, test) for k, score in scores.items()}
    best = max(results, key=lambda k: (results[k].value, -k))
    about = {"neighbours of": f"{train_size} images", "temperature": options.temperature}
    if options.leave_one_out:
        about["leave one out"] = (
            f"groups of {options.leave_one_out}; scored on classes that are not in the training set"
        )
    places = _write(
        options,
        data,
        "knn",
        about,
        [{"k": k, data.metric: result.value} for k, result in results.items()],
        shown=replace(data.task, test=test),
        scores=scores[best],
        result=results[best],
        numbers={f"{data.metric}_k{k}": result.value for k, result in results.items()},
    )
    for k, result in results.items():
        print(f"k {k:>4}: {data.metric} {result.value:.4f}")
    print(places)


def _knn(options: argparse.Namespace, data: _Data) -> "tuple[dict[int, Tensor], Tensor, int]":
    """Return the scores of the test images by k, their classes, and the number of training images."""
    task, number = data.task, len(data.task.train)
    _check_neighbours(options.nb_knn, number)
    rows = task.train_kept.nonzero()[:, 0]
    train = data.train.tensor(rows[data.world.part(len(rows))])
    return _scores(options, data, train, task.train, data.test.tensor(task.test_kept)), task.test, number


def _leave_one_out(options: argparse.Namespace, data: _Data) -> "tuple[dict[int, Tensor], Tensor, int]":
    """Do what `_knn` does, for each group with the other groups as training images; only new classes are kept."""
    import numpy as np
    import torch

    from dinocell.eval.probes.image_sets import labels_of

    task = data.task
    rows = [row for row, kept in zip(data.test.labels, task.test_kept.tolist(), strict=True) if kept]
    groups = np.array(labels_of(rows, options.leave_one_out, data.names[1]))
    names = sorted(set(groups))
    is_new = torch.zeros(len(groups), dtype=torch.bool) if task.multilabel else ~torch.isin(task.test, task.train)
    require(not task.multilabel, "--leave-one-out: requires class labels, not multi-label targets")
    got = ", ".join(names)
    require(len(names) > 1, f"--leave-one-out {options.leave_one_out}: expected several groups, got {got}")
    require(is_new.any(), "--leave-one-out: every class of the test images is also in the training images")
    train, test = data.train.tensor(task.train_kept), data.test.tensor(task.test_kept)
    scores = {k: torch.zeros(len(test), len(task.classes)) for k in options.nb_knn}
    smallest = len(train) + min(int((groups != group).sum()) for group in names)
    _check_neighbours(options.nb_knn, smallest)
    for group in names:
        is_query = torch.from_numpy(groups == group)
        references, labels = torch.cat((train, test[~is_query])), torch.cat((task.train, task.test[~is_query]))
        part = data.world.part(len(references))
        for k, score in _scores(options, data, references[part], labels, test[is_query]).items():
            scores[k][is_query] = score
    # A wrong vote for a class of the training images is still wrong.
    return {k: score[is_new] for k, score in scores.items()}, task.test[is_new], smallest


def _check_neighbours(ks: Sequence[int], count: int) -> None:
    if invalid := [k for k in ks if not 1 <= k <= count]:
        got = ", ".join(map(str, invalid))
        raise ConfigError(f"--nb-knn: expected 1 to {count}, the number of training images, got {got}")


def _scores(
    options: argparse.Namespace, data: _Data, train: "Tensor", labels: "Tensor", queries: "Tensor"
) -> "dict[int, Tensor]":
    """Return the kNN scores of the queries, with the training images of all ranks."""
    from dinocell.eval.probes.knn import knn_scores

    scores = knn_scores(
        *(tensor.to(data.world.device) for tensor in (train, labels, queries)),
        ks=options.nb_knn,
        num_classes=None if data.task.multilabel else len(data.task.classes),
        temperature=options.temperature,
        world=data.world,
    )
    return {k: score.cpu() for k, score in scores.items()}


def _run_linear(options: argparse.Namespace) -> None:
    from dinocell.eval.probes.linear import LEARNING_RATES, WEIGHT_DECAYS, LinearSettings

    settings = LinearSettings(  # checked before the features are extracted
        learning_rates=tuple(options.learning_rates or LEARNING_RATES),
        weight_decays=tuple(options.weight_decays or WEIGHT_DECAYS),
        epochs=options.epochs,
        epoch_steps=options.epoch_steps or None,
        batch_size=options.train_batch_size,
        validation_share=options.validation_share,
        seed=options.seed,
    )
    data = _open_data(options, learn=options.classifier is None)
    if not data.world.is_main:  # other ranks only extract features
        return
    if options.classifier is not None:
        _score_saved(options, data)
    else:
        loss: Loss = "binary_cross_entropy" if data.task.multilabel else "cross_entropy"
        _train(options, data, replace(settings, loss=options.loss or loss))


def _train(options: argparse.Namespace, data: _Data, settings: "LinearSettings") -> None:
    import torch

    from dinocell.eval.probes.classification import metric_of
    from dinocell.eval.probes.linear import Classifier, choose, split_off, train_grid

    task, name = data.task, data.metric
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
    saved = options.output / "classifier.safetensors"
    Classifier(
        weight=classifiers.weight[choice.which],
        bias=classifiers.bias[choice.which],
        classes=task.classes,
        task=options.task,
        features=_features_of(options, data),
    ).save(saved)
    chosen_on = "the test images (as Cell-DINO)" if options.choose_on_test else f"{len(held)} held-out training images"
    about = {
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
    note, numbers = f"The classifier was chosen on {chosen_on}.", {name: result.value}
    places = _write(
        options, data, "linear", about, grid, shown=task, scores=scores, result=result, numbers=numbers, note=note
    )
    print(f"{name} {result.value:.4f}; chosen on {chosen_on}: {choice.chosen_by:.4f}")
    print(f"{places}; classifier: {saved}")


def _features_of(options: argparse.Namespace, data: _Data) -> dict[str, object]:
    """Return the properties of features that must match those of a saved classifier."""
    from dinocell.eval.probes.features import fingerprint

    properties = {name: getattr(data.settings, name) for name in ("channels", "n_last_blocks", "avgpool")}
    return {"weights": fingerprint(options.weights), **properties}


def _score_saved(options: argparse.Namespace, data: _Data) -> None:
    import torch

    from dinocell.eval.probes.classification import metric_of
    from dinocell.eval.probes.linear import Classifier

    task, saved = data.task, Classifier.load(options.classifier)
    given = _features_of(options, data)
    problems = [
        f"features with {key} {expected}, these have {given.get(key)}"
        for key, expected in saved.features.items()
        if given.get(key) != expected
    ]
    labels = task.test
    if task.multilabel:
        is_other = task.classes != saved.classes
    else:
        # The test set may lack classes, so indices differ; -1 is a class that the classifier does not know.
        index = {label: saved.classes.index(label) if label in saved.classes else -1 for label in task.classes}
        labels = torch.tensor([index[task.classes[label]] for label in task.test.tolist()])
        is_other = bool((labels < 0).any())
    if is_other:
        problems.append(f"other classes: {', '.join(saved.classes)}")
    if problems:
        raise DinocellError(f"{options.classifier}: was trained on {problems[0]}")
    scores = saved.scores(data.test.tensor(task.test_kept))
    result = metric_of(data.metric, multilabel=task.multilabel, logits=True)(scores, labels)
    about, rows = {"classifier": str(options.classifier)}, [{data.metric: result.value}]
    shown = replace(task, classes=saved.classes, test=labels)
    places = _write(options, data, "linear", about, rows, shown=shown, scores=scores, result=result, numbers={})
    print(f"{data.metric} {result.value:.4f}; {places}")
