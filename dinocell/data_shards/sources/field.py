"""Fields of view as a source lists them: which files hold the channels, and the metadata of the field.

Sources list fields without opening an image; ``read_field`` reads the files of one field.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from dinocell.errors import ImageError
from dinocell.images.image import COLOURS, Image
from dinocell.images.listing import Listed
from dinocell.images.read import read_image

LabelValue = str | int | float | bool
Layout = Literal["planes", "grey", "red", "green", "blue", "colour", "side_by_side"]


@dataclass(frozen=True, kw_only=True)
class FieldFile:
    """One file, or one frame of it, with one or more channels of a field.

    Attributes
    ----------
    path
        A local path or an address (``s3://``, ``https://``).
    channels
        Channel names, in the file's order; empty uses the names in the file, or ``c0``, ``c1``... if it has none.
    layout
        ``planes``: the image's own channels. ``grey``: one channel, from an image that may store it as red = green =
        blue, or in one of them with the others empty. ``red``, ``green``, ``blue``: one channel, from a grey image or
        from this plane of an image tinted for display (HPA's JPEGs, whose compression leaves traces in the other
        planes). ``colour``: one channel, ``grey``, from a grey image, otherwise red, green and blue.
        ``side_by_side``: square channels next to each other along the width of one grey image (or an image that
        already has them as channels).
    frame
        Index of the frame in a stack; None expects a single frame.
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
        Unique in its source and independent of where the input is mounted (a relative path or plate/well/site).
    missing
        Channels that other fields of the source have and this one lacks.
    labels
        Columns of the source's table that describe the field or its cells.
    pixel_size_um
        None uses the pixel size in the file.
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
    """An input that gives no sample, or not all of its tiles: its name, the kind of reason, and the reason."""

    input: str
    kind: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """A list of fields, in the same order every time, whatever the file system's order."""

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, and the inputs that belong to none, without opening an image."""


def read_field(field: Field) -> Image:
    """Read all channels of a field.

    Raise ImageError if a file cannot be read, has another number of channels than the source expects, or differs from
    the field's first file in size or type; the message names the file.
    """
    images = [_read_file(file) for file in field.files]
    first = images[0]
    problems = [
        f"{file.path}: {_size_of(image)}, but {field.files[0].path} is {_size_of(first)}"
        for file, image in zip(field.files, images, strict=True)
        if _size_of(image) != _size_of(first)
    ]
    names = tuple(name for image in images for name in image.channel_names)
    if len(set(names)) != len(names):
        problems.append(f"{field.files[0].path}: field {field.id} has duplicate channel names: {', '.join(names)}")
    if problems:
        raise ImageError(problems[0])
    sizes = {image.pixel_size_um for image in images} - {None}
    from_files = sizes.pop() if len(sizes) == 1 else None
    return Image(
        pixels=np.concatenate([image.pixels for image in images]) if len(images) > 1 else first.pixels,
        channel_names=names,
        pixel_size_um=field.pixel_size_um if field.pixel_size_um is not None else from_files,
    )


def _read_file(file: FieldFile) -> Image:
    image = read_image(file.path, frame=file.frame, frames_as_channels=file.frames_as_channels)
    # Channels side by side are one grey image, unless the file already stores them as channels.
    is_split = file.layout == "side_by_side" and len(image.pixels) == len(file.channels) > 1
    if file.layout != "planes" and not is_split:
        image = image.grey()
    pixels = image.pixels if is_split else _select_pixels(file.layout, image)
    if pixels is None or len(file.channels) not in (0, len(pixels)):
        expected = f"{len(file.channels)} channel(s) ({', '.join(file.channels)})"
        if pixels is None:
            expected, pixels = _EXPECTED.get(file.layout, "a grey or an RGB image"), image.pixels
        num_planes, height, width = pixels.shape
        raise ImageError(f"{file.path}: expected {expected}, got {num_planes} channel(s) of {height} x {width}")
    names = image.channel_names if file.layout in ("planes", "colour") else ()
    if file.layout == "colour" and len(pixels) == 1:
        names = names or ("grey",)
    return Image(
        pixels=pixels,
        channel_names=file.channels or names or tuple(f"c{index}" for index in range(len(pixels))),
        pixel_size_um=image.pixel_size_um,
    )


_EXPECTED = {
    "side_by_side": "square channels side by side in one grey image",
    "grey": "one channel, or equal colour planes",
}


def _select_pixels(layout: Layout, image: Image) -> Shaped[np.ndarray, "c h w"] | None:
    """Return the channels that the layout describes, of an image whose equal colour planes are one; None: not so."""
    pixels = image.pixels
    num_planes, height, width = pixels.shape
    if layout == "side_by_side":
        if num_planes == 1 and width % height == 0:
            return np.ascontiguousarray(pixels[0].reshape(height, width // height, height).transpose(1, 0, 2))
    elif num_planes == 1 or layout in ("planes", "colour"):
        return pixels
    elif layout == "grey":
        used = [index for index, plane in enumerate(pixels) if plane.any()] or [0]
        if len(used) == 1:
            return image.select(used[0]).pixels
    elif image.is_colour and num_planes <= len(COLOURS):
        return image.select(layout).pixels
    return None


def _size_of(image: Image) -> str:
    _, height, width = image.pixels.shape
    return f"{height} x {width} {image.pixels.dtype}"


Missing = Literal["keep", "reject"]
Match = TypeVar("Match")


class ChannelFile(NamedTuple):
    """A file that holds one channel of a field, as described by its name or a row of a table.

    Attributes
    ----------
    field_id
        The same for all channels of a field.
    channel
        As in the file name (``ch1``, ``d0``); ``name`` is its name in other metadata, if any. Empty for a file that
        holds all channels of its field; ``channels`` may name these.
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


def match_files(
    files: Iterable[Listed], match: Callable[[str], Match | None], *, address: str, expected: str, reason: str
) -> tuple[list[tuple[Listed, Match]], list[Rejected]]:
    """Return the files whose names match, with what ``match`` returned, and the others, rejected for ``reason``.

    Raise ImageError if no file matches; ``expected`` describes such files.
    """
    matched: list[tuple[Listed, Match]] = []
    others: list[Rejected] = []
    for file in files:
        if (result := match(file.name)) is None:
            others.append(Rejected(input=file.name, kind="unmatched", reason=reason))
        else:
            matched.append((file, result))
    if not matched:
        example = f" (such as {others[0].input})" if others else ""
        raise ImageError(f"{address}: no {expected}, among {len(others)} file(s){example} in it and its subfolders")
    return matched, others


def group_fields(
    files: Iterable[ChannelFile],
    *,
    channels: Sequence[str] = (),
    missing: Missing = "keep",
    pixel_size_um: float | None = None,
) -> Iterator[Field | Rejected]:
    """Group files into fields, sorted by id.

    Parameters
    ----------
    channels
        Which channels, in which order: ``CHANNEL`` as in the files, or ``CHANNEL=NAME``. Empty uses all.
    missing
        What happens to a field that lacks one of the channels.

    Raises
    ------
    ImageError
        If two files are the same channel of one field, or a requested channel does not exist.
    """
    by_field: dict[str, dict[str, ChannelFile]] = {}
    for file in files:
        in_field = by_field.setdefault(file.field_id, {})
        if (other := in_field.setdefault(file.channel, file)) is not file:
            raise ImageError(
                f"{other.path} and {file.path}: both are channel {file.channel} of field {file.field_id}; "
                "move one of them out of the input"
            )
    names = select_channels(channels, {channel for in_field in by_field.values() for channel in in_field})
    if not channels:
        names = dict.fromkeys(names, "")  # each file by its own name
    common = _common_names(by_field.values(), names)
    for field_id in sorted(by_field):
        in_field = by_field[field_id]
        present = [in_field[channel] for channel in names if channel in in_field]
        absent = tuple(common[channel] for channel in names if channel not in in_field)
        if present and (not absent or missing == "keep"):
            yield _make_field(present, names, absent, pixel_size_um)
            continue
        reason = f"none of the chosen channels; it has {next(iter(in_field.values())).path}"
        if present:
            reason = f"no {', '.join(absent)} for {present[0].path}"
        yield Rejected(input=field_id, kind="missing channel", reason=reason)


def select_channels(requested: Sequence[str], available: Collection[str]) -> dict[str, str]:
    """Return the channels to read, in order, with their names; raise ImageError for unavailable and duplicate ones."""
    in_order = sorted(available, key=natural_order)
    if not requested:
        return {channel: channel for channel in in_order}
    names = {item.partition("=")[0]: item.partition("=")[2] or item for item in requested}
    if unknown := [channel for channel in names if channel not in available]:
        problem = f"no {', '.join(unknown)} among the channels found: {', '.join(in_order)}"
    elif len(set(names.values())) < len(requested):
        problem = "a channel or a name is given twice"
    else:
        return names
    raise ImageError(f"--channels {','.join(requested)}: {problem}")


def check_plain_names(channels: Sequence[str]) -> None:
    """Raise ImageError for ``CHANNEL=NAME``, in sources that name all channels of a file in its order."""
    if renamed := [item for item in channels if "=" in item]:
        raise ImageError(f"--channels {renamed[0]}: expected the names of a file's channels, in its order, without =")


def merged_channel_order(orders: Iterable[tuple[str, ...]]) -> list[str]:
    """Return all names in one order consistent with each of the given ones; on conflict, the longest ones win.

    So the channels of a set have the order of a complete field, even if many fields lack some of them.
    """
    ranked = sorted(set(orders), key=lambda names: (-len(names), names))
    rank = {name: index for index, name in enumerate(dict.fromkeys(chain.from_iterable(ranked)))}
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
    """Return a name of each channel for fields that lack it: the chosen one, or the first that a file has."""
    common = {channel: name for channel, name in names.items() if name}
    for in_field in fields:
        if len(common) == len(names):
            break
        for channel, file in in_field.items():
            common.setdefault(channel, file.name or channel)
    return common


def _make_field(
    files: Sequence[ChannelFile], names: Mapping[str, str], missing: tuple[str, ...], pixel_size_um: float | None
) -> Field:
    first = files[0]
    sizes = {file.pixel_size_um for file in files if file.pixel_size_um is not None}
    if pixel_size_um is None and len(sizes) == 1:
        (pixel_size_um,) = sizes
    return Field(
        id=first.field_id,
        files=tuple(
            FieldFile(
                path=file.path,
                channels=(names[file.channel] or file.name or file.channel,) if file.channel else file.channels,
                layout=file.layout,
                frame=file.frame,
            )
            for file in files
        ),
        missing=missing,
        plate=first.plate,
        well=first.well,
        site=first.site,
        labels=first.labels or {},
        pixel_size_um=pixel_size_um,
    )
