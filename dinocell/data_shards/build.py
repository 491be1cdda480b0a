"""Build a shard set: fields in, tiles out, on all cores, with the same bytes however often it was interrupted.

Each shard is written to a temporary name and renamed; then a record of it is stored in ``.build/``. Shards with a
record are skipped when the build is run again. The last step, ``merge``, turns the records into the manifest.
"""

import bisect
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dinocell._version import __version__
from dinocell.data_shards.manifest import (
    INDEX,
    MANIFEST,
    REJECTED,
    Histogram,
    Manifest,
    Shard,
    check_files,
    read_index,
    read_manifest,
)
from dinocell.data_shards.plan import BUILD_FOLDER, Plan, make_plan, open_plan
from dinocell.data_shards.shard import (
    UNREADABLE,
    IntensityRanges,
    ShardSettings,
    build_shard,
    check_num_unreadable,
    check_values,
    read_usable,
)
from dinocell.data_shards.sources.field import Field, Rejected, Source, merged_channel_order
from dinocell.errors import ShardError
from dinocell.images.image import percentile_range
from dinocell.runtime.files import replacing, write_atomically


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """Progress of a build after each shard: shards done and in total, samples written, inputs rejected by kind."""

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
    on_listed: Callable[[int], None] = lambda _: None,
    progress: Callable[[BuildProgress], None] = lambda _: None,
) -> Manifest | None:
    """Build a shard set, or continue a build that was interrupted; return its manifest, None for one of several parts.

    Parameters
    ----------
    output
        A local folder; new, or of the same build.
    samples_per_shard
        Approximate number; a field's tiles stay together. Small sets get at least 8 shards.
    shuffle_seed
        Seed of the assignment of fields to shards.
    workers
        Processes; None uses one per core. They do not change the result.
    part
        ``(3, 64)`` builds the third of 64 parts of the shards, for a job array; call ``merge`` after the last.
    strict
        Stop at the first input that cannot be read, instead of rejecting it.
    on_listed, progress
        Called with the number of fields listed so far, and after each shard.

    Raises
    ------
    ShardError
        If the output holds something else, or a finished set that lacks files, there is nothing to build, the disk is
        full, or ``strict`` and an input cannot be read.
    """
    output = Path(output)
    settings = settings or ShardSettings()
    # Everything that determines the set's bytes, as JSON has it.
    content = {"source": _to_plain(source), **asdict(settings)}
    content |= {"samples_per_shard": samples_per_shard, "shuffle_seed": shuffle_seed}
    described: dict[str, Any] = json.loads(json.dumps(content, default=str))
    workers = (os.cpu_count() or 1) if workers is None else workers
    check_values(
        ("workers", workers, workers >= 1, "at least 1"),
        ("samples_per_shard", samples_per_shard, samples_per_shard >= 1, "at least 1"),
        ("part", part, 1 <= part[0] <= part[1], "I of N with I from 1 to N"),
    )
    if (output / MANIFEST).exists():
        manifest = read_manifest(output)
        _check_same_settings(output, manifest.settings, described)
        check_files(output, manifest)
        read_index(output, manifest)
        _remove_build_files(output)
        return manifest
    plan = open_plan(output)
    with _write_errors(output):
        if plan is None:
            if output.exists() and not (
                output.is_dir() and all(path.name.startswith(BUILD_FOLDER) for path in output.iterdir())
            ):
                raise ShardError(f"{output}: exists and is not a shard set; use another output")
            plan = make_plan(
                source,
                output,
                tile_settings=settings.tiles,
                samples_per_shard=samples_per_shard,
                shuffle_seed=shuffle_seed,
                settings=described,
                on_listed=on_listed,
            )
        _check_same_settings(output, plan.settings, described)
        ranges = plate_intensity_ranges(plan, settings, workers) if settings.bit_depth == 8 else {}
        shards = [shard for shard in range(plan.num_shards) if shard % part[1] == part[0] - 1]
        waiting = [shard for shard in shards if not record_path(plan, shard).exists()]
        (plan.folder / "records").mkdir(exist_ok=True)
        build_one = partial(_build_one, plan, output, settings, ranges, strict)
        rejected: Counter[str] = Counter()
        num_samples = 0
        results = run_tasks(build_one, waiting, workers=workers)
        for done, (num_built, kinds) in enumerate(results, start=len(shards) - len(waiting) + 1):
            num_samples += num_built
            rejected += kinds
            progress(BuildProgress(done=done, total=len(shards), num_samples=num_samples, rejected=rejected))
    return merge(output) if part[1] == 1 else None


