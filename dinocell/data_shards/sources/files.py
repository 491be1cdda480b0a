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
    nothing_found,
    unmatched,
)
from dinocell.errors import ImageError
from dinocell.images.read import IMAGE_SUFFIXES, count_frames
from dinocell.images.storage import Listed, list_files


@dataclass(frozen=True, kw_only=True)
class MultichannelSource:
    """One file a field, with several channels: TIFF, OME-TIFF, OME-Zarr (a ``.zarr`` folder), .npy, PNG.

    The id is the path below the input.

    Attributes
    ----------
    channels
        Names of a file's channels, in its order. Empty takes the file's own names, else ``c0``, ``c1``...
    frames_as
        What the frames of a stack (pages, time points, slices) are. ``channels``: all frames are channels of one field.
        ``fields``: each is a field (this opens every file once to count them). None rejects stacks.
    """

    input: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    frames_as: Literal["channels", "fields"] | None = None

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, sorted by path, and before them the files that are no pictures."""
        check_plain_names(self.channels)
        files, others = _pictures(self.input)
        yield from unmatched(others, "not an image, by its name")
        for file in files:
            if self.frames_as == "fields":
                yield from _frames_of(file, self.channels, "planes", self.pixel_size_um)
                continue
            whole = FieldFile(path=file.path, channels=self.channels, frames_as_channels=self.frames_as == "channels")
            yield Field(id=file.name, files=(whole,), pixel_size_um=self.pixel_size_um)


@dataclass(frozen=True, kw_only=True)
class ImagesSource:
    """A folder of images of one channel each; the id is the path below the input.

    Attributes
    ----------
    channels
        The name of the channel; empty calls it ``grey``.
    colour
        What becomes of pictures with real colour (grey ones stored as RGB are grey). ``reject``: they are listed as
        unreadable. ``channels``: red, green and blue are three channels. Colour is never weighted into grey: that would
        make up a stain that nobody imaged.
    frames_as
        ``fields``: each frame of a stack is a field (this opens every file once to count them). None rejects stacks.
    """

    input: str
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    colour: Literal["reject", "channels"] = "reject"
    frames_as: Literal["fields"] | None = None

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, sorted by path, and before them the files that are no pictures."""
        if len(self.channels) > 1 or (self.channels and self.colour == "channels"):
            raise ImageError(
                f"--channels {','.join(self.channels)}: expected one name, for images of one channel each; "
                "--source multichannel takes files with several, --colour channels names them itself"
            )
        check_plain_names(self.channels)
        layout: Layout = "grey" if self.colour == "reject" else "colour"
        names = self.channels or (("grey",) if self.colour == "reject" else ())
        files, others = _pictures(self.input)
        yield from unmatched(others, "not an image, by its name")
        for file in files:
            if self.frames_as == "fields":
                yield from _frames_of(file, names, layout, self.pixel_size_um)
                continue
            whole = FieldFile(path=file.path, channels=names, layout=layout)
            yield Field(id=file.name, files=(whole,), pixel_size_um=self.pixel_size_um)


def _pictures(address: str) -> tuple[list[Listed], list[str]]:
    """Return the files that may be pictures, and the names of the others."""
    listed = list_files(address, folders_as_files=(".zarr",))
    files = [file for file in listed if file.name.lower().endswith(IMAGE_SUFFIXES)]
    others = [file.name for file in listed if not file.name.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise nothing_found(address, f"images ({', '.join(IMAGE_SUFFIXES)})", others)
    return files, others


def _frames_of(
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
