"""A field of view as a source finds it on disk: which files hold its channels, and what is known about it.

Sources (``sources.py``) list fields without opening a picture; ``read_field`` opens the files of one field.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dinocell.errors import ImageError
from dinocell.images.image import COLOURS, Image
from dinocell.images.read import read_image

LabelValue = str | int | float | bool
Layout = Literal["planes", "grey", "red", "green", "blue", "colour", "side_by_side"]


@dataclass(frozen=True, kw_only=True)
class FieldFile:
    """One file, or one frame of it, with one or more channels of a field.

    Attributes
    ----------
    path
        A path on this disk or an address (``s3://``, ``https://``).
    channels
        The names of the channels in this file, in the file's order; empty takes the names that the file says, and
        ``c0``, ``c1``... where it says none.
    layout
        ``planes``: the picture's own channels. ``grey``: one channel, from a picture that may store it as red = green =
        blue, or in one of them with nothing in the others. ``red``, ``green``, ``blue``: one channel, from a grey
        picture, or from this plane of one that is tinted for display (HPA's JPEGs, whose compression leaves traces in
        the other planes). ``colour``: one channel, ``grey``, from a grey picture, else red, green and blue.
        ``side_by_side``: channels next to one another along the width of one grey picture, each as wide as it is high
        (or a picture that already holds them apart).
    frame
        Which frame of a stack, from 0; None expects one.
    frames_as_channels
        The frames of the stack are its channels.
    """

    path: str
    channels: tuple[str, ...] = ()
    layout: Layout = "planes"
    frame: int | None = None
    frames_as_channels: bool = False


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of view.

    Attributes
    ----------
    id
        Unique in its source, and the same wherever the input folder is mounted (a relative path or plate/well/site).
    missing
        Channels that other fields of the source have and this one has not.
    labels
        Columns of the source's table that say something about the field or its cells.
    pixel_size_um
        Where the source knows it; None leaves it to the file.
    """

    id: str
    files: tuple[FieldFile, ...]
    missing: tuple[str, ...] = ()
    plate: str | None = None
    well: str | None = None
    site: str | None = None
    labels: Mapping[str, LabelValue] = field(default_factory=dict)
    pixel_size_um: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """An input that gives no sample, or not all of its tiles: what, which kind of reason, and the reason in words."""

    input: str
    kind: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """Where fields come from. Fields come in the same order every time, whatever the file system's order."""

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, and the inputs that belong to none, without opening a picture."""


def read_field(field: Field) -> Image:
    """Read all channels of a field.

    Raises
    ------
    ImageError
        If a file cannot be read, has another number of channels than the source says, or differs from the field's
        first file in size or type; the message names the file.
    """
    pictures = [_read(file) for file in field.files]
    first = pictures[0]
    for file, picture in zip(field.files, pictures, strict=True):
        if picture.pixels.shape[1:] != first.pixels.shape[1:] or picture.pixels.dtype != first.pixels.dtype:
            raise ImageError(
                f"{file.path}: {_kind(picture)}, but the field's first file, {field.files[0].path}, is {_kind(first)}"
            )
    names = tuple(name for picture in pictures for name in picture.channel_names)
    if len(set(names)) != len(names):
        raise ImageError(f"{field.files[0].path}: two channels of one name in field {field.id}: {', '.join(names)}")
    sizes = {picture.pixel_size_um for picture in pictures} - {None}
    from_files = sizes.pop() if len(sizes) == 1 else None
    return Image(
        pixels=np.concatenate([picture.pixels for picture in pictures]) if len(pictures) > 1 else first.pixels,
        channel_names=names,
        pixel_size_um=field.pixel_size_um if field.pixel_size_um is not None else from_files,
    )


def _read(file: FieldFile) -> Image:
    picture = read_image(file.path, frame=file.frame, frames_as_channels=file.frames_as_channels)
    pixels, names = picture.pixels, picture.channel_names
    if file.layout == "grey":
        pixels, names = _one_channel(file, picture), ()
    elif file.layout in COLOURS:
        pixels, names = _tinted(file, picture), ()
    elif file.layout == "colour":
        picture = picture.grey()
        pixels = picture.pixels
        names = picture.channel_names or (("grey",) if len(pixels) == 1 else ())
    elif file.layout == "side_by_side":
        pixels, names = _unstack(file, picture), ()
    if file.channels:
        if len(file.channels) != len(pixels):
            raise ImageError(
                f"{file.path}: expected {len(file.channels)} channel(s) ({', '.join(file.channels)}), got {len(pixels)}"
            )
        names = file.channels
    return Image(
        pixels=pixels,
        channel_names=names or tuple(f"c{number}" for number in range(len(pixels))),
        pixel_size_um=picture.pixel_size_um,
    )


def _one_channel(file: FieldFile, picture: Image) -> np.ndarray:
    pixels = picture.grey().pixels
    if len(pixels) > 1:
        lit = [plane for plane in pixels if plane.any()]
        if len(lit) > 1:
            raise ImageError(f"{file.path}: expected one channel, got {len(pixels)} that differ")
        pixels = lit[0][None] if lit else pixels[:1]
    return pixels


def _tinted(file: FieldFile, picture: Image) -> np.ndarray:
    picture = picture.grey()
    if len(picture.pixels) == 1:
        return picture.pixels
    if not picture.is_colour or len(picture.pixels) > len(COLOURS):
        raise ImageError(f"{file.path}: expected a grey or an RGB picture, got {len(picture.pixels)} channels")
    return picture.select(file.layout).pixels


def _unstack(file: FieldFile, picture: Image) -> np.ndarray:
    if len(picture.pixels) == len(file.channels) > 1:
        return picture.pixels
    pixels = picture.grey().pixels
    _, height, width = pixels.shape
    if len(pixels) != 1 or width % height:
        raise ImageError(
            f"{file.path}: expected square channels side by side in one grey picture, "
            f"got {len(pixels)} channel(s) of {height} x {width}"
        )
    return np.ascontiguousarray(pixels[0].reshape(height, width // height, height).transpose(1, 0, 2))


def _kind(picture: Image) -> str:
    _, height, width = picture.pixels.shape
    return f"{height} x {width} {picture.pixels.dtype}"


# --- channel_files -------------------------------------------------------------------------------------------------
#
# From files with one channel each to fields: grouping, choice and names of channels, missing channels.

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


def nothing_found(address: str, wanted: str, others: Sequence[str]) -> ImageError:
    """Return the error for an input without a single field."""
    such = f" (such as {others[0]})" if others else ""
    return ImageError(f"{address}: no {wanted}, among {len(others)} file(s){such} in it and the folders below")


def unmatched(names: Sequence[str], reason: str) -> Iterator[Rejected]:
    """Yield inputs that belong to no field."""
    return (Rejected(input=name, kind="unmatched", reason=reason) for name in names)


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