def _build_one(
    plan: Plan, output: Path, settings: ShardSettings, ranges: IntensityRanges, strict: bool, shard: int
) -> tuple[int, Counter[str]]:
    """Build a shard, then its record; return the number of samples, and of rejected inputs by kind."""
    path = output / f"shard-{shard:06d}.tar"
    with replacing(path) as temporary, temporary.open("w+b") as file:
        record = {"file": path.name, **build_shard(plan.fields(shard), file, settings, ranges, strict=strict)}
    if not record["index"]:
        path.unlink()
    with replacing(record_path(plan, shard)) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(record, ensure_ascii=False).encode(), mtime=0))
    return len(record["index"]), Counter(item["kind"] for item in record["rejected"])


@contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"{output}: cannot be written ({error.strerror or error}); run the same command again to continue, the "
            "shards built so far are kept"
        ) from error


def _to_plain(value: Any) -> Any:
    """Return a source as plain data, with the kind of every dataclass in it."""
    if not is_dataclass(value):
        return value
    return {"kind": type(value).__name__} | {
        field.name: _to_plain(getattr(value, field.name)) for field in fields(value)
    }


# Settings of sets built with version 0.1: renamed keys, and removed ones with the value that is now always used.
_RENAMED_SETTINGS = {"depth": "bit_depth", "tiles.min_structure": "tiles.min_contrast"}
_REMOVED_SETTINGS = {"tiles.cover": False, "levels_of": "plate"}


def _check_same_settings(output: Path, existing: Any, requested: dict[str, Any]) -> None:
    renamed = {_RENAMED_SETTINGS.get(key, key): value for key, value in _flatten(existing).items()}
    old, new = _REMOVED_SETTINGS | renamed, _REMOVED_SETTINGS | _flatten(requested)
    keys = sorted((old | new).keys() - {"max_unreadable"})  # changes no byte
    if differing := [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]:
        raise ShardError(
            f"{output}: holds a set with other settings ({'; '.join(differing[:4])}); use another output or remove it"
        )


