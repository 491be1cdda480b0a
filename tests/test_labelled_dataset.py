"""Labelled sets: pixels and labels are unchanged, in SAMCell's file format, and complete or absent."""

import json
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dinocell.errors import ImageError
from dinocell.images.image import Image, percentile_range, to_uint8
from dinocell.labelled.build import PERCENTILES, build_labelled
from dinocell.labelled.dataset import open_labelled
from dinocell.labelled.distance import labels_to_distance
from dinocell.labelled.layouts import Pair, PairContent
from dinocell.labelled.masks import PairError

RNG = np.random.default_rng(0)


def cells(height: int, width: int, *, first_id: int = 1) -> np.ndarray:
    """Square cells of 6 px, side by side, in the upper left quarter."""
    rows, columns = np.arange(height) // 6, np.arange(width) // 6
    labels = rows[:, None] * 10 + columns[None] + first_id
    labels[height // 2 :] = 0
    labels[:, width // 2 :] = 0
    return labels


def pair(name: str, pixels: np.ndarray, labels: np.ndarray, **image: object) -> Pair:
    content = PairContent(image=Image(pixels=pixels, **image), labels=labels)
    return Pair(name=name, read=lambda: content)


def grey_pair(name: str, height: int = 40, width: int = 60, **options: int) -> Pair:
    return pair(name, RNG.integers(0, 256, (1, height, width), dtype=np.uint8), cells(height, width, **options))


def test_images_labels_and_distances_come_back_exactly(tmp_path: Path) -> None:
    pairs = [grey_pair("a"), grey_pair("größe 2 [x]"), grey_pair("c")]
    report = build_labelled(pairs, tmp_path / "set", source="test", licence="CC0")
    found = open_labelled(tmp_path / "set")
    assert len(found) == report.num_images == 3
    assert found.names == ["a", "größe 2 [x]", "c"]
    assert report.sizes == {(40, 60): 3}
    assert not report.skipped
    for image, want in zip(found, pairs, strict=True):
        content = want.read()
        np.testing.assert_array_equal(image.pixels, np.repeat(content.image.pixels, 3, axis=0))
        np.testing.assert_array_equal(image.labels, content.labels)
        np.testing.assert_array_equal(image.distance, labels_to_distance(content.labels))
        assert image.crowd is None
        assert not image.labels.flags.writeable
    description = found.description
    assert (description["source"], description["licence"], description["num_images"]) == ("test", "CC0", 3)
    assert description["num_cells"] == report.num_cells == sum(len(np.unique(p.read().labels)) - 1 for p in pairs)


def test_the_files_have_samcells_format(tmp_path: Path) -> None:
    colour = RNG.integers(0, 256, (3, 40, 60), dtype=np.uint8)
    build_labelled([pair("a", colour, cells(40, 60))], tmp_path / "set")
    images = np.load(tmp_path / "set" / "imgs.npy")
    assert (images.dtype, images.shape) == (np.uint8, (1, 40, 60, 3))
    np.testing.assert_array_equal(images[0], colour[::-1].transpose(1, 2, 0))  # blue, green, red
    labels, distance = (np.load(tmp_path / "set" / name) for name in ("anns.npy", "dist_maps.npy"))
    assert (labels.dtype, labels.shape) == (np.int16, (1, 40, 60))
    assert (distance.dtype, distance.shape) == (np.float32, (1, 40, 60))
    assert distance.max() == 1
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "anns.npy",
        "dataset.json",
        "dist_maps.npy",
        "imgs.npy",
    ]


@pytest.mark.parametrize(("first_id", "dtype"), [(32_000, np.int16), (32_767, np.int32), (2**31 - 1000, np.int32)])
def test_ids_that_int16_cannot_hold_widen_the_labels(tmp_path: Path, first_id: int, dtype: type) -> None:
    pairs = [grey_pair("a"), grey_pair("b", first_id=first_id), grey_pair("c")]
    build_labelled(pairs, tmp_path / "set")
    assert np.load(tmp_path / "set" / "anns.npy").dtype == dtype
    for image, want in zip(open_labelled(tmp_path / "set"), pairs, strict=True):
        np.testing.assert_array_equal(image.labels, want.read().labels)


def test_sizes_become_folders_and_read_as_one_set(tmp_path: Path) -> None:
    pairs = [grey_pair("a", 40, 60), grey_pair("b", 30, 30), grey_pair("c", 40, 60), grey_pair("d", 1, 1)]
    report = build_labelled(pairs, tmp_path / "set", keep_empty=True)
    assert report.sizes == {(1, 1): 1, (30, 30): 1, (40, 60): 2}
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"1x1", "30x30", "40x60", "dataset.json"}
    found = {image.name: image for image in open_labelled(tmp_path / "set")}
    for want in pairs:
        np.testing.assert_array_equal(found[want.name].labels, want.read().labels)
        np.testing.assert_array_equal(found[want.name].pixels[0], want.read().image.pixels[0])


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (20, 20), (100, 7)])
def test_a_target_size_scales_the_whole_image_and_pads(tmp_path: Path, height: int, width: int) -> None:
    want = pair("a", np.full((1, height, width), 200, np.uint8), np.ones((height, width), int), pixel_size_um=0.5)
    with_cells = pair("b", np.full((1, height, width), 9, np.uint8), cells(height, width), pixel_size_um=0.5)
    build_labelled([want, with_cells], tmp_path / "set", target_size=50)
    assert np.load(tmp_path / "set" / "imgs.npy").shape == (2, 50, 50, 3)
    image = open_labelled(tmp_path / "set")[0]
    scale = 50 / max(height, width)
    assert image.pixels.shape == (3, max(1, round(height * scale)), max(1, round(width * scale)))
    assert (image.pixels == 200).all()  # the padding is not part of the image
    assert (image.labels == 1).all()
    assert (image.distance == 1).all()  # nor does it bound a cell
    assert image.pixel_size_um == pytest.approx(0.5 / scale)
    padded = np.load(tmp_path / "set" / "anns.npy")[0]
    assert int(padded.sum()) == image.labels.size


