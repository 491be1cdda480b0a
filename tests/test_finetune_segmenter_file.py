"""The file of a segmenter: round trips, errors of one line, and failed writes that keep the old file."""

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dinocell.errors import WeightsError
from dinocell.finetune.preprocess import SegmenterSettings
from dinocell.finetune.segmenter_file import SegmenterFile, is_segmenter, read_segmenter, write_segmenter
from dinocell.models.checkpoint_files import METADATA_KEY
from dinocell.models.config import WeightsCard, variant_config
from dinocell.models.export import Weights, save_weights
from dinocell.models.vit import VisionTransformer

VIT = variant_config("tiny", width=32, depth=4, heads=2, mlp_hidden=64, in_channels=1, patch_size=8)
FILE = SegmenterFile(
    vit=VIT,
    blocks=(0, 1, 2, 3),
    settings=SegmenterSettings(target="flows", probability=0.3, flow_error=0.8, trained_on=("a", "b"), merge_px=None),
    card=WeightsCard(licence="CC BY 4.0", derived_from=("x", "y")),
    tensors={"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)},
)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.safetensors", "deep/er/m.pt"])
def test_a_written_file_is_read_back(tmp_path: Path, name: str) -> None:
    write_segmenter(tmp_path / name, FILE)
    read = read_segmenter(tmp_path / name)
    for field in ("vit", "blocks", "settings", "card"):
        assert getattr(read, field) == getattr(FILE, field), field
    assert read.tensors.keys() == FILE.tensors.keys()
    assert all(torch.equal(read.tensors[key], value) for key, value in FILE.tensors.items())
    assert {key: value.dtype for key, value in read.tensors.items()} == {"a.weight": torch.float32, "b": torch.float16}
    assert is_segmenter(tmp_path / name)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]  # no partial file


def test_a_folder_is_read_as_the_file_in_it(tmp_path: Path) -> None:
    write_segmenter(tmp_path / "model.safetensors", FILE)
    assert read_segmenter(tmp_path).settings == FILE.settings
    assert is_segmenter(tmp_path)


def test_a_tensor_that_is_a_view_is_written_correctly(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    for name in ("m.pt", "m.safetensors"):
        write_segmenter(tmp_path / name, dataclasses.replace(FILE, tensors={"t": whole.T}))
        assert torch.equal(read_segmenter(tmp_path / name).tensors["t"], whole.T)


def test_a_backbone_is_not_a_segmenter(tmp_path: Path) -> None:
    save_weights(tmp_path / "backbone.pt", Weights.of(VisionTransformer(VIT)))
    assert not is_segmenter(tmp_path / "backbone.pt")
    with pytest.raises(WeightsError, match=r"backbone\.pt: expected a segmenter, this file is a backbone"):
        read_segmenter(tmp_path / "backbone.pt")


def test_missing_files_and_other_files_are_not_segmenters(tmp_path: Path) -> None:
    assert not is_segmenter(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert not is_segmenter(tmp_path / "text.pt")
    with pytest.raises(WeightsError, match=r"text\.pt"):
        read_segmenter(tmp_path / "text.pt")


def changed(tmp_path: Path, change: dict[str, object], *, drop: str | None = None) -> Path:
    """Write a file whose description was changed by hand."""
    path = tmp_path / "m.safetensors"
    write_segmenter(path, FILE)
    with safetensors.safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    metadata |= change
    metadata.pop(drop, None)
    safetensors.torch.save_file(FILE.tensors, path, metadata={"format": "pt", METADATA_KEY: json.dumps(metadata)})
    return path


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"m\.safetensors: .*version 2"):
        read_segmenter(changed(tmp_path, {"schema": 2}))


@pytest.mark.parametrize(
    ("change", "drop"),
    [
        ({"settings": {"colour": "blue"}}, None),
        ({"settings": {"target": "heat"}}, None),
        ({"settings": {"cells_max": 0.1, "cell_fill": 0.5}}, None),
        ({"settings": {"flow_error": 0.0}}, None),
        ({"blocks": "all"}, None),
        ({}, "card"),
    ],
)
def test_metadata_that_does_not_fit_is_one_line(tmp_path: Path, change: dict[str, object], drop: str | None) -> None:
    with pytest.raises(WeightsError, match=r"m\.safetensors: its metadata") as caught:
        read_segmenter(changed(tmp_path, change, drop=drop))
    assert "\n" not in str(caught.value)


def test_settings_missing_in_an_older_file_have_their_defaults(tmp_path: Path) -> None:
    path = changed(tmp_path, {"settings": {"cells_max": 0.6, "cell_fill": 0.2}})
    assert read_segmenter(path).settings == SegmenterSettings(cells_max=0.6, cell_fill=0.2)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    write_segmenter(path, FILE)
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(WeightsError, match=r"m\.pt: cannot be written \(No space left on device\)"):
        write_segmenter(path, dataclasses.replace(FILE, blocks=(0, 1, 2, 4)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"model": {"a": torch.ones(1)}, METADATA_KEY: {"kind": "segmenter"}, "x": Bomb()}, tmp_path / "m.pt")
    with pytest.raises(WeightsError):
        read_segmenter(tmp_path / "m.pt")
    assert not (tmp_path / "boom").exists()
