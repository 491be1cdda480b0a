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
    nothing_found,
    unmatched,
)
from dinocell.images.storage import Listed, list_files

# red, green, blue, yellow, as the atlas colours its stains; the order is that of Cell-DINO's models (protein second).
_HPA_CHANNELS = {"red": "microtubules", "green": "protein", "blue": "nucleus", "yellow": "er"}


_HPA_PLANES: dict[str, Layout] = {"red": "red", "green": "green", "blue": "blue", "yellow": "red"}


_HPA_NAME = re.compile(r"(?P<id>.+)_(?P<colour>red|green|blue|yellow)\.(?:jpe?g|png|tiff?)", re.IGNORECASE | re.DOTALL)


_HPA_ID = re.compile(r"(?:.*[/_])?(?P<plate>\d+)_(?P<well>[A-P]\d{1,2})_(?P<site>[^_/]+)", re.DOTALL)


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
        yield from group_fields(
            matched,
            channels=self.channels or tuple(name for name in _HPA_CHANNELS.values() if name in found),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


def _hpa_file(file: Listed, match: re.Match[str]) -> ChannelFile:
    colour = match["colour"].lower()
    place = parse_hpa_id(match["id"])
    return ChannelFile(
        field_id=match["id"],
        channel=_HPA_CHANNELS[colour],
        path=file.path,
        layout=_HPA_PLANES[colour],
        plate=place.get("plate"),
        well=place.get("well"),
        site=place.get("site"),
    )


def parse_hpa_id(field_id: str) -> dict[str, str]:
    """Return plate, well and site where an id ends as the atlas writes them (``800_A6_1``); else nothing."""
    match = _HPA_ID.fullmatch(field_id)
    return match.groupdict() if match else {}