def test_scaling_keeps_ids_and_counts_the_cells_that_vanish(tmp_path: Path) -> None:
    labels = np.zeros((100, 100), int)
    labels[10:50, 10:50] = 7
    labels[60:90, 60:90] = 30_000
    labels[3, 3] = 5
    report = build_labelled([pair("a", np.zeros((1, 100, 100), np.uint8), labels)], tmp_path / "set", target_size=25)
    image = open_labelled(tmp_path / "set")[0]
    assert np.unique(image.labels).tolist() == [0, 7, 30_000]
    assert (image.labels == 7).sum() == 100
    assert report.notes == {"cells lost in scaling": 1}
    assert report.num_cells == 2


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_grey_levels_beyond_8_bit_are_mapped_by_recorded_percentiles(tmp_path: Path, dtype: str) -> None:
    pixels = RNG.normal(3000, 500, (1, 40, 60)).astype(dtype)
    build_labelled([pair("a", pixels, cells(40, 60))], tmp_path / "set")
    found = open_labelled(tmp_path / "set")
    low, high = percentile_range(pixels, *PERCENTILES)
    np.testing.assert_array_equal(found[0].pixels[0], to_uint8(pixels, low, high)[0])
    assert found.description["percentiles"] == list(PERCENTILES)
    assert found.description["groups"][0]["images"][0]["levels"] == [low, high]


def test_channels_are_grey_rgb_or_selected(tmp_path: Path) -> None:
    four = RNG.integers(0, 256, (4, 40, 60), dtype=np.uint8)
    rgba = pair("alpha", four, cells(40, 60), channel_names=("red", "green", "blue", "alpha"))
    stains = pair("stains", four, cells(40, 60), channel_names=("DNA", "ER", "RNA", "AGP"))
    report = build_labelled([rgba, stains], tmp_path / "set", advice={"several channels": "--channel chooses one"})
    assert open_labelled(tmp_path / "set").names == ["alpha"]
    np.testing.assert_array_equal(open_labelled(tmp_path / "set")[0].pixels, four[:3])
    (skipped,) = report.skipped
    assert skipped.kind == "several channels"
    assert skipped.reason.startswith("stains: 4 channels (DNA, ER, RNA, AGP); expected one")
    assert skipped.reason.endswith("(--channel chooses one)")
    build_labelled([stains], tmp_path / "er", channel="ER")
    np.testing.assert_array_equal(open_labelled(tmp_path / "er")[0].pixels[1], four[1])


