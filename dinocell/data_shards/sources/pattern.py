"""Files with one channel each (or all of them), described by a user's file name pattern."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dinocell.data_shards.sources.field import (
    ChannelFile,
    Field,
    Missing,
    Rejected,
    check_plain_names,
    group_fields,
    match_files,
    reject_unmatched,
)
from dinocell.errors import ImageError
from dinocell.images.name_pattern import NamePattern
from dinocell.images.storage import Listed, list_files

_RESERVED = ("plate", "well", "site", "channel", "")


@dataclass(frozen=True, kw_only=True)
class PatternSource:
    """Files whose relative paths match a pattern: ``{plate}/{well}_s{site}_w{channel}.tif`` (see ``NamePattern``).

    The id consists of all pattern fields except the channel. Fields other than plate, well, site and channel become
    labels. Without ``{channel}``, each file is a field with all channels in the file; a grey image stored as colour has
    one channel, ``grey``, unless ``channels`` has two or more names.

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
        """List the files with other names, then the fields, sorted by id."""
        pattern = NamePattern.parse(self.pattern)
        by_channel = "channel" in pattern.names
        if not by_channel:
            check_plain_names(self.channels)
        matched, others = match_files(
            list_files(self.input, folders_as_files=() if by_channel else (".zarr",)),
            pattern.match,
            address=self.input,
            expected=f"files that match {self.pattern!r}",
        )
        first = matched[0][1]
        if by_channel and (name := _channel_index([values for _, values in matched])) is not None:
            raise ImageError(
                f"{self.pattern!r}: {{{name}}} changes with the channel ({first[name]} for {first['channel']}) and "
                "makes a field of every file; use * instead"
            )
        yield from reject_unmatched(others, f"does not match {self.pattern!r}")
        yield from group_fields(
            [_channel_file(file, values, self.channels) for file, values in matched],
            channels=self.channels if by_channel else (),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


def _channel_index(matches: Sequence[Mapping[str, str]]) -> str | None:
    """Return the pattern field that only numbers the channels, such as the 2 of ``_2_GFP``; None if there is none.

    As part of the fields' ids it would split the channels of a field.
    """
    for name in matches[0].keys() - {*_RESERVED}:
        pairs = {(values["channel"], values[name]) for values in matches}
        channels, others = ({pair[side] for pair in pairs} for side in (0, 1))
        if len(pairs) == len(channels) == len(others) > 1:
            return name
    return None


def _channel_file(file: Listed, values: dict[str, str], channels: tuple[str, ...]) -> ChannelFile:
    by_channel = "channel" in values
    return ChannelFile(
        field_id="/".join(value for name, value in values.items() if name != "channel" and value) or "field",
        channel=values.get("channel", ""),
        path=file.path,
        layout="grey" if by_channel else "colour" if len(channels) < 2 else "planes",
        channels=() if by_channel else channels,
        plate=values.get("plate"),
        well=values.get("well"),
        site=values.get("site"),
        labels={name: value for name, value in values.items() if name not in _RESERVED},
    )
