"""``dinocell knn``: kNN classification with the features of a frozen backbone, by the published protocols."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
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
from dinocell.errors import ConfigError, DinocellError

if TYPE_CHECKING:
    import torch

    from dinocell.eval.probes.tasks import Task


def register(subparsers: Any) -> None:
    """Add ``knn`` to the commands."""
    parser = add_command(
        subparsers,
        "knn",
        "classify images by their nearest neighbours in the features of a backbone",
        "dinocell knn --weights W --hpaone D --task CELL_TYPE --metric mean_per_class_multiclass_f1 --nb-knn 1 10 "
        "--output probes/knn",
    )
    add_feature_arguments(parser)
    add_set_arguments(parser)
    add_task_arguments(parser)
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


def _run_knn(options: argparse.Namespace) -> None:
    from dinocell.eval.metrics.classification import confusion, metric_of
    from dinocell.eval.probes.report import log_to_run, write_classes, write_scores
    from dinocell.runtime.distributed import together

    if not 0 < options.temperature < math.inf:
        raise ConfigError(f"--temperature: expected more than 0, got {options.temperature:g}")
    with together(options.device) as world:
        data = open_probe_data(options)
        name = metric_name(options, data.task)
        metric = metric_of(name, multilabel=data.task.multilabel)
        scores, task, train_size = (_leave_one_out if options.leave_one_out else _plain)(options, data)
    if not world.is_main:
        return
    results = {k: metric(score, task.test) for k, score in scores.items()}
    best = max(results, key=lambda k: (results[k].value, -k))
    rows = [{"k": k, name: result.value} for k, result in results.items()]
    about = describe(options, data) | {"neighbours of": f"{train_size} images", "temperature": options.temperature}
    if options.leave_one_out:
        about["leave one out"] = (
            f"groups of {options.leave_one_out}; scored on classes that are not in the training set"
        )
    paths = write_scores(options.output, "knn", about, rows)
    table = None if task.multilabel else confusion(scores[best], task.test)
    figures = write_classes(options.output, "knn", task.classes, results[best], table)
    logged = log_to_run(
        options.weights,
        {f"knn/{options.task}_{name}_k{k}": result.value for k, result in results.items()},
        {f"knn/{options.task}_{shown}": path for shown, path in figures.items()},
    )
    for k, result in results.items():
        print(f"k {k:>4}: {name} {result.value:.4f}")
    print(f"scores: {paths[2]}" + (f"; TensorBoard: {logged}" if logged else ""))


def _check_neighbours(ks: Sequence[int], count: int) -> None:
    invalid = [k for k in ks if not 1 <= k <= count]
    if invalid:
        raise ConfigError(
            f"--nb-knn: expected 1 to {count}, the number of training images, got {', '.join(map(str, invalid))}"
        )


def _plain(options: argparse.Namespace, data: ProbeData) -> "tuple[dict[int, torch.Tensor], Task, int]":
    task = data.task
    _check_neighbours(options.nb_knn, len(task.train))
    rows = task.train_kept.nonzero()[:, 0]
    train = data.train.tensor(rows[data.world.part(len(rows))])
    scores = _scores(options, data, train, task.train, data.test.tensor(task.test_kept))
    return scores, task, len(task.train)


def _scores(
    options: argparse.Namespace,
    data: ProbeData,
    train: "torch.Tensor",
    labels: "torch.Tensor",
    queries: "torch.Tensor",
) -> "dict[int, torch.Tensor]":
    """Return the kNN scores of the queries, with the training images of all ranks."""
    from dinocell.eval.probes.knn import knn_scores

    train, labels, queries = (tensor.to(data.world.device) for tensor in (train, labels, queries))
    scores = knn_scores(
        train,
        labels,
        queries,
        ks=options.nb_knn,
        num_classes=None if data.task.multilabel else len(data.task.classes),
        temperature=options.temperature,
        world=data.world,
    )
    return {k: score.cpu() for k, score in scores.items()}


def _leave_one_out(options: argparse.Namespace, data: ProbeData) -> "tuple[dict[int, torch.Tensor], Task, int]":
    import numpy as np
    import torch

    from dinocell.eval.probes.image_sets import labels_of

    task = data.task
    if task.multilabel:
        raise ConfigError("--leave-one-out: requires class labels, not multi-label targets")
    rows = [row for row, kept in zip(data.test.labels, task.test_kept.tolist(), strict=True) if kept]
    groups = np.array(labels_of(rows, options.leave_one_out, data.names[1]))
    if len(set(groups)) < 2:
        raise DinocellError(
            f"--leave-one-out {options.leave_one_out}: expected several groups, got {', '.join(set(groups))}"
        )
    novel = sorted(set(task.test.tolist()) - set(task.train.tolist()))
    if not novel:
        raise DinocellError("--leave-one-out: every class of the test images is also in the training images")
    train, test = data.train.tensor(task.train_kept), data.test.tensor(task.test_kept)
    scores = {k: torch.zeros(len(test), len(task.classes)) for k in options.nb_knn}
    smallest = len(train) + min(len(test) - int((groups == group).sum()) for group in set(groups))
    _check_neighbours(options.nb_knn, smallest)
    for group in sorted(set(groups)):
        is_query = torch.from_numpy(groups == group)
        references, labels = torch.cat((train, test[~is_query])), torch.cat((task.train, task.test[~is_query]))
        part = data.world.part(len(references))
        group_scores = _scores(options, data, references[part], labels, test[is_query])
        for k, score in group_scores.items():
            scores[k][is_query] = score
    kept = torch.tensor([label in novel for label in task.test.tolist()])
    # Only held-out classes are scored; a wrong vote for another class is still wrong.
    return {k: score[kept] for k, score in scores.items()}, _only(task, kept), smallest


def _only(task: "Task", kept: "torch.Tensor") -> "Task":
    return replace(task, test=task.test[kept])
