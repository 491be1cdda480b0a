"""The sets of a run: their split, and inputs that are not a set."""

import json
from pathlib import Path

import pytest

from dinocell.errors import DinocellError
from dinocell.finetune.config import DataConfig
from dinocell.finetune.sets import open_sets, split
from dinocell.labelled.build import build_labelled
from dinocell.labelled.layouts import folder_pairs


def test_the_split_is_by_image_fixed_by_the_seed_and_recorded(labelled_folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "split.json"
    config = DataConfig(sets=("x",), validation_share=0.4)
    divided = split([labelled_folder / "set"], config, seed=3, record=record)
    assert split([labelled_folder / "set"], config, seed=3, record=None).validation == divided.validation
    names = json.loads(record.read_text())
    assert len(names["validation"]) == 2
    assert not set(names["validation"]) & set(names["training"])


def test_one_image_cannot_be_split(tmp_path: Path, labelled_folder: Path) -> None:
    pairs = folder_pairs(labelled_folder, images="images/f0.{name}", masks="masks/f0.{name}")
    build_labelled(pairs, tmp_path / "one")
    with pytest.raises(DinocellError, match="one image"):
        split([tmp_path / "one"], DataConfig(sets=("x",)), seed=0, record=None)


@pytest.mark.parametrize("wrong", ["images/f0.tif", "pictures"])
def test_a_missing_folder_of_images_is_named(wrong: str, labelled_folder: Path, tmp_path: Path) -> None:
    config = DataConfig(images=str(labelled_folder / wrong), masks=str(labelled_folder / "masks"))
    with pytest.raises(DinocellError, match=f"data.images: no folder {labelled_folder / wrong}"):
        open_sets(config, tmp_path)
