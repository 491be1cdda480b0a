"""Sources whose file names say everything, one channel a file: Opera Phenix, Human Protein Atlas, a user's pattern."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dinocell.data_shards.sources.field import (
    ChannelFile,
    Field,
    Missing,
    Rejected,
    check_plain_names,
    group_fields,
    nothing_found,
    unmatched,
)
from dinocell.errors import ImageError
from dinocell.images.name_pattern import NamePattern
from dinocell.images.storage import Listed, list_files


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
        listed = group_fields(
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
