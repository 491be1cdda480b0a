"""Build a shard set: fields in, tiles out, on all cores, and the same bytes however often it was interrupted.

Each shard is written to a temporary name and renamed; then a record of it is kept in ``.build/``. What has a record is
never built again, what has none is built anew. The last step, ``merge``, turns the records into the manifest.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dinocell.data_shards.fields import Source
from dinocell.data_shards.levels import plate_levels
from dinocell.data_shards.manifest import MANIFEST, Manifest, check_files, read_index, read_manifest
from dinocell.data_shards.merge import merge, record_path, tidy
from dinocell.data_shards.plan import Plan, make_plan, open_plan
from dinocell.data_shards.shard import Levels, ShardSettings, build_shard
from dinocell.data_shards.workers import run_tasks
from dinocell.errors import ShardError
from dinocell.runtime.atomic import replacing


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """What a running build reports after each shard: shards done, of how many, samples written, inputs rejected."""

    done: int
    total: int
    num_samples: int
    rejected: Counter[str]


def build(
    source: Source,
    output: str | Path,
    *,
    settings: ShardSettings | None = None,
    samples_per_shard: int = 256,
    shuffle_seed: int = 0,
    workers: int | None = None,
    part: tuple[int, int] = (1, 1),
    strict: bool = False,
    listed: Callable[[int], None] = lambda _: None,
    progress: Callable[[BuildProgress], None] = lambda _: None,
) -> Manifest | None:
    """Build a shard set, or continue a build that was interrupted.

    Parameters
    ----------
    source
        Where the fields come from (``sources.py``).
    output
        A folder on this disk; new, or of the same build.
    samples_per_shard
        About how many; a field's tiles stay together. Small sets get at least 8 shards.
    shuffle_seed
        Of the dealing of fields to shards.
    workers
        Processes; None takes one a core. They do not change the result.
    part
        ``(3, 64)`` builds the third of 64 parts of the shards, for an array of jobs; then ``merge`` is to be called.
    strict
        Stop at the first input that cannot be read, instead of listing it among the rejected.
    listed
        Called with the number of fields found so far.
    progress
        Called after each shard.

    Returns
    -------
    The manifest; None if this was one of several parts.

    Raises
    ------
    ShardError
        If the output holds something else, or a finished set that lacks files, there is nothing to build, the disk is
        full, or ``strict`` met a bad input.
    """
    output = Path(output)
    settings = settings or ShardSettings()
    described = _described(source, settings, samples_per_shard, shuffle_seed)
    for name, number in (("workers", 1 if workers is None else workers), ("samples_per_shard", samples_per_shard)):
        if number < 1:
            raise ShardError(f"{name}: expected at least 1, got {number}")
    if not 1 <= part[0] <= part[1]:
        raise ShardError(f"part {part[0]} of {part[1]}: expected 1 to the number of parts")
    if (output / MANIFEST).exists():
        manifest = read_manifest(output)
        _check_same(output, manifest.settings, described)
        try:
            check_files(output, manifest)
            read_index(output, manifest)
        except ShardError as error:
            raise ShardError(f"{error} (to build it again, remove {output} first)") from error
        tidy(output)
        return manifest
    plan = open_plan(output)
    try:
        if plan is None:
            _check_free(output)
            plan = make_plan(
                source,
                output,
                tile_settings=settings.tiles,
                samples_per_shard=samples_per_shard,
                shuffle_seed=shuffle_seed,
                settings=described,
                listed=listed,
            )
        _check_same(output, plan.settings, described)
        workers = workers or os.cpu_count() or 1
        levels = plate_levels(plan, settings, workers) if settings.depth == 8 and settings.levels_of == "plate" else {}
        numbers = [number for number in range(plan.num_shards) if number % part[1] == part[0] - 1]
        _build_shards(plan, output, numbers, settings, levels, workers=workers, strict=strict, progress=progress)
        return merge(output) if part[1] == 1 else None
    except OSError as error:
        raise ShardError(
            f"{output}: cannot be written ({error.strerror or error}); what is built so far stays, "
            "run the same command again to continue"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a worker needs to build one shard."""

    plan: Plan
    number: int
    output: Path
    settings: ShardSettings
    levels: Levels
    strict: bool


def _build_shards(
    plan: Plan,
    output: Path,
    numbers: Sequence[int],
    settings: ShardSettings,
    levels: Levels,
    *,
    workers: int,
    strict: bool,
    progress: Callable[[BuildProgress], None],
) -> None:
    rejected: Counter[str] = Counter()
    num_samples = done = 0
    waiting = []
    (plan.folder / "records").mkdir(exist_ok=True)
    for number in numbers:
        if record_path(plan, number).exists():
            done += 1
        else:
            waiting.append(
                _Task(plan=plan, number=number, output=output, settings=settings, levels=levels, strict=strict)
            )
    for samples, kinds in run_tasks(_build_one, waiting, workers=workers):
        done += 1
        num_samples += samples
        rejected += kinds
        progress(BuildProgress(done=done, total=len(numbers), num_samples=num_samples, rejected=rejected))


def _build_one(task: _Task) -> tuple[int, Counter[str]]:
    """Build a shard, then its record; return the number of samples and of rejected inputs by kind."""
    name = f"shard-{task.number:06d}.tar"
    with replacing(task.output / name) as temporary, temporary.open("wb") as file:
        built = build_shard(task.plan.fields(task.number), file, task.settings, task.levels, strict=task.strict)
    if not built.index:
        (task.output / name).unlink()
    record = {"file": name, **built.to_json()}
    with replacing(record_path(task.plan, task.number)) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(record, ensure_ascii=False).encode(), mtime=0))
    return len(built.index), Counter(item.kind for item in built.rejected)


def _described(source: Source, settings: ShardSettings, samples_per_shard: int, seed: int) -> dict[str, Any]:
    """Return everything that decides about the set's bytes, as it goes into plan and manifest."""
    known = {
        "source": _plain(source),
        **asdict(settings),
        "samples_per_shard": samples_per_shard,
        "shuffle_seed": seed,
    }
    content: dict[str, Any] = json.loads(json.dumps(known, default=str))
    return content


def _plain(value: Any) -> Any:
    """Return a source as plain data, with the kind of every dataclass in it."""
    if not is_dataclass(value):
        return value
    return {"kind": type(value).__name__, **{each.name: _plain(getattr(value, each.name)) for each in fields(value)}}


def _check_same(output: Path, existing: Any, wanted: dict[str, Any]) -> None:
    old, new = _flat(existing), _flat(wanted)
    # Of max_unreadable no byte depends, and whoever was told to raise it goes on with the same build.
    keys = sorted((old | new).keys() - {"max_unreadable"})
    differing = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
    if differing:
        raise ShardError(
            f"{output}: holds a set of other settings ({'; '.join(differing[:4])}); choose another output or remove it"
        )


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _check_free(output: Path) -> None:
    if output.exists() and (
        not output.is_dir() or any(not path.name.startswith(".build") for path in output.iterdir())
    ):
        raise ShardError(f"{output}: exists and is not a shard set; choose another output")
