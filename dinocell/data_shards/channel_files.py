"""From files with one channel each to fields: grouping, choice and names of channels, missing channels."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from typing import Literal, NamedTuple

from dinocell.data_shards.fields import Field, FieldFile, LabelValue, Layout, Rejected
from dinocell.errors import ImageError

Missing = Literal["keep", "reject"]


class ChannelFile(NamedTuple):
    """A file that holds one channel of a field, as its name or a row of a table says.

    Attributes
    ----------
    field_id
        The same for all channels of a field.
    channel
        As the name says (``ch1``, ``d0``); ``name`` is what it is called, where something else says so. Empty for a
        file that holds all channels of its field, which ``channels`` may name.
    """

    field_id: str
    channel: str
    path: str
    layout: Layout = "grey"
    frame: int | None = None
    channels: tuple[str, ...] = ()
    name: str = ""
    plate: str | None = None
    well: str | None = None
    site: str | None = None
    labels: Mapping[str, LabelValue] | None = None
    pixel_size_um: float | None = None


def fields_of(
    files: Iterable[ChannelFile],
    *,
    channels: Sequence[str] = (),
    missing: Missing = "keep",
    pixel_size_um: float | None = None,
) -> Iterator[Field | Rejected]:
    """Group files to fields, sorted by id.

    Parameters
    ----------
    channels
        Which channels, in which order: ``CHANNEL`` as the files call it, or ``CHANNEL=NAME``. Empty takes all.
    missing
        What becomes of a field that lacks one of the channels.
    pixel_size_um
        Of all fields; None takes what the files say.

    Raises
    ------
    ImageError
        If two files are the same channel of one field, or a channel that was asked for is nowhere.
    """
    by_field: dict[str, dict[str, ChannelFile]] = {}
    for file in files:
        in_field = by_field.setdefault(file.field_id, {})
        if (other := in_field.setdefault(file.channel, file)) is not file:
            raise ImageError(
                f"{other.path} and {file.path}: both are channel {file.channel} of field {file.field_id}; "
                "move one of them out of the input"
            )
    found = {channel for in_field in by_field.values() for channel in in_field}
    names = chosen_channels(channels, found)
    if not channels:
        names = dict.fromkeys(names, "")  # each file by its own name
    common = _common_names(by_field.values(), names)
    for field_id in sorted(by_field):
        in_field = by_field[field_id]
        here = [in_field[channel] for channel in names if channel in in_field]
        lacking = tuple(common[channel] for channel in names if channel not in in_field)
        if not here:
            shown = next(iter(in_field.values())).path
            yield Rejected(
                input=field_id, kind="missing channel", reason=f"none of the chosen channels; it has {shown}"
            )
        elif lacking and missing == "reject":
            reason = f"no {', '.join(lacking)} beside {here[0].path}"
            yield Rejected(input=field_id, kind="missing channel", reason=reason)
        else:
            yield _field(here, names, lacking, pixel_size_um)


def chosen_channels(wanted: Sequence[str], found: Collection[str]) -> dict[str, str]:
    """Return the channels to take, in order, with their names.

    Raises
    ------
    ImageError
        If one is not among those found, or two get one name.
    """
    if not wanted:
        return {channel: channel for channel in sorted(found, key=natural_order)}
    names = {item.partition("=")[0]: item.partition("=")[2] or item for item in wanted}
    unknown = [channel for channel in names if channel not in found]
    if unknown:
        raise ImageError(
            f"--channels: no {', '.join(unknown)} among the channels found: "
            f"{', '.join(sorted(found, key=natural_order))}"
        )
    if len(set(names.values())) < len(wanted):
        raise ImageError(f"--channels {','.join(wanted)}: a channel or a name is given twice")
    return names


def check_plain_names(channels: Sequence[str]) -> None:
    """Raise ImageError if a name is a renaming: where a file holds all channels, they are named in its order."""
    for item in channels:
        if "=" in item:
            raise ImageError(
                f"--channels {item}: here all channels of a file are named, in its order; expected a name without ="
            )


def common_order(orders: Iterable[tuple[str, ...]]) -> list[str]:
    """Return all names in one order that keeps each of the given ones; where they contradict, the longest ones count.

    So channels of which many fields lack some get the order of a whole field, wherever that comes.
    """
    ranked = sorted(set(orders), key=lambda names: (-len(names), names))
    rank = {name: number for number, name in enumerate(dict.fromkeys(chain.from_iterable(ranked)))}
    sorter = TopologicalSorter(dict.fromkeys(rank, ()))
    for names in ranked:
        for before, after in pairwise(names):
            sorter.add(after, before)
    try:
        sorter.prepare()
    except CycleError:
        return list(rank)
    order: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=rank.__getitem__)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


def natural_order(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts ``ch10`` after ``ch9``."""
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", text))


def _common_names(fields: Iterable[Mapping[str, ChannelFile]], names: Mapping[str, str]) -> dict[str, str]:
    """Return a name for each channel, to be told where it is missing: the chosen one, or the first that a file has."""
    common = {channel: name for channel, name in names.items() if name}
    for in_field in fields:
        if len(common) == len(names):
            break
        for channel, file in in_field.items():
            common.setdefault(channel, file.name or channel)
    return common


def _field(
    here: Sequence[ChannelFile], names: Mapping[str, str], lacking: tuple[str, ...], pixel_size_um: float | None
) -> Field:
    first = here[0]
    sizes = {file.pixel_size_um for file in here if file.pixel_size_um is not None}
    if pixel_size_um is None and len(sizes) == 1:
        (pixel_size_um,) = sizes
    return Field(
        id=first.field_id,
        files=tuple(_named(file, names[file.channel] or file.name or file.channel) for file in here),
        missing=lacking,
        plate=first.plate,
        well=first.well,
        site=first.site,
        labels=first.labels or {},
        pixel_size_um=pixel_size_um,
    )


def _named(file: ChannelFile, name: str) -> FieldFile:
    channels = (name,) if file.channel else file.channels
    return FieldFile(path=file.path, channels=channels, layout=file.layout, frame=file.frame)
