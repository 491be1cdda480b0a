"""Features on the disk: those in memory, on any number of ranks, taken up where they stopped."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocell.data_shards.sources.field import Field, FieldFile
from dinocell.errors import DinocellError
from dinocell.eval.probes.feature_files import extract_to, read_features, weights_of
from dinocell.eval.probes.features import FeatureSettings, extract
from dinocell.eval.probes.image_sets import FieldImages, ShardImages
from dinocell.images.write import write_tiff
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.runtime.distributed import World


@dataclass(frozen=True)
class Listed:
    """A source of fields that are there already."""

    fields_: tuple[Field, ...]

    def fields(self) -> Iterator[Field]:
        yield from self.fields_


def tiny(in_channels: int = 1, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    vit = VisionTransformer(variant_config("nano", patch_size=8, in_channels=in_channels)).eval()
    vit.init_weights(layer_scale=1.0)
    return vit


def test_features_on_disk_equal_those_in_memory_on_any_number_of_ranks(shard_set: Path, tmp_path: Path) -> None:
    vit, images = tiny(), ShardImages(shard_set)
    settings = FeatureSettings(channels="each", batch_size=7)
    wanted = extract(vit, images, settings)
    assert wanted.values.shape == (60, 3, 192)
    one = extract_to(tmp_path / "one", vit, images, settings, weights="seed 0")
    np.testing.assert_allclose(one.values, wanted.values, rtol=1e-5, atol=1e-5)
    assert one.ids == wanted.ids
    assert one.channel_names == ("DNA", "ER", "AGP")
    assert [row["number"] for row in one.labels] == [str(row["number"]) for row in wanted.labels]
    # Rank 1 first, then rank 0, which joins the parts.
    (tmp_path / "two").mkdir()
    for rank in (1, 0):
        world = World(rank=rank, size=2)
        if rank == 1:
            with pytest.raises(DinocellError, match="holds no features"):
                extract_to(tmp_path / "two", vit, images, settings, weights="seed 0", world=world)
        else:
            two = extract_to(tmp_path / "two", vit, images, settings, weights="seed 0", world=world)
    np.testing.assert_allclose(two.values, wanted.values, rtol=1e-5, atol=1e-5)
    half = extract_to(tmp_path / "half", vit, images, settings, weights="seed 0", half=True)
    assert half.values.dtype == np.float16


def test_an_interrupted_extraction_goes_on(shard_set: Path, tmp_path: Path) -> None:
    vit, images = tiny(), ShardImages(shard_set)
    settings = FeatureSettings(channels="bag", batch_size=4)
    wanted = extract(vit, images, settings)

    def stops(number: int) -> None:
        if number == 23:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_to(tmp_path / "out", vit, images, settings, weights="w", progress=stops)
    part = tmp_path / "out" / ".features-0-of-1.jsonl"
    with part.open("a") as file:
        file.write('{"id": "half a li')  # as a machine that died left it
    seen: list[int] = []
    found = extract_to(tmp_path / "out", vit, images, settings, weights="w", progress=seen.append)
    assert seen[0] == 24
    np.testing.assert_allclose(found.values, wanted.values, rtol=1e-5, atol=1e-5)
    assert not list((tmp_path / "out").glob(".features*"))
    again = extract_to(tmp_path / "out", vit, images, settings, weights="w", progress=seen.append)
    assert seen[-1] == 60
    np.testing.assert_array_equal(again.values, found.values)


def test_what_a_machine_that_died_kept_of_the_rows_alone_counts(shard_set: Path, tmp_path: Path) -> None:
    vit, images = tiny(), ShardImages(shard_set)
    settings = FeatureSettings(channels="bag", batch_size=4)

    def stops(number: int) -> None:
        if number == 23:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_to(tmp_path / "out", vit, images, settings, weights="w", progress=stops)
    rows = tmp_path / "out" / ".features-0-of-1.rows"
    rows.write_bytes(rows.read_bytes()[: 10 * 576 * 4 + 7])
    seen: list[int] = []
    found = extract_to(tmp_path / "out", vit, images, settings, weights="w", progress=seen.append)
    assert seen[0] == 11
    np.testing.assert_allclose(found.values, extract(vit, images, settings).values, rtol=1e-5, atol=1e-5)


def test_two_extractions_into_one_folder_do_not_write_each_others_rows(shard_set: Path, tmp_path: Path) -> None:
    vit, images = tiny(), ShardImages(shard_set)
    settings = FeatureSettings(channels="bag", batch_size=4)

    def another(number: int) -> None:
        if number == 23:
            with pytest.raises(DinocellError, match="out: another process extracts these features now"):
                extract_to(tmp_path / "out", vit, images, settings, weights="w")

    found = extract_to(tmp_path / "out", vit, images, settings, weights="w", progress=another)
    np.testing.assert_allclose(found.values, extract(vit, images, settings).values, rtol=1e-5, atol=1e-5)
    (tmp_path / "file").touch()
    with pytest.raises(DinocellError, match=r"file: cannot be written \(File exists\)"):
        extract_to(tmp_path / "file", vit, images, settings, weights="w")


def test_a_label_may_be_called_id(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", np.eye(16, dtype=np.uint8))
    field = Field(id="first", files=(FieldFile(path=str(tmp_path / "a.tif")),), labels={"id": "P-7", "dose": 3})
    images = FieldImages(Listed(fields_=(field,)), "listed")
    found = extract_to(tmp_path / "out", tiny(), images, FeatureSettings(channels="bag"), weights="w")
    assert found.ids == ("first",)
    assert found.labels == ({"id": "P-7", "dose": "3"},)


def test_features_of_something_else_are_not_mixed_in(shard_set: Path, tmp_path: Path) -> None:
    vit, images = tiny(), ShardImages(shard_set)
    extract_to(tmp_path / "out", vit, images, FeatureSettings(channels="bag"), weights="w")
    with pytest.raises(DinocellError, match="out holds features with other weights; remove it"):
        extract_to(tmp_path / "out", vit, images, FeatureSettings(channels="bag"), weights="v")
    with pytest.raises(DinocellError, match="out holds features with other settings"):
        extract_to(tmp_path / "out", vit, images, FeatureSettings(channels="mean"), weights="w")
    with pytest.raises(DinocellError, match=r"nothing: holds no features"):
        read_features(tmp_path / "nothing")


def test_folders_that_do_not_say_where_the_weights_lay_are_of_no_run(tmp_path: Path) -> None:
    (tmp_path / "extraction.json").write_text('{"weights": "a hash"}')
    assert weights_of(tmp_path) == ""
    (tmp_path / "extraction.json").write_text('{"weights": "a hash", "weights_from": "teacher.pth"}')
    assert weights_of(tmp_path) == "teacher.pth"