def unreadable() -> PairContent:
    raise ImageError("b.tif: damaged")


def bad_pairs() -> dict[str, Pair]:
    nan = np.ones((1, 40, 60), np.float32)
    nan[0, 0, 0] = np.nan
    grey = np.zeros((1, 40, 60), np.uint8)
    return {
        "cannot be read": Pair(name="unreadable", read=unreadable),
        "sizes differ": pair("mask of another size", grey, cells(40, 61)),
        "no cells": pair("empty", grey, np.zeros((40, 60), int)),
        "ids too large": pair("large ids", grey, cells(40, 60, first_id=2**31)),
        "values or channels": pair("nan", nan, cells(40, 60)),
        "duplicate name": grey_pair("good"),
    }


def test_every_pair_that_cannot_be_used_is_counted_with_its_reason(tmp_path: Path) -> None:
    bad = bad_pairs()
    report = build_labelled([grey_pair("good"), *bad.values()], tmp_path / "set")
    assert report.num_images == 1
    assert [skip.kind for skip in report.skipped] == list(bad)
    assert all("\n" not in skip.reason for skip in report.skipped)
    listed = open_labelled(tmp_path / "set").description["skipped"]
    assert [skip["name"] for skip in listed] == [wrong.name for wrong in bad.values()]


def test_strict_stops_at_the_first_unusable_pair_and_writes_nothing(tmp_path: Path) -> None:
    for name, wrong in bad_pairs().items():
        with pytest.raises(ImageError):
            build_labelled([grey_pair("good"), wrong], tmp_path / name, strict=True)
    assert list(tmp_path.iterdir()) == []


