"""The images of a CellProfiler pipeline, as its LoadData table lists them (``load_data.csv``)."""

import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dinocell.data_shards.sources.field import ChannelFile, Field, Missing, Rejected, group_fields
from dinocell.data_shards.sources.table import Row, Table, open_tables, row_labels
from dinocell.errors import ImageError
from dinocell.images.storage import base_name, file_exists, folder_exists, join

_USUAL_NAMES = ("load_data.csv",)


@dataclass(frozen=True, kw_only=True)
class LoadDataSource:
    """Rows with ``FileName_OrigDNA``, ``PathName_OrigDNA`` (or ``URL_OrigDNA``), ``Metadata_Plate``...

    Channels are the columns ``FileName_Orig<channel>``; without a single such, all ``FileName_<channel>`` but the
    illumination functions (``Illum<channel>``). The columns ``Metadata_*`` become labels, apart from plate, well, site.

    ``PathName`` is most often a folder of the machine that made the table. It is taken as it is where it exists, or is
    an address. Otherwise it is looked for below the input: of ``/home/ubuntu/bucket/P1/Images``, the longest end that
    exists, ``IN/home/ubuntu/bucket/P1/Images``, ``IN/ubuntu/bucket/P1/Images``... ``IN/Images``, and last the input
    itself, if the first file is in it. This is asked once a folder, not once a file. Rows whose folder is nowhere are
    rejected, and two fields that would come from one file are an error.

    Attributes
    ----------
    input
        The folder of the images, with ``load_data.csv`` in it; or the table.
    table
        The tables, if elsewhere.
    id_columns
        The columns that make a field's id, with or without ``Metadata_``; empty takes plate, well and site, where there
        are well and site, else the name of the first file.
    """

    input: str
    table: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    missing: Missing = "keep"
    id_columns: tuple[str, ...] = ()

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields, sorted by id, and before them the rows without files."""
        root, tables = open_tables(self.input, self.table, _USUAL_NAMES)
        folders: dict[str, str | None] = {}
        files: list[ChannelFile] = []
        names: dict[str, None] = {}
        for table in tables:
            columns = _image_columns(table)
            read_row = _RowReader(table, columns, self.id_columns)
            _find_folders(table, columns, root, folders)
            for line, row in table.rows():
                try:
                    of_row = read_row(row, folders)
                except _RowError as error:
                    where = f"{base_name(table.address)}:{line}"
                    yield Rejected(input=where, kind=error.kind, reason=str(error))
                    continue
                files += of_row
            names |= dict.fromkeys(columns)
        if not files:
            looked = (
                f"; {next(iter(folders))} is not below {root}: --input is to be the images' folder" if folders else ""
            )
            raise ImageError(f"{', '.join(table.address for table in tables)}: no row has its files{looked}")
        _check_own_files(files)
        found = {file.channel for file in files}
        yield from group_fields(
            files,
            channels=self.channels or tuple(name for name in names if name in found),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


class _RowError(Exception):
    """A row that gives no field."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class _ImageColumns:
    """The columns of one channel: a file name and a folder, or an address; and which frame of the file."""

    file: str | None
    folder: str | None
    url: str | None
    frame: str | None
    series: str | None

    def place(self, row: Row) -> tuple[str, str]:
        """Return folder and file name; empty where the row has none."""
        if self.file:
            return (row[self.folder].strip() if self.folder else ""), row[self.file].strip()
        url = row[self.url or ""].strip()
        if url.startswith("file:"):
            url = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
        folder, _, name = url.replace("\\", "/").rpartition("/")
        return folder, name

    def path(self, folder: str, name: str) -> str:
        """Return where to open a file; an address of the table is taken letter by letter."""
        return join(folder, name) if self.file or "://" not in folder else f"{folder}/{name}"


def _image_columns(table: Table) -> dict[str, _ImageColumns]:
    """Return the columns of each channel, in the table's order."""
    for kind in ("FileName_", "URL_"):
        names = [column.removeprefix(kind) for column in table.columns if column.startswith(kind)]
        names = [name for name in names if not name.startswith("Illum")]
        original = [name for name in names if name.startswith("Orig") and name != "Orig"]
        if names:
            break
    else:
        raise ImageError(
            f"{table.address}: no column FileName_Orig... or URL_Orig...; it has {', '.join(table.columns)}"
        )

    def column(prefix: str, name: str) -> str | None:
        return f"{prefix}{name}" if f"{prefix}{name}" in table.columns else None

    return {
        name.removeprefix("Orig") if original else name: _ImageColumns(
            file=column("FileName_", name),
            folder=column("PathName_", name),
            url=column("URL_", name),
            frame=column("Frame_", name),
            series=column("Series_", name),
        )
        for name in original or names
    }


