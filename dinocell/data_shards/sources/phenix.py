"""Opera Phenix / Harmony exports: file names, and the channel names and pixel size of the Harmony index."""

import posixpath
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

from dinocell.data_shards.sources.field import (
    ChannelFile,
    Field,
    Missing,
    Rejected,
    group_fields,
    nothing_found,
    unmatched,
)
from dinocell.errors import ImageError
from dinocell.images.image import square_pixel
from dinocell.images.storage import base_name, list_files, open_bytes, parent

# --- harmony -------------------------------------------------------------------------------------------------------
#
# What the index file of an Opera Phenix export (``Index.idx.xml``) says about its channels.
#
# Harmony writes one ``Image`` element a file. In older versions of the format each of them repeats the channel's name
# and
# pixel size; newer ones keep these in one ``Entry`` a channel, before the images.

INDEX_NAMES = ("Index.idx.xml", "Index.xml")

_UM_PER_METRE = 1e6
# The index of a 384-well plate has 100 MB, and its first megabytes name all channels.
_HEAD_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class HarmonyChannel:
    """A channel as the microscope calls it; ``pixel_size_um`` is None where the axes differ or nothing is said."""

    name: str
    pixel_size_um: float | None


def read_harmony_channels(path: str, channels: Collection[int]) -> dict[int, HarmonyChannel]:
    """Return what the index says about these channel numbers; ones that it does not name are not in the result.

    Reading stops when all are known.

    Raises
    ------
    ImageError
        If it cannot be read, or is damaged before all channels are known.
    """
    try:
        head = open_bytes(path, first=_HEAD_BYTES)
        known = _named_channels(head, channels, is_whole=len(head) < _HEAD_BYTES)
        if len(known) < len(channels) and len(head) == _HEAD_BYTES:
            known = _named_channels(open_bytes(path), channels, is_whole=True)
    except (ElementTree.ParseError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"{path}: damaged ({error}); export it again, or remove it and say --channels and --pixel-size"
        ) from error
    return known


def _named_channels(content: bytes, channels: Collection[int], *, is_whole: bool) -> dict[int, HarmonyChannel]:
    known: dict[int, HarmonyChannel] = {}
    parser: ElementTree.XMLPullParser[Any] = ElementTree.XMLPullParser(("end",))
    for start in range(0, len(content), _CHUNK_BYTES):
        parser.feed(content[start : start + _CHUNK_BYTES])
        for _, element in cast(Iterator[tuple[str, ElementTree.Element]], parser.read_events()):
            if element.tag.rpartition("}")[2] in ("Image", "Entry"):
                _note_channel(element, known)
                element.clear()
        if all(channel in known for channel in channels):
            return {channel: known[channel] for channel in channels}
    if is_whole:
        parser.close()
    return {channel: known[channel] for channel in channels if channel in known}


def _note_channel(element: ElementTree.Element, known: dict[int, HarmonyChannel]) -> None:
    said = {part.tag.rpartition("}")[2]: (part.text or "").strip() for part in element}
    number = said.get("ChannelID") or element.get("ChannelID") or ""
    if number.isdecimal() and said.get("ChannelName"):
        size = _pixel_size_um(said.get("ImageResolutionX"), said.get("ImageResolutionY"))
        known.setdefault(int(number), HarmonyChannel(name=said["ChannelName"], pixel_size_um=size))


def _pixel_size_um(across: str | None, down: str | None) -> float | None:
    if not across:
        return None
    size = square_pixel(float(across), float(down or across))
    if size is None:
        return None
    # Twelve digits: 6.5E-07 m is 0.65 um, not 0.6499999999999999.
    return float(f"{size * _UM_PER_METRE:.12g}")


_PHENIX_NAME = re.compile(
    r"r(?P<row>\d+)c(?P<column>\d+)f(?P<field>\d+)p(?P<plane>\d+)-ch(?P<channel>\d+)"
    r"(?:sk(?P<time>\d+))?(?:fk\d+)?(?:fl\d+)?\.tiff?",
    re.IGNORECASE,
)


_PHENIX_EXAMPLE = "r01c01f01p01-ch1sk1fk1fl1.tiff"


