"""Sources whose file names say everything, one channel a file: Opera Phenix, Human Protein Atlas, a user's pattern."""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from dinocell.data_shards.channel_files import ChannelFile, Missing, check_plain_names, fields_of
from dinocell.data_shards.fields import Field, Layout, Rejected
from dinocell.data_shards.harmony import INDEX_NAMES, HarmonyChannel, read_harmony_index
from dinocell.data_shards.listing import Listed, base_name, list_files, parent
from dinocell.data_shards.name_pattern import NamePattern
from dinocell.errors import ImageError

_PHENIX_NAME = re.compile(
    r"r(?P<row>\d+)c(?P<column>\d+)f(?P<field>\d+)p(?P<plane>\d+)-ch(?P<channel>\d+)"
    r"(?:sk(?P<time>\d+))?(?:fk\d+)?(?:fl\d+)?\.tiff?",
    re.IGNORECASE,
)
_PHENIX_EXAMPLE = "r01c01f01p01-ch1sk1fk1fl1.tiff"

# red, green, blue, yellow, as the atlas colours its stains; the order is that of Cell-DINO's models (protein second).
_HPA_CHANNELS = {"red": "microtubules", "green": "protein", "blue": "nucleus", "yellow": "er"}
_HPA_PLANES: dict[str, Layout] = {"red": "red", "green": "green", "blue": "blue", "yellow": "red"}
_HPA_NAME = re.compile(r"(?P<id>.+)_(?P<colour>red|green|blue|yellow)\.(?:jpe?g|png|tiff?)", re.IGNORECASE | re.DOTALL)
_HPA_ID = re.compile(r"(?:.*[/_])?(?P<plate>\d+)_(?P<well>[A-P]\d{1,2})_(?P<site>[^_/]+)", re.DOTALL)


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
        yield from fields_of(
            _phenix_files(self.input, matched, known),
            channels=_by_number(self.channels, {file.channel for file in matched}),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


@dataclass(frozen=True, kw_only=True)
class HpaSource:
    """Human Protein Atlas fields: ``<id>_red``, ``_green``, ``_blue`` and ``_yellow`` as JPEG, PNG or TIFF.

    Channels: microtubules (red), protein (green), nucleus (blue), er (yellow). Plate, well and site are known where
    the id ends as the atlas writes it: ``800_A6_1``. JPEGs are coloured in their stain's colour; the channel is that
    plane (red for yellow).
    """

    input: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    missing: Missing = "keep"

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, sorted by id, and before them the files with other names."""
        matched: list[ChannelFile] = []
        others: list[str] = []
        for file in list_files(self.input):
            if match := _HPA_NAME.fullmatch(file.name):
                matched.append(_hpa_file(file, match))
            else:
                others.append(file.name)
        if not matched:
            raise nothing_found(self.input, "files named <id>_red.jpg, _green, _blue, _yellow (also PNG, TIFF)", others)
        yield from unmatched(others, "not named <id>_red, _green, _blue or _yellow")
        found = {file.channel for file in matched}
        yield from fields_of(
            matched,
            channels=self.channels or tuple(name for name in _HPA_CHANNELS.values() if name in found),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


@dataclass(frozen=True, kw_only=True)
class PatternSource:
    """Files whose relative paths follow a pattern: ``{plate}/{well}_s{site}_w{channel}.tif`` (see ``NamePattern``).

    The id is made of all fields but the channel. Fields other than plate, well, site and channel become labels.
    Without a ``{channel}`` each file is a field with the channels that it holds, a grey picture stored as colour with
    one, ``grey``; with two names or more in ``channels`` it has the channels that its file has.

    Attributes
    ----------
    channels
        With ``{channel}``: which ones, in order, ``CHANNEL`` or ``CHANNEL=NAME``. Without: names of a file's channels.
    """

    input: str
    pattern: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    missing: Missing = "keep"

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, sorted by id, and before them the files with other names."""
        pattern = NamePattern.parse(self.pattern)
        by_channel = "channel" in pattern.names
        if not by_channel:
            check_plain_names(self.channels)
        matched: list[ChannelFile] = []
        read: list[dict[str, str]] = []
        others: list[str] = []
        for file in list_files(self.input, folders_as_files=() if by_channel else (".zarr",)):
            if (values := pattern.match(file.name)) is None:
                others.append(file.name)
            else:
                matched.append(_pattern_file(file, values, self.channels))
                read.append(values)
        if not matched:
            raise nothing_found(self.input, f"files that fit {self.pattern!r}", others)
        if (name := _echo_of_channel(read)) is not None:
            raise ImageError(
                f"{self.pattern!r}: {{{name}}} changes with the channel ({read[0][name]} in {read[0]['channel']}) and "
                "makes a field of every file; write * in its place"
            )
        yield from unmatched(others, f"does not fit {self.pattern!r}")
        listed = fields_of(
            matched,
            channels=self.channels if by_channel else (),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )
        yield from listed


def _echo_of_channel(read: Sequence[Mapping[str, str]]) -> str | None:
    """Return the part of the names that only numbers the channels, as the 2 of ``_2_GFP`` does; None if none does.

    It would become part of the fields' ids, and tear the channels of a field apart.
    """
    if "channel" not in read[0]:
        return None
    for name in read[0].keys() - {"", "channel", "plate", "well", "site"}:
        pairs = {(values["channel"], values[name]) for values in read}
        channels, others = ({pair[side] for pair in pairs} for side in (0, 1))
        if len(pairs) == len(channels) == len(others) > 1:
            return name
    return None


def nothing_found(address: str, wanted: str, others: Sequence[str]) -> ImageError:
    """Return the error for an input without a single field."""
    such = f" (such as {others[0]})" if others else ""
    return ImageError(f"{address}: no {wanted}, among {len(others)} file(s){such} in it and the folders below")


def unmatched(names: Sequence[str], reason: str) -> Iterator[Rejected]:
    """Yield inputs that belong to no field."""
    return (Rejected(input=name, kind="unmatched", reason=reason) for name in names)


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
        said = read_harmony_index(indexes[folder], numbers[folder])
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


def _hpa_file(file: Listed, match: re.Match[str]) -> ChannelFile:
    colour = match["colour"].lower()
    place = hpa_place(match["id"])
    return ChannelFile(
        field_id=match["id"],
        channel=_HPA_CHANNELS[colour],
        path=file.path,
        layout=_HPA_PLANES[colour],
        plate=place.get("plate"),
        well=place.get("well"),
        site=place.get("site"),
    )


def hpa_place(field_id: str) -> dict[str, str]:
    """Return plate, well and site where an id ends as the atlas writes them (``800_A6_1``); else nothing."""
    match = _HPA_ID.fullmatch(field_id)
    return match.groupdict() if match else {}


def _pattern_file(file: Listed, values: dict[str, str], channels: tuple[str, ...]) -> ChannelFile:
    by_channel = "channel" in values
    known = ("plate", "well", "site", "channel", "")
    return ChannelFile(
        field_id="/".join(value for name, value in values.items() if name != "channel" and value) or "field",
        channel=values.get("channel", ""),
        path=file.path,
        layout="grey" if by_channel else "colour" if len(channels) < 2 else "planes",
        channels=() if by_channel else channels,
        plate=values.get("plate"),
        well=values.get("well"),
        site=values.get("site"),
        labels={name: value for name, value in values.items() if name not in known},
    )