class _RowReader:
    """Makes the channels' files of a row."""

    def __init__(self, table: Table, columns: Mapping[str, _ImageColumns], id_columns: Sequence[str]) -> None:
        self._columns = columns
        self._places = table.places()
        self._id_columns = [table.column_like(column.lower()) or column for column in id_columns]
        table.require(*self._id_columns)
        if not id_columns and {"well", "site"} <= self._places.keys():
            self._id_columns = list(self._places.values())

    def __call__(self, row: Row, folders: Mapping[str, str | None]) -> list[ChannelFile]:
        places = {place: row[column] for place, column in self._places.items() if row[column]}
        labels = row_labels(row, without=self._places.values(), prefix="Metadata_")
        id_parts = [row[column] for column in self._id_columns]
        field_id = "/".join(id_parts) if any(id_parts) else ""
        files: list[ChannelFile] = []
        for channel, columns in self._columns.items():
            folder, name = columns.place(row)
            if not name:
                continue
            found = folders[_key(folder)]
            if found is None:
                raise _RowError("missing folder", f"{folder}: neither there nor, under a shorter path, below the input")
            field_id = field_id or name
            files.append(
                ChannelFile(
                    field_id=field_id,
                    channel=channel,
                    path=columns.path(found, name),
                    frame=_frame(columns, row),
                    plate=places.get("plate"),
                    well=places.get("well"),
                    site=places.get("site"),
                    labels=labels,
                )
            )
        if not files:
            raise _RowError("missing channel", "no file name in any channel's column")
        return files


def _frame(columns: _ImageColumns, row: Row) -> int | None:
    series, frame = (row[column].strip() if column else "" for column in (columns.series, columns.frame))
    if series not in ("", "0"):
        raise _RowError("unmatched", f"{columns.series} is {series}; series of a file cannot be chosen, export them")
    if not frame:
        return None
    if not frame.isdecimal():
        raise _RowError("unmatched", f"{columns.frame} is {frame!r}; expected a number from 0")
    return int(frame)


def _find_folders(
    table: Table, columns: Mapping[str, _ImageColumns], root: str, folders: dict[str, str | None]
) -> None:
    """Add where the folders of a table really are; None for nowhere."""
    for _, row in table.rows():
        for channel_columns in columns.values():
            folder, name = channel_columns.place(row)
            if name and _key(folder) not in folders:
                folders[_key(folder)] = _found_folder(_key(folder), name, root)


def _key(folder: str) -> str:
    return folder.replace("\\", "/").rstrip("/")


def _found_folder(folder: str, file: str, root: str) -> str | None:
    """Return a folder as it is, or the longest end of its path that exists below the root; None for nowhere.

    A row without a folder means the root, whether its file is there or not.
    """
    if not folder:
        return root
    if "://" in folder:
        return folder
    is_absolute = folder.startswith("/") or re.match(r"[A-Za-z]:", folder) is not None
    if is_absolute and folder_exists(folder):
        return folder
    parts = [part for part in re.sub(r"^[A-Za-z]:", "", folder).split("/") if part not in ("", ".")]
    on_web = root.startswith(("http://", "https://"))
    for start in range(len(parts)):
        if ".." in parts[start:]:
            continue
        candidate = join(root, *parts[start:])
        if file_exists(join(candidate, file)) if on_web else folder_exists(candidate):
            return candidate
    return root if file_exists(join(root, file)) else None


def _check_own_files(files: Sequence[ChannelFile]) -> None:
    """Raise if two fields or channels would be made of one file."""
    used: dict[tuple[str, int | None], ChannelFile] = {}
    for file in files:
        other = used.setdefault((file.path, file.frame), file)
        if (other.field_id, other.channel) != (file.field_id, file.channel):
            raise ImageError(
                f"{file.path}: both channel {other.channel} of {other.field_id} and channel {file.channel} of "
                f"{file.field_id} lead to it; --input must be the folder that holds all folders of the table"
            )
