"""Reading: each sample once an epoch for any ranks and workers, from any position on, whatever is damaged."""

import itertools
import pickle
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from dinocell.data_shards.build import build
from dinocell.data_shards.manifest import read_index, read_manifest
from dinocell.data_shards.read import Batch, Origin, SampleStream, loader, stream
from dinocell.data_shards.sample import SampleInfo, decode_sample, raw_sample
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.errors import ShardError


def take(batches: Any, number: int) -> list[Batch]:
    return list(itertools.islice(batches, number))


def seen(batches: Sequence[Batch]) -> list[tuple[int, int, int]]:
    return [(origin.epoch, origin.data_set, origin.sample) for batch in batches for origin in batch.origins]


def of_all_ranks(shard_set: Path, world_size: int, steps: int, **options: Any) -> list[tuple[int, int, int]]:
    """What the steps of all ranks see, in the stream's order."""
    by_rank = [
        take(stream(shard_set, rank=rank, world_size=world_size, **options), steps) for rank in range(world_size)
    ]
    return [each for step in range(steps) for batches in by_rank for each in seen([batches[step]])]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_sees_each_sample_once_for_any_ranks_and_workers(
    shard_set: Path, world_size: int, workers: int
) -> None:
    batch_size, steps = 4, -(-60 // (4 * world_size)) + 1
    alone = seen(take(stream(shard_set, batch_size=1, seed=5), steps * batch_size * world_size))
    assert sorted(alone[:60]) == [(0, 0, sample) for sample in range(60)]
    together: dict[int, list[Batch]] = {}
    for rank in range(world_size):
        mine = stream(shard_set, batch_size=batch_size, seed=5, rank=rank, world_size=world_size)
        together[rank] = take(loader(mine, workers=workers), steps)
    in_order = [each for step in range(steps) for rank in range(world_size) for each in seen([together[rank][step]])]
    assert in_order == alone
    assert all(len(batch) == batch_size for batches in together.values() for batch in batches)


def test_a_resumed_stream_equals_an_uninterrupted_one(shard_set: Path) -> None:
    whole = take(stream(shard_set, batch_size=7, seed=1), 20)
    for stopped in (1, 8, 9, 13):
        rest = take(stream(shard_set, batch_size=7, seed=1, position=whole[stopped - 1].next_position), 20 - stopped)
        assert seen(rest) == seen(whole[stopped:])
        for ours, theirs in zip(rest, whole[stopped:], strict=True):
            torch.testing.assert_close(ours.storage, theirs.storage, rtol=0, atol=0)


def test_another_number_of_ranks_resumes_without_a_gap(shard_set: Path) -> None:
    alone = seen(take(stream(shard_set, batch_size=1), 200))
    begun = of_all_ranks(shard_set, 2, 5, batch_size=6)
    position = take(stream(shard_set, batch_size=6, world_size=2), 5)[-1].next_position
    gone_on = of_all_ranks(shard_set, 3, 9, batch_size=5, position=position)
    assert begun + gone_on == alone[: len(begun) + len(gone_on)]


def test_workers_resume_from_a_position(shard_set: Path) -> None:
    whole = take(stream(shard_set, batch_size=4), 12)
    rest = take(loader(stream(shard_set, batch_size=4, position=whole[4].next_position), workers=2), 7)
    assert seen(rest) == seen(whole[5:])


def test_tiles_equal_the_fields(shard_set: Path, draw: Callable[[int], np.ndarray]) -> None:
    for batch in take(stream(shard_set, batch_size=8), 8):
        for number, info in enumerate(batch.infos):
            field = draw(int(info.labels["number"]))
            want = field[:, info.row : info.row + 32, info.column : info.column + 32]
            np.testing.assert_array_equal(batch.tile(number).numpy(), want)


@dataclass(frozen=True)
class _OneChannel:
    number: int

    def channels(self) -> list[int]:
        return [self.number]


def _one_by_sample(info: SampleInfo, origin: Origin) -> _OneChannel:
    return _OneChannel(origin.sample % len(info.channels))


def test_only_the_channels_of_the_plans_are_decoded(shard_set: Path, draw: Callable[[int], np.ndarray]) -> None:
    samples = stream(shard_set, batch_size=8)
    samples.plan_sample = _one_by_sample
    for batch in take(loader(samples, workers=1), 3):
        assert batch.storage.numel() == 8 * 32 * 32 * 2
        assert batch.plans == tuple(_OneChannel(origin.sample % 3) for origin in batch.origins)
        for number, info in enumerate(batch.infos):
            channel = batch.origins[number].sample % 3
            assert batch.channels[number] == (channel,)
            want = draw(int(info.labels["number"]))[channel, info.row : info.row + 32, info.column : info.column + 32]
            np.testing.assert_array_equal(batch.tile(number)[0].numpy(), want)


def test_one_pass_ends_with_a_smaller_batch(shard_set: Path) -> None:
    mine = stream(shard_set, batch_size=8, stop=60, shuffle=False)
    batches = list(mine)
    assert [len(batch) for batch in batches] == [8] * 7 + [4]
    assert [sample for _, _, sample in seen(batches)] == list(range(60))
    assert mine.num_samples == 60
    by_rank = [list(stream(shard_set, batch_size=8, stop=60, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(sample for batches in by_rank for _, _, sample in seen(batches)) == list(range(60))


@pytest.fixture
def two_sets(shard_set: Path, fields: Callable[..., Any], tmp_path: Path) -> list[Path]:
    """The set of 60 tiles, and one of 20 in another size and type."""
    settings = ShardSettings(tiles=TileSettings(size=48, min_size=16, min_contrast=0), bit_depth=8)
    build(fields(10), tmp_path / "other", settings=settings, workers=1)
    return [shard_set, tmp_path / "other"]


def test_sets_of_different_sizes_and_types_mix_by_weight(two_sets: list[Path]) -> None:
    batches = take(loader(stream(two_sets, batch_size=10, weights=[1, 3]), workers=1), 100)
    shares = Counter(number for _, number, _ in seen(batches))
    assert shares[1] / 1000 == pytest.approx(0.75, abs=0.04)
    shapes = {(tuple(batch.tile(n).shape), batch.tile(n).dtype) for batch in batches for n in range(len(batch))}
    assert shapes == {((3, 32, 32), torch.uint16), ((3, 48, 48), torch.uint8)}
    by_size = Counter(number for _, number, _ in seen(take(stream(two_sets, batch_size=10), 100)))
    assert by_size[0] / 1000 == pytest.approx(0.75, abs=0.04)


def damage(folder: Path, sample: int, *, member_byte: int = 600) -> None:
    manifest = read_manifest(folder)
    start = int(read_index(folder, manifest)[sample, 0])
    first = np.cumsum([0, *(shard.num_samples for shard in manifest.shards)])
    shard = manifest.shards[int(np.searchsorted(first, sample, side="right")) - 1]
    content = bytearray((folder / shard.file).read_bytes())
    content[start + member_byte] ^= 0xFF
    (folder / shard.file).write_bytes(content)


@pytest.mark.parametrize("member_byte", [260, 600])  # in a tar header, in a channel's bytes
def test_a_damaged_sample_is_replaced_and_reported_and_nothing_else_changes(shard_set: Path, member_byte: int) -> None:
    good = take(stream(shard_set, batch_size=6), 10)
    damage(shard_set, 17, member_byte=member_byte)
    damage(shard_set, 40, member_byte=member_byte)
    found = take(stream(shard_set, batch_size=6), 10)
    lines = [line for batch in found for line in batch.damaged]
    assert len(lines) == 2
    assert any("sample 17: " in line for line in lines)
    assert any("sample 40: " in line for line in lines)
    assert all(len(batch) == 6 for batch in found)
    for want, got in zip(seen(good), seen(found), strict=True):
        assert got == want if want[2] not in (17, 40) else got[2] not in (17, 40)
    # Whoever meets it replaces it by the same sample.
    split = of_all_ranks(shard_set, 3, 5, batch_size=4)
    assert split == seen(found)


@pytest.mark.parametrize(("column", "number"), [(0, 2**63 + 5), (1, 2**50)])
def test_a_damaged_entry_of_the_index_is_a_damaged_sample(shard_set: Path, column: int, number: int) -> None:
    index = np.load(shard_set / "index.npy")
    index[17, column] = number
    np.save(shard_set / "index.npy", index)
    [line] = [line for batch in take(stream(shard_set, batch_size=6), 10) for line in batch.damaged]
    assert re.search(r"sample 17: shard-\d+.tar, bytes \d+ to", line)


def test_a_set_with_only_damaged_samples_is_an_error(shard_set: Path) -> None:
    for sample in range(60):
        damage(shard_set, sample)
    with pytest.raises(ShardError, match="8 samples in a row cannot be read"):
        next(iter(stream(shard_set, batch_size=2)))


def test_missing_and_shortened_shards_are_named_at_once(shard_set: Path) -> None:
    (shard_set / "shard-000002.tar").unlink()
    with (shard_set / "shard-000005.tar").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ShardError, match=r"shard-000002.tar is missing; shard-000005.tar has 1000 bytes instead of"):
        stream(shard_set, batch_size=1)


def test_a_missing_or_foreign_index_is_an_error(shard_set: Path) -> None:
    np.save(shard_set / "index.npy", np.zeros((3, 2), np.uint64))
    with pytest.raises(ShardError, match=r"expected uint64 of \(60, 2\), got uint64 of \(3, 2\)"):
        stream(shard_set, batch_size=1)
    (shard_set / "index.npy").unlink()
    with pytest.raises(ShardError, match=r"index.npy: cannot be read"):
        stream(shard_set, batch_size=1)


def test_an_empty_list_of_sets_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no shard set \(no manifest.json\)"):
        stream(tmp_path, batch_size=1)
    with pytest.raises(ShardError, match="no shard set given"):
        stream([], batch_size=1)


@pytest.mark.parametrize("wrong", [{"rank": 2, "world_size": 2}, {"batch_size": 0}, {"position": -1}])
def test_impossible_numbers_are_rejected(shard_set: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        stream(shard_set, **{"batch_size": 1, **wrong})


def test_a_stream_is_sent_to_workers_without_its_index(shard_set: Path) -> None:
    mine = stream(shard_set, batch_size=4)
    content = pickle.dumps(mine)
    assert b"_index" not in content
    assert b"sha256" not in content
    again = pickle.loads(content)
    assert isinstance(again, SampleStream)
    assert seen(take(again, 3)) == seen(take(mine, 3))


def test_webdataset_reads_the_shards(shard_set: Path) -> None:
    shards = [str(path) for path in sorted(shard_set.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    ours = stream(shard_set, batch_size=60, stop=60, shuffle=False)
    batch = next(iter(ours))
    assert len(found) == 60
    for number, members in enumerate(found):
        sample = raw_sample(members["__key__"], {k: v for k, v in members.items() if not k.startswith("__")})
        assert sample.info == batch.infos[number]
        np.testing.assert_array_equal(decode_sample(sample), batch.tile(number).numpy())


def test_reading_holds_few_files_open(fields: Callable[..., Any], tmp_path: Path) -> None:
    settings = ShardSettings(tiles=TileSettings(size=32, min_size=16, min_contrast=0))
    build(fields(80), tmp_path / "many", settings=settings, samples_per_shard=1, workers=1)
    mine = stream(tmp_path / "many", batch_size=16, block_shards=80)
    take(mine, 30)
    assert len(read_manifest(tmp_path / "many").shards) == 80
    assert len(mine.sets[0]._files) <= 64
    shutil.rmtree(tmp_path / "many")


def test_pinning_needs_a_gpu_and_moving_keeps_the_tiles(shard_set: Path) -> None:
    batch = next(iter(stream(shard_set, batch_size=3)))
    moved = batch.to("cpu")
    assert all(torch.equal(batch.tile(n).view(torch.int16), moved.tile(n).view(torch.int16)) for n in range(3))
    assert moved.origins == batch.origins
