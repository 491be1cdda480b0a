"""How fast are the probes: neighbours against scikit-learn's brute force, a grid of classifiers against one by one?

python benchmarks/probes.py           # 100,000 x 384 known, 10,000 asked, k 200; writes results/probes.md
python benchmarks/probes.py --quick   # a tenth of each; writes nothing
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
from _harness import alternate, ratio, write_result
from torch import nn

from dinocell.eval.probes.knn import knn_scores
from dinocell.eval.probes.linear import LinearSettings, train_grid

WIDTH, CLASSES, K = 384, 20, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known, asked = (10_000, 1_000) if options.quick else (100_000, 10_000)
    sides = neighbours(known, asked)
    if options.side:
        sides[options.side]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    memory = {name: peak(name) for name in sides}
    seconds = alternate(sides, rounds=1 if options.quick else options.rounds, warmup=0)
    grids = classifiers(300 if options.quick else 2000)
    grid_seconds = alternate(grids, rounds=1 if options.quick else options.rounds, warmup=0)
    lines = [
        "# Probes",
        "",
        f"Neighbours: {known:,} x {WIDTH} known, {asked:,} asked, k {K}, {CLASSES} classes, votes included. Grid: 48 "
        f"linear classifiers of {WIDTH} x {CLASSES} at batch 64, against torch's AdamW one after the other.",
        "",
        "| what | other / dinocell, time | peak memory, dinocell | peak memory, other |",
        "|---|---|---|---|",
        f"| neighbours, scikit-learn brute force | {ratio(seconds['scikit-learn'], seconds['dinocell'])} | "
        f"{memory['dinocell'] / 1e9:.2f} GB | {memory['scikit-learn'] / 1e9:.2f} GB |",
        f"| grid of 48 classifiers, one by one | {ratio(grid_seconds['one by one'], grid_seconds['at once'])} | | |",
    ]
    text = "\n".join(lines)
    print(text)
    if not options.quick:
        write_result("probes", text, ["torch", "scikit-learn"])


def peak(name: str) -> int:
    line = [sys.executable, __file__, *sys.argv[1:], "--side", name]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1])


def neighbours(known: int, asked: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(known, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (known,), generator=generator)
    queries = torch.randn(asked, WIDTH, generator=generator)

    def theirs() -> object:
        from sklearn.neighbors import KNeighborsClassifier

        classifier = KNeighborsClassifier(
            K, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), n_jobs=-1
        )
        return classifier.fit(train.numpy(), labels.numpy()).predict_proba(queries.numpy())

    return {
        "dinocell": lambda: knn_scores(train, labels, queries, ks=[K], num_classes=CLASSES),
        "scikit-learn": theirs,
    }


def classifiers(steps: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5_000, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (5_000,), generator=generator)
    settings = LinearSettings(epochs=1, epoch_steps=steps)

    def one_by_one() -> None:
        for rate, decay in settings.grid:
            layer = nn.Linear(WIDTH, CLASSES)
            optimizer = torch.optim.AdamW(layer.parameters(), lr=rate * 64 / 256, weight_decay=decay)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for step in range(steps):
                which = torch.arange(step * 64, step * 64 + 64) % len(features)
                loss = nn.functional.cross_entropy(layer(features[which]), labels[which])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    return {
        "at once": lambda: train_grid(features, labels, settings, num_classes=CLASSES),
        "one by one": one_by_one,
    }


if __name__ == "__main__":
    main()
