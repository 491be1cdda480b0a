"""Which field goes to which shard: decided once, before the first shard is written, and kept in ``.build/``.

A shard is a function of its list of fields and the settings, nothing else. So any process can build any shard in any
order, now or after a crash, and the set always comes out the same.

Fields are dealt to shards at random (seeded), so that neighbours on a plate do not end up in one batch.
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

from dinocell.data_shards.sources.field import Field, FieldFile, Rejected, Source, read_field
from dinocell.data_shards.build.tiles import TileSettings, tiles
from dinocell.errors import ImageError, ShardError

BUILD_FOLDER = ".build"

# Small sets give every core of a small machine something to do, and every loader worker a shard of its own.
_MIN_SHARDS = 8
_TRIED_FOR_SIZE = 20  # of the first fields, and as many of all
_SPOOLED_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shards to build: how many, of how many fields, with which settings; ``folder`` is where the rest lies."""

    folder: Path
    num_fields: int
    num_shards: int
    settings: dict[str, Any]

    def fields(self, number: int) -> list[Field]:
        """Return the fields of a shard."""
        text = gzip.decompress((self.folder / "fields" / f"{number:06d}.jsonl.gz").read_bytes()).decode()
        return [_field_from(json.loads(line)) for line in text.split("\n")]

    def rejected(self) -> Iterator[Rejected]:
        """Return the inputs that belong to no field."""
        with (self.folder / "rejected.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield Rejected(**json.loads(line))


def open_plan(output: Path) -> Plan | None:
    """Return the plan of an unfinished build; None if there is none.

    Raises
    ------
    ShardError
        If it is damaged.
    """
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
    listed: Callable[[int], None] = lambda _: None,
) -> Plan:
    """List the source's fields and deal them to shards; memory does not grow with their number, but for 16 bytes each.

    If another process makes the same plan at the same time, the first to be done wins and both return its plan.

    Raises
    ------
    ShardError
        If there is no field, or two have one id.
    ImageError
        If no field can be read.
    """
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    folder = output / f"{BUILD_FOLDER}-{secrets.token_hex(4)}.part"
    (folder / "fields").mkdir(parents=True)
    try:
        num_fields = _spool(source, folder, listed)
        if num_fields == 0:
            raise ShardError(_nothing_found(folder))
        per_shard = max(1, samples_per_shard // _tiles_of_a_field(folder, num_fields, tile_settings))
        per_shard = min(per_shard, max(1, num_fields // _MIN_SHARDS))
        num_shards = -(-num_fields // per_shard)
        _deal(folder, num_fields, per_shard, shuffle_seed)
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
            _remove_if_empty(output)
    plan = open_plan(output)
    assert plan is not None
    return plan


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder that nothing was put into: another process may be building there."""
    with suppress(OSError):
        folder.rmdir()


def _spool(source: Source, folder: Path, listed: Callable[[int], None]) -> int:
    """Write fields and rejected inputs to one file each, a line each; return the number of fields."""
    hashes: list[int] = []
    with (
        (folder / "spool.jsonl").open("w", encoding="utf-8") as fields,
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        for item in source.fields():
            line = json.dumps(asdict(item), ensure_ascii=False) + "\n"
            if not line.isascii():
                _check_unicode(line)
            if isinstance(item, Rejected):
                rejected.write(line)
                continue
            fields.write(line)
            hashes.append(int.from_bytes(hashlib.blake2b(item.id.encode(), digest_size=8).digest(), "little"))
            listed(len(hashes))
    values, counts = np.unique(np.array(hashes, np.uint64), return_counts=True)
    if (counts > 1).any():
        number = hashes.index(int(values[np.argmax(counts > 1)]))
        raise ShardError(f"two fields have the id {_nth_field(folder, number).id!r}; ids must differ")
    return len(hashes)


def _check_unicode(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:  # names are checked where they are listed; this is the folder that the user named
        shown = os.fsencode(line).decode("utf-8", "backslashreplace").strip()
        raise ShardError(f"the path of the input is not Unicode (UTF-8), rename its folder; in {shown}") from None


def _deal(folder: Path, num_fields: int, per_shard: int, seed: int) -> None:
    """Cut the spool into one compressed file a shard, in a random order that depends on the seed alone."""
    place = np.random.default_rng(seed).permutation(num_fields)
    waiting: dict[int, list[tuple[int, str]]] = {}
    held = 0

    def flush() -> None:
        for shard, lines in waiting.items():
            with (folder / "fields" / f"{shard:06d}.part").open("a", encoding="utf-8") as file:
                file.writelines(f"{place:d}\t{line}" for place, line in lines)
        waiting.clear()

    with (folder / "spool.jsonl").open(encoding="utf-8") as lines:
        for position, line in zip(place.tolist(), lines, strict=True):
            waiting.setdefault(position // per_shard, []).append((position, line))
            held += len(line)
            if held > _SPOOLED_BYTES:
                flush()
                held = 0
    flush()
    for part in (folder / "fields").glob("*.part"):
        placed = [line.split("\t", 1) for line in part.read_text(encoding="utf-8").split("\n")[:-1]]
        text = "\n".join(line for _, line in sorted(placed, key=lambda pair: int(pair[0])))
        part.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        part.unlink()
    (folder / "spool.jsonl").unlink()


def _tiles_of_a_field(folder: Path, num_fields: int, settings: TileSettings) -> int:
    """Return how many tiles the first field gives that can be read; a whole folder of others may come before it."""
    tried = {*range(_TRIED_FOR_SIZE), *np.linspace(0, num_fields - 1, _TRIED_FOR_SIZE, dtype=int).tolist()}
    first_error: ImageError | None = None
    with (folder / "spool.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number not in tried:
                continue
            try:
                picture = read_field(_field_from(json.loads(line)))
            except ImageError as error:
                first_error = first_error or error
                continue
            _, height, width = picture.pixels.shape
            return len(list(tiles(height, width, settings)))
    num_tried = sum(number < num_fields for number in tried)
    raise ShardError(f"none of {num_tried} of {num_fields} fields can be read; the first: {first_error}")


def _nothing_found(folder: Path) -> str:
    with (folder / "rejected.jsonl").open(encoding="utf-8") as lines:
        reasons = [json.loads(line) for line in lines]
    if not reasons:
        return "no field found"
    return f"no field found; {len(reasons)} input(s) rejected, the first: {reasons[0]['input']}: {reasons[0]['reason']}"


def _nth_field(folder: Path, number: int) -> Field:
    with (folder / "spool.jsonl").open(encoding="utf-8") as lines:
        return next(_field_from(json.loads(line)) for index, line in enumerate(lines) if index == number)


def _field_from(content: dict[str, Any]) -> Field:
    files = tuple(FieldFile(**{**file, "channels": tuple(file["channels"])}) for file in content.pop("files"))
    return Field(files=files, **{**content, "missing": tuple(content["missing"])})
