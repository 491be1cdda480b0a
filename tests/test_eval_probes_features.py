"""Features of images: the same whichever way they are asked for, taken up where they stopped."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinocell.data_shards.build import build
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.field import Field, FieldFile
from dinocell.errors import ConfigError, DinocellError
from dinocell.eval.probes.features import (
    FeatureSettings,
    extract,
    extract_to,
    read_features,
    to_input,
    tokens_to_feature,
    weights_of,
)
from dinocell.eval.probes.image_sets import ClassFolders, FieldImages, ProbeImage, ShardImages, labels_of, to_unit
from dinocell.eval.probes.online import OnlineProbe
from dinocell.eval.probes.patch import labelled_r2
from dinocell.images.write import write_png, write_tiff
from dinocell.labelled.dataset import open_labelled
from dinocell.runtime.distributed import World
from helpers.models import tiny

SMALL = ShardSettings(tiles=TileSettings(size=32, min_size=16, min_contrast=0))


def an_image(*sizes: int, seed: int = 0) -> ProbeImage:
    pixels = np.random.default_rng(seed).random(sizes, np.float32)
    return ProbeImage(id="i", pixels=pixels, channel_names=tuple("abcdef"[: sizes[0]]), labels={})


def test_a_shard_set_gives_each_sample_with_its_labels(shard_set: Path) -> None:
    images = ShardImages(shard_set)
    assert len(images) == 60
    found = list(images.images(10, 13))
    assert [each.id for each in found] == [each.id for each in list(images.images(0, 60))[10:13]]
    pixels = found[0].pixels
    assert pixels is not None
    assert pixels.shape == (3, 32, 32)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert {"number", "plate", "well", "site"} <= found[0].labels.keys()


def test_settings_make_the_feature_that_plain_code_makes() -> None:
    vit, image = tiny(), an_image(3, 40, 50)
    assert image.pixels is not None
    for settings in (
        FeatureSettings(channels="bag", crop_size=32),
        FeatureSettings(channels="bag", crop_size=32, n_last_blocks=3, avgpool=True),
        FeatureSettings(channels="mean", crop_size=32),
    ):
        inputs = to_input(image, vit, settings)
        middle = torch.from_numpy(image.pixels)[:, 4:36, 9:41]
        wanted = middle.mean(0, keepdim=True) if settings.channels == "mean" else middle
        wanted = (wanted - wanted.mean((1, 2), keepdim=True)) / wanted.std((1, 2), keepdim=True, correction=0)
        torch.testing.assert_close(inputs[:, 0], wanted, atol=1e-5, rtol=1e-5)
        blocks = vit.forward_blocks(wanted[:, None], range(vit.config.depth - settings.n_last_blocks, vit.config.depth))
        parts = [out.cls for out in blocks] + ([blocks[-1].patches.mean(1)] if settings.avgpool else [])
        found = tokens_to_feature(vit, inputs, settings)
        torch.testing.assert_close(found, torch.cat(parts, 1).detach(), atol=1e-4, rtol=1e-4)


def test_images_are_scaled_padded_and_cut_to_whole_patches() -> None:
    vit = tiny()
    assert to_input(an_image(1, 40, 50), vit, FeatureSettings(channels="bag")).shape == (1, 1, 40, 48)
    assert to_input(an_image(1, 40, 80), vit, FeatureSettings(channels="bag", resize_size=24)).shape == (1, 1, 24, 48)
    padded = to_input(an_image(1, 40, 50), vit, FeatureSettings(channels="bag", crop_size=64))
    assert padded.shape == (1, 1, 64, 64)
    assert torch.equal(padded[0, 0, 0], padded[0, 0, 0, :1].expand(64))  # the padding is even
    blank = ProbeImage(id="i", pixels=np.zeros((1, 16, 16), np.float32), channel_names=("a",), labels={})
    assert not to_input(blank, vit, FeatureSettings(channels="bag")).any()


def test_a_stack_is_put_into_the_order_of_the_model() -> None:
    vit, image = tiny(2), an_image(2, 16, 16)
    plain = to_input(image, vit, FeatureSettings())
    vit.card = replace(vit.card, input=replace(vit.card.input, channel_names=("b", "a")))
    torch.testing.assert_close(to_input(image, vit, FeatureSettings()), plain.flip(1))
    vit.card = replace(vit.card, input=replace(vit.card.input, channel_names=("b", "x")))
    with pytest.raises(DinocellError, match=r"i: has the channels a, b, c, the model takes 2 \(b, x\)"):
        to_input(an_image(3, 16, 16), vit, FeatureSettings())
    with pytest.raises(DinocellError, match="channels bag: needs a model of one channel, this one has 2"):
        to_input(image, vit, FeatureSettings(channels="bag"))


def test_a_file_that_cannot_be_read_is_said_and_left_out(tmp_path: Path) -> None:
    for name in ("round", "long"):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (24, 24), np.uint8)
            write_png(tmp_path / name / f"{number}.png", pixels)
    (tmp_path / "long" / "1.png").write_bytes(b"not a picture")
    images = FieldImages(ClassFolders(input=tmp_path), str(tmp_path))
    found = extract_to(tmp_path / "out", tiny(), images, FeatureSettings(channels="bag"), weights="w")
    assert len(found.values) == 5
    assert labels_of(found.labels, "class", "x") == ["long", "long", "round", "round", "round"]
    assert len(found.problems) == 1
    assert "long/1.png" in found.problems[0]
    with pytest.raises(DinocellError, match=r"x: no label 'colour'"):
        labels_of(found.labels, "colour", "x")


def test_class_folders_may_be_linked_but_hidden_ones_are_no_classes(tmp_path: Path) -> None:
    for path in (".ipynb_checkpoints/a.png", "long/a.png", "long/._a.png", "O\u0308l/a.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write_png(tmp_path / path, np.eye(24, dtype=np.uint8))
    (tmp_path / "round").symlink_to(tmp_path / "long")
    found = list(ClassFolders(input=tmp_path).fields())
    # One spelling of Öl, whichever system has made the folder.
    assert [(each.id, each.labels["class"]) for each in found if isinstance(each, Field)] == [
        ("\u00d6l/a.png", "\u00d6l"),
        ("long/a.png", "long"),
        ("round/a.png", "round"),
    ]


def test_an_image_with_values_that_are_not_finite_is_left_out(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, np.nan)):
        (tmp_path / "a").mkdir(exist_ok=True)
        write_tiff(tmp_path / "a" / f"{number}.tif", np.full((24, 24), value, np.float32))
    found = extract(tiny(), FieldImages(ClassFolders(input=tmp_path), "x"), FeatureSettings(channels="bag"))
    assert found.ids == ("a/0.tif",)
    assert found.problems == ("a/1.tif: 576 of 576 values are not finite (NaN or infinite); replace them first",)


def test_images_of_other_channels_are_refused(tmp_path: Path) -> None:
    class Mixed:
        name = "mixed"

        def __len__(self) -> int:
            return 2

        def images(self, start: int, stop: int) -> Iterator[ProbeImage]:
            yield from [an_image(2, 16, 16), an_image(3, 16, 16)][start:stop]

    with pytest.raises(DinocellError, match=r"mixed: i has the channels a, b, c, the first image has a, b"):
        extract(tiny(), Mixed(), FeatureSettings(channels="bag"))
    with pytest.raises(DinocellError, match=r"mixed: i has the channels a, b, c, the first image has a, b"):
        extract_to(tmp_path / "o", tiny(), Mixed(), FeatureSettings(channels="bag"), weights="w")


def test_eight_bit_keeps_its_scale_and_sixteen_is_stretched() -> None:
    assert to_unit(np.full((1, 2, 2), 51, np.uint8)).tolist() == [[[pytest.approx(0.2)] * 2] * 2]
    ramp = np.arange(10_000, dtype=np.uint16).reshape(1, 100, 100)
    scaled = to_unit(ramp)
    assert scaled.min() == 0
    assert scaled.max() == 1


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError):
        FeatureSettings(n_last_blocks=0)
    with pytest.raises(ConfigError, match="n_last_blocks: the model has 4"):
        tokens_to_feature(tiny(), torch.zeros(1, 1, 16, 16), FeatureSettings(n_last_blocks=5))


def test_the_online_probe_knows_the_samples_again(shard_set: Path) -> None:
    probe = OnlineProbe(
        str(shard_set), tiles=12, crop_size=32, knn_train=str(shard_set), knn_test=str(shard_set), label="number",
        neighbours=1,
    )  # fmt: skip
    found = probe(tiny())
    assert found["probe/knn_accuracy"] == 1.0  # each sample is its own nearest neighbour
    assert found["probe/consistency_margin"] == pytest.approx(
        found["probe/consistency_same"] - found["probe/consistency_different"]
    )
    # What would end a training after hours is said before it begins.
    sets = {"knn_train": str(shard_set), "knn_test": str(shard_set)}
    with pytest.raises(DinocellError, match=r"online_eval\.neighbours: 100, but .* has 60 samples"):
        OnlineProbe(str(shard_set), tiles=2, crop_size=32, label="number", neighbours=100, **sets)
    with pytest.raises(DinocellError, match="no label 'colour'"):
        OnlineProbe(str(shard_set), tiles=2, crop_size=32, label="colour", **sets)


def test_the_online_probe_reads_distance_maps_from_patches(shard_set: Path, labelled_folder: Path) -> None:
    patch_set = labelled_folder / "set"
    probe = OnlineProbe(str(shard_set), tiles=2, crop_size=32, patch_set=patch_set, patch_labelled=5)
    teacher, images = tiny(), open_labelled(patch_set)
    assert probe(teacher)["probe/patch_r2"] == labelled_r2(teacher, images.__getitem__, range(5), [5])
    with pytest.raises(DinocellError, match=r"patch_labelled: expected fewer than the 6 images of .*set, got 6"):
        OnlineProbe(str(shard_set), tiles=2, crop_size=32, patch_set=patch_set, patch_labelled=6)


def test_a_set_in_which_no_tile_is_whole_is_said_before_a_training(tmp_path: Path, fields: Callable[..., Any]) -> None:
    """Plates of different stains: no tile has every channel of the set."""
    build(fields(1, missing_from=0), tmp_path / "set", settings=SMALL, workers=1)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    manifest["channels"]["AGP"] = manifest["channels"]["DNA"]
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    shards = str(tmp_path / "set")
    with pytest.raises(DinocellError, match=r"none of the first 2 tiles has all .*AGP.*online_eval\.every=0"):
        OnlineProbe(shards, tiles=2, crop_size=32)
    assert OnlineProbe(shards, tiles=2, crop_size=32, in_channels=3)(tiny(in_channels=3)) == {}
    with pytest.raises(DinocellError, match="none of the first 6 tiles"):
        OnlineProbe(
            shards, tiles=2, crop_size=32, in_channels=3, knn_train=shards, knn_test=shards, label="number",
            neighbours=1,
        )  # fmt: skip


def test_the_online_probe_leaves_out_tiles_that_lack_a_channel(tmp_path: Path, fields: Callable[..., Any]) -> None:
    build(fields(4, missing_from=1), tmp_path / "set", settings=SMALL, workers=1)
    found = OnlineProbe(
        str(tmp_path / "set"), tiles=24, crop_size=32, knn_train=str(tmp_path / "set"), knn_test=str(tmp_path / "set"),
        label="number", neighbours=1,
    )(tiny())  # fmt: skip
    assert found["probe/knn_accuracy"] == 1.0
    assert "probe/retrieval" in found


def test_the_command_watches_and_draws_views(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], draw: Callable[[int], np.ndarray]
) -> None:
    import fsspec

    from dinocell.cli import main

    line = ["pretrain", "debug", f"data.shards=[{shard_set}]", f"output={tmp_path / 'run'}", "steps=2", "batch_size=2"]
    line += ["views.global_size=32", "views.local_size=16", "compute.workers=0", "heads.num_prototypes=64"]
    assert main([*line, "online_eval.every=1", "online_eval.tiles=4", "model.variant=nano"]) == 0
    said = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("probe/consistency_margin" in row for row in said) == 2
    views = ["--views", "debug", "views.global_size=32", "views.local_size=16"]
    named = shutil.copytree(shard_set, tmp_path / "my set, [v2]")
    for policy in ("consistency", "stack"):
        picture = tmp_path / f"{policy}.png"
        extra = [f"views.policy={policy}", "views.channels=[DNA,ER]"] if policy == "stack" else []
        arguments = ["shards", "preview", str(named), "--output", str(picture), "--samples", "3"]
        assert main([*arguments, *views, *extra]) == 0
        assert picture.stat().st_size > 1000
    odd = tmp_path / "12, [b] #3"
    shutil.copytree(shard_set, odd)
    assert main(["shards", "preview", str(odd), "--output", str(picture), "--samples", "2", *views]) == 0
    files = fsspec.filesystem("memory")
    files.put(str(shard_set), "/views", recursive=True)
    arguments[2] = "memory://views"
    assert main([*arguments, "--cache", str(tmp_path / "cache"), *views]) == 0
    assert list((tmp_path / "cache").glob("*.tar"))
    capsys.readouterr()
    assert main([*arguments, "--views", "nonesuch"]) == 2
    assert "nonesuch" in capsys.readouterr().err


@dataclass(frozen=True)
class Listed:
    """A source of fields that are there already."""

    fields_: tuple[Field, ...]

    def fields(self) -> Iterator[Field]:
        yield from self.fields_


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
            with pytest.raises(DinocellError, match="two: contains no features"):
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
            with pytest.raises(DinocellError, match="out: another process"):
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
    with pytest.raises(DinocellError, match="out contains features with other weights"):
        extract_to(tmp_path / "out", vit, images, FeatureSettings(channels="bag"), weights="v")
    with pytest.raises(DinocellError, match="out contains features with other settings"):
        extract_to(tmp_path / "out", vit, images, FeatureSettings(channels="mean"), weights="w")
    with pytest.raises(DinocellError, match=r"nothing: contains no features"):
        read_features(tmp_path / "nothing")


def test_folders_that_do_not_say_where_the_weights_lay_are_of_no_run(tmp_path: Path) -> None:
    (tmp_path / "extraction.json").write_text('{"weights": "a hash"}')
    assert weights_of(tmp_path) == ""
    (tmp_path / "extraction.json").write_text('{"weights": "a hash", "weights_from": "teacher.pth"}')
    assert weights_of(tmp_path) == "teacher.pth"
