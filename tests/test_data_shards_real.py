"""From real files to shards and back, through the command line: every pixel of every real source, by other decoders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinocell.cli import main
from dinocell.data_shards.read import stream
from helpers.real_data import DATA, needs_data


def planes(*paths: Path) -> np.ndarray:
    return np.stack([tifffile.imread(path) for path in paths])


def atlas() -> list[np.ndarray]:
    """Each file's own plane; yellow fills red and green."""
    own = {"red": 0, "green": 1, "blue": 2, "yellow": 0}
    folder = DATA / "hpa_4channel"
    return [np.stack([np.asarray(Image.open(folder / f"800_A6_1_{name}.jpg"))[..., n] for name, n in own.items()])]


def schwann() -> list[np.ndarray]:
    folder = DATA / "nf1_schwann_cell_painting" / "Plate_2_images"
    return [planes(*sorted(folder.glob(f"{well}_*.tif"))) for well in ("B7", "D6", "D7")]


def nuclei() -> list[np.ndarray]:
    """Pictures stored as RGBA: the alpha that says nothing goes, and of three equal planes one stays."""
    paths = DATA.glob("dsb2018_stage1_train/*/images/*.png")
    pictures = [np.asarray(Image.open(path))[..., :3].transpose(2, 0, 1) for path in paths]
    return [planes if (planes != planes[0]).any() else planes[:1] for planes in pictures]


def single(pattern: str) -> Callable[[], list[np.ndarray]]:
    return lambda: [planes(path) for path in DATA.glob(pattern)]


SOURCES = {
    "phenix --input jump_cell_painting": lambda: [planes(*sorted(DATA.glob("jump_cell_painting/*.tiff")))],
    "hpa --input hpa_4channel": atlas,
    "pattern --input nf1_schwann_cell_painting --pattern Plate_2_images/{well}_01_*_{site}_{channel}_001.tif": schwann,
    "pattern --input cellprofiler_examplehuman --pattern AS_09125_{plate}_{well}f{site}d{channel}.tif": lambda: [
        planes(*sorted(DATA.glob("cellprofiler_examplehuman/*.tif")))
    ],
    "multichannel --input hpa_reference_3channel": lambda: [
        tifffile.imread(path).transpose(2, 0, 1) for path in DATA.glob("hpa_reference_3channel/*.tiff")
    ],
    "images --input livecell_phase": single("livecell_phase/**/*.tif*"),
    "images --input bbbc039/images": single("bbbc039/images/*.tif"),
    "pattern --input usiigaci_t98g --pattern {set}/raw.tif": single("usiigaci_t98g/*/raw.tif"),
    "pattern --input stardist_2d --pattern {set}/img2d.tif": single("stardist_2d/*/img2d.tif"),
    "pattern --input dsb2018_stage1_train --pattern {field}/images/*.png": nuclei,
}


@needs_data
@pytest.mark.parametrize("source", SOURCES)
def test_every_real_source_is_stored_pixel_by_pixel(source: str, tmp_path: Path) -> None:
    kind, _, folder, *more = source.split()
    line = ["shards", "build", "--source", kind, "--input", str(DATA / folder), *more, "--output", str(tmp_path / "s")]
    assert main([*line, "--tile-size", "0", "--min-structure", "0", "--max-saturated", "1", "--workers", "1"]) == 0
    opened = stream(tmp_path / "s", batch_size=1, shuffle=False)
    opened.stop = opened.num_samples
    found = [batch.tile(0).numpy().copy() for batch in opened]
    wanted = SOURCES[source]()
    assert len(found) == len(wanted) > 0
    left = {(each.shape, each.dtype.name, each.tobytes()) for each in wanted}
    assert {(each.shape, each.dtype.name, each.tobytes()) for each in found} == left
