"""Probes on two ranks say what one process says. Real processes, started by torchrun, once for all checks."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocell.cli import main
from dinocell.eval.probes.features import FeatureSettings, extract_to, read_features
from dinocell.eval.probes.image_sets import ShardImages
from dinocell.eval.probes.knn import knn_scores
from dinocell.images.write import write_png
from dinocell.runtime.distributed import World, together
from helpers.models import tiny

RANKS = 2
SETTINGS = FeatureSettings(channels="each", batch_size=7)
PLACES = ("nucleoplasm", "cytosol")


def votes(world: World, *, tied: bool, multilabel: bool, count: int) -> dict[int, torch.Tensor]:
    """Each rank knows its part of ``count`` images; tied: one of 24 directions each, a dozen equally near."""
    generator = torch.Generator().manual_seed(count)
    known, asked = (torch.randn(number, 12, generator=generator) for number in (count, 20))
    if tied:
        known, asked = (torch.nn.functional.one_hot(each.argmax(1), 12).float() for each in (known, asked))
    labels = torch.randint(0, 5, (count,), generator=generator)
    rows = torch.randint(0, 2, (count, 5), generator=generator).float()
    return knn_scores(
        known[world.part(count)],
        rows if multilabel else labels,
        asked,
        ks=[1, 4, count],
        num_classes=None if multilabel else 5,
        query_chunk=7,
        train_chunk=13,
        world=world,
    )


# The last has a rank without a training image.
CASES = [
    {"tied": tied, "multilabel": multilabel, "count": count}
    for tied in (True, False)
    for multilabel in (True, False)
    for count in (151, 5)
]


def on_each_rank(folder: Path, commands: list[list[str]]) -> None:
    """What a rank does: extract, vote, refuse what one rank alone has, run the commands; rank 0 keeps what it saw."""
    with together("cpu") as world:
        assert world.size == RANKS
        images = ShardImages(folder / "set")
        found = extract_to(folder / "two", tiny(), images, SETTINGS, weights="seed 0", world=world)
        assert found.values.shape == (60, 3, 192)
        seen = [votes(world, **case) for case in CASES]  # type: ignore[arg-type]
        torch.save(seen, folder / f"votes-{world.rank}.pt")
        broken = torch.full((2, 3), torch.nan if world.rank == 1 else 1.0)
        with pytest.raises(ValueError, match="expected finite features"):
            knn_scores(broken, torch.zeros(4, dtype=torch.long), torch.ones(1, 3), ks=[1], world=world)
        with pytest.raises(ValueError, match="expected 2 training features for 4 labels and 2 ranks, got 4"):
            knn_scores(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), torch.ones(1, 3), ks=[1], world=world)
        for command in commands:
            assert main(command) == 0


def write_hpaone(folder: Path) -> None:
    images = folder / "fixed_size_masked_single_cells_HPA"
    images.mkdir(parents=True)
    for table, first in (("pretrain", 0), ("evaluation", 50)):
        with (folder / f"fixed_size_masked_single_cells_{table}_20240507.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", *PLACES])
            for number in range(first, first + 11):
                pixels = np.random.default_rng(number).integers(0, 255, (32, 4 * 32), dtype=np.uint8)
                write_png(images / f"c{number}.png", pixels)
                writer.writerow([f"c{number}.png", number % 2 == 0, number % 3 == 0])


def commands_of(folder: Path, output: Path) -> list[list[str]]:
    common = ["--weights", "random:nano", "--device", "cpu", "--crop-size", "32", "--batch-size", "4"]
    sets = ["--train", str(folder / "set"), "--test", str(folder / "set"), "--task", "site"]
    fast = ["--epochs", "1", "--epoch-steps", "4"]
    return [
        ["knn", *common, *sets, "--nb-knn", "1", "7", "--output", str(output / "knn")],
        ["knn", *common, "--hpaone", str(folder / "hpaone"), "--task", "PROTEIN_LOCALIZATION", "--nb-knn", "3",
         "--output", str(output / "places")],
        ["linear", *common, *sets, *fast, "--output", str(output / "linear")],
    ]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_give_the_features_the_votes_and_the_scores_of_one_process(shard_set: Path, tmp_path: Path) -> None:
    write_hpaone(tmp_path / "hpaone")
    (tmp_path / "commands.json").write_text(json.dumps(commands_of(tmp_path, tmp_path / "shared")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"),
            *("--master-addr=127.0.0.1", f"--master-port={port}", __file__, str(tmp_path)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    one = extract_to(tmp_path / "one", tiny(), ShardImages(shard_set), SETTINGS, weights="seed 0")
    two = read_features(tmp_path / "two")
    np.testing.assert_allclose(two.values, one.values, rtol=1e-5, atol=1e-5)
    assert (two.ids, two.labels, two.channel_names) == (one.ids, one.labels, one.channel_names)

    ranks = [torch.load(tmp_path / f"votes-{rank}.pt") for rank in range(RANKS)]
    for number, case in enumerate(CASES):
        alone = votes(World(), **case)  # type: ignore[arg-type]
        for shared in ranks:
            assert shared[number].keys() == alone.keys()
            for k, wanted in alone.items():
                torch.testing.assert_close(shared[number][k], wanted, rtol=0, atol=1e-6, msg=f"{case}, k {k}")

    for command in commands_of(tmp_path, tmp_path / "alone"):
        assert main(command) == 0
    for name in ("knn/knn", "places/knn", "linear/linear"):
        alone, shared = (json.loads((tmp_path / each / f"{name}.json").read_text()) for each in ("alone", "shared"))
        assert len(alone["rows"]) > 0
        for ours, wanted in zip(shared["rows"], alone["rows"], strict=True):
            assert ours == pytest.approx(wanted, abs=1e-6), name


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    on_each_rank(folder, json.loads((folder / "commands.json").read_text()))
