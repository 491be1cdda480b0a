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

from dinocell.data_shards.sources.field import Source
from dinocell.data_shards.manifest import MANIFEST, Manifest, check_files, read_index, read_manifest
from dinocell.data_shards.build.plan import Plan, make_plan, open_plan
from dinocell.data_shards.build.shard import Levels, ShardSettings, build_shard
from dinocell.data_shards.build.workers import run_tasks
from dinocell.errors import ShardError
from dinocell.runtime.files import replacing

import gzip
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dinocell._version import __version__
from dinocell.data_shards.sources.field import common_order
from dinocell.data_shards.manifest import INDEX, MANIFEST, REJECTED, Manifest, Shard, read_manifest
from dinocell.data_shards.build.plan import BUILD_FOLDER, Plan, open_plan
from dinocell.data_shards.manifest import Histogram
from dinocell.errors import ShardError
from dinocell.runtime.files import replacing, write_atomically

import hashlib
import json
from collections import defaultdict

import numpy as np

from dinocell.data_shards.sources.field import Field, read_field
from dinocell.images.image import percentile_range
from dinocell.data_shards.build.plan import Plan
from dinocell.data_shards.build.shard import Levels, ShardSettings, UnusableFieldError, check_in_reach, usable
from dinocell.data_shards.build.workers import run_tasks
from dinocell.errors import ImageError
from dinocell.runtime.files import write_atomically


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
        levels = plate_levels(plan, settings, workers) if settings.bit_depth == 8 and settings.levels_of == "plate" else {}
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
        # The manifest's key is older than the option's name.
        **{key.replace("bit_depth", "depth"): value for key, value in asdict(settings).items()},
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


# --- merge ---------------------------------------------------------------------------------------------------------
#
# The last step of a build: the records of all shards become index, list of rejected inputs, and manifest.

def merge(output: str | Path) -> Manifest:
    """Write the manifest of a set whose shards are all built; where it is there already, return it.

    Raises
    ------
    ShardError
        If there is no build, shards are missing, not one sample came out, or the files cannot be written.
    """
    output = Path(output)
    plan = open_plan(output)
    if plan is None or (output / MANIFEST).exists():
        manifest = read_manifest(output)
        tidy(output)
        return manifest
    try:
        _check_complete(plan, output)
        manifest = _merged(plan, output)
        write_atomically(output / MANIFEST, manifest.to_json())
    except (OSError, ShardError) as error:
        if (output / MANIFEST).exists():  # another process has merged meanwhile, and removed the records
            return read_manifest(output)
        if isinstance(error, ShardError):
            raise
        raise ShardError(
            f"{output}: cannot be written ({error.strerror or error}); what is built so far stays, "
            "run the same command again to continue"
        ) from error
    tidy(output)
    return manifest


def tidy(output: Path) -> None:
    """Remove what a finished build, and interrupted ones before it, have left beside the set."""
    shutil.rmtree(output / BUILD_FOLDER, ignore_errors=True)
    for path in output.glob(".*.part"):
        path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def record_path(plan: Plan, number: int) -> Path:
    """Return where the record of a built shard lies."""
    return plan.folder / "records" / f"{number:06d}.json.gz"


def _check_complete(plan: Plan, output: Path) -> None:
    missing = [number for number in range(plan.num_shards) if not record_path(plan, number).exists()]
    if missing:
        named = ", ".join(str(number) for number in missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ShardError(
            f"{output}: {len(missing)} of {plan.num_shards} shards are not built yet ({named}); "
            "run the build again, or the parts that are missing"
        )


def _merged(plan: Plan, output: Path) -> Manifest:
    shards: list[Shard] = []
    index: list[np.ndarray] = []
    histograms: dict[str, Histogram] = {}
    orders: set[tuple[str, ...]] = set()
    shapes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    first_reason = ""
    num_fields = 0
    with replacing(output / REJECTED) as temporary, temporary.open("w", encoding="utf-8") as rejected:
        for item in plan.rejected():
            kinds[item.kind] += 1
            first_reason = first_reason or f"{item.input}: {item.reason}"
            rejected.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
        for record in _records(plan):
            for refused in record["rejected"]:
                kinds[refused["kind"]] += 1
                first_reason = first_reason or f"{refused['input']}: {refused['reason']}"
                rejected.write(json.dumps(refused, ensure_ascii=False) + "\n")
            if not record["index"]:
                continue
            shards.append(
                Shard(
                    file=record["file"],
                    num_samples=len(record["index"]),
                    num_bytes=record["num_bytes"],
                    sha256=record["sha256"],
                )
            )
            index.append(np.array(record["index"], np.uint64))
            num_fields += record["num_fields"]
            shapes.update(record["shapes"])
            orders |= {tuple(names) for names in record["channel_orders"]}
            for name, content in record["histograms"].items():
                histograms.setdefault(name, Histogram()).merge(Histogram.from_json(content))
        if not shards:
            counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
            raise ShardError(f"{output}: not one sample came out ({counted}); the first: {first_reason}")
    with replacing(output / INDEX) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(index), allow_pickle=False)
    return Manifest(
        num_samples=sum(shard.num_samples for shard in shards),
        num_fields=num_fields,
        shards=tuple(shards),
        channels={name: histograms[name].statistics() for name in common_order(orders)},
        shapes=dict(sorted(shapes.items())),
        rejected=dict(sorted(kinds.items())),
        settings=plan.settings,
        index_sha256=hashlib.sha256((output / INDEX).read_bytes()).hexdigest(),
        written_by=f"dinocell {__version__}",
    )


