"""How much faster do shards deliver the tiles of a training step than the microscope's own files do?

    python benchmarks/reading.py                       # 5 alternated rounds, writes results/reading.md
    python benchmarks/reading.py --fields plate/ ...   # fields of one's own: Opera Phenix names, five channels used
    python benchmarks/reading.py --quick               # 2 rounds, writes nothing

A step of channel consistency (2 global + 8 local crops) needs all channels of a 512 px tile: global 1 is their mean. So
both sides deliver (5, 512, 512) arrays. The straight way opens a field's five 16-bit LZW TIFFs with tifffile (and with
Pillow) and cuts a tile out; ours reads the tile from a shard set built from the same files with default settings.
Files are in the page cache on both sides. One core each; the loader's row is what arrives in the training process.
"""

import argparse
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tifffile
import torch
from _harness import alternate, ratio, write_result
from PIL import Image

from dinocell.data_shards.build import build
from dinocell.data_shards.read import loader, stream
from dinocell.data_shards.sample import CODECS
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.field import Field, FieldFile
from dinocell.demo.synthetic.field import SyntheticConfig, make_field

TILE, CHANNELS, SIDE = 512, 5, 1080


@dataclass(frozen=True)
class Fields:
    """Fields of five TIFFs each, as a source."""

    files: list[list[Path]]

    def fields(self) -> Iterator[Field]:
        """List them."""
        for number, files in enumerate(self.files):
            parts = tuple(FieldFile(path=str(file), channels=(f"c{k}",)) for k, file in enumerate(files))
            yield Field(id=f"f{number}", files=parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", nargs="+", type=Path, default=[], help="folders with r01c01f01p01-ch1... files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 rounds, no result file")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = phenix_fields(options.fields) if options.fields else synthetic_fields(folder / "tiff", 6)
        sides: dict[str, Callable[[], float]] = {
            "tifffile": lambda: straight(fields, tifffile.imread, 12),
            "Pillow": lambda: straight(fields, lambda path: np.asarray(Image.open(path)), 12),
        }
        sizes = {}
        for codec in CODECS:
            # Enough copies of the fields for a set that is not read in one gulp.
            copies = Fields(fields * -(-48 // len(fields)))
            manifest = build(copies, folder / codec, settings=ShardSettings(codec=codec))
            assert manifest is not None
            sizes[codec] = manifest.num_bytes / manifest.num_samples / 1e6
            sides[codec] = lambda codec=codec: shards(folder / codec, 64)
        sides["pco, loader"] = lambda: with_loader(folder / "pco", 160)
        seconds = alternate(sides, rounds=rounds)
        counts = {"tifffile": 12, "Pillow": 12, "pco, loader": 160, **dict.fromkeys(CODECS, 64)}
        per_sample = {side: [value / counts[side] for value in values] for side, values in seconds.items()}
        lines = [
            "# Reading tiles: shards against the microscope's files",
            "",
            f"{len(fields)} {'real' if options.fields else 'generated'} fields of {CHANNELS} x {SIDE} x {SIDE} uint16, "
            f"LZW TIFF; {rounds} alternated rounds after a warm-up. Ratio = time of tifffile for a sample / ours.",
            "`pco` is the default. The loader has 2 workers on 2 cores; its row is samples a second in all.",
            "",
            "| side | samples/s: median (lowest to highest) | times tifffile | MB a sample |",
            "|---|---|---|---|",
        ]
        for side, values in per_sample.items():
            rates = sorted(1 / value for value in values)
            rate = f"{rates[len(rates) // 2]:.0f} ({rates[0]:.0f} to {rates[-1]:.0f})"
            size = f"{sizes[side]:.2f}" if side in sizes else ""
            lines.append(f"| {side} | {rate} | {ratio(per_sample['tifffile'], values)} | {size} |")
        lines += ["", *opening(folder)]
        print("\n".join(lines))
    if not options.quick:
        print(write_result("reading", "\n".join(lines), ["torch", "tifffile", "imagecodecs", "pillow"]))


def straight(fields: list[list[Path]], read: Callable[[Path], np.ndarray], number: int) -> float:
    """Open a field's files and cut a tile out, as often as asked."""
    rng = random.Random(0)
    for files in itertools.islice(itertools.cycle(fields), number):
        planes = [read(file) for file in files]
        row, column = (rng.randrange(side - TILE + 1) for side in planes[0].shape)
        tile = np.stack([plane[row : row + TILE, column : column + TILE] for plane in planes])
        assert tile.shape == (CHANNELS, TILE, TILE)
    return 0.0


def shards(folder: Path, number: int) -> None:
    """Read batches in this process."""
    for batch in itertools.islice(stream(folder, batch_size=8), number // 8):
        assert batch.tile(0).shape == (CHANNELS, TILE, TILE)


def with_loader(folder: Path, number: int) -> None:
    """Read batches through two workers; their start counts."""
    for batch in itertools.islice(loader(stream(folder, batch_size=8), workers=2), number // 8):
        assert batch.tile(0).shape == (CHANNELS, TILE, TILE)


def opening(folder: Path) -> list[str]:
    """Time the opening of a set of 1,000 shards and its first sample."""
    source = Path(tempfile.mkdtemp(dir=folder))
    rng = np.random.default_rng(0)
    tifffile.imwrite(source / "a.tif", rng.poisson(100, (64, 64)).astype(np.uint16))
    fields = Fields([[source / "a.tif"]] * 1000)
    build(
        fields,
        folder / "many",
        settings=ShardSettings(tiles=TileSettings(size=64, min_contrast=0)),
        samples_per_shard=1,
    )
    start = time.perf_counter()
    next(iter(stream(folder / "many", batch_size=1)))
    return [f"Opening a set of 1,000 shards and reading its first sample: {time.perf_counter() - start:.2f} s."]


def synthetic_fields(folder: Path, number: int) -> list[list[Path]]:
    """Write generated Cell Painting fields as a microscope would."""
    folder.mkdir()
    fields = []
    for seed in range(number):
        pixels = make_field(seed, SyntheticConfig(size=(SIDE, SIDE), num_cells=(300, 400))).pixels[:CHANNELS]
        fields.append([folder / f"r01c01f{seed:02d}p01-ch{k + 1}sk1fk1fl1.tiff" for k in range(CHANNELS)])
        for plane, path in zip(pixels, fields[-1], strict=True):
            tifffile.imwrite(path, plane, compression="lzw")
    return fields


def phenix_fields(folders: list[Path]) -> list[list[Path]]:
    """Find the first five channels of each field."""
    fields: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*-ch[1-5]sk*.tif*")):
            fields.setdefault(f"{path.parent}/{path.name.split('-')[0]}", []).append(path)
    return [files for files in fields.values() if len(files) == CHANNELS]


if __name__ == "__main__":
    main()
