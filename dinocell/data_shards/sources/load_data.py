"""The images of a CellProfiler pipeline, as listed in its LoadData table (``load_data.csv``)."""

import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinocell.data_shards.sources.field import ChannelFile, Field, Missing, Rejected, group_fields
from dinocell.data_shards.sources.table import Row, Table, open_tables, row_labels
from dinocell.errors import ImageError
from dinocell.images.listing import base_name, join
from dinocell.images.storage import file_exists, folder_exists


@dataclass(frozen=True, kw_only=True)
class LoadDataSource:
    """Rows with ``FileName_OrigDNA``, ``PathName_OrigDNA`` (or ``URL_OrigDNA``), ``Metadata_Plate``...

    Channels are the columns ``FileName_Orig<channel>``; if there are none, all ``FileName_<channel>`` except the
    illumination functions (``Illum<channel>``). The columns ``Metadata_*`` become labels, except plate, well, site.

    ``PathName`` is usually a folder of the machine that made the table. If it exists, or is an address, it is used
    unchanged. Otherwise it is searched for in the input: for ``/home/ubuntu/bucket/P1/Images``, the first of
    ``IN/home/ubuntu/bucket/P1/Images``, ``IN/ubuntu/bucket/P1/Images``... ``IN/Images`` that exists, then the input
    itself, if it contains the first file. This takes one search per folder, not per file. Rows without an existing
    folder are rejected; two fields that would use one file are an error.

    Attributes
    ----------
    input
        The folder of the images, with ``load_data.csv`` in it; or the table.
    table
        The tables, if elsewhere.
    id_columns
        The columns that make a field's id, with or without ``Metadata_``; empty uses plate, well and site if there are
        well and site, otherwise the name of the first file.
    """

    input: str
    table: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    missing: Missing = "keep"
    id_columns: tuple[str, ...] = ()

    def fields(self) -> Iterator[Field | Rejected]:
        """List the rows without files, then the fields, sorted by id."""
        root, tables = open_tables(self.input, self.table, ["load_data.csv"])
        folders: dict[str, str | None] = {}
        files: list[ChannelFile] = []
        channels: dict[str, None] = {}
        for table in tables:
            columns = _image_columns(table)
            channels |= dict.fromkeys(columns)
            for row_files in _read_rows(table, columns, self.id_columns, root, folders):
                if isinstance(row_files, Rejected):
                    yield row_files
                else:
                    files += row_files
        if not files:
            hint = f"; {next(iter(folders))} is not in {root}: --input must be the images' folder" if folders else ""
            raise ImageError(f"{', '.join(table.address for table in tables)}: no row has existing files{hint}")
        _check_unique_files(files)
        available = {file.channel for file in files}
        yield from group_fields(
            files,
            channels=self.channels or tuple(name for name in channels if name in available),
            missing=self.missing,
            pixel_size_um=self.pixel_size_um,
        )


def _image_columns(table: Table) -> dict[str, str]:
    """Return the channels, in the table's order, and what their columns are named after: ``OrigDNA`` for ``DNA``."""
    for kind in ("FileName_", "URL_"):
        names = [column.removeprefix(kind) for column in table.columns if column.startswith(kind)]
        names = [name for name in names if not name.startswith("Illum")]
        original = [name for name in names if name.startswith("Orig") and name != "Orig"]
        if names:
            break
    else:
        table.require("FileName_Orig... or URL_Orig...")
    return {name.removeprefix("Orig"): name for name in original} or {name: name for name in names}


def _read_rows(
    table: Table, columns: Mapping[str, str], id_columns: Sequence[str], root: str, folders: dict[str, str | None]
) -> Iterator[list[ChannelFile] | Rejected]:
    """Yield the channels' files of each row; ``folders`` caches the actual folder of each folder in the tables."""
    plate_columns = table.plate_columns()
    id_columns = [table.column_like(column.lower()) or column for column in id_columns]
    table.require(*id_columns)
    if not id_columns and {"well", "site"} <= plate_columns.keys():
        id_columns = list(plate_columns.values())
    for line, row in table.rows():
        location: dict[str, Any] = {key: row[column] for key, column in plate_columns.items() if row[column]}
        labels = row_labels(row, without=plate_columns.values(), prefix="Metadata_")
        id_parts = [row[column] for column in id_columns]
        field_id = "/".join(id_parts) if any(id_parts) else ""
        files: list[ChannelFile] = []
        kind, reason = "missing channel", "no file name in any channel's column"
        for channel, column in columns.items():
            listed_folder, name = _listed_file(row, column)
            if not name:
                continue
            key = listed_folder.replace("\\", "/").rstrip("/")
            if key not in folders:
                folders[key] = _find_folder(key, name, root)
            folder = folders[key]
            series, frame = (row.get(f"{prefix}_{column}", "").strip() for prefix in ("Series", "Frame"))
            kind, reason = "unmatched", ""
            if folder is None:
                kind, reason = "missing folder", f"{listed_folder}: neither it nor an end of it in the input exists"
            elif series not in ("", "0"):
                reason = f"Series_{column} is {series}; series cannot be selected, export them to files"
            elif frame and not frame.isdecimal():
                reason = f"Frame_{column} is {frame!r}; expected a number from 0"
            if folder is None or reason:
                break
            field_id = field_id or name
            is_verbatim = f"FileName_{column}" not in row and "://" in folder  # an address in the table
            files.append(
                ChannelFile(
                    field_id=field_id,
                    channel=channel,
                    path=f"{folder}/{name}" if is_verbatim else join(folder, name),
                    frame=int(frame) if frame else None,
                    labels=labels,
                    **location,
                )
            )
        yield Rejected(input=f"{base_name(table.address)}:{line}", kind=kind, reason=reason) if reason else files


def _listed_file(row: Row, column: str) -> tuple[str, str]:
    """Return folder and file name of a channel; empty if the row has none."""
    if (name := row.get(f"FileName_{column}")) is not None:
        return row.get(f"PathName_{column}", "").strip(), name.strip()
    url = row[f"URL_{column}"].strip()
    if url.startswith("file:"):
        url = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    folder, _, name = url.replace("\\", "/").rpartition("/")
    return folder, name


def _find_folder(folder: str, file: str, root: str) -> str | None:
    """Return a folder unchanged if it exists, or the longest end of its path that exists in the root, or None.

    A row without a folder means the root, whether the file exists there or not.
    """
    if not folder:
        return root
    is_absolute = folder.startswith("/") or re.match(r"[A-Za-z]:", folder) is not None
    if "://" in folder or (is_absolute and folder_exists(folder)):
        return folder
    parts = [part for part in re.sub(r"^[A-Za-z]:", "", folder).split("/") if part not in ("", ".")]
    is_web = root.startswith(("http://", "https://"))  # web servers cannot be asked for folders
    for start in range(len(parts)):
        candidate = join(root, *parts[start:])
        if ".." not in parts[start:] and (file_exists(join(candidate, file)) if is_web else folder_exists(candidate)):
            return candidate
    return root if file_exists(join(root, file)) else None


def _check_unique_files(files: Sequence[ChannelFile]) -> None:
    """Raise ImageError if two fields or channels would use one file."""
    used: dict[tuple[str, int | None], ChannelFile] = {}
    for file in files:
        other = used.setdefault((file.path, file.frame), file)
        if (other.field_id, other.channel) != (file.field_id, file.channel):
            raise ImageError(
                f"{file.path}: both channel {other.channel} of {other.field_id} and channel {file.channel} of "
                f"{file.field_id} use it; --input must be the folder that contains all folders of the table"
            )