def _flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys: ``tiles.size``."""
    if not isinstance(content, dict):
        return {prefix.removesuffix("."): content}
    return {name: leaf for key, value in content.items() for name, leaf in _flatten(value, f"{prefix}{key}.").items()}


# --- merge: from the records of all shards to index, list of rejected inputs, and manifest --------------------------


def merge(output: str | Path) -> Manifest:
    """Write the manifest of a set whose shards are all built, and return it; an existing one is returned.

    Raise ShardError if there is no build, shards are missing, there is not one sample, or the files cannot be written.
    """
    output = Path(output)
    plan = open_plan(output)
    if plan is not None and not (output / MANIFEST).exists():
        try:
            with _write_errors(output):
                write_atomically(output / MANIFEST, _merge_records(plan, output).to_json())
        except ShardError:
            if not (output / MANIFEST).exists():
                raise
            return read_manifest(output)  # another process has merged meanwhile, and is removing the records
    manifest = read_manifest(output)
    _remove_build_files(output)
    return manifest


def _remove_build_files(output: Path) -> None:
    """Remove the files of a finished build, and of interrupted ones before it."""
    shutil.rmtree(output / BUILD_FOLDER, ignore_errors=True)
    for path in output.glob(".*.part"):
        path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def record_path(plan: Plan, shard: int) -> Path:
    """Return the path of the record of a built shard."""
    return plan.folder / "records" / f"{shard:06d}.json.gz"


def _merge_records(plan: Plan, output: Path) -> Manifest:
    shards: list[Shard] = []
    index: list[np.ndarray] = []
    histograms: dict[str, Histogram] = {}
    orders: set[tuple[str, ...]] = set()
    shapes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    first_reason = ""
    num_fields = 0
    with replacing(output / REJECTED) as temporary, temporary.open("w", encoding="utf-8") as rejected:
        without_field = {"rejected": map(asdict, plan.rejected()), "index": []}
        for record in chain([without_field], _read_records(plan, output)):
            for item in record["rejected"]:
                kinds[item["kind"]] += 1
                first_reason = first_reason or f"{item['input']}: {item['reason']}"
                rejected.write(json.dumps(item, ensure_ascii=False) + "\n")
            if not record["index"]:
                continue
            of_file = {name: record[name] for name in ("file", "num_bytes", "sha256")}
            shards.append(Shard(num_samples=len(record["index"]), **of_file))
            index.append(np.array(record["index"], np.uint64))
            num_fields += record["num_fields"]
            shapes.update(record["shapes"])
            orders |= {tuple(names) for names in record["channel_orders"]}
            for name, content in record["histograms"].items():
                histograms.setdefault(name, Histogram()).merge(Histogram.from_json(content))
        if not shards:
            counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
            raise ShardError(f"{output}: the set has no sample ({counts}); the first: {first_reason}")
    with replacing(output / INDEX) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(index), allow_pickle=False)
    return Manifest(
        num_samples=sum(shard.num_samples for shard in shards),
        num_fields=num_fields,
        shards=tuple(shards),
        channels={name: histograms[name].statistics() for name in merged_channel_order(orders)},
        shapes=dict(sorted(shapes.items())),
        rejected=dict(sorted(kinds.items())),
        settings=plan.settings,
        index_sha256=hashlib.sha256((output / INDEX).read_bytes()).hexdigest(),
        written_by=f"dinocell {__version__}",
    )


def _read_records(plan: Plan, output: Path) -> Iterator[dict[str, Any]]:
    if missing := [shard for shard in range(plan.num_shards) if not record_path(plan, shard).exists()]:
        some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise ShardError(
            f"{output}: {len(missing)} of {plan.num_shards} shards are not built yet ({some}); "
            "run the build again, or the missing parts"
        )
    for shard in range(plan.num_shards):
        path = record_path(plan, shard)
        try:
            record: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError) as error:
            raise ShardError(f"{path}: damaged ({error}); remove it and run the build again") from error
        yield record


# --- intensity ranges of 8-bit sets: the source's values that become 0 and 255, per plate and channel ---------------

# Enough for 0.1 and 99.9 percentiles that no single field determines.
_FIELDS_PER_PLATE = 24
# Sampled pixels of a field along each side.
_GRID = 256


def plate_intensity_ranges(plan: Plan, settings: ShardSettings, workers: int) -> IntensityRanges:
    """Return the ranges of every plate and channel, from at most 24 fields per plate, selected by hashes of their ids.

    They are stored with the plan, so that an interrupted build, or another part of it, does not compute them again.
    Plates without a usable field have no ranges: their fields are rejected when the shards are built.
    """
    folder = plan.folder / "ranges"
    folder.mkdir(exist_ok=True)
    fields_by_plate = _select_fields(plan)
    paths = {plate: folder / f"{_hash(plate)}.json" for plate in fields_by_plate}
    waiting = [(plate, selected, settings) for plate, selected in fields_by_plate.items() if not paths[plate].exists()]
    for plate, of_plate in run_tasks(_ranges_of_plate, waiting, workers=workers):
        write_atomically(paths[plate], json.dumps(of_plate))
    contents = {plate: json.loads(path.read_text()) for plate, path in paths.items()}
    return {plate: {name: (low, high) for name, (low, high) in of.items()} for plate, of in contents.items()}


def _select_fields(plan: Plan) -> dict[str, list[Field]]:
    """Return the fields of each plate with the smallest hashes."""
    selected: defaultdict[str, list[tuple[str, Field]]] = defaultdict(list)
    for shard in range(plan.num_shards):
        for field in plan.fields(shard):
            candidates = selected[field.plate or ""]
            bisect.insort(candidates, (_hash(field.id), field), key=itemgetter(0))
            del candidates[_FIELDS_PER_PLATE:]
    return {plate: [field for _, field in candidates] for plate, candidates in sorted(selected.items())}


def _ranges_of_plate(task: tuple[str, Sequence[Field], ShardSettings]) -> tuple[str, dict[str, tuple[float, float]]]:
    plate, selected, settings = task
    values: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    unreadable: list[str] = []
    for field in selected:
        image = read_usable(field, settings)
        if isinstance(image, Rejected):
            unreadable += [image.reason] if image.kind == UNREADABLE else []
            continue
        for name, plane in zip(image.channel_names, image.pixels, strict=True):
            rows, columns = (max(1, side // _GRID) for side in plane.shape)
            values[name].append(plane[::rows, ::columns].ravel())
    if not values:
        check_num_unreadable(unreadable, len(selected), settings, of=f"plate {plate or '(none)'}")
    return plate, {
        name: percentile_range(np.concatenate(samples), *settings.percentiles)
        for name, samples in sorted(values.items())
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int) -> Iterator[Result]:
    """Call ``function`` on each task and yield the results as they are ready, in no particular order.

    With one worker or task, everything runs in this process. An exception of a task, or leaving the loop early, ends
    all workers.

    Raise ShardError if a worker is killed (out of memory, most often).
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads is not safe
    receiver, sender = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(receiver,))
    try:
        waiting = iter(tasks)
        running: set[Future[Result]] = {executor.submit(function, task) for task in islice(waiting, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                running |= {executor.submit(function, task) for task in islice(waiting, 1)}
    except BrokenProcessPool:
        raise ShardError(
            "a worker process was killed, most often because memory ran out; run again with fewer --workers "
            "to continue (a script that builds shards must do so under 'if __name__ == \"__main__\":')"
        ) from None
    finally:
        sender.close()  # workers that are still busy exit at once
        executor.shutdown(wait=False, cancel_futures=True)


def _start_worker(parent: Connection) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def exit_with_parent() -> None:
        try:
            parent.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    import cv2

    cv2.setNumThreads(1)  # there is one process per core
