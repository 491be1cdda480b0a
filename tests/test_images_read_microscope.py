"""ND2 and CZI through a stand-in for bioio, and the error without that package."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinocell.errors import ImageError
from dinocell.images.read import count_frames, read_image, read_stack

# scene, time, channel, depth, row, column
PIXELS = np.random.default_rng(0).integers(0, 60000, (2, 3, 2, 1, 6, 7)).astype(np.uint16)


class UnsupportedFileFormatError(Exception):
    pass


class BioImage:
    """The part of bioio's class that we use, over `PIXELS`."""

    scenes = ("A", "B")
    channel_names = ("DAPI", "GFP")
    physical_pixel_sizes = SimpleNamespace(X=0.325, Y=0.325, Z=None)
    dims = SimpleNamespace(T=3, Z=1, order="TCZYX")

    def __init__(self, path: str) -> None:
        if path.endswith(".czi"):
            raise UnsupportedFileFormatError(path)
        self.scene = 0

    def set_scene(self, scene: int) -> None:
        self.scene = scene

    def get_image_dask_data(self, axes: str, **at: int) -> Any:
        assert axes == "CYX"
        return SimpleNamespace(compute=lambda: PIXELS[self.scene, at["T"], :, at["Z"]])


@pytest.fixture
def bioio(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {name: ModuleType(name) for name in ("bioio", "bioio_base", "bioio_base.exceptions")}
    modules["bioio"].BioImage = BioImage
    modules["bioio_base.exceptions"].UnsupportedFileFormatError = UnsupportedFileFormatError
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    heads = {"new.nd2": b"\xda\xce\xbe\x0a", "old.nd2": b"\x00\x00\x00\x0cjP  ", "a.czi": b"ZISRAWFILE"}
    for name, head in heads.items():
        (tmp_path / name).write_bytes(head + bytes(100))
    return {name: tmp_path / name for name in heads}


@pytest.mark.usefixtures("bioio")
@pytest.mark.parametrize("name", ["new.nd2", "old.nd2"])
def test_scenes_and_time_points_are_frames(files: dict[str, Path], name: str) -> None:
    assert count_frames(files[name]) == 6
    frames = list(read_stack(files[name]))
    np.testing.assert_array_equal([frame.pixels for frame in frames], PIXELS[:, :, :, 0].reshape(6, 2, 6, 7))
    assert frames[4].channel_names == ("DAPI", "GFP")
    assert frames[4].pixel_size_um == pytest.approx(0.325)


@pytest.mark.parametrize("name", ["new.nd2", "old.nd2", "a.czi"])
def test_without_the_extra_the_error_names_it(
    files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bioio", None)  # as if it were not installed
    with pytest.raises(ImageError, match=rf"{name}: .*pip install 'dinocell-toolkit\[microscopes\]'") as caught:
        read_image(files[name])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("bioio")
def test_without_the_plug_in_the_error_names_the_extra(files: dict[str, Path]) -> None:
    with pytest.raises(ImageError, match=r"a\.czi: .*\[microscopes\]"):
        read_image(files["a.czi"])


def test_a_pixel_size_that_is_not_a_number_is_unknown(
    bioio: None, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BioImage, "physical_pixel_sizes", SimpleNamespace(X=float("nan"), Y=float("nan"), Z=None))
    assert read_image(files["new.nd2"], frame=0).pixel_size_um is None
