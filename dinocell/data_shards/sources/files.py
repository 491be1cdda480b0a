"""Sources with all channels of a field in one file, and folders of single-channel images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dinocell.data_shards.sources.field import (
    Field,
    FieldFile,
    Layout,
    Rejected,
    check_plain_names,
    match_files,
    reject_unmatched,
)
from dinocell.errors import ImageError
from dinocell.images.read import IMAGE_SUFFIXES, count_frames
from dinocell.images.storage import Listed, list_files


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
    )
    yield from reject_unmatched(others, "not an image file name")
    for file, _ in matched:
        if frames_as == "fields":
            yield from _list_frames(file, channels, layout, pixel_size_um)
        else:
            whole = FieldFile(
                path=file.path, channels=channels, layout=layout, frames_as_channels=frames_as == "channels"
            )
            yield Field(id=file.name, files=(whole,), pixel_size_um=pixel_size_um)


def _list_frames(
    file: Listed, channels: tuple[str, ...], layout: Layout, pixel_size_um: float | None
) -> Iterator[Field | Rejected]:
    try:
        num_frames = count_frames(file.path)
    except ImageError as error:
        yield Rejected(input=file.name, kind="unreadable", reason=str(error))
        return
    digits = len(str(num_frames - 1))
    for frame in range(num_frames):
        yield Field(
            id=file.name if num_frames == 1 else f"{file.name}/{frame:0{digits}d}",
            files=(FieldFile(path=file.path, channels=channels, layout=layout, frame=frame),),
            labels={} if num_frames == 1 else {"frame": frame},
            pixel_size_um=pixel_size_um,
        )
