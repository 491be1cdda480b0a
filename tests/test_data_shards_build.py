"""Building: every tile arrives, whatever interrupts the build, and the same bytes come out."""

import errno
import gzip
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from dinocell.data_shards import build as merge_module
from dinocell.data_shards.build import build, merge
from dinocell.data_shards.manifest import read_index, read_manifest
from dinocell.data_shards.sample import decode_sample, parse_sample
from dinocell.data_shards.shard import ShardSettings, TileSettings
from dinocell.data_shards.sources.field import Field, FieldFile
from dinocell.data_shards.sources.files import ImagesSource
from dinocell.errors import ShardError
from dinocell.images.write import write_tiff

SMALL = ShardSettings(tiles=TileSettings(size=32, min_size=16, min_contrast=0))


@pytest.fixture
def shard_set(fields: Callable[..., Any], tmp_path: Path) -> Path:
    """Build the set here: its manifest names the folder of the fields, and the builds below have that very one."""
    build(fields(10), tmp_path / "set", settings=SMALL, workers=1)
    return tmp_path / "set"


def content(folder: Path) -> dict[str, str]:
    """Every file of a set, also hidden ones, by its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def samples(folder: Path) -> list[tuple[Any, np.ndarray]]:
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    found, number = [], 0
    for shard in manifest.shards:
        data = memoryview((folder / shard.file).read_bytes())
        for start, size in index[number : number + shard.num_samples].tolist():
            sample = parse_sample(data[start : start + size])
            found.append((sample.info, decode_sample(sample)))
        number += shard.num_samples
    return found


def test_every_pixel_of_every_field_arrives(shard_set: Path, draw: Callable[[int], np.ndarray]) -> None:
    found = samples(shard_set)
    assert len(found) == 60
    fields = {int(info.labels["number"]): np.zeros((3, 64, 96), np.uint16) for info, _ in found}
    for info, pixels in found:
        number = info.labels["number"]
        assert (info.channels, info.plate, info.site) == (("DNA", "ER", "AGP"), f"P{number % 2}", str(number))
        assert info.pixel_size_um == pytest.approx(0.65)
        fields[number][:, info.row : info.row + 32, info.column : info.column + 32] = pixels
    assert len(fields) == 10
    for number, pixels in fields.items():
        np.testing.assert_array_equal(pixels, draw(number))


def test_the_manifest_describes_the_set(shard_set: Path, draw: Callable[[int], np.ndarray]) -> None:
    manifest = read_manifest(shard_set)
    assert (manifest.num_samples, manifest.num_fields, len(manifest.shards)) == (60, 10, 10)
    assert manifest.shapes == {"3 x 32 x 32 uint16": 60}
    assert list(manifest.channels) == ["DNA", "ER", "AGP"]
    everything = np.stack([draw(number) for number in range(10)]).astype(np.float64)
    for channel, known in enumerate(manifest.channels.values()):
        values = everything[:, channel]
        assert (known.minimum, known.maximum) == (values.min(), values.max())
        assert known.mean == pytest.approx(values.mean())
        assert known.std == pytest.approx(values.std())
        assert known.percentiles["50"] == pytest.approx(np.median(values), rel=0.02)
    for shard in manifest.shards:
        data = (shard_set / shard.file).read_bytes()
        assert (shard.num_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(content(shard_set)) == sorted(
        ["index.npy", "manifest.json", "rejected.jsonl", *(shard.file for shard in manifest.shards)]
    )


def test_workers_and_parts_do_not_change_a_byte(shard_set: Path, fields: Callable[..., Any], tmp_path: Path) -> None:
    want = content(shard_set)
    build(fields(10), tmp_path / "two", settings=SMALL, workers=2)
    assert content(tmp_path / "two") == want
    for number in (3, 1, 2):
        assert build(fields(10), tmp_path / "parts", settings=SMALL, workers=1, part=(number, 3)) is None
        if number != 2:
            with pytest.raises(ShardError, match="of 10 shards are not built yet"):
                merge(tmp_path / "parts")
    merge(tmp_path / "parts")
    assert content(tmp_path / "parts") == want
    assert merge(tmp_path / "parts") == read_manifest(tmp_path / "parts")


class _StopError(Exception):
    pass


def test_an_interrupted_build_resumes(shard_set: Path, fields: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "again"

    def stop(state: Any) -> None:
        if state.done == 4:
            raise _StopError

    with pytest.raises(_StopError):
        build(fields(10), output, settings=SMALL, workers=1, progress=stop)
    with pytest.raises(ShardError, match="unfinished"):
        read_manifest(output)
    built = [path.name for path in output.glob("shard-*.tar")]
    times = {name: (output / name).stat().st_mtime_ns for name in built}
    assert len(built) == 4
    seen = []
    build(fields(10), output, settings=SMALL, workers=1, progress=lambda state: seen.append(state.done))
    assert seen == [5, 6, 7, 8, 9, 10]
    assert {name: (output / name).stat().st_mtime_ns for name in built} == times
    assert content(output) == content(shard_set)


def test_kill_9_at_any_moment_loses_nothing(shard_set: Path, fields: Callable[..., Any], tmp_path: Path) -> None:
    source = fields(10)
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import FolderOfFields, SMALL
        from dinocell.data_shards.write import build
        if __name__ == "__main__":
            build(FolderOfFields(folder={source.folder!r}, num_fields=10), {str(tmp_path / "killed")!r}, settings=SMALL,
                  workers=int(sys.argv[1]))
    """)
    (tmp_path / "run.py").write_text(script)

    def num_shards() -> int:
        return len(list((tmp_path / "killed").glob("shard-*.tar")))

    killed_at = set()
    # The first two die while they start, list or plan; each other a moment after it has written a shard.
    for attempt, delay in enumerate((0.2, 0.4, *np.linspace(0, 0.02, 5))):
        before = num_shards()
        process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), "2" if attempt % 8 == 7 else "1"])
        while attempt > 1 and process.poll() is None and num_shards() == before:
            time.sleep(0.001)
        try:
            process.wait(timeout=float(delay))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed_at.add(num_shards())
    subprocess.run([sys.executable, str(tmp_path / "run.py"), "1"], check=True)
    assert len(killed_at) > 1  # it was killed between shards, not only before the first
    assert content(tmp_path / "killed") == content(shard_set)


