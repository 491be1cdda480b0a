"""Fields from image files alone: one file with all channels, single-channel images, or a pattern of file names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dinocell.data_shards.sources.field import (
    ChannelFile,
    Field,
    FieldFile,
    Layout,
    Missing,
    Rejected,
    check_plain_names,
    group_fields,
    match_files,
)
from dinocell.errors import ImageError
from dinocell.images.listing import Listed, NamePattern, list_files
from dinocell.images.read import IMAGE_SUFFIXES, count_frames


@dataclass(frozen=True, kw_only=True)
class MultichannelSource:
    """One multi-channel file per field: TIFF, OME-TIFF, OME-Zarr (a ``.zarr`` folder), .npy, PNG.

    The id is the path relative to the input.

    Attributes
    ----------
    channels
        Names of a file's channels, in its order. Empty uses the names in the file, or ``c0``, ``c1``...
    frames_as
        What the frames of a stack (pages, time points, slices) are. ``channels``: all frames are channels of one field.
        ``fields``: each is a field (this opens every file once to count them). None rejects stacks.
    """

    input: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    frames_as: Literal["channels", "fields"] | None = None

    def fields(self) -> Iterator[Field | Rejected]:
        """List the files that are no images, then the fields, sorted by path."""
        check_plain_names(self.channels)
        return _list_fields(self.input, self.channels, "planes", self.frames_as, self.pixel_size_um)


@dataclass(frozen=True, kw_only=True)
class ImagesSource:
    """A folder of single-channel images; the id is the path relative to the input.

    Attributes
    ----------
    channels
        The name of the channel; empty calls it ``grey``.
    colour
        How to handle images with real colour (grey ones stored as RGB are grey). ``reject``: list them as unreadable.
        ``channels``: red, green and blue are three channels. Colour is never converted to grey, since the weighted sum
        is a channel that was not imaged.
    frames_as
        ``fields``: each frame of a stack is a field (this opens every file once to count them). None rejects stacks.
    """

    input: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    colour: Literal["reject", "channels"] = "reject"
    frames_as: Literal["fields"] | None = None

    def fields(self) -> Iterator[Field | Rejected]:
        """List the files that are no images, then the fields, sorted by path."""
        has_colour = self.colour == "channels"
        if len(self.channels) > 1 or (self.channels and has_colour):
            raise ImageError(
                f"--channels {','.join(self.channels)}: expected one name, for single-channel images; use --source "
                "multichannel for files with several channels (--colour channels uses the names red, green, blue)"
            )
        check_plain_names(self.channels)
        names = self.channels or (() if has_colour else ("grey",))
        return _list_fields(self.input, names, "colour" if has_colour else "grey", self.frames_as, self.pixel_size_um)


def _list_fields(
    address: str, channels: tuple[str, ...], layout: Layout, frames_as: str | None, pixel_size_um: float | None
) -> Iterator[Field | Rejected]:
    matched, others = match_files(
        list_files(address, folders_as_files=(".zarr",)),
        lambda name: name.lower().endswith(IMAGE_SUFFIXES) or None,
        address=address,
        expected=f"images ({', '.join(IMAGE_SUFFIXES)})",
        reason="not an image file name",
    )
    yield from others
    for file, _ in matched:
        whole = FieldFile(path=file.path, channels=channels, layout=layout, frames_as_channels=frames_as == "channels")
        try:
            num_frames = count_frames(file.path) if frames_as == "fields" else 1
        except ImageError as error:
            yield Rejected(input=file.name, kind="unreadable", reason=str(error))
            continue
        if num_frames == 1:
            yield Field(id=file.name, files=(whole,), pixel_size_um=pixel_size_um)
            continue
        digits = len(str(num_frames - 1))
        for frame in range(num_frames):
            yield Field(
                id=f"{file.name}/{frame:0{digits}d}",
                files=(replace(whole, frame=frame),),
                labels={"frame": frame},
                pixel_size_um=pixel_size_um,
            )


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
            reason=f"does not match {self.pattern!r}",
        )
        first = matched[0][1]
        if by_channel and (name := _channel_index([values for _, values in matched])) is not None:
            raise ImageError(
                f"{self.pattern!r}: {{{name}}} changes with the channel ({first[name]} for {first['channel']}) and "
                "makes a field of every file; use * instead"
            )
        yield from others
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
