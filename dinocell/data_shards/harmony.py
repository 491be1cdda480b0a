"""What the index file of an Opera Phenix export (``Index.idx.xml``) says about its channels.

Harmony writes one ``Image`` element a file. In older versions of the format each of them repeats the channel's name and
pixel size; newer ones keep these in one ``Entry`` a channel, before the images.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

from dinocell.data_shards.locations import open_bytes
from dinocell.data_shards.picture import square_pixel
from dinocell.errors import ImageError

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


def read_harmony_index(path: str, channels: Collection[int]) -> dict[int, HarmonyChannel]:
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