def test_workers_end_when_their_parent_is_killed(fields: Callable[..., Any], tmp_path: Path) -> None:
    source = fields(10)
    script = textwrap.dedent(f"""
        import multiprocessing, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from dinocell.data_shards.build import run_tasks
        from pathlib import Path
        import os

        def task(number):
            Path({str(tmp_path)!r}, f"pid{{number}}").write_text(str(os.getpid()))
            time.sleep(60)

        if __name__ == "__main__":
            list(run_tasks(task, [0, 1], workers=2))
    """)
    (tmp_path / "run.py").write_text(script)
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")])
    pids = [tmp_path / "pid0", tmp_path / "pid1"]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(_runs(int(path.read_text())) for path in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert source.num_fields == 10


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_field_that_cannot_be_read_is_listed_and_skipped(fields: Callable[..., Any], tmp_path: Path) -> None:
    source = fields(10, unmatched=2)
    (Path(source.folder) / "f003_ER.tif").write_bytes((Path(source.folder) / "f003_ER.tif").read_bytes()[:500])
    (Path(source.folder) / "f005_DNA.tif").write_bytes(b"")
    write_tiff(Path(source.folder) / "f007_DNA.tif", np.full((64, 96), np.nan, np.float32))
    for name in ("DNA", "ER", "AGP"):
        write_tiff(Path(source.folder) / f"f008_{name}.tif", np.ones((1, 1), np.uint16))
    manifest = build(source, tmp_path / "set", settings=SMALL, workers=1)
    assert manifest is not None
    assert manifest.rejected == {"too small": 1, "unmatched": 2, "unreadable": 3}
    assert (manifest.num_samples, manifest.num_fields) == (36, 6)
    lines = [json.loads(line) for line in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["input"]: line["reason"] for line in lines}
    assert set(reasons) == {"notes0.txt", "notes1.txt", "P1/f003", "P1/f005", "P1/f007", "P0/f008"}
    assert "f003_ER.tif" in reasons["P1/f003"]
    assert "f005_DNA.tif" in reasons["P1/f005"]
    assert "1 x 1 pixels" in reasons["P0/f008"]
    with pytest.raises(ShardError, match=r"f00[357]_\w+\.tif.*without --strict"):
        build(source, tmp_path / "strict", settings=SMALL, workers=1, strict=True)


def test_values_that_are_not_finite_are_rejected(fields: Callable[..., Any], tmp_path: Path) -> None:
    source = fields(10)
    for name in ("DNA", "ER", "AGP"):
        write_tiff(Path(source.folder) / f"f002_{name}.tif", np.full((64, 96), np.inf, np.float32))
    manifest = build(source, tmp_path / "set", settings=SMALL, workers=1)
    assert manifest is not None
    assert manifest.rejected == {"not finite": 1}


def test_fields_with_a_missing_channel_keep_the_others(fields: Callable[..., Any], tmp_path: Path) -> None:
    build(fields(10, missing_from=4), tmp_path / "set", settings=SMALL, workers=1)
    without = [info for info, _ in samples(tmp_path / "set") if info.missing]
    assert len(without) == 6
    assert {(info.channels, info.missing) for info in without} == {(("DNA", "ER"), ("AGP",))}


@pytest.mark.parametrize("samples_per_shard", [1, 1000])
def test_channels_have_the_sources_order_whatever_the_first_fields_lack(
    fields: Callable[..., Any], tmp_path: Path, samples_per_shard: int
) -> None:
    source = fields(10)

    @dataclass(frozen=True)
    class OneWhole:
        """Field 4 is whole; of the others, each lacks one channel."""

        def fields(self) -> Any:
            for number, each in enumerate(source.fields()):
                files = [file for index, file in enumerate(each.files) if index != number % 3 or number == 4]
                yield replace(each, files=tuple(files))

    for seed in range(5):
        settings = {"settings": SMALL, "samples_per_shard": samples_per_shard, "shuffle_seed": seed, "workers": 1}
        manifest = build(OneWhole(), tmp_path / str(seed), **settings)
        assert manifest is not None
        assert list(manifest.channels) == ["DNA", "ER", "AGP"]


def test_an_outage_of_the_storage_stops_the_build(fields: Callable[..., Any], tmp_path: Path) -> None:
    source = fields(40)
    for number in range(5, 40):
        (Path(source.folder) / f"f{number:03d}_ER.tif").unlink()
    with pytest.raises(ShardError, match=r"fields of a shard cannot be read"):
        build(source, tmp_path / "set", settings=SMALL, workers=1)
    assert not (tmp_path / "set" / "manifest.json").exists()
    manifest = build(source, tmp_path / "set", settings=replace(SMALL, max_unreadable=1), workers=1)  # as it says
    assert manifest is not None
    assert (manifest.num_fields, manifest.rejected) == (5, {"unreadable": 35})


def test_unreadable_files_listed_first_do_not_stop_the_build(fields: Callable[..., Any], tmp_path: Path) -> None:
    source = fields(60)
    for number in range(30):
        (Path(source.folder) / f"f{number:03d}_ER.tif").write_bytes(b"II*\0")
    settings = replace(SMALL, max_unreadable=1)
    manifest = build(source, tmp_path / "set", settings=settings, workers=1)
    assert manifest is not None
    assert manifest.rejected == {"unreadable": 30}
    for number in range(30, 60):
        (Path(source.folder) / f"f{number:03d}_ER.tif").unlink()
    with pytest.raises(ShardError, match=r"none of 33 of 60 fields can be read; the first: .*f000_ER.tif"):
        build(source, tmp_path / "out", settings=settings, workers=1)


def test_a_build_with_other_settings_is_rejected(shard_set: Path, fields: Callable[..., Any]) -> None:
    with pytest.raises(ShardError, match=r"other settings \(codec 'pco' -> 'png'\)"):
        build(fields(10), shard_set, settings=replace(SMALL, codec="png"))
    with pytest.raises(ShardError, match=r"source\.num_fields 10 -> 9"):
        build(replace(fields(10), num_fields=9), shard_set, settings=SMALL)
    before = content(shard_set)
    assert build(fields(10), shard_set, settings=SMALL) == read_manifest(shard_set)
    assert content(shard_set) == before


def test_a_set_built_with_version_01_is_the_same_build(shard_set: Path, fields: Callable[..., Any]) -> None:
    path = shard_set / "manifest.json"
    manifest = json.loads(path.read_text())
    tiles = manifest["settings"]["tiles"]
    tiles |= {"min_structure": tiles.pop("min_contrast"), "cover": False}
    manifest["settings"] |= {"depth": manifest["settings"].pop("bit_depth"), "levels_of": "plate"}
    for statistics in manifest["channels"].values():
        statistics["deviation"] = statistics.pop("std")
    path.write_text(json.dumps(manifest))
    rebuilt = build(fields(10), shard_set, settings=SMALL)
    assert rebuilt is not None
    assert rebuilt.channels["DNA"].std > 0
    tiles["cover"] = True
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"tiles\.cover True -> False"):
        build(fields(10), shard_set, settings=SMALL)


