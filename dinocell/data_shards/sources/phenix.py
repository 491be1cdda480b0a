"""Opera Phenix / Harmony exports: file names, and the channel names and pixel size of the Harmony index."""

import io
import posixpath
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from dinocell.data_shards.sources.field import ChannelFile, Field, Missing, Rejected, group_fields, match_files
from dinocell.errors import ImageError
from dinocell.images.image import square_pixel
from dinocell.images.listing import base_name, list_files, parent
from dinocell.images.storage import open_bytes

_NAME = re.compile(
    r"r(?P<row>\d+)c(?P<column>\d+)f(?P<field>\d+)p(?P<plane>\d+)-ch(?P<channel>\d+)"
    r"(?:sk(?P<time>\d+))?(?:fk\d+)?(?:fl\d+)?\.tiff?",
    re.IGNORECASE,
)
_EXAMPLE = "r01c01f01p01-ch1sk1fk1fl1.tiff"


@dataclass(frozen=True, kw_only=True)
class PhenixSource:
    """An Opera Phenix export, or folders of them: ``<plate>/Images/r01c01f01p01-ch1sk1fk1fl1.tiff``.

    The plate is the folder (without ``Images``, and without the part after ``__``: ``BR1__2020-Measurement 1`` is plate
    ``BR1``), the well comes from row and column, the site is the field. If there are several planes or time points,
    each is a field (``f01p02``, ``f01p01t3``).

    Attributes
    ----------
    channels
        Names of channels 1, 2, 3... (``-`` skips one), or ``4=DNA`` for some. Empty reads them from ``Index.idx.xml``
        in the images' folder, or uses ``ch1``, ``ch2``...
    pixel_size_um
        None reads it from ``Index.idx.xml``, if there is one.
    """

    input: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    missing: Missing = "keep"

    def fields(self) -> Iterator[Field | Rejected]:
        """List the files with other names, then the fields, sorted by id."""
        listed = list_files(self.input)
        matched, others = match_files(
            listed,
            lambda name: _NAME.fullmatch(name.rpartition("/")[2]),
            address=self.input,
            expected=f"files named like {_EXAMPLE}",
            reason=f"not named like {_EXAMPLE}",
        )
        is_index = {file.input for file in others if posixpath.basename(file.input) in _INDEX_NAMES}
        yield from (file for file in others if file.input not in is_index)
        files = [
            _PhenixFile(file.path, posixpath.dirname(file.name), *(int(text or 1) for text in match.groups()))
            for file, match in matched
        ]
        metadata: dict[tuple[str, int], HarmonyChannel] = {}
        if not self.channels or self.pixel_size_um is None:
            # Index.idx.xml is listed first, and preferred.
            indexes = {posixpath.dirname(file.name): file.path for file in reversed(listed) if file.name in is_index}
            metadata = _read_indexes(files, indexes)
        yield from group_fields(
            _channel_files(self.input, files, metadata),
            channels=_number_channels(self.channels, {file.channel for file in files}),
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


def _channel_files(
    address: str, files: Sequence[_PhenixFile], metadata: dict[tuple[str, int], "HarmonyChannel"]
) -> Iterator[ChannelFile]:
    planes: defaultdict[str, set[int]] = defaultdict(set)
    times: defaultdict[str, set[int]] = defaultdict(set)
    for file in files:
        planes[file.folder].add(file.plane)
        times[file.folder].add(file.time)
    plate_folders = {folder: re.sub(r"(^|/)Images$", "", folder) for folder in planes}
    plates = {folder: _plate_name(address, plate_folder) for folder, plate_folder in plate_folders.items()}
    for file in files:
        site = f"f{file.field:02d}"
        if len(planes[file.folder]) > 1 or len(times[file.folder]) > 1:
            site += f"p{file.plane:02d}"
        if len(times[file.folder]) > 1:
            site += f"t{file.time}"
        well, plate_folder = well_name(file.row, file.column), plate_folders[file.folder]
        channel = metadata.get((file.folder, file.channel))
        yield ChannelFile(
            field_id=f"{plate_folder}/{well}/{site}" if plate_folder else f"{well}/{site}",
            channel=f"ch{file.channel}",
            name=channel.name if channel else "",
            path=file.path,
            plate=plates[file.folder],
            well=well,
            site=site,
            pixel_size_um=channel.pixel_size_um if channel else None,
        )


def _plate_name(address: str, folder: str) -> str:
    if not folder:
        folder = base_name(address)
        if folder == "Images":
            folder = base_name(parent(address))
    return posixpath.basename(folder).split("__")[0]


@cache
def well_name(row: int, column: int) -> str:
    """Return ``A01`` for row 1, column 1; rows beyond Z (1536-well plates) are AA, AB..."""
    letters = ""
    while row > 0:
        row, letter = divmod(row - 1, 26)
        letters = chr(ord("A") + letter) + letters
    return f"{letters}{column:02d}"


def _number_channels(channels: tuple[str, ...], numbers: set[int]) -> tuple[str, ...]:
    """Return ``ch1=DNA``... for names in the order of the channel numbers."""
    num_named = sum("=" in item for item in channels)
    if channels and num_named == len(channels):
        return tuple(f"ch{item.removeprefix('ch')}" for item in channels)
    if num_named or (channels and max(numbers) > len(channels)):
        raise ImageError(
            f"--channels {','.join(channels)}: expected a name for each channel in order (- skips one), or 4=DNA for "
            f"some; there are {', '.join(f'ch{number}' for number in sorted(numbers))}"
        )
    return tuple(f"ch{number}={name}" for number, name in enumerate(channels, start=1) if name != "-")


# --- Harmony index (Index.idx.xml) ----------------------------------------------------------------------------------
#
# It has one ``Image`` element per file. In older versions of the format each of them repeats the channel's name and
# pixel size; newer ones keep these in one ``Entry`` per channel, before the images.

_INDEX_NAMES = ("Index.idx.xml", "Index.xml")

_UM_PER_METRE = 1e6
# The index of a 384-well plate has 100 MB; its first megabytes name all channels.
_HEAD_BYTES = 4 << 20


class HarmonyChannel(NamedTuple):
    """A channel in the microscope's metadata; ``pixel_size_um`` is None if it is absent or differs between axes."""

    name: str
    pixel_size_um: float | None


def read_harmony_channels(path: str, channels: Collection[int]) -> dict[int, HarmonyChannel]:
    """Return the metadata of these channels, as far as they are in the index; reading stops when all are found."""
    for first in (_HEAD_BYTES, None):
        content = open_bytes(path, first=first)
        is_whole = first is None or len(content) < first
        found: dict[int, HarmonyChannel] = {}
        try:
            for _, element in ElementTree.iterparse(io.BytesIO(content)):
                if element.tag.rpartition("}")[2] in ("Image", "Entry"):
                    _add_channel(element, found)
                    element.clear()
                    if found.keys() >= set(channels):
                        break
        except (ElementTree.ParseError, ValueError) as error:
            if is_whole:  # else the end is missing, or the whole file has this error too
                raise ImageError(
                    f"{path}: damaged ({error}); export it again, or remove it and use --channels and --pixel-size"
                ) from error
        if is_whole or found.keys() >= set(channels):
            break
    return {channel: found[channel] for channel in channels if channel in found}


def _add_channel(element: ElementTree.Element, found: dict[int, HarmonyChannel]) -> None:
    values = {part.tag.rpartition("}")[2]: (part.text or "").strip() for part in element}
    number = values.get("ChannelID") or element.get("ChannelID") or ""
    if number.isdecimal() and values.get("ChannelName"):
        x_metres, y_metres = (values.get(f"ImageResolution{axis}") for axis in "XY")
        size = square_pixel(float(x_metres), float(y_metres or x_metres)) if x_metres else None
        # Twelve digits: 6.5E-07 m is 0.65 um, not 0.6499999999999999.
        size = None if size is None else float(f"{size * _UM_PER_METRE:.12g}")
        found.setdefault(int(number), HarmonyChannel(name=values["ChannelName"], pixel_size_um=size))


def _read_indexes(files: Sequence[_PhenixFile], indexes: dict[str, str]) -> dict[tuple[str, int], HarmonyChannel]:
    """Return the channels in the index of each folder, by folder and channel number."""
    numbers: dict[str, set[int]] = {}
    for file in files:
        numbers.setdefault(file.folder, set()).add(file.channel)
    metadata: dict[tuple[str, int], HarmonyChannel] = {}
    for folder in sorted(numbers.keys() & indexes.keys()):
        channels = read_harmony_channels(indexes[folder], numbers[folder])
        names = [channel.name for channel in channels.values()]
        for number, channel in channels.items():
            name = channel.name if names.count(channel.name) == 1 else f"{channel.name} (ch{number})"
            metadata[folder, number] = HarmonyChannel(name=name, pixel_size_um=channel.pixel_size_um)
    return metadata
