"""Assignment of fields to shards: fixed before the first shard is written, and stored in ``.build/``.

A shard is a function of its list of fields and the settings, nothing else. So any process can build any shard in any
order, now or after a crash, and the set is always the same.

Fields are assigned to shards at random (seeded), so that neighbours on a plate are not in the same batch.
"""

import gzip
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinocell.data_shards.shard import TileSettings, tiles
from dinocell.data_shards.sources.field import Field, FieldFile, Rejected, Source, read_field
from dinocell.errors import ImageError, ShardError

BUILD_FOLDER = ".build"

# Enough to occupy every core of a small machine, and every loader worker.
_MIN_SHARDS = 8
_NUM_SIZE_TRIALS = 20  # of the first fields, and as many spread over all


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shards to build: numbers of fields and shards, and settings; ``folder`` has the lists of fields."""

    folder: Path
    num_fields: int
    num_shards: int
    settings: dict[str, Any]

    def fields(self, shard: int) -> list[Field]:
        """Return the fields of a shard."""
        text = gzip.decompress((self.folder / "fields" / f"{shard:06d}.jsonl.gz").read_bytes()).decode()
        return [_parse_field(line) for line in text.split("\n")]

    def rejected(self) -> Iterator[Rejected]:
        """Return the inputs that belong to no field."""
        with (self.folder / "rejected.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield Rejected(**json.loads(line))


def open_plan(output: Path) -> Plan | None:
    """Return the plan of an unfinished build, or None; raise ShardError if it is damaged."""
    folder = output / BUILD_FOLDER
    path = folder / "plan.json"
    if not path.exists():
        return None
    try:
        return Plan(folder=folder, **json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ShardError(f"{path}: damaged ({error}); remove {folder} and start again") from error


def make_plan(
    source: Source,
    output: Path,
    *,
    tile_settings: TileSettings,
    samples_per_shard: int,
    shuffle_seed: int,
    settings: dict[str, Any],
    on_listed: Callable[[int], None] = lambda _: None,
) -> Plan:
    """List the source's fields and assign them to shards; this needs about 50 bytes of memory per field.

    If another process makes the same plan at the same time, the first to finish wins and both return its plan.

    Raise ShardError if there is no field, two have the same id, or none of the first can be read.
    """
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    folder = output / f"{BUILD_FOLDER}-{secrets.token_hex(4)}.part"
    (folder / "fields").mkdir(parents=True)
    try:
        num_fields = _list_fields(source, folder, on_listed)
        per_shard = max(1, samples_per_shard // _num_tiles_per_field(folder, num_fields, tile_settings))
        per_shard = min(per_shard, max(1, num_fields // _MIN_SHARDS))
        num_shards = -(-num_fields // per_shard)
        _assign_fields(folder, num_fields, per_shard, shuffle_seed)
        content = {"num_fields": num_fields, "num_shards": num_shards, "settings": settings}
        (folder / "plan.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        try:
            folder.rename(output / BUILD_FOLDER)
        except OSError:
            if open_plan(output) is None:
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                output.rmdir()  # if it is empty: another process may be building there
    plan = open_plan(output)
    assert plan is not None
    return plan


def _list_fields(source: Source, folder: Path, on_listed: Callable[[int], None]) -> int:
    """Write fields and rejected inputs to one file each, one per line; return the number of fields."""
    hashes: list[int] = []
    first_rejected: Rejected | None = None
    num_rejected, problem = 0, ""
    with (
        (folder / "spool.jsonl").open("w", encoding="utf-8") as fields,
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        for item in source.fields():
            line = json.dumps(asdict(item), ensure_ascii=False) + "\n"
            try:
                (rejected if isinstance(item, Rejected) else fields).write(line)
            except UnicodeEncodeError:  # file names are checked when they are listed; this is the user's folder
                shown = os.fsencode(line).decode("utf-8", "backslashreplace").strip()
                problem = f"the path of the input is not Unicode (UTF-8), rename its folder; in {shown}"
                break
            if isinstance(item, Rejected):
                first_rejected = first_rejected or item
                num_rejected += 1
                continue
            hashes.append(int.from_bytes(hashlib.blake2b(item.id.encode(), digest_size=8).digest(), "little"))
            on_listed(len(hashes))
    values, counts = np.unique(np.array(hashes, np.uint64), return_counts=True)
    if not hashes and not problem:
        problem = "no field found"
        if first_rejected is not None:
            first = f"{first_rejected.input}: {first_rejected.reason}"
            problem += f"; {num_rejected} input(s) rejected, the first: {first}"
    elif (counts > 1).any():
        index = hashes.index(int(values[np.argmax(counts > 1)]))
        field = next(field for position, field in _spooled_fields(folder) if position == index)
        problem = f"two fields have the id {field.id!r}; ids must be unique"
    if problem:
        raise ShardError(problem)
    return len(hashes)


def _assign_fields(folder: Path, num_fields: int, per_shard: int, seed: int) -> None:
    """Split the list of fields into one compressed file per shard, in a random order that depends on the seed alone."""
    order = np.argsort(np.random.default_rng(seed).permutation(num_fields))
    with (folder / "spool.jsonl").open("rb") as spool:
        ends = np.cumsum(np.fromiter(map(len, spool), np.int64, num_fields))
        for shard, first in enumerate(range(0, num_fields, per_shard)):
            lines = []
            for index in order[first : first + per_shard].tolist():
                spool.seek(ends[index - 1] if index else 0)
                lines.append(spool.readline())
            content = gzip.compress(b"".join(lines).rstrip(b"\n"), mtime=0)
            (folder / "fields" / f"{shard:06d}.jsonl.gz").write_bytes(content)
    (folder / "spool.jsonl").unlink()


def _num_tiles_per_field(folder: Path, num_fields: int, settings: TileSettings) -> int:
    """Return the number of tiles of the first readable field; a whole folder of unreadable ones may precede it."""
    trials = {*range(_NUM_SIZE_TRIALS), *np.linspace(0, num_fields - 1, _NUM_SIZE_TRIALS, dtype=int).tolist()}
    first_error: ImageError | None = None
    for position, field in _spooled_fields(folder):
        if position not in trials:
            continue
        try:
            _, height, width = read_field(field).pixels.shape
        except ImageError as error:
            first_error = first_error or error
        else:
            return len(list(tiles(height, width, settings)))
    num_tried = sum(position < num_fields for position in trials)
    raise ShardError(f"none of {num_tried} of {num_fields} fields can be read; the first: {first_error}")


def _spooled_fields(folder: Path) -> Iterator[tuple[int, Field]]:
    with (folder / "spool.jsonl").open(encoding="utf-8") as lines:
        for position, line in enumerate(lines):
            yield position, _parse_field(line)


def _parse_field(line: str) -> Field:
    content: dict[str, Any] = json.loads(line)
    files = tuple(FieldFile(**{**file, "channels": tuple(file["channels"])}) for file in content.pop("files"))
    return Field(files=files, **{**content, "missing": tuple(content["missing"])})