@pytest.mark.parametrize("name", ["shard-000002.tar", "index.npy"])
def test_a_finished_set_that_lacks_a_file_is_an_error(shard_set: Path, fields: Callable[..., Any], name: str) -> None:
    (shard_set / name).unlink()
    with pytest.raises(ShardError, match=name):
        build(fields(10), shard_set, settings=SMALL)


def test_another_folder_is_not_overwritten(fields: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("x")
    with pytest.raises(ShardError, match="exists and is not a shard set"):
        build(fields(3), tmp_path / "set", settings=SMALL)
    assert content(tmp_path / "set").keys() == {"thesis.tex"}


def test_a_source_without_a_usable_tile_is_an_error(fields: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no field found; 1 input\(s\) rejected, the first: notes0.txt"):
        build(replace(fields(1), num_fields=0, unmatched=1), tmp_path / "a", settings=SMALL)
    with pytest.raises(ShardError, match=r"2 x too small"):
        build(fields(2), tmp_path / "b", settings=replace(SMALL, tiles=TileSettings(size=512, min_size=500)))


def test_duplicate_field_ids_are_an_error(fields: Callable[..., Any], tmp_path: Path) -> None:
    source = fields(3)

    @dataclass(frozen=True)
    class Twice:
        def fields(self) -> Any:
            yield from source.fields()
            yield from source.fields()

    with pytest.raises(ShardError, match=r"two fields have the id 'P[01]/f00[012]'"):
        build(Twice(), tmp_path / "set", settings=SMALL)


def test_eight_bit_sets_have_one_range_per_plate_and_channel(
    fields: Callable[..., Any], draw: Callable[[int], np.ndarray], tmp_path: Path
) -> None:
    settings = replace(SMALL, bit_depth=8)
    manifest = build(fields(10), tmp_path / "plate", settings=settings, workers=1)
    assert manifest is not None
    assert manifest.shapes == {"3 x 32 x 32 uint8": 60}
    ranges = {(info.plate, info.ranges) for info, _ in samples(tmp_path / "plate")}
    assert len(ranges) == 2
    for info, pixels in samples(tmp_path / "plate"):
        field = draw(info.labels["number"])[:, info.row : info.row + 32, info.column : info.column + 32]
        for plane, raw, (low, high) in zip(pixels, field, info.ranges, strict=True):
            want = np.rint(np.clip((raw.astype(float) - low) / (high - low), 0, 1) * 255)
            np.testing.assert_array_equal(plane, want)


def test_unusable_fields_do_not_prevent_a_plates_intensity_ranges(fields: Callable[..., Any], tmp_path: Path) -> None:
    """Plate P0 has fields 0, 2, 4...: one is not finite. P1 has 1, 3, 5...: none is usable."""
    source = fields(10)
    for number in (2, 1, 3, 5):
        for name in ("DNA", "ER", "AGP"):
            write_tiff(Path(source.folder) / f"f{number:03d}_{name}.tif", np.full((64, 96), np.nan, np.float32))
    for number in (7, 9):
        (Path(source.folder) / f"f{number:03d}_ER.tif").write_bytes(b"II*\0")
    settings = replace(SMALL, bit_depth=8)
    manifest = build(source, tmp_path / "set", settings=settings, workers=1)
    assert manifest is not None
    assert manifest.rejected == {"not finite": 4, "unreadable": 2}
    assert manifest.num_fields == 4
    for number in (1, 3, 5):
        (Path(source.folder) / f"f{number:03d}_ER.tif").write_bytes(b"II*\0")
    with pytest.raises(ShardError, match=r"5 of 5 fields of plate P1 cannot be read.*--max-unreadable"):
        build(source, tmp_path / "out", settings=settings, workers=1)


def test_a_full_disk_leaves_no_half_shard(fields: Callable[..., Any], shard_set: Path, tmp_path: Path) -> None:
    source = fields(10)
    limit = max(path.stat().st_size for path in shard_set.glob("*.tar")) // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ShardError, match=r"cannot be written \(File too large\).*run the same command again"):
            build(source, tmp_path / "full", settings=SMALL, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert not list((tmp_path / "full").glob("*.tar"))
    build(source, tmp_path / "full", settings=SMALL, workers=1)
    assert content(tmp_path / "full") == content(shard_set)


def test_a_merge_that_cannot_write_is_an_error_and_can_be_repeated(
    fields: Callable[..., Any], shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "parts"
    for number in (1, 2):
        build(fields(10), output, settings=SMALL, workers=1, part=(number, 2))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        ShardError, match=r"parts: cannot be written \(No space left on device\).*run the same command again"
    ):
        merge(output)
    monkeypatch.undo()
    merge(output)
    assert content(output) == content(shard_set)


@pytest.mark.parametrize("moment", [0, 13])  # while it looks whether all records are there; while it reads them
def test_two_concurrent_merges_both_succeed(
    fields: Callable[..., Any], shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    output = tmp_path / "parts"
    for number in (1, 2):
        build(fields(10), output, settings=SMALL, workers=1, part=(number, 2))
    calls: list[Path] = []

    def record_path(plan: Any, number: int) -> Path:
        calls.append(plan.folder / "records" / f"{number:06d}.json.gz")
        if len(calls) == moment + 1:
            merge(output)  # the other one
        return calls[-1]

    monkeypatch.setattr(merge_module, "record_path", record_path)
    assert merge(output) == read_manifest(shard_set)
    assert content(output) == content(shard_set)


def test_an_input_whose_path_is_not_unicode_is_one_line(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    write_tiff(folder / "a.tif", np.zeros((64, 64), np.uint16))
    with pytest.raises(ShardError, match=r"not Unicode \(UTF-8\), rename its folder; in .*caf\\xe9"):
        build(ImagesSource(input=str(folder)), tmp_path / "set", settings=SMALL, workers=1)
    assert not (tmp_path / "set").exists()


def test_a_damaged_record_is_named(fields: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "set"
    for number in (1, 2):
        build(fields(10), output, settings=SMALL, workers=1, part=(number, 2))
    record = output / ".build" / "records" / "000003.json.gz"
    assert json.loads(gzip.decompress(record.read_bytes()))["num_fields"] == 1
    record.write_bytes(record.read_bytes()[:50])
    with pytest.raises(ShardError, match=r"000003.json.gz: damaged .*remove it and run the build again"):
        merge(output)
    record.unlink()
    build(fields(10), output, settings=SMALL, workers=1)
    assert read_manifest(output).num_samples == 60


def _stack(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((5, 64, 96), np.uint16), metadata={"axes": "TYX"}, imagej=True)


def _three_channels(path: Path) -> None:
    write_tiff(path, np.zeros((3, 64, 96), np.uint16))


def _smaller(path: Path) -> None:
    write_tiff(path, np.zeros((64, 95), np.uint16))


def _other_type(path: Path) -> None:
    write_tiff(path, np.zeros((64, 96), np.uint8))


def _text(path: Path) -> None:
    path.write_text("not a picture")


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_stack, "a stack of 5 frames"),
        (_three_channels, "expected 1 channel"),
        (_smaller, "64 x 95 uint16, but "),
        (_other_type, "64 x 96 uint8, but "),
        (_text, "AGP"),
        (_folder, "a folder, where one image file was expected"),
        (lambda path: None, "no such file"),
    ],
)
def test_every_kind_of_bad_file_is_listed_with_its_name_and_reason(
    fields: Callable[..., Any], tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    source = fields(10)
    path = Path(source.folder) / "f006_AGP.tif"
    path.unlink()
    spoil(path)
    manifest = build(source, tmp_path / "set", settings=SMALL, workers=1)
    assert manifest is not None
    assert manifest.rejected == {"unreadable": 1}
    (line,) = (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["input"] == "P0/f006"
    assert "f006_AGP.tif" in json.loads(line)["reason"]
    assert reason in json.loads(line)["reason"]


def test_names_beyond_ascii_and_line_separators_survive(tmp_path: Path) -> None:
    names = ["größe 1", "日本語", "a\u2028b", "x" * 150, "tab\there", "..", "a.b.c"]
    for number in range(len(names)):
        write_tiff(tmp_path / f"{number}.tif", np.full((16, 16), 7 + number, np.uint16) + np.eye(16, dtype=np.uint16))
    source = _Named(folder=str(tmp_path), names=tuple(names))
    build(source, tmp_path / "set", settings=SMALL, workers=1)
    found = {info.field: (info, int(pixels.min())) for info, pixels in samples(tmp_path / "set")}
    assert set(found) == set(names)
    for number, name in enumerate(names):
        info, lowest = found[name]
        assert lowest == 7 + number
        assert (info.channels, info.plate, info.labels) == (("größe",), name, {"name": name})
    for shard in read_manifest(tmp_path / "set").shards:
        with tarfile.open(tmp_path / "set" / shard.file) as tar:
            assert all("/" not in name and ".." not in name for name in tar.getnames())


@dataclass(frozen=True, kw_only=True)
class _Named:
    """Fields whose ids are the names given."""

    folder: str
    names: tuple[str, ...]

    def fields(self) -> Any:
        for number, name in enumerate(self.names):
            file = FieldFile(path=f"{self.folder}/{number}.tif", channels=("größe",))
            yield Field(id=name, files=(file,), plate=name, labels={"name": name})
