"""Tables of images (CSV, also ``.csv.gz`` and tab-separated): rows by column name, cells as labels."""

import _csv
import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dinocell.data_shards.sources.field import Field, LabelValue, Rejected, Source
from dinocell.errors import ImageError
from dinocell.images.storage import base_name, join, open_bytes, parent

Row = Mapping[str, str]

_PLACES = ("plate", "well", "site")
# An integer that int() and str() give back as it was, or a decimal fraction. 007 and 12E3 are names.
_INTEGER = re.compile(r"-?(?:0|[1-9]\d{0,17})")
_FRACTION = re.compile(r"-?\d+\.\d+(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that was read; ``address`` is where from."""

    address: str
    columns: tuple[str, ...]
    text: str = field(repr=False)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield the rows with their line numbers (the first row below the header has 2, unless cells span lines).

        Raises
        ------
        ImageError
            If a row has another number of cells than the header, or a quote is not closed.
        """
        reader = _reader(self.text, self.address)
        try:
            next(reader)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(self.columns):
                    raise ImageError(
                        f"{self.address}, line {reader.line_num}: {len(cells)} cells, but the header has "
                        f"{len(self.columns)}; the table is cut short or damaged"
                    )
                yield reader.line_num, dict(zip(self.columns, cells, strict=True))
        except csv.Error as error:
            raise ImageError(
                f"{self.address}, line {reader.line_num}: {error}; the table is cut short, or a quote is not closed"
            ) from error

    def require(self, *columns: str) -> None:
        """Raise ImageError, listing what there is, if a column is missing."""
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise ImageError(
                f"{self.address}: no column {', '.join(missing)}; it has {', '.join(filter(None, self.columns))}"
            )

    def column_like(self, *names: str) -> str | None:
        """Return the first column of one of these names, upper and lower case alike, also after ``Metadata_``."""
        known = {column.lower(): column for column in reversed(self.columns)}
        tried = [form for name in names for form in (name, f"metadata_{name}")]
        return next((known[name] for name in tried if name in known), None)

    def places(self) -> dict[str, str]:
        """Return which columns hold plate, well and site, where there are such."""
        found = {place: self.column_like(place) for place in _PLACES}
        return {place: column for place, column in found.items() if column}


def read_table(address: str) -> Table:
    """Read a table: UTF-8, with a header; tabs between cells if it is named ``.tsv`` or ``.txt``, else commas.

    Raises
    ------
    ImageError
        If it cannot be read, is not UTF-8 text, is empty, has other separators, or two columns of one name.
    """
    content = open_bytes(address)
    try:
        text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
        header = next(_reader(text, address), None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{address}: not a table in UTF-8 ({error}); save it as CSV, UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{address}: a damaged gzip file ({error}); download it again") from error
    if not header:
        raise ImageError(f"{address}: an empty table")
    if len(header) == 1 and (other := next((mark for mark in ";\t" if mark in header[0]), "")):
        named = "semicolons" if other == ";" else "tabs"
        raise ImageError(f"{address}: its cells are separated by {named}; save it as CSV, with commas")
    columns = tuple(column.strip() for column in header)
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise ImageError(f"{address}: two columns are named {', '.join(twice)}; rename one")
    return Table(address=address, columns=columns, text=text)


def is_table(address: str) -> bool:
    """Return whether this is a table, by its name."""
    return address.lower().removesuffix(".gz").endswith((".csv", ".tsv", ".txt"))


def open_tables(address: str, given: Sequence[str], usual: Sequence[str]) -> tuple[str, list[Table]]:
    """Return the folder of the images and the tables: those given, the input itself, or those of the usual names.

    Raises
    ------
    ImageError
        If a table cannot be read, or the input is one and others are given too.
    """
    if is_table(address):
        if given:
            raise ImageError(f"--input {address} is a table; give the folder of the images there, or leave out --table")
        return parent(address), [read_table(address)]
    if given:
        return address, [read_table(table) for table in given]
    try:
        return address, [read_table(join(address, name)) for name in usual]
    except ImageError as error:
        if "no such file" not in str(error):
            raise
        raise ImageError(f"{error}; say where the table is with --table") from error


def row_labels(row: Row, *, without: Collection[str] = (), prefix: str = "") -> dict[str, LabelValue]:
    """Return the cells of a row as labels: ``True`` and ``False``, whole numbers, fractions, else text.

    Empty cells, columns without a name (row numbers, as pandas writes them) and those of ``without`` are left out.

    Parameters
    ----------
    prefix
        Only columns that begin with this, which is taken off.
    """
    return {
        column.removeprefix(prefix): _value(cell)
        for column, cell in row.items()
        if cell.strip() and column.startswith(prefix) and column not in without and not _is_row_number(column)
    }


def _is_row_number(column: str) -> bool:
    return not column or column.startswith("Unnamed: ")


def _value(cell: str) -> LabelValue:
    cell = cell.strip()
    if cell in ("True", "False"):
        return cell == "True"
    if _INTEGER.fullmatch(cell):
        return int(cell)
    number = float(cell) if _FRACTION.fullmatch(cell) else math.inf
    return number if math.isfinite(number) else cell


def _reader(text: str, address: str) -> _csv.Reader:
    name = base_name(address).lower().removesuffix(".gz")
    delimiter = "\t" if name.endswith((".tsv", ".txt")) else ","
    # Strict: a quote that is not closed would take all rows below it into one cell.
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


# --- sources_labels ------------------------------------------------------------------------------------------------
#
# Labels from a table of the user's, such as a plate map, for the fields of any source.

_KEYS = ("id", "plate", "well", "site")


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """A source whose fields get the other columns of a table's rows as labels.

    Fields without a row stay without; labels that the source has itself are replaced by those of the table. Rows that
    name no field are left out, as spreadsheets put them below a table.

    Attributes
    ----------
    labels
        The table.
    labels_key
        Which columns say to which fields a row belongs: ``COLUMN=plate``, ``=well``, ``=site`` or ``=id``; or just the
        column, where it is called so (also ``Metadata_Well``). Wells are compared as positions: ``A1`` is ``A01``.
    """

    source: Source
    labels: str
    labels_key: tuple[str, ...]

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields of the source, with the labels of the table."""
        keys, rows = self._rows()
        num_fields = num_labelled = 0
        example = ""
        for item in self.source.fields():
            if isinstance(item, Rejected):
                yield item
                continue
            key = tuple(_comparable(name, str(getattr(item, name) or "")) for name in keys)
            found = rows.get(key)
            num_fields += 1
            num_labelled += found is not None
            example = example or ", ".join(f"{name} {value!r}" for name, value in zip(keys, key, strict=True))
            yield item if found is None else replace(item, labels={**item.labels, **found})
        if num_fields and not num_labelled:
            raise ImageError(
                f"{self.labels}: no row goes with any of the {num_fields} fields (the first: {example}); "
                "check --labels-key"
            )

    def _rows(self) -> tuple[list[str], dict[tuple[str, ...], dict[str, LabelValue]]]:
        """Return the fields' attributes that are compared, and the labels by their values."""
        table = read_table(self.labels)
        columns: dict[str, str] = {}
        for item in self.labels_key:
            column, _, name = (
                item.rpartition("=") if "=" in item else (item, "", item.lower().removeprefix("metadata_"))
            )
            if name not in _KEYS:
                raise ImageError(f"--labels-key {item}: expected COLUMN=id, =plate, =well or =site")
            if name in columns:
                raise ImageError(f"--labels-key {item}: {columns[name]} is the {name} already")
            columns[name] = column
        table.require(*columns.values())
        rows: dict[tuple[str, ...], dict[str, LabelValue]] = {}
        for line, row in table.rows():
            key = tuple(_comparable(name, row[column].strip()) for name, column in columns.items())
            if not any(key):
                continue
            labels = row_labels(row, without=columns.values())
            if rows.setdefault(key, labels) != labels:
                raise ImageError(f"{self.labels}, line {line}: another row says otherwise for {', '.join(key)}")
        return list(columns), rows


def _comparable(name: str, value: str) -> str:
    match = re.fullmatch(r"([A-Za-z]{1,2})0*(\d+)", value) if name == "well" else None
    return f"{match[1].upper()}{int(match[2]):02d}" if match else value
