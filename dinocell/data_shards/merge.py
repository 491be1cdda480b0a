"""The last step of a build: the records of all shards become index, list of rejected inputs, and manifest."""

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

from dinocell import __version__
from dinocell.data_shards.channel_files import common_order
from dinocell.data_shards.manifest import INDEX, MANIFEST, REJECTED, Manifest, Shard, read_manifest
from dinocell.data_shards.plan import BUILD_FOLDER, Plan, open_plan
from dinocell.data_shards.statistics import Histogram
from dinocell.errors import ShardError
from dinocell.runtime.atomic import replacing, write_atomically


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