def test_a_set_without_an_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="1 x cannot be read"):
        build_labelled([bad_pairs()["cannot be read"]], tmp_path / "set")
    with pytest.raises(ImageError, match="there are no pairs"):
        build_labelled([], tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_empty_masks_are_kept_on_request(tmp_path: Path) -> None:
    report = build_labelled([bad_pairs()["no cells"]], tmp_path / "set", keep_empty=True)
    assert (report.num_images, report.num_cells) == (1, 0)
    assert not open_labelled(tmp_path / "set")[0].distance.any()


def test_a_cell_that_fills_its_image_is_noted_not_warned_about(tmp_path: Path) -> None:
    report = build_labelled([pair("a", np.zeros((1, 5, 5), np.uint8), np.ones((5, 5), int))], tmp_path / "set")
    assert report.notes == {"images filled by one cell": 1}


def test_an_existing_set_is_kept_without_overwrite(tmp_path: Path) -> None:
    build_labelled([grey_pair("a")], tmp_path / "set")
    with pytest.raises(ImageError, match="--overwrite"):
        build_labelled([grey_pair("b")], tmp_path / "set")
    with pytest.raises(ImageError):
        build_labelled([bad_pairs()["cannot be read"]], tmp_path / "set", overwrite=True)
    assert open_labelled(tmp_path / "set").names == ["a"]
    build_labelled([grey_pair("b")], tmp_path / "set", overwrite=True)
    assert open_labelled(tmp_path / "set").names == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_same_pairs_give_the_same_bytes(tmp_path: Path) -> None:
    pairs = [grey_pair("a"), grey_pair("b", first_id=40_000)]
    for name in ("one", "two"):
        build_labelled(pairs, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


SLOW_BUILD = """
import sys, time
import numpy as np
from dinocell.images.image import Image
from dinocell.labelled.build import build_labelled
from dinocell.labelled.layouts import Pair, PairContent

def slow():
    time.sleep(0.05)
    return PairContent(image=Image(pixels=np.zeros((1, 40, 60), np.uint8)), labels=np.eye(40, 60, dtype=int))

build_labelled([Pair(name=str(k), read=slow) for k in range(2000)], sys.argv[1])
"""


def test_a_killed_build_leaves_no_set_and_the_next_build_works(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, tmp_path / "set"])
    building = tmp_path / ".set.building"
    while not (building / "40x60" / "imgs.npy").exists():
        assert process.poll() is None
        time.sleep(0.05)
    with pytest.raises(ImageError, match="another process"):
        build_labelled([grey_pair("a")], tmp_path / "set")
    process.kill()
    process.wait()
    assert building.exists()
    assert not (tmp_path / "set").exists()
    with pytest.raises(ImageError):
        open_labelled(building / "40x60")
    build_labelled([grey_pair("a")], tmp_path / "set")
    assert open_labelled(tmp_path / "set").names == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_ctrl_c_and_a_full_disk_remove_the_incomplete_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> PairContent:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_labelled([grey_pair("a"), Pair(name="b", read=interrupt)], tmp_path / "set")
    assert list(tmp_path.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ImageError, match="No space left"):
        build_labelled([grey_pair("a")], tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_pair(tmp_path: Path) -> None:
    done: list[int] = []
    build_labelled([grey_pair("a"), *bad_pairs().values()], tmp_path / "set", progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6, 7]


# Reading sets of other tools.


def save(folder: Path, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_samcells_cellpose_files_are_read(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (4, 30, 20), dtype=np.uint8)
    labels = RNG.integers(0, 5, (4, 30, 20)).astype(np.uint16)
    found = open_labelled(save(tmp_path, imgs=images, anns=labels))
    assert found[-1].distance is None
    assert found[2].name == "000002"
    np.testing.assert_array_equal(found[2].pixels, images[2][None])
    np.testing.assert_array_equal(found[2].labels, labels[2])
    with pytest.raises(IndexError):
        found[4]


def test_samcells_livecell_files_are_read_with_their_crowd_plane(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (2, 30, 20, 3), dtype=np.uint8)
    labels = RNG.integers(0, 5, (2, 2, 30, 20)).astype(np.int16)
    distance = RNG.random((2, 30, 20), np.float32)
    found = open_labelled(save(tmp_path, imgs=images, anns=labels, dist_maps=distance, wms=np.zeros((9, 9))))
    np.testing.assert_array_equal(found[1].pixels, images[1, ..., ::-1].transpose(2, 0, 1))
    np.testing.assert_array_equal(found[1].labels, labels[1, 0])
    np.testing.assert_array_equal(found[1].crowd, labels[1, 1] != 0)
    np.testing.assert_array_equal(found[1].distance, distance[1])


IMAGES, LABELS = np.zeros((2, 8, 9, 3), np.uint8), np.zeros((2, 8, 9), np.int16)


@pytest.mark.parametrize(
    ("arrays", "fragment"),
    [
        ({"imgs": IMAGES}, "anns.npy: no such file"),
        ({"anns": LABELS}, "no imgs.npy"),
        ({"imgs": IMAGES, "anns": LABELS.astype(np.float32)}, "anns.npy is float32"),
        ({"imgs": IMAGES.astype(np.float32), "anns": LABELS}, "imgs.npy is float32"),
        ({"imgs": IMAGES, "anns": LABELS[:1]}, "anns.npy is int16 of (1, 8, 9)"),
        ({"imgs": IMAGES, "anns": LABELS[:, :7]}, "anns.npy is int16 of (2, 7, 9)"),
        ({"imgs": IMAGES, "anns": LABELS[:, None]}, "anns.npy is int16 of (2, 1, 8, 9)"),
        ({"imgs": IMAGES[..., :2], "anns": LABELS}, "imgs.npy is uint8 of (2, 8, 9, 2)"),
        (
            {"imgs": IMAGES, "anns": LABELS, "dist_maps": np.zeros((1, 8, 9), np.float32)},
            "dist_maps.npy is float32 of (1, 8, 9)",
        ),
        ({"imgs": np.array([{}], object), "anns": LABELS}, "imgs.npy: damaged"),
    ],
)
def test_inconsistent_sets_are_rejected_in_one_line(
    tmp_path: Path, arrays: dict[str, np.ndarray], fragment: str
) -> None:
    with pytest.raises(ImageError) as caught:
        open_labelled(save(tmp_path, **arrays))
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_negative_labels_are_rejected_when_they_are_read(tmp_path: Path) -> None:
    """Ids beyond 32,767 are negative in SAMCell's int16."""
    np.save(tmp_path / "imgs.npy", np.zeros((2, 8, 9, 3), np.uint8))
    labels = np.zeros((2, 8, 9), np.int16)
    labels[1, 0, 0] = -7
    np.save(tmp_path / "anns.npy", labels)
    found = open_labelled(tmp_path)
    assert found[0].labels.max() == 0
    with pytest.raises(ImageError, match=r"anns\.npy, image 000001: .*-7"):
        found[1]


def test_truncated_files_and_changed_descriptions_are_rejected(tmp_path: Path) -> None:
    build_labelled([grey_pair("a"), grey_pair("b")], tmp_path / "set")
    description = json.loads((tmp_path / "set" / "dataset.json").read_text())
    for change, fragment in (({"version": 2}, "version 2"), ({"groups": []}, "names 0 images"), ({}, "names 1 images")):
        changed = description | change
        if not change:
            changed["groups"][0]["images"] = changed["groups"][0]["images"][:1]
        (tmp_path / "set" / "dataset.json").write_text(json.dumps(changed))
        with pytest.raises(ImageError, match=fragment):
            open_labelled(tmp_path / "set")
    (tmp_path / "set" / "dataset.json").unlink()
    content = (tmp_path / "set" / "imgs.npy").read_bytes()
    for size in (0, 100, len(content) - 1):
        (tmp_path / "set" / "imgs.npy").write_bytes(content[:size])
        with pytest.raises(ImageError, match=r"imgs\.npy: damaged"):
            open_labelled(tmp_path / "set")
    with pytest.raises(ImageError, match="no such folder"):
        open_labelled(tmp_path / "nowhere")


def test_a_set_is_pickled_by_its_path_without_its_pixels(tmp_path: Path) -> None:
    build_labelled([grey_pair(str(k), 200, 200) for k in range(5)], tmp_path / "set")
    pickled = pickle.dumps(open_labelled(tmp_path / "set"))
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled)[3].labels, cells(200, 200))


def test_notes_of_the_pairs_are_summed(tmp_path: Path) -> None:
    def noted(name: str) -> Pair:
        image = Image(pixels=np.zeros((1, 40, 60), np.uint8))
        content = PairContent(image=image, labels=cells(40, 60), notes=Counter({"crowd regions skipped": 2, "x": 0}))
        return Pair(name=name, read=lambda: content)

    assert build_labelled([noted("a"), noted("b")], tmp_path / "set").notes == {"crowd regions skipped": 4}


def test_pair_errors_have_a_kind_for_reports() -> None:
    assert PairError("no mask", "a.tif: no mask").kind == "no mask"


def test_overwriting_replaces_labelled_sets_and_nothing_else(tmp_path: Path) -> None:
    originals = tmp_path / "originals"
    build_labelled([grey_pair("a")], originals / "set")
    build_labelled([grey_pair("a")], tmp_path / "with notes")
    (tmp_path / "with notes" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output in (originals, tmp_path / "with notes", tmp_path / "file"):
        with pytest.raises(ImageError, match=re.escape(f"{output}: exists")):
            build_labelled([grey_pair("b")], output, overwrite=True)
        assert output.exists()
    assert (tmp_path / "with notes" / "notes.txt").read_text() == "mine"
    assert open_labelled(originals / "set").names == ["a"]


def test_a_linked_output_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "set").symlink_to(tmp_path / "large disk" / "set")
    for name in ("a", "b", "c"):
        build_labelled([grey_pair(name)], tmp_path / "set", overwrite=True)
        assert open_labelled(tmp_path / "set").names == [name]
        assert (tmp_path / "set").is_symlink()
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_a_folder_of_sets_is_not_a_set_of_their_arrays(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_labelled([grey_pair(name)], tmp_path / "sets" / name, target_size=64)
    with pytest.raises(ImageError, match=r"sets: .*a, b"):
        open_labelled(tmp_path / "sets")


def test_a_set_of_several_sizes_can_be_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_labelled([grey_pair(name), grey_pair("c", 20, 30)], tmp_path / "set", overwrite=True)
    assert sorted(open_labelled(tmp_path / "set").names) == ["b", "c"]


def test_more_sizes_than_a_process_may_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        pairs = [grey_pair(f"{width:03d}", 16, width) for width in range(16, 136)]
        report = build_labelled(pairs, tmp_path / "set")
        labelled = open_labelled(tmp_path / "set")
        assert (report.num_images, len(report.skipped), len(labelled)) == (120, 0, 120)
        assert {labelled[index].labels.shape[1] for index in range(120)} == set(range(16, 136))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
