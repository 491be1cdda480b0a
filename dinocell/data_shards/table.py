"""Tables of images (CSV, also ``.csv.gz`` and tab-separated): rows by column name, cells as labels."""

import _csv
import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dinocell.data_shards.fields import LabelValue
from dinocell.data_shards.listing import base_name, join, parent
from dinocell.data_shards.locations import open_bytes
from dinocell.errors import ImageError

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


def root_and_tables(address: str, given: Sequence[str], usual: Sequence[str]) -> tuple[str, list[Table]]:
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


def labels_of(row: Row, *, without: Collection[str] = (), prefix: str = "") -> dict[str, LabelValue]:
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