@dataclass(frozen=True, kw_only=True)
class PhenixSource:
    """An Opera Phenix export, or folders of them: ``<plate>/Images/r01c01f01p01-ch1sk1fk1fl1.tiff``.

    The plate is the folder (without ``Images``, and without what follows ``__``: ``BR1__2020-Measurement 1`` is plate
    ``BR1``), the well comes from row and column, the site is the field. Planes and time points are fields of their
    own where there are several (``f01p02``, ``f01p01t3``).

    Attributes
    ----------
    channels
        Names of channels 1, 2, 3... (``-`` leaves one out), or ``4=DNA`` for some. Empty takes them from
        ``Index.idx.xml`` beside the images, else ``ch1``, ``ch2``...
    pixel_size_um
        None takes it from ``Index.idx.xml``, where there is one.
    """

    input: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    missing: Missing = "keep"

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, sorted by id, and before them the files with other names."""
        matched: list[_PhenixFile] = []
        indexes: dict[str, str] = {}
        others: list[str] = []
        for file in list_files(self.input):
            folder, _, name = file.name.rpartition("/")
            if match := _PHENIX_NAME.fullmatch(name):
                matched.append(_PhenixFile(file.path, folder, *[int(text or 1) for text in match.groups()]))
            elif name in INDEX_NAMES:
                indexes.setdefault(folder, file.path)  # Index.idx.xml comes first
            else:
                others.append(file.name)
        if not matched:
            raise nothing_found(self.input, f"files named like {_PHENIX_EXAMPLE}", others)
        yield from unmatched(others, f"not named like {_PHENIX_EXAMPLE}")
        known = {} if self.channels and self.pixel_size_um is not None else _known_channels(matched, indexes)
        yield from group_fields(
            _phenix_files(self.input, matched, known),
            channels=_by_number(self.channels, {file.channel for file in matched}),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


class _PhenixFile(NamedTuple):
    """A file and the numbers in its name."""

    path: str
    folder: str
    row: int
    column: int
    field: int
    plane: int
    channel: int
    time: int


def _known_channels(files: Sequence[_PhenixFile], indexes: dict[str, str]) -> dict[tuple[str, int], HarmonyChannel]:
    """Return what the index of each folder says, by folder and channel number."""
    numbers: dict[str, set[int]] = {}
    for file in files:
        numbers.setdefault(file.folder, set()).add(file.channel)
    known: dict[tuple[str, int], HarmonyChannel] = {}
    for folder in sorted(numbers.keys() & indexes.keys()):
        said = read_harmony_channels(indexes[folder], numbers[folder])
        names = [channel.name for channel in said.values()]
        for number, channel in said.items():
            name = channel.name if names.count(channel.name) == 1 else f"{channel.name} (ch{number})"
            known[folder, number] = HarmonyChannel(name=name, pixel_size_um=channel.pixel_size_um)
    return known


def _phenix_files(
    address: str, files: Sequence[_PhenixFile], known: dict[tuple[str, int], HarmonyChannel]
) -> Iterator[ChannelFile]:
    planes: dict[str, set[int]] = {}
    times: dict[str, set[int]] = {}
    for file in files:
        planes.setdefault(file.folder, set()).add(file.plane)
        times.setdefault(file.folder, set()).add(file.time)
    places = {folder: re.sub(r"(^|/)Images$", "", folder) for folder in planes}
    plates = {folder: _plate_of(address, place) for folder, place in places.items()}
    for file in files:
        site = f"f{file.field:02d}"
        if len(planes[file.folder]) > 1 or len(times[file.folder]) > 1:
            site += f"p{file.plane:02d}"
        if len(times[file.folder]) > 1:
            site += f"t{file.time}"
        well, place = well_name(file.row, file.column), places[file.folder]
        said = known.get((file.folder, file.channel))
        yield ChannelFile(
            field_id=f"{place}/{well}/{site}" if place else f"{well}/{site}",
            channel=f"ch{file.channel}",
            name=said.name if said else "",
            path=file.path,
            plate=plates[file.folder],
            well=well,
            site=site,
            pixel_size_um=said.pixel_size_um if said else None,
        )


def _plate_of(address: str, place: str) -> str:
    if not place:
        place = base_name(address)
        if place == "Images":
            place = base_name(parent(address))
    return posixpath.basename(place).split("__")[0]


@cache
def well_name(row: int, column: int) -> str:
    """Return ``A01`` for row 1, column 1; rows beyond Z (1536-well plates) are AA, AB..."""
    letters = ""
    while row > 0:
        row, letter = divmod(row - 1, 26)
        letters = chr(ord("A") + letter) + letters
    return f"{letters}{column:02d}"


def _by_number(channels: tuple[str, ...], found: set[int]) -> tuple[str, ...]:
    """Return ``ch1=DNA``... for names by number."""
    if not channels:
        return ()
    named = [item for item in channels if "=" in item]
    if named and len(named) < len(channels):
        raise ImageError(f"--channels {','.join(channels)}: name all by number (4=DNA) or none")
    if named:
        return tuple(f"ch{item.removeprefix('ch')}" for item in channels)
    unnamed = sorted(number for number in found if number > len(channels))
    if unnamed:
        raise ImageError(
            f"--channels: {len(channels)} names, but there are channels {', '.join(f'ch{n}' for n in sorted(found))}; "
            "name them all in order, with - for what is to be left out"
        )
    return tuple(f"ch{number}={name}" for number, name in enumerate(channels, start=1) if name != "-")
