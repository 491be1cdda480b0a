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
from dinocell.images.listing import base_name, join, parent
from dinocell.images.storage import open_bytes

Row = Mapping[str, str]

# An integer that int() and str() convert back to the same text, or a decimal fraction. 007 and 12E3 are names.
_INTEGER = re.compile(r"-?(?:0|[1-9]\d{0,17})")
_FRACTION = re.compile(r"-?\d+\.\d+(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that was read from ``address``."""

    address: str
    columns: tuple[str, ...]
    text: str = field(repr=False)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield the rows with their line numbers (2 for the first row below the header, unless cells span lines).

        Raise ImageError if a row has another number of cells than the header, or a quote is not closed.
        """
        reader = _reader(self.text, self.address)
        problem: object = None
        try:
            next(reader)
            for cells in reader:
                if len(cells) == len(self.columns):
                    yield reader.line_num, dict(zip(self.columns, cells, strict=True))
                elif cells:
                    problem = f"{len(cells)} cells, but the header has {len(self.columns)}"
                    break
        except csv.Error as error:
            problem = error
        if problem:
            raise ImageError(
                f"{self.address}, line {reader.line_num}: {problem}; the table is cut short, or a quote is not closed"
            )

    def require(self, *columns: str) -> None:
        """Raise ImageError, with a list of the columns, if one is missing."""
        if missing := [column for column in columns if column not in self.columns]:
            raise ImageError(
                f"{self.address}: no column {', '.join(missing)}; it has {', '.join(filter(None, self.columns))}"
            )

    def column_like(self, name: str) -> str | None:
        """Return the first column with this lower-case name, regardless of case and of a prefix ``Metadata_``."""
        by_name = {column.lower(): column for column in reversed(self.columns)}
        return by_name.get(name) or by_name.get(f"metadata_{name}")

    def plate_columns(self) -> dict[str, str]:
        """Return the columns with plate, well and site, as far as they exist."""
        columns = {name: self.column_like(name) for name in ("plate", "well", "site")}
        return {name: column for name, column in columns.items() if column}


def read_table(address: str) -> Table:
    """Read a table: UTF-8, with a header; tab-separated if it is named ``.tsv`` or ``.txt``, otherwise with commas.

    Raise ImageError if it cannot be read, is not UTF-8 text, is empty, has other separators, or duplicate column names.
    """
    content = open_bytes(address)
    header: list[str] | None = None
    problem = text = ""
    try:
        text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
        header = next(_reader(text, address), None)
    except (UnicodeDecodeError, csv.Error) as error:
        problem = f"not a table in UTF-8 ({error}); save it as CSV, UTF-8"
    except (OSError, EOFError, zlib.error) as error:
        problem = f"a damaged gzip file ({error}); download it again"
    columns = tuple(column.strip() for column in header or ())
    duplicates = sorted({column for column in columns if column and columns.count(column) > 1})
    if not columns:
        problem = problem or "an empty table"
    elif len(columns) == 1 and re.search(r"[;\t]", text.splitlines()[0]):
        problem = "its cells are separated by semicolons or tabs; save it as CSV, with commas"
    elif duplicates:
        problem = f"duplicate column names: {', '.join(duplicates)}"
    if problem:
        raise ImageError(f"{address}: {problem}")
    return Table(address=address, columns=columns, text=text)


def open_tables(address: str, tables: Sequence[str], *default_names: Sequence[str]) -> tuple[str, list[Table]]:
    """Return the folder of the images, and the tables: ``tables``, the input itself, or the first defaults that exist.

    Parameters
    ----------
    default_names
        Names of tables in the input, in the order in which they are tried.
    """
    problem = ""
    if address.lower().removesuffix(".gz").endswith((".csv", ".tsv", ".txt")):
        if not tables:
            return parent(address), [read_table(address)]
        problem = f"--input {address} is a table; give the folder of the images instead, or omit --table"
    elif tables:
        return address, [read_table(table) for table in tables]
    for names in () if problem else default_names:
        try:
            return address, [read_table(join(address, name)) for name in names]
        except ImageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            problem = f"{error}; use --table if it is elsewhere"
    raise ImageError(problem)


def row_labels(row: Row, *, without: Collection[str] = (), prefix: str = "") -> dict[str, LabelValue]:
    """Return the cells of a row as labels: ``True`` and ``False``, integers, decimal fractions, otherwise text.

    Empty cells, columns without a name (row numbers, as written by pandas) and those in ``without`` are skipped.

    Parameters
    ----------
    prefix
        Only columns that begin with this, which is removed.
    """
    return {
        column.removeprefix(prefix): _value(cell)
        for column, cell in row.items()
        if cell.strip() and column and not column.startswith("Unnamed: ")
        if column.startswith(prefix) and column not in without
    }


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
    # Strict: an unclosed quote would otherwise swallow all rows below it.
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


_KEYS = ("id", "plate", "well", "site")


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """A source whose fields get the other columns of the table ``labels``, such as a plate map, as labels.

    Fields without a row stay unlabelled; labels of the source are replaced by those of the table. Rows without a key
    are skipped, as spreadsheets put them below a table.

    Attributes
    ----------
    labels_key
        The columns that identify the fields of a row: ``COLUMN=plate``, ``=well``, ``=site`` or ``=id``; or just the
        column, if it has that name (also ``Metadata_Well``). Wells are compared as positions: ``A1`` is ``A01``.
    """

    source: Source
    labels: str
    labels_key: tuple[str, ...]

    def fields(self) -> Iterator[Field | Rejected]:
        """List the fields of the source, with the labels of the table."""
        keys, labels_by_key = self._read_labels()
        num_fields = num_labelled = 0
        example = ""
        for item in self.source.fields():
            if isinstance(item, Rejected):
                yield item
                continue
            key = tuple(_normalize(name, str(getattr(item, name) or "")) for name in keys)
            labels = labels_by_key.get(key)
            num_fields += 1
            num_labelled += labels is not None
            example = example or ", ".join(f"{name} {value!r}" for name, value in zip(keys, key, strict=True))
            yield item if labels is None else replace(item, labels={**item.labels, **labels})
        if num_fields and not num_labelled:
            raise ImageError(
                f"{self.labels}: no row matches any of the {num_fields} fields (the first: {example}); "
                "check --labels-key"
            )

    def _read_labels(self) -> tuple[list[str], dict[tuple[str, ...], dict[str, LabelValue]]]:
        """Return the compared attributes of the fields, and the labels by their values."""
        table = read_table(self.labels)
        columns: dict[str, str] = {}
        for item in self.labels_key:
            column, _, name = (
                item.rpartition("=") if "=" in item else (item, "", item.lower().removeprefix("metadata_"))
            )
            if name not in _KEYS or name in columns:
                raise ImageError(f"--labels-key {item}: expected COLUMN=id, =plate, =well or =site, each at most once")
            columns[name] = column
        table.require(*columns.values())
        labels_by_key: dict[tuple[str, ...], dict[str, LabelValue]] = {}
        for line, row in table.rows():
            key = tuple(_normalize(name, row[column].strip()) for name, column in columns.items())
            labels = row_labels(row, without=columns.values())
            if any(key) and labels_by_key.setdefault(key, labels) != labels:
                raise ImageError(f"{self.labels}, line {line}: another row has other labels for {', '.join(key)}")
        return list(columns), labels_by_key


def _normalize(name: str, value: str) -> str:
    match = re.fullmatch(r"([A-Za-z]{1,2})0*(\d+)", value) if name == "well" else None
    return f"{match[1].upper()}{int(match[2]):02d}" if match else value
