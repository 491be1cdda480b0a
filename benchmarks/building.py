"""Is building shards bound by decoding and compression, on all cores, in memory that does not grow with the set?

    python benchmarks/building.py           # 3 alternated rounds, writes results/building.md
    python benchmarks/building.py --quick   # 1 round of fewer fields, writes nothing

Generated fields of 5 x 1080 x 1080 uint16 in LZW TIFFs. What must be done is the decoding of a field's files and the
encoding of its tiles, timed by itself on one core; the rest (tiles, statistics, tar files, hashes, processes) is ours.
"""

import argparse
import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import tifffile
from _harness import ratio, write_result
from reading import CHANNELS, Fields, synthetic_fields

from dinocell.data_shards.build import build
from dinocell.data_shards.sample import CODECS
from dinocell.data_shards.shard import TileSettings, tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1 round of fewer fields, no result file")
    options = parser.parse_args()
    rounds, few, many = (1, 8, 16) if options.quick else (options.rounds, 24, 72)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = synthetic_fields(folder / "tiff", 4)
        seconds: dict[str, list[float]] = {}
        for number in range(rounds):
            for workers in (1, 2):
                target = folder / f"{workers}-{number}"
                seconds.setdefault(f"{workers}", []).append(built(files, many, target, workers)[0] / many)
            seconds.setdefault("needed", []).append(needed(files))
        memory = {count: in_new_process(files, count, folder / f"memory{count}") for count in (few, many)}
        rate = statistics.median(4 / value for value in seconds["2"])
        lines = [
            "# Building shards",
            "",
            f"{many} generated fields of {CHANNELS} x 1080 x 1080 uint16 (LZW TIFF), four tiles each; {rounds} rounds.",
            "",
            "| what | ratio, or number: median (range) |",
            "|---|---|",
            f"| decoding + encoding by itself / whole build, one process | {ratio(seconds['needed'], seconds['1'])} |",
            f"| one process / two processes (2 cores; starting them counts) | {ratio(seconds['1'], seconds['2'])} |",
            f"| tiles a second with two processes | {rate:.1f} |",
            f"| peak memory of one process, {few} fields | {memory[few]:.0f} MB |",
            f"| peak memory of one process, {many} fields | {memory[many]:.0f} MB |",
        ]
        print("\n".join(lines))
        if not options.quick:
            print(write_result("building", "\n".join(lines), ["tifffile", "imagecodecs", "numpy"]))


def built(files: list[list[Path]], number: int, output: Path, workers: int) -> tuple[float, float]:
    """Build a set of as many fields, the same files again and again; return seconds and peak memory in MB."""
    fields = Fields(list(itertools.islice(itertools.cycle(files), number)))
    start = time.perf_counter()
    manifest = build(fields, output, workers=workers)
    assert manifest is not None
    assert manifest.num_samples == 4 * number
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def in_new_process(files: list[list[Path]], number: int, output: Path) -> float:
    """Return the peak memory of a build in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(built, (files, number, output, 1))[1]


def needed(files: list[list[Path]]) -> float:
    """Return the seconds a field that decoding its files and encoding its tiles take."""
    start = time.perf_counter()
    for field in files:
        for file in field:
            plane = tifffile.imread(file)
            for tile in tiles(*plane.shape, TileSettings()):
                part = plane[tile.row : tile.row + tile.height, tile.column : tile.column + tile.width]
                CODECS["pco"].encode(part.copy())
    return (time.perf_counter() - start) / len(files)


if __name__ == "__main__":
    main()
