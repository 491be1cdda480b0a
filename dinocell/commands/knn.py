"""``dinocell knn``: nearest neighbours in the features of a frozen backbone, by the published protocols."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command
from dinocell.commands._probe_options import (
    Material,
    add_feature_arguments,
    add_set_arguments,
    add_task_arguments,
    describe,
    metric_name,
    open_material,
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
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes (0.07)")
    parser.add_argument(
        "--leave-one-out",
        metavar="COLUMN",
        help="ask each group of the test images by the training images and the other groups; scored on the classes "
        "that the training images do not have (CHAMMI's HPA Task_three: cell_type, CP Task_four: plate)",
    )
    parser.set_defaults(run=_run_knn)


def _run_knn(options: argparse.Namespace) -> None:
    from dinocell.eval.metrics.classification import confusion, metric_of
    from dinocell.eval.probes.report import log_to_run, write_classes, write_scores
    from dinocell.runtime.distributed import together

    if not 0 < options.temperature < math.inf:
        raise ConfigError(f"--temperature: expected more than 0, got {options.temperature:g}")
    with together(options.device) as world:
        material = open_material(options)
        name = metric_name(options, material.task)
        metric = metric_of(name, multilabel=material.task.multilabel)
        scores, task, train_size = (_leave_one_out if options.leave_one_out else _plain)(options, material)
    if not world.is_main:
        return
    found = {k: metric(each, task.test) for k, each in scores.items()}
    best = max(found, key=lambda k: (found[k].value, -k))
    rows = [{"k": k, name: each.value} for k, each in found.items()]
    about = describe(options, material) | {"neighbours of": f"{train_size} images", "temperature": options.temperature}
    if options.leave_one_out:
        about["leave one out"] = (
            f"groups of {options.leave_one_out}; scored on classes that are not in the training set"
        )
    paths = write_scores(options.output, "knn", about, rows)
    table = None if task.multilabel else confusion(scores[best], task.test)
    pictures = write_classes(options.output, "knn", task.classes, found[best], table)
    logged = log_to_run(
        options.weights,
        {f"knn/{options.task}_{name}_k{k}": each.value for k, each in found.items()},
        {f"knn/{options.task}_{shown}": path for shown, path in pictures.items()},
    )
    for k, each in found.items():
        print(f"k {k:>4}: {name} {each.value:.4f}")
    print(f"scores: {paths[2]}" + (f"; TensorBoard: {logged}" if logged else ""))


def _check_neighbours(ks: Sequence[int], count: int) -> None:
    wrong = [k for k in ks if not 1 <= k <= count]
    if wrong:
        raise ConfigError(
            f"--nb-knn: expected 1 to {count}, the number of training images, got {', '.join(map(str, wrong))}"
        )


def _plain(options: argparse.Namespace, material: Material) -> "tuple[dict[int, torch.Tensor], Task, int]":
    task = material.task
    _check_neighbours(options.nb_knn, len(task.train))
    rows = task.train_kept.nonzero()[:, 0]
    train = material.train.tensor(rows[material.world.part(len(rows))])
    scores = _ask(options, material, train, task.train, material.test.tensor(task.test_kept))
    return scores, task, len(task.train)


def _ask(
    options: argparse.Namespace,
    material: Material,
    train: "torch.Tensor",
    labels: "torch.Tensor",
    queries: "torch.Tensor",
) -> "dict[int, torch.Tensor]":
    """Let this rank's part of the training images and those of the other ranks vote."""
    from dinocell.eval.probes.knn import knn_scores

    train, labels, queries = (each.to(material.world.device) for each in (train, labels, queries))
    scores = knn_scores(
        train,
        labels,
        queries,
        ks=options.nb_knn,
        num_classes=None if material.task.multilabel else len(material.task.classes),
        temperature=options.temperature,
        world=material.world,
    )
    return {k: each.cpu() for k, each in scores.items()}


def _leave_one_out(options: argparse.Namespace, material: Material) -> "tuple[dict[int, torch.Tensor], Task, int]":
    import numpy as np
    import torch

    from dinocell.eval.probes.image_sets import labels_of

    task = material.task
    if task.multilabel:
        raise ConfigError("--leave-one-out: is for class labels, not for multi-label rows")
    rows = [row for row, kept in zip(material.test.labels, task.test_kept.tolist(), strict=True) if kept]
    groups = np.array(labels_of(rows, options.leave_one_out, material.names[1]))
    if len(set(groups)) < 2:
        raise DinocellError(
            f"--leave-one-out {options.leave_one_out}: expected several groups, got {', '.join(set(groups))}"
        )
    novel = sorted(set(task.test.tolist()) - set(task.train.tolist()))
    if not novel:
        raise DinocellError(
            "--leave-one-out: every class of the test images is in the training images: nothing is held out"
        )
    train, test = material.train.tensor(task.train_kept), material.test.tensor(task.test_kept)
    scores = {k: torch.zeros(len(test), len(task.classes)) for k in options.nb_knn}
    smallest = len(train) + min(len(test) - int((groups == group).sum()) for group in set(groups))
    _check_neighbours(options.nb_knn, smallest)
    for group in sorted(set(groups)):
        asked = torch.from_numpy(groups == group)
        known, labels = torch.cat((train, test[~asked])), torch.cat((task.train, task.test[~asked]))
        part = material.world.part(len(known))
        found = _ask(options, material, known[part], labels, test[asked])
        for k, each in found.items():
            scores[k][asked] = each
    kept = torch.tensor([label in novel for label in task.test.tolist()])
    # Only held-out classes are scored; a wrong vote for another class is still wrong.
    return {k: each[kept] for k, each in scores.items()}, _only(task, kept), smallest


def _only(task: "Task", kept: "torch.Tensor") -> "Task":
    return replace(task, test=task.test[kept])
