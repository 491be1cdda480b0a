"""Verifying: nothing wrong with a good set; every kind of damage is found and named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocell.data_shards.inspect import preview, verify
from dinocell.data_shards.manifest import MANIFEST, Manifest, read_index, read_manifest
from dinocell.errors import ShardError


def rewrite(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    (folder / MANIFEST).write_text(change(read_manifest(folder)).to_json())


def test_a_good_set_has_no_problem(shard_set: Path) -> None:
    seen = []
    assert verify(shard_set, workers=2, progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(number, 10) for number in range(1, 11)]


def test_damage_is_found_wherever_it_is(shard_set: Path) -> None:
    names = sorted(path.name for path in shard_set.glob("*.tar"))
    (shard_set / names[0]).unlink()
    content = (shard_set / names[1]).read_bytes()
    (shard_set / names[1]).write_bytes(content[: len(content) // 2])
    for name, place in ((names[2], 700), (names[3], 100), (names[4], -1)):
        flipped = bytearray((shard_set / name).read_bytes())
        flipped[place] ^= 1
        (shard_set / name).write_bytes(flipped)
    (shard_set / names[5]).write_bytes(b"")
    problems = verify(shard_set)
    found = {problem.file: [] for problem in problems}
    for problem in problems:
        found[problem.file].append(problem.what)
    assert sorted(found) == names[:6]
    assert found[names[0]] == ["missing"]
    assert any("bytes instead of" in what for what in found[names[1]])
    assert any("sample 0" in what and "damaged" in what for what in found[names[2]])
    for name in names[1:6]:
        assert any("sha256" in what for what in found[name])


def test_files_of_two_builds_in_one_set_are_found(shard_set: Path) -> None:
    index = np.load(shard_set / "index.npy")
    np.save(shard_set / "index.npy", index[::-1])
    problems = verify(shard_set)
    assert {problem.file for problem in problems} >= {"index.npy"}
    assert any("sample" in problem.what for problem in problems)


@pytest.mark.parametrize(("column", "number"), [(0, 2**63 + 5), (1, 2**50)])
def test_an_index_beyond_its_shard_is_found(shard_set: Path, column: int, number: int) -> None:
    index = np.load(shard_set / "index.npy")
    index[3, column] = number
    np.save(shard_set / "index.npy", index)
    problems = verify(shard_set)
    assert [problem.file for problem in problems[:2]] == ["index.npy", "shard-000000.tar"]
    assert any(f"sample 3: the index points to bytes {index[3, 0]}" in problem.what for problem in problems)


def test_a_shard_with_an_undecodable_sample_but_right_hash_is_found(shard_set: Path) -> None:
    shard = read_manifest(shard_set).shards[0]
    start = int(read_index(shard_set, read_manifest(shard_set))[2, 0])
    content = bytearray((shard_set / shard.file).read_bytes())
    content[start + 800] ^= 1
    (shard_set / shard.file).write_bytes(content)
    new = replace(shard, sha256=hashlib.sha256(content).hexdigest())
    rewrite(shard_set, lambda manifest: replace(manifest, shards=(new, *manifest.shards[1:])))
    problems = verify(shard_set)
    assert [problem.file for problem in problems] == [shard.file] * len(problems)
    assert "sample 2: " in problems[0].what


def test_a_sample_missing_from_the_index_is_found_by_webdataset(shard_set: Path) -> None:
    manifest = read_manifest(shard_set)
    index = np.load(shard_set / "index.npy")
    shorter = np.delete(index, 3, axis=0)
    np.save(shard_set / "index.npy", shorter)
    first = replace(manifest.shards[0], num_samples=5)
    rewrite(
        shard_set,
        lambda known: replace(
            known,
            shards=(first, *known.shards[1:]),
            num_samples=59,
            index_sha256=hashlib.sha256((shard_set / "index.npy").read_bytes()).hexdigest(),
        ),
    )
    assert [problem.what for problem in verify(shard_set)] == ["WebDataset finds 6 samples, the index points to 5"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("", "cannot be read"),
        ("[1]", "damaged"),
        ('{"format": "dinocell shards", "version": 99}', "version 99, this DINOCell reads .* version 1"),
        ('{"format": "dinocell shards", "version": 1}', "damaged"),
        ('{"format": "something else", "version": 1}', "something else"),
    ],
)
def test_a_damaged_manifest_is_named(shard_set: Path, broken: str, message: str) -> None:
    (shard_set / MANIFEST).write_text(broken)
    with pytest.raises(ShardError, match=f"{MANIFEST}: .*{message}"):
        read_manifest(shard_set)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../../escape.tar"),
        ("file", "/tmp/escape.tar"),
        ("file", ".bashrc"),
        ("file", 1),
        ("sha256", "../../escape"),
        ("sha256", ""),
    ],
)
def test_a_manifest_with_paths_outside_the_set_is_rejected(shard_set: Path, key: str, value: object) -> None:
    """Copies of a remote set's shards are written under these names."""
    content = json.loads((shard_set / MANIFEST).read_text())
    content["shards"][0][key] = value
    (shard_set / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ShardError, match=f"{MANIFEST}: .*damaged"):
        read_manifest(shard_set)


def test_a_manifest_with_wrong_sums_is_rejected(shard_set: Path) -> None:
    content = json.loads((shard_set / MANIFEST).read_text())
    content["num_samples"] += 1
    (shard_set / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ShardError, match=f"{MANIFEST}: .*num_samples is 61"):
        read_manifest(shard_set)


def test_a_manifest_is_read_as_written(shard_set: Path, tmp_path: Path) -> None:
    manifest = read_manifest(shard_set)
    shutil.copytree(shard_set, tmp_path / "copy")
    rewrite(tmp_path / "copy", lambda known: known)
    assert asdict(read_manifest(tmp_path / "copy")) == asdict(manifest)
    assert (tmp_path / "copy" / MANIFEST).read_bytes() == (shard_set / MANIFEST).read_bytes()


def test_the_contact_sheet_shows_samples_and_channels(shard_set: Path, tmp_path: Path) -> None:
    preview(shard_set, tmp_path / "sheet.png", num_samples=4, tile_px=64)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (14 + 4 * (14 + 64 + 4), 3 * (64 + 4))
    for row in range(4):
        for column in range(3):
            top = 14 + row * 82 + 14
            tile = sheet[top : top + 64, column * 68 : column * 68 + 64]
            assert tile.std() > 0.1  # noise and blobs, not the ground
    preview(shard_set, tmp_path / "again.png", num_samples=4, tile_px=64)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
