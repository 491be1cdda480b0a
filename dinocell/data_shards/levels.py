"""For sets of 8 bit: which levels of the source become 0 and 255, a channel, over a plate or a field."""

import hashlib
import json
from collections import defaultdict

import numpy as np

from dinocell.data_shards.fields import Field, read_field
from dinocell.data_shards.picture import percentile_range
from dinocell.data_shards.plan import Plan
from dinocell.data_shards.shard import Levels, ShardSettings, UnusableFieldError, check_in_reach, usable
from dinocell.data_shards.workers import run_tasks
from dinocell.errors import ImageError
from dinocell.runtime.atomic import write_atomically

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
