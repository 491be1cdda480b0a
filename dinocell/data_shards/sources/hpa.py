"""Human Protein Atlas fields: one file per channel, named by colour."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dinocell.data_shards.sources.field import (
    ChannelFile,
    Field,
    Layout,
    Missing,
    Rejected,
    group_fields,
    match_files,
    reject_unmatched,
)
from dinocell.images.storage import Listed, list_files

# Colours of the atlas and their channels, in the order of Cell-DINO's models (protein second).
_CHANNELS = {"red": "microtubules", "green": "protein", "blue": "nucleus", "yellow": "er"}
_LAYOUTS: dict[str, Layout] = {"red": "red", "green": "green", "blue": "blue", "yellow": "red"}

_NAME = re.compile(r"(?P<id>.+)_(?P<colour>red|green|blue|yellow)\.(?:jpe?g|png|tiff?)", re.IGNORECASE | re.DOTALL)
_ID = re.compile(r"(?:.*[/_])?(?P<plate>\d+)_(?P<well>[A-P]\d{1,2})_(?P<site>[^_/]+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class HpaSource:
    """Human Protein Atlas fields: ``<id>_red``, ``_green``, ``_blue`` and ``_yellow`` as JPEG, PNG or TIFF.

    Channels: microtubules (red), protein (green), nucleus (blue), er (yellow). Plate, well and site are read from ids
    that end as in the atlas: ``800_A6_1``. JPEGs are tinted in the channel's colour; the channel is that plane (red for
    yellow).
    """

    input: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    missing: Missing = "keep"

    def fields(self) -> Iterator[Field | Rejected]:
        """List the files with other names, then the fields, sorted by id."""
        expected = "files named <id>_red.jpg, _green, _blue, _yellow (also PNG, TIFF)"
        matched, others = match_files(list_files(self.input), _NAME.fullmatch, address=self.input, expected=expected)
        yield from reject_unmatched(others, "not named <id>_red, _green, _blue or _yellow")
        files = [_channel_file(file, match) for file, match in matched]
        available = {file.channel for file in files}
        yield from group_fields(
            files,
            channels=self.channels or tuple(name for name in _CHANNELS.values() if name in available),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


def _channel_file(file: Listed, match: re.Match[str]) -> ChannelFile:
    colour, location = match["colour"].lower(), parse_hpa_id(match["id"])
    return ChannelFile(
        field_id=match["id"],
        channel=_CHANNELS[colour],
        path=file.path,
        layout=_LAYOUTS[colour],
        plate=location.get("plate"),
        well=location.get("well"),
        site=location.get("site"),
    )


def parse_hpa_id(field_id: str) -> dict[str, str]:
    """Return plate, well and site of an id that ends as in the atlas (``800_A6_1``), otherwise nothing."""
    match = _ID.fullmatch(field_id)
    return match.groupdict() if match else {}
