"""What several test files need: a source of small fields on disk, shard sets built from it, and labelled images."""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.field import Field, FieldFile, Rejected
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.layouts import folder_pairs

NAMES = ("DNA", "ER", "AGP")


def pytest_configure() -> None:
    """Give each process of pytest-xdist one thread; torch and the processes that tests start read this variable."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let processes of pytest-xdist start with the slowest files, so that none is left with a long one at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: (item.path.name != "test_launch_slurm.py", -num_slow[item.path], str(item.path)))


@dataclass(frozen=True, kw_only=True)
class FolderOfFields:
    """``num_fields`` fields of three channels, one TIFF each, as ``field_pixels`` draws them."""

    folder: str
    num_fields: int
    missing_from: int = -1
    unmatched: int = 0

    def fields(self) -> Iterator[Field | Rejected]:
        for number in range(self.num_fields):
            names = NAMES[:2] if number == self.missing_from else NAMES
            files = tuple(FieldFile(path=f"{self.folder}/f{number:03d}_{name}.tif", channels=(name,)) for name in names)
            yield Field(
                id=f"P{number % 2}/f{number:03d}",
                files=files,
                missing=tuple(set(NAMES) - set(names)),
                plate=f"P{number % 2}",
                well="A01",
                site=str(number),
                labels={"number": number},
            )
        for number in range(self.unmatched):
            yield Rejected(input=f"notes{number}.txt", kind="unmatched", reason="not an image")


def field_pixels(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Blobs on noise, (3 h w) uint16; every field differs."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:height, :width]
    pixels = rng.poisson(100, (3, height, width)).astype(float)
    for plane in pixels:
        for row, column in rng.uniform(0, 1, (4, 2)) * (height, width):
            plane += 3000 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 60)
    return pixels.round().astype(np.uint16)


def write_fields(folder: Path, num_fields: int, **options: int) -> FolderOfFields:
    """Write fields to disk and return their source."""
    folder.mkdir(exist_ok=True)
    for number in range(num_fields):
        for name, plane in zip(NAMES, field_pixels(number), strict=True):
            write_tiff(folder / f"f{number:03d}_{name}.tif", plane, pixel_size_um=0.65)
    return FolderOfFields(folder=str(folder), num_fields=num_fields, **options)


@pytest.fixture
def fields(tmp_path: Path) -> Callable[..., FolderOfFields]:
    """Return a function that writes fields to disk and gives their source."""

    def make(num_fields: int = 10, **options: int) -> FolderOfFields:
        return write_fields(tmp_path / "input", num_fields, **options)

    return make


CELLS = SyntheticConfig(size=(96, 112), channels=("AGP",), num_cells=(6, 10), cell_radius_px=12.0)
SMALL = ShardSettings(tiles=TileSettings(size=32, min_size=16, min_contrast=0))


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the set that ``shard_set`` copies: a test may damage its own."""
    folder = tmp_path_factory.mktemp("shards")
    build(write_fields(folder / "input", 10), folder / "set", settings=SMALL, workers=1)
    return folder / "set"


@pytest.fixture
def shard_set(built_once: Path, tmp_path: Path) -> Path:
    """Return a set of 10 fields, 60 tiles of 3 x 32 x 32, in 10 shards."""
    return Path(shutil.copytree(built_once, tmp_path / "set"))


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """Handle SIGINT by Python's default here and in processes started from here.

    A suite that was started in the background of a script inherits SIGINT as ignored, and so would they.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def draw() -> Callable[[int], np.ndarray]:
    """Return what draws the pixels of a field by its number."""
    return field_pixels


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Return the file of a very small segmenter whose random maps have peaks and valleys."""
    # Here, not above: a test starts processes that import this file and must be quick.
    import torch

    from dinocell.finetune.model import DINOCell
    from dinocell.models.config import VARIANTS, variant_config

    monkeypatch.setitem(VARIANTS, "tiny", variant_config("tiny", width=32, depth=4, heads=2, mlp_hidden=64))
    torch.manual_seed(1)
    built = DINOCell("vitt8", pretrained=False)
    torch.nn.init.normal_(built.decoder.head.weight, std=1.0)
    built.save_pretrained(tmp_path / "model.pt")
    return str(tmp_path / "model.pt")


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six images with masks, and their labelled set."""
    root = tmp_path_factory.mktemp("own")
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for number in range(6):
        made = make_field(number, CELLS)
        write_tiff(root / "images" / f"f{number}.tif", made.pixels)
        write_labels(root / "masks" / f"f{number}.tif", made.labels)
    build_labelled(folder_pairs(root, images="images/{name}.tif", masks="masks/{name}.tif"), root / "set")
    return root
