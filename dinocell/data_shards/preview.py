"""A contact sheet of a shard set: some samples, a row each, with their channels side by side."""

from itertools import islice
from pathlib import Path

import numpy as np

from dinocell.data_shards.images import write_png
from dinocell.data_shards.manifest import Manifest
from dinocell.data_shards.picture import to_uint8
from dinocell.data_shards.read import stream
from dinocell.data_shards.sample import SampleInfo

_GAP_PX = 4
_CAPTION_PX = 14
_GROUND, _INK = 24, 230
# Of the data set's values; so that tiles can be compared, each channel is drawn with one range.
_BLACK, _WHITE = "0.1", "99.9"


def preview(
    location: str | Path,
    output: str | Path,
    *,
    num_samples: int = 8,
    tile_px: int = 192,
    seed: int = 0,
    cache: str | Path | None = None,
) -> None:
    """Write a PNG with ``num_samples`` random samples, each channel from its 0.1 to its 99.9 percentile in the set.

    Raises
    ------
    ShardError
        If the set cannot be read.
    ImageError
        If the picture cannot be written.
    """
    samples = stream(location, batch_size=1, seed=seed, cache=cache)
    manifest = samples.sets[0].manifest
    names = list(manifest.channels)
    rows = []
    for batch in islice(samples, min(num_samples, manifest.num_samples)):
        info = batch.infos[0]
        shown = {
            name: _thumbnail(plane, name, manifest, tile_px)
            for name, plane in zip(info.channels, batch.tile(0).numpy(), strict=True)
        }
        empty = np.full((tile_px, tile_px), _GROUND, np.uint8)
        planes = [shown.get(name, empty) for name in names]
        rows.append(np.concatenate([caption(_text(info), planes), side_by_side(planes)]))
    header = _header(names, tile_px)
    write_png(output, np.concatenate([header, *rows]))


def _thumbnail(plane: np.ndarray, name: str, manifest: Manifest, size: int) -> np.ndarray:
    import cv2

    known = manifest.channels[name].percentiles
    grey = to_uint8(plane, known[_BLACK], known[_WHITE])
    height, width = grey.shape
    scale = size / max(height, width)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(grey, fitted, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    framed = np.full((size, size), _GROUND, np.uint8)
    framed[: small.shape[0], : small.shape[1]] = small
    return framed


def side_by_side(planes: list[np.ndarray]) -> np.ndarray:
    """Put pictures of one height next to one another, with a gap after each."""
    padded = [np.pad(plane, ((0, _GAP_PX), (0, _GAP_PX)), constant_values=_GROUND) for plane in planes]
    return np.concatenate(padded, axis=1)


def caption(text: str, planes: list[np.ndarray]) -> np.ndarray:
    """Return a line of text as wide as the pictures side by side."""
    return _line([(0, text)], sum(plane.shape[1] + _GAP_PX for plane in planes))


def _header(names: list[str], tile_px: int) -> np.ndarray:
    width = tile_px + _GAP_PX
    return _line([(number * width, name) for number, name in enumerate(names)], len(names) * width)


def _line(texts: list[tuple[int, str]], width: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (width, _CAPTION_PX), _GROUND)
    draw = ImageDraw.Draw(image)
    for left, text in texts:
        draw.text((left + 2, 0), text, fill=_INK, font=ImageFont.load_default(size=11))
    return np.array(image)


def _text(info: SampleInfo) -> str:
    size = f"{info.height} x {info.width} {info.dtype}, row {info.row}, column {info.column}"
    missing = f", without {', '.join(info.missing)}" if info.missing else ""
    return f"{info.field}   {size}{missing}"
