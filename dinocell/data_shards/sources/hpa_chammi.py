"""The public data sets of the Human Protein Atlas (HPA), HPAone, HPA-FoV and CHAMMI.

The last three have tables, and store the channels of an image side by side in one grey image. Their file and column
names are those that the loaders of Cell-DINO (github.com/facebookresearch/dinov2, December 2025) and CHAMMI (doi
10.5281/zenodo.7988357) read.
"""

import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from dinocell.data_shards.sources.field import (
    ChannelFile,
    Field,
    FieldFile,
    LabelValue,
    Layout,
    Missing,
    Rejected,
    check_plain_names,
    group_fields,
    match_files,
)
from dinocell.data_shards.sources.table import Row, Table, open_tables, row_labels
from dinocell.errors import ImageError
from dinocell.images.listing import Listed, base_name, join, list_files

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
        matched, others = match_files(
            list_files(self.input),
            _NAME.fullmatch,
            address=self.input,
            expected="files named <id>_red.jpg, _green, _blue, _yellow (also PNG, TIFF)",
            reason="not named <id>_red, _green, _blue or _yellow",
        )
        yield from others
        files = [_channel_file(file, match) for file, match in matched]
        available = {file.channel for file in files}
        yield from group_fields(
            files,
            channels=self.channels or tuple(name for name in _CHANNELS.values() if name in available),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


def _channel_file(file: Listed, match: re.Match[str]) -> ChannelFile:
    colour = match["colour"].lower()
    return ChannelFile(
        field_id=match["id"],
        channel=_CHANNELS[colour],
        path=file.path,
        layout=_LAYOUTS[colour],
        **_parse_id(match["id"]),
    )


def _parse_id(field_id: str) -> dict[str, Any]:
    """Return plate, well and site of an id that ends as in the atlas (``800_A6_1``), otherwise nothing."""
    match = _ID.fullmatch(field_id)
    return match.groupdict() if match else {}


class _Split(NamedTuple):
    """The table of a split, its column with the image, and the folder of the images."""

    table: str
    column: str
    folder: str
    has_subfolders: bool = False
    may_have_other_suffix: bool = False


@dataclass(frozen=True, kw_only=True)
class _HpaTableSource:
    """The rows of a Human Protein Atlas table as fields; see the two data sets below."""

    input: str
    split: str
    table: tuple[str, ...] = ()
    path_column: str | None = None
    channels: tuple[str, ...] = tuple(_CHANNELS.values())
    pixel_size_um: float | None = None

    splits: ClassVar[Mapping[str, _Split]]

    def fields(self) -> Iterator[Field | Rejected]:
        """List the rows of the table as fields, in its order."""
        check_plain_names(self.channels)
        if self.split.lower() not in self.splits:
            raise ImageError(f"--split {self.split}: expected one of {', '.join(self.splits)}")
        split = self.splits[self.split.lower()]
        root, tables = open_tables(self.input, self.table, (split.table,))
        existing = None
        if split.may_have_other_suffix and not root.startswith(("http://", "https://")):
            existing = {file.name for file in list_files(join(root, split.folder))}
        seen: set[str] = set()
        for table in tables:
            column = self.path_column or split.column
            rows = _RowReader(table, column, root, self.pixel_size_um, seen)
            for line, row in table.rows():
                path = row[column].replace("\\", "/")
                name: str | None = path if split.has_subfolders else posixpath.basename(path)
                if name and split.may_have_other_suffix:
                    name = _find_file(name, existing)
                if name is None:
                    reason = f"no {posixpath.basename(path)} (.png or .tiff) in {join(root, split.folder)}"
                    yield Rejected(input=f"{base_name(table.address)}:{line}", kind="missing file", reason=reason)
                else:
                    yield rows.field(line, row, f"{split.folder}/{name}", self.channels)


_VARIED, _FIXED = "varied_size_masked_single_cells", "fixed_size_masked_single_cells"


@dataclass(frozen=True, kw_only=True)
class HpaOneSource(_HpaTableSource):
    """HPAone: single cells of the Human Protein Atlas (BioStudies S-BIAD2443).

    Attributes
    ----------
    input
        The folder with the tables and the image folders, or one of the tables.
    split
        ``all``: cells of varied size, without labels, for pretraining. ``train``, ``val``: cells of fixed size, with 19
        protein locations and 29 cell lines as labels (True or False).
    path_column
        The column with the image, if not ``img_path`` (all) or ``file`` (train, val).
    """

    split: str = "all"

    splits: ClassVar[Mapping[str, _Split]] = {
        "all": _Split(f"{_VARIED}_pretrain_20240507.csv", "img_path", f"{_VARIED}_HPA", has_subfolders=True),
        "train": _Split(f"{_FIXED}_pretrain_20240507.csv", "file", f"{_FIXED}_HPA"),
        "val": _Split(f"{_FIXED}_evaluation_20240507.csv", "file", f"{_FIXED}_HPA"),
    }


@dataclass(frozen=True, kw_only=True)
class HpaFovSource(_HpaTableSource):
    """HPA-FoV: fields of view of the Human Protein Atlas (BioStudies S-BIAD2443).

    Attributes
    ----------
    input
        The folder with the tables and the image folders, or one of the tables.
    split
        ``ssl``: all images, without labels, for pretraining. ``train``, ``val``: with 28 protein locations (True or
        False) and the cell line as labels. Rows without a file are rejected; .png in the table may be .tiff in the
        folder.
    path_column
        The column with the image, if not ``ID`` (ssl) or ``file`` (train, val).
    """

    split: str = "ssl"

    splits: ClassVar[Mapping[str, _Split]] = {
        "ssl": _Split("whole_images_names.csv", "ID", "normalized_data", may_have_other_suffix=True),
        "train": _Split("whole_images_512_train.csv", "file", "512_whole_images", may_have_other_suffix=True),
        "val": _Split("whole_images_512_test.csv", "file", "512_whole_images", may_have_other_suffix=True),
    }


def _find_file(name: str, existing: Collection[str] | None) -> str | None:
    """Return the file for a name in a table, which may lack the suffix or have another; None existing: a web server."""
    stem, suffix = posixpath.splitext(name)
    if suffix not in (".png", ".tif", ".tiff", ".jpg"):
        stem, suffix = name, ".png"
    names = [f"{stem}{ending}" for ending in (suffix, ".tiff", ".tif", ".png")]
    return names[0] if existing is None else next((name for name in names if name in existing), None)


_CHAMMI_TABLE, _CHAMMI_SUBSET_TABLE = "morphem70k_v2.csv", "enriched_meta.csv"
_CHAMMI_CHANNELS = {
    "Allen": ("nucleus", "membrane", "protein"),
    "HPA": tuple(_CHANNELS.values()),
    "CP": ("nucleus", "er", "rna", "agp", "mito"),
}


@dataclass(frozen=True, kw_only=True)
class ChammiSource:
    """CHAMMI: single cells of three data sets: Allen (WTC-11, 3 channels), HPA (4), CP (Cell Painting, 5).

    Attributes
    ----------
    input
        The folder with ``morphem70k_v2.csv`` or the three ``<subset>/enriched_meta.csv``; or such a table.
    subset
        Which of Allen, HPA, CP; empty uses all.
    split
        A value of the column ``train_test_split`` (Train, Task_one, Task_two...); None uses all.
    path_column
        The column with the image, if not ``file_path``.
    """

    input: str
    subset: tuple[str, ...] = ()
    split: str | None = None
    table: tuple[str, ...] = ()
    path_column: str | None = None
    pixel_size_um: float | None = None

    def fields(self) -> Iterator[Field | Rejected]:
        """List the rows of the table as fields, in its order."""
        by_name = {name.lower(): name for name in _CHAMMI_CHANNELS}
        if unknown := [name for name in self.subset if name.lower() not in by_name]:
            raise ImageError(f"--subset {', '.join(unknown)}: expected some of {', '.join(_CHAMMI_CHANNELS)}")
        subsets = [by_name[name.lower()] for name in self.subset] or list(_CHAMMI_CHANNELS)
        of_subsets = [f"{subset}/{_CHAMMI_SUBSET_TABLE}" for subset in subsets]
        root, tables = open_tables(self.input, self.table, [_CHAMMI_TABLE], of_subsets)
        seen: set[str] = set()
        splits: set[str] = set()
        num_fields, column = 0, self.path_column or "file_path"
        for table in tables:
            table.require(*(("train_test_split",) if self.split else ()))
            rows = _RowReader(table, column, root, self.pixel_size_um, seen)
            for line, row in table.rows():
                splits.add(row.get("train_test_split", ""))
                subset = row[column].replace("\\", "/").lstrip("./").split("/")[0]
                if self.split and row["train_test_split"].lower() != self.split.lower():
                    continue
                if subset not in _CHAMMI_CHANNELS:
                    reason = f"expected a path in {', '.join(_CHAMMI_CHANNELS)}, got {row[column]!r}"
                    yield Rejected(input=f"{base_name(table.address)}:{line}", kind="unmatched", reason=reason)
                elif subset in subsets:
                    num_fields += 1
                    yield rows.field(line, row, row[column], _CHAMMI_CHANNELS[subset], {"subset": subset})
        if not num_fields:
            of_split = f"of split {self.split} " if self.split else ""
            raise ImageError(
                f"{self.input}: no image {of_split}in {', '.join(subsets)}; splits found: {', '.join(sorted(splits))}"
            )


class _RowReader:
    """Makes fields of the rows of one table; ``seen`` is shared with the other tables."""

    def __init__(self, table: Table, column: str, root: str, pixel_size_um: float | None, seen: set[str]) -> None:
        table.require(column)
        self._table, self._column, self._root, self._pixel_size_um = table, column, root, pixel_size_um
        self._seen = seen
        self._plate_columns = table.plate_columns()

    def field(
        self, line: int, row: Row, name: str, channels: tuple[str, ...], labels: Mapping[str, LabelValue] | None = None
    ) -> Field | Rejected:
        """Return the field; rejected if the path is empty, outside the input, or in an earlier row."""
        address, cell = f"{base_name(self._table.address)}:{line}", row[self._column].strip()
        name = posixpath.normpath(name.replace("\\", "/"))
        if not cell or name.startswith(("../", "/")):
            reason = f"{cell}: outside the input" if cell else f"no file name in {self._column}"
            return Rejected(input=address, kind="unmatched", reason=reason)
        if name in self._seen:
            return Rejected(input=address, kind="listed twice", reason=f"{name} is in an earlier row")
        self._seen.add(name)
        location = _parse_id(posixpath.splitext(name)[0])
        location |= {key: row[column] for key, column in self._plate_columns.items() if row[column]}
        return Field(
            id=name,
            files=(FieldFile(path=join(self._root, *name.split("/")), channels=channels, layout="side_by_side"),),
            **location,
            labels={**row_labels(row, without={self._column, *self._plate_columns.values()}), **(labels or {})},
            pixel_size_um=self._pixel_size_um,
        )
