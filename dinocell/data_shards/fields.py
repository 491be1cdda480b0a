"""A field of view as a source finds it on disk: which files hold its channels, and what is known about it.

Sources (``sources.py``) list fields without opening a picture; ``read_field`` opens the files of one field.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from dinocell.data_shards.images import read_image
from dinocell.data_shards.picture import COLOURS, Picture
from dinocell.errors import ImageError

LabelValue = str | int | float | bool
Layout = Literal["planes", "grey", "red", "green", "blue", "colour", "side_by_side"]


@dataclass(frozen=True, kw_only=True)
class FieldFile:
    """One file, or one frame of it, with one or more channels of a field.

    Attributes
    ----------
    path
        A path on this disk or an address (``s3://``, ``https://``).
    channels
        The names of the channels in this file, in the file's order; empty takes the names that the file says, and
        ``c0``, ``c1``... where it says none.
    layout
        ``planes``: the picture's own channels. ``grey``: one channel, from a picture that may store it as red = green =
        blue, or in one of them with nothing in the others. ``red``, ``green``, ``blue``: one channel, from a grey
        picture, or from this plane of one that is tinted for display (HPA's JPEGs, whose compression leaves traces in
        the other planes). ``colour``: one channel, ``grey``, from a grey picture, else red, green and blue.
        ``side_by_side``: channels next to one another along the width of one grey picture, each as wide as it is high
        (or a picture that already holds them apart).
    frame
        Which frame of a stack, from 0; None expects one.
    frames_as_channels
        The frames of the stack are its channels.
    """

    path: str
    channels: tuple[str, ...] = ()
    layout: Layout = "planes"
    frame: int | None = None
    frames_as_channels: bool = False


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of view.

    Attributes
    ----------
    id
        Unique in its source, and the same wherever the input folder is mounted (a relative path or plate/well/site).
    missing
        Channels that other fields of the source have and this one has not.
    labels
        Columns of the source's table that say something about the field or its cells.
    pixel_size_um
        Where the source knows it; None leaves it to the file.
    """

    id: str
    files: tuple[FieldFile, ...]
    missing: tuple[str, ...] = ()
    plate: str | None = None
    well: str | None = None
    site: str | None = None
    labels: Mapping[str, LabelValue] = field(default_factory=dict)
    pixel_size_um: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """An input that gives no sample, or not all of its tiles: what, which kind of reason, and the reason in words."""

    input: str
    kind: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """Where fields come from. Fields come in the same order every time, whatever the file system's order."""

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, and the inputs that belong to none, without opening a picture."""


def read_field(field: Field) -> Picture:
    """Read all channels of a field.

    Raises
    ------
    ImageError
        If a file cannot be read, has another number of channels than the source says, or differs from the field's
        first file in size or type; the message names the file.
    """
    pictures = [_read(file) for file in field.files]
    first = pictures[0]
    for file, picture in zip(field.files, pictures, strict=True):
        if picture.pixels.shape[1:] != first.pixels.shape[1:] or picture.pixels.dtype != first.pixels.dtype:
            raise ImageError(
                f"{file.path}: {_kind(picture)}, but the field's first file, {field.files[0].path}, is {_kind(first)}"
            )
    names = tuple(name for picture in pictures for name in picture.channel_names)
    if len(set(names)) != len(names):
        raise ImageError(f"{field.files[0].path}: two channels of one name in field {field.id}: {', '.join(names)}")
    sizes = {picture.pixel_size_um for picture in pictures} - {None}
    from_files = sizes.pop() if len(sizes) == 1 else None
    return Picture(
        pixels=np.concatenate([picture.pixels for picture in pictures]) if len(pictures) > 1 else first.pixels,
        channel_names=names,
        pixel_size_um=field.pixel_size_um if field.pixel_size_um is not None else from_files,
    )


def _read(file: FieldFile) -> Picture:
    picture = read_image(file.path, frame=file.frame, frames_as_channels=file.frames_as_channels)
    pixels, names = picture.pixels, picture.channel_names
    if file.layout == "grey":
        pixels, names = _one_channel(file, picture), ()
    elif file.layout in COLOURS:
        pixels, names = _tinted(file, picture), ()
    elif file.layout == "colour":
        picture = picture.grey()
        pixels = picture.pixels
        names = picture.channel_names or (("grey",) if len(pixels) == 1 else ())
    elif file.layout == "side_by_side":
        pixels, names = _unstack(file, picture), ()
    if file.channels:
        if len(file.channels) != len(pixels):
            raise ImageError(
                f"{file.path}: expected {len(file.channels)} channel(s) ({', '.join(file.channels)}), got {len(pixels)}"
            )
        names = file.channels
    return Picture(
        pixels=pixels,
        channel_names=names or tuple(f"c{number}" for number in range(len(pixels))),
        pixel_size_um=picture.pixel_size_um,
    )


def _one_channel(file: FieldFile, picture: Picture) -> np.ndarray:
    pixels = picture.grey().pixels
    if len(pixels) > 1:
        lit = [plane for plane in pixels if plane.any()]
        if len(lit) > 1:
            raise ImageError(f"{file.path}: expected one channel, got {len(pixels)} that differ")
        pixels = lit[0][None] if lit else pixels[:1]
    return pixels


def _tinted(file: FieldFile, picture: Picture) -> np.ndarray:
    picture = picture.grey()
    if len(picture.pixels) == 1:
        return picture.pixels
    if not picture.is_colour or len(picture.pixels) > len(COLOURS):
        raise ImageError(f"{file.path}: expected a grey or an RGB picture, got {len(picture.pixels)} channels")
    return picture.select(file.layout).pixels


def _unstack(file: FieldFile, picture: Picture) -> np.ndarray:
    if len(picture.pixels) == len(file.channels) > 1:
        return picture.pixels
    pixels = picture.grey().pixels
    _, height, width = pixels.shape
    if len(pixels) != 1 or width % height:
        raise ImageError(
            f"{file.path}: expected square channels side by side in one grey picture, "
            f"got {len(pixels)} channel(s) of {height} x {width}"
        )
    return np.ascontiguousarray(pixels[0].reshape(height, width // height, height).transpose(1, 0, 2))


def _kind(picture: Picture) -> str:
    _, height, width = picture.pixels.shape
    return f"{height} x {width} {picture.pixels.dtype}"