def _records(plan: Plan) -> Iterator[dict[str, Any]]:
    for number in range(plan.num_shards):
        path = record_path(plan, number)
        try:
            record: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError) as error:
            raise ShardError(f"{path}: damaged ({error}); remove it and run the build again") from error
        yield record


# --- levels --------------------------------------------------------------------------------------------------------
#
# For sets of 8 bit: which levels of the source become 0 and 255, a channel, over a plate or a field.

# Fields of a plate that are looked at: enough for percentiles of 0.1 and 99.9 that no single field decides.
_FIELDS_A_PLATE = 24
# Pixels of a field along each side that count.
_GRID = 256


def plate_levels(plan: Plan, settings: ShardSettings, workers: int) -> Levels:
    """Return the levels of every plate and channel, from at most 24 fields a plate, chosen by their ids' hashes.

    They are kept beside the plan, so that an interrupted build, or another part of it, does not compute them again.

    A plate none of whose fields can be used has no levels: its fields are rejected when their shards are built.

    Raises
    ------
    ShardError
        If none of a plate's fields can be read, and they are more than a few.
    """
    folder = plan.folder / "levels"
    folder.mkdir(exist_ok=True)
    levels: dict[str, dict[str, tuple[float, float]]] = {}
    waiting = []
    for plate, fields in _chosen_fields(plan).items():
        path = folder / f"{_hash(plate)}.json"
        if path.exists():
            levels[plate] = {name: (low, high) for name, (low, high) in json.loads(path.read_text()).items()}
        else:
            waiting.append((plate, fields, settings))
    for plate, found in run_tasks(_levels_of_plate, waiting, workers=workers):
        write_atomically(folder / f"{_hash(plate)}.json", json.dumps(found))
        levels[plate] = found
    return levels


def _chosen_fields(plan: Plan) -> dict[str, list[Field]]:
    chosen: defaultdict[str, list[tuple[str, Field]]] = defaultdict(list)
    for number in range(plan.num_shards):
        for field in plan.fields(number):
            held = chosen[field.plate or ""]
            held.append((_hash(field.id), field))
            if len(held) >= 4 * _FIELDS_A_PLATE:
                held.sort(key=lambda pair: pair[0])
                del held[_FIELDS_A_PLATE:]
    return {
        plate: [field for _, field in sorted(held, key=lambda pair: pair[0])[:_FIELDS_A_PLATE]]
        for plate, held in sorted(chosen.items())
    }


def _levels_of_plate(
    task: tuple[str, list[Field], ShardSettings],
) -> tuple[str, dict[str, tuple[float, float]]]:
    plate, fields, settings = task
    values: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    unreadable: list[str] = []
    for field in fields:
        try:
            picture = usable(read_field(field), settings)
        except UnusableFieldError:
            continue
        except ImageError as error:
            unreadable.append(str(error))
            continue
        for name, plane in zip(picture.channel_names, picture.pixels, strict=True):
            rows, columns = (max(1, side // _GRID) for side in plane.shape)
            values[name].append(plane[::rows, ::columns].ravel())
    if not values:
        check_in_reach(unreadable, len(fields), settings, of=f"plate {plate or '(none)'}")
    return plate, {
        name: percentile_range(np.concatenate(found), *settings.percentiles) for name, found in sorted(values.items())
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
