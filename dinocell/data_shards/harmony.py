"""What the index file of an Opera Phenix export (``Index.idx.xml``) says about its channels.

Harmony writes one ``Image`` element a file; up to version 5 of the format each repeats the channel's name and pixel
size, later versions keep them in one ``Entry`` a channel at the top.
"""

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection
from dataclasses import dataclass

from dinocell.data_shards.locations import open_bytes
from dinocell.errors import ImageError

INDEX_NAMES = ("Index.idx.xml", "Index.xml")
_UM_PER_METRE = 1e6


@dataclass(frozen=True, kw_only=True)
class HarmonyChannel:
    """A channel as the microscope calls it; ``pixel_size_um`` is None where the axes differ or nothing is said."""

    name: str
    pixel_size_um: float | None


def read_harmony_index(path: str, channels: Collection[int]) -> dict[int, HarmonyChannel]:
    """Return what the index says about these channel numbers; ones that it does not name are not in the result.

    Reading stops when all are known: the index of a 384-well plate has 100 MB.

    Raises
    ------
    ImageError
        If it cannot be read, or is damaged before all channels are known.
    """
    known: dict[int, HarmonyChannel] = {}
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(open_bytes(path))):
            if element.tag.rpartition("}")[2] not in ("Image", "Entry"):
                continue
            said = {part.tag.rpartition("}")[2]: (part.text or "").strip() for part in element}
            number = said.get("ChannelID") or element.get("ChannelID") or ""
            if number.isdecimal() and said.get("ChannelName"):
                size = _pixel_size_um(said.get("ImageResolutionX"), said.get("ImageResolutionY"))
                known.setdefault(int(number), HarmonyChannel(name=said["ChannelName"], pixel_size_um=size))
            element.clear()
            if all(channel in known for channel in channels):
                break
    except (ElementTree.ParseError, ValueError) as error:
        raise ImageError(
            f"{path}: damaged ({error}); export it again, or remove it and say --channels and --pixel-size"
        ) from error
    return {channel: known[channel] for channel in channels if channel in known}


def _pixel_size_um(across: str | None, down: str | None) -> float | None:
    if not across:
        return None
    size = float(across)
    if size <= 0 or (down and abs(float(down) - size) > 0.001 * size):
        return None
    # Twelve digits: 6.5E-07 m is 0.65 um, not 0.6499999999999999.
    return float(f"{size * _UM_PER_METRE:.12g}")
