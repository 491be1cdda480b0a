"""``dinocell shards``, typed as a user would type it."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinocell.cli import main
from dinocell.commands import shards
from dinocell.data_shards.manifest import read_manifest
from dinocell.images.write import write_png, write_tiff


@pytest.fixture
def folder(fields: Callable[..., Any], tmp_path: Path) -> Path:
    """10 fields of three channels in one folder, and a file that is none."""
    (Path(fields(10).folder) / "notes.txt").write_text("x")
    return tmp_path / "input"


def build(folder: Path, output: Path, *more: str) -> list[str]:
    line = ["shards", "build", "--source", "pattern", "--pattern", "f{site}_{channel}.tif", "--input", str(folder)]
    return [*line, "--output", str(output), "--tile-size", "32", "--min-structure", "0", "--workers", "1", *more]


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_build_info_verify_preview(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "set"
    assert main(build(folder, output)) == 0
    printed = capsys.readouterr().out
    assert f"{output}: 60 samples of 10 fields in 10 shards" in printed
    assert "rejected: 1 unmatched" in printed
    assert main(["shards", "info", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "60 of 3 x 32 x 32 uint16" in printed
    assert all(name in printed for name in ("DNA", "ER", "AGP", "median"))
    assert main(["shards", "info", "--json", str(output)]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 60
    assert main(["shards", "verify", str(output)]) == 0
    assert "60 samples in 10 shards, no problems" in capsys.readouterr().out
    assert main(["shards", "preview", str(output), "--output", str(tmp_path / "p.png"), "--samples", "2"]) == 0
    assert np.asarray(Image.open(tmp_path / "p.png")).shape == (14 + 2 * (14 + 192 + 4), 3 * 196)


@pytest.mark.parametrize(("option", "least"), [("samples", 1), ("seed", 0)])
@pytest.mark.parametrize("views", [[], ["--views", "debug"]])
def test_a_preview_without_samples_is_one_line(
    option: str, least: int, views: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["shards", "preview", str(tmp_path), f"--{option}", str(least - 1), *views])
    assert f"argument --{option}: expected a whole number of at least {least}" in capsys.readouterr().err


def test_views_of_a_remote_set_are_drawn_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(shards, "_preview_views", lambda *arguments: given.extend(arguments))
    line = ["shards", "preview", "s3://bucket/set", "--cache", str(tmp_path), "--views", "debug", "views.blur=1"]
    assert main(line) == 0
    options, *recipe = given
    assert recipe == ["debug", ["views.blur=1"]]
    assert (options.set, options.cache) == ("s3://bucket/set", tmp_path)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_failed_listing_leaves_no_folder(
    folder: Path, tmp_path: Path, is_there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "set"
    if is_there:
        output.mkdir()
    assert main(build(folder, output, "--channels", "nonesuch")) == 2
    assert "nonesuch" in capsys.readouterr().err
    assert output.exists() == is_there
    assert main(build(folder, output)) == 0


def test_verify_lists_the_damage_and_fails(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build(folder, tmp_path / "set")) == 0
    (tmp_path / "set" / "shard-000003.tar").unlink()
    capsys.readouterr()
    assert main(["shards", "verify", str(tmp_path / "set"), "--workers", "1"]) == 2
    captured = capsys.readouterr()
    assert "shard-000003.tar: missing" in captured.out
    assert "1 problem(s) in 1 file(s)" in captured.err


def test_slices_and_merge_give_the_set_of_one_build(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(build(folder, tmp_path / "one")) == 0
    for number in (2, 1):
        assert main(build(folder, tmp_path / "parts", "--slice", f"{number}/2")) == 0
    assert "part 1 of 2 is built" in capsys.readouterr().out
    assert main(["shards", "info", str(tmp_path / "parts")]) == 2
    assert "the build is unfinished" in capsys.readouterr().err
    assert main(["shards", "merge", str(tmp_path / "parts")]) == 0
    assert content(tmp_path / "parts") == content(tmp_path / "one")


def test_every_option_reaches_the_set(folder: Path, tmp_path: Path) -> None:
    more = ["--codec", "png", "--bit-depth", "8", "--percentiles", "1", "99", "--overlap", "4"]
    more += ["--min-contrast", "0", "--min-size", "60", "--max-saturated", "0.9", "--samples-per-shard", "18"]
    assert main(build(folder, tmp_path / "set", *more, "--max-unreadable", "0.25")) == 0
    manifest = read_manifest(tmp_path / "set")
    assert manifest.shapes == {"3 x 32 x 32 uint8": 10 * 2 * 3}  # 64 x 96 px, at least 4 px shared
    settings = manifest.settings
    tiles = {"size": 32, "overlap": 4, "min_size": 60, "min_contrast": 0.0, "max_saturated": 0.9}
    assert settings["tiles"] == tiles
    assert (settings["codec"], settings["bit_depth"], settings["percentiles"]) == ("png", 8, [1.0, 99.0])
    assert (settings["samples_per_shard"], settings["max_unreadable"]) == (18, 0.25)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--slice", "3/2"], "expected I/N with I from 1 to N"),
        (["--slice", "x"], "expected I/N"),
        (["--overlap", "32"], "overlap: expected 0 to 31"),
        (["--percentiles", "90", "10"], "percentiles: expected"),
        (["--max-unreadable", "7"], "max_unreadable: expected"),
        (["--codec", "jpg"], "jpg"),
        (["--source", "phoenix"], "did you mean 'phenix'"),
        (["--workers", "0"], "workers: expected at least 1"),
        (["--samples-per-shard", "0"], "samples_per_shard: expected at least 1"),
    ],
)
def test_user_errors_are_one_line(
    folder: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(build(folder, tmp_path / "set", *more))
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "words", [["preview", "--samples", "0"], ["preview", "--samples", "-1"], ["preview", "--seed", "-1"]]
)
def test_invalid_numbers_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["shards", *words, "set"])
    assert "expected a whole number of at least" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["shards", "verify", "set", "--workers", "0"])


def test_a_corrupt_file_is_reported_and_strict_stops(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "f004_ER.tif").write_bytes((folder / "f004_ER.tif").read_bytes()[:500])
    assert main(build(folder, tmp_path / "set")) == 0
    assert "1 unmatched, 1 unreadable" in capsys.readouterr().out
    assert read_manifest(tmp_path / "set").rejected == {"unmatched": 1, "unreadable": 1}
    assert main(build(folder, tmp_path / "strict", "--strict")) == 2
    assert "f004_ER.tif" in capsys.readouterr().err


def test_every_file_becomes_a_sample_or_is_rejected_with_a_reason(tmp_path: Path, draw: Callable[..., Any]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = draw(0)
    for name in ("a.tif", "größe 日本.tif", "c [1].tif"):
        write_tiff(folder / name, good[0])
    write_png(folder / "a.png", (good[0] // 16).astype(np.uint8))  # of the same name but for its end
    (folder / "cut.tif").write_bytes((folder / "a.tif").read_bytes()[:2000])
    (folder / "nothing.png").write_bytes(b"")
    write_tiff(folder / "not_numbers.tif", np.where(good[0] > 200, np.nan, good[0]).astype(np.float32))
    write_tiff(folder / "pixel.tif", good[0][:1, :1])
    tifffile.imwrite(folder / "stack.tif", good, metadata={"axes": "ZYX"}, imagej=True)
    write_tiff(folder / "channels.tif", good)
    (folder / "notes.txt").write_text("x")
    line = ["shards", "build", "--source", "images", "--input", str(folder), "--output", str(tmp_path / "set")]
    assert main([*line, "--workers", "1", "--max-unreadable", "1"]) == 0
    assert read_manifest(tmp_path / "set").num_fields == 4
    lines = [json.loads(each) for each in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    reasons = {each["input"]: f"{each['kind']}: {each['reason']}" for each in lines}
    for name, reason in {
        "cut.tif": "truncated",
        "nothing.png": "the file is empty (0 bytes)",
        "not_numbers.tif": "values are NaN or infinite",
        "pixel.tif": "1 x 1 pixels",
        "stack.tif": "a stack of 3 frames",
        "channels.tif": "expected one channel",
        "notes.txt": "unmatched",
    }.items():
        assert reason in reasons.pop(name), name
    assert not reasons
    assert main(["shards", "verify", str(tmp_path / "set")]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_stops_at_once_and_the_next_run_resumes(folder: Path, tmp_path: Path) -> None:
    for number in range(10, 200):
        for name in ("DNA", "ER", "AGP"):
            (folder / f"f{number:03d}_{name}.tif").write_bytes((folder / f"f{number % 10:03d}_{name}.tif").read_bytes())
    small = ("--samples-per-shard", "60")
    line = [sys.executable, "-m", "dinocell", *build(folder, tmp_path / "set", *small, "--workers", "2")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("set/shard-*.tar")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert main(build(folder, tmp_path / "set", *small)) == 0
    assert main(build(folder, tmp_path / "whole", *small)) == 0
    assert content(tmp_path / "set") == content(tmp_path / "whole")
