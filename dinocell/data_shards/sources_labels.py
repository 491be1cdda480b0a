"""Labels from a table of the user's, such as a plate map, for the fields of any source."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dinocell.data_shards.fields import Field, LabelValue, Rejected, Source
from dinocell.data_shards.table import labels_of, read_table
from dinocell.errors import ImageError

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
            labels = labels_of(row, without=columns.values())
            if rows.setdefault(key, labels) != labels:
                raise ImageError(f"{self.labels}, line {line}: another row says otherwise for {', '.join(key)}")
        return list(columns), rows


def _comparable(name: str, value: str) -> str:
    match = re.fullmatch(r"([A-Za-z]{1,2})0*(\d+)", value) if name == "well" else None
    return f"{match[1].upper()}{int(match[2]):02d}" if match else value
