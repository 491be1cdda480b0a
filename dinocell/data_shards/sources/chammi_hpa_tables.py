"""Sources that public data sets describe in tables: HPA single cells, HPA fields of view, CHAMMI.

All three store the channels of an image side by side in one grey picture. File and column names are those that the
loaders of Cell-DINO (github.com/facebookresearch/dinov2, December 2025) and CHAMMI (doi 10.5281/zenodo.7988357) read.
"""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from dinocell.data_shards.sources.field import Field, FieldFile, LabelValue, Rejected, check_plain_names
from dinocell.data_shards.sources.hpa import parse_hpa_id
from dinocell.data_shards.sources.table import Row, Table, is_table, open_tables, row_labels
from dinocell.errors import ImageError
from dinocell.images.storage import base_name, join, list_files

_HPA_CHANNELS = ("microtubules", "protein", "nucleus", "er")

# Table, column and folder of each split.
_HPA_ONE_SPLITS = {
    "all": (
        "varied_size_masked_single_cells_pretrain_20240507.csv",
        "img_path",
        "varied_size_masked_single_cells_HPA",
    ),
    "train": (
        "fixed_size_masked_single_cells_pretrain_20240507.csv",
        "file",
        "fixed_size_masked_single_cells_HPA",
    ),
    "val": (
        "fixed_size_masked_single_cells_evaluation_20240507.csv",
        "file",
        "fixed_size_masked_single_cells_HPA",
    ),
}
_HPA_FOV_SPLITS = {
    "ssl": ("whole_images_names.csv", "ID", "normalized_data"),
    "train": ("whole_images_512_train.csv", "file", "512_whole_images"),
    "val": ("whole_images_512_test.csv", "file", "512_whole_images"),
}

_CHAMMI_TABLE, _CHAMMI_SUBSET_TABLE = "morphem70k_v2.csv", "enriched_meta.csv"
_CHAMMI_CHANNELS = {
    "Allen": ("nucleus", "membrane", "protein"),
    "HPA": _HPA_CHANNELS,
    "CP": ("nucleus", "er", "rna", "agp", "mito"),
}


@dataclass(frozen=True, kw_only=True)
class HpaOneSource:
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

    input: str
    split: str = "all"
    table: tuple[str, ...] = ()
    path_column: str | None = None
    channels: tuple[str, ...] = _HPA_CHANNELS
    pixel_size_um: float | None = None

    def fields(self) -> Iterator[Field | Rejected]:
        """List the rows of the table as fields, in its order."""
        check_plain_names(self.channels)
        name, column, folder = _of_split(_HPA_ONE_SPLITS, self.split)
        root, tables = open_tables(self.input, self.table, (name,))
        seen: set[str] = set()
        for table in tables:
            used = self.path_column or column
            rows = _Rows(table, used, root, self.pixel_size_um, seen)
            for line, row in table.rows():
                inner = row[used] if self.split.lower() == "all" else posixpath.basename(row[used])
                yield rows.field(line, row, f"{folder}/{inner}", self.channels)


@dataclass(frozen=True, kw_only=True)
class HpaFovSource:
    """HPA-FoV: fields of view of the Human Protein Atlas (BioStudies S-BIAD2443).

    Attributes
    ----------
    input
        The folder with the tables and the image folders, or one of the tables.
    split
        ``ssl``: all images, without labels, for pretraining. ``train``, ``val``: with 28 protein locations (True or
        False) and the cell line as labels. Images of the table without a file are rejected; .png in the table may be
        .tiff in the folder.
    path_column
        The column with the image, if not ``ID`` (ssl) or ``file`` (train, val).
    """

    input: str
    split: str = "ssl"
    table: tuple[str, ...] = ()
    path_column: str | None = None
    channels: tuple[str, ...] = _HPA_CHANNELS
    pixel_size_um: float | None = None

    def fields(self) -> Iterator[Field | Rejected]:
        """List the rows of the table as fields, in its order."""
        check_plain_names(self.channels)
        name, column, folder = _of_split(_HPA_FOV_SPLITS, self.split)
        root, tables = open_tables(self.input, self.table, (name,))
        present = None
        if not root.startswith(("http://", "https://")):
            present = {file.name for file in list_files(join(root, folder))}
        seen: set[str] = set()
        for table in tables:
            used = self.path_column or column
            rows = _Rows(table, used, root, self.pixel_size_um, seen)
            for line, row in table.rows():
                wanted = posixpath.basename(row[used].replace("\\", "/"))
                found = _present(wanted, present)
                if found is None:
                    reason = f"no {wanted} (.png or .tiff) in {join(root, folder)}"
                    yield Rejected(input=f"{base_name(table.address)}:{line}", kind="missing file", reason=reason)
                    continue
                yield rows.field(line, row, f"{folder}/{found}", self.channels)


@dataclass(frozen=True, kw_only=True)
class ChammiSource:
    """CHAMMI: single cells of three data sets: Allen (WTC-11, 3 channels), HPA (4), CP (Cell Painting, 5).

    Attributes
    ----------
    input
        The folder with ``morphem70k_v2.csv``, else the three ``<subset>/enriched_meta.csv``; or such a table.
    subset
        Which of Allen, HPA, CP; empty takes all.
    split
        A value of the column ``train_test_split`` (Train, Task_one, Task_two...); None takes all.
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
        known = {name.lower(): name for name in _CHAMMI_CHANNELS}
        unknown = [name for name in self.subset if name.lower() not in known]
        if unknown:
            raise ImageError(f"--subset {', '.join(unknown)}: expected some of {', '.join(_CHAMMI_CHANNELS)}")
        chosen = [known[name.lower()] for name in self.subset] or list(_CHAMMI_CHANNELS)
        root, tables = self._tables(chosen)
        seen: set[str] = set()
        splits: set[str] = set()
        num_fields = 0
        for table in tables:
            used = self.path_column or "file_path"
            table.require(*(("train_test_split",) if self.split else ()))
            rows = _Rows(table, used, root, self.pixel_size_um, seen)
            for line, row in table.rows():
                splits.add(row.get("train_test_split", ""))
                subset = row[used].replace("\\", "/").lstrip("./").split("/")[0]
                if self.split and row["train_test_split"].lower() != self.split.lower():
                    continue
                if subset not in _CHAMMI_CHANNELS:
                    reason = f"expected a path in {', '.join(_CHAMMI_CHANNELS)}, got {row[used]!r}"
                    yield Rejected(input=f"{base_name(table.address)}:{line}", kind="unmatched", reason=reason)
                elif subset in chosen:
                    num_fields += 1
                    yield rows.field(line, row, row[used], _CHAMMI_CHANNELS[subset], {"subset": subset})
        if not num_fields:
            where = f"of split {self.split} " if self.split else ""
            raise ImageError(
                f"{self.input}: no image {where}in {', '.join(chosen)}; splits found: {', '.join(sorted(splits))}"
            )

    def _tables(self, chosen: Sequence[str]) -> tuple[str, list[Table]]:
        try:
            return open_tables(self.input, self.table, (_CHAMMI_TABLE,))
        except ImageError as error:
            if self.table or is_table(self.input) or "no such file" not in str(error):
                raise
        names = tuple(f"{subset}/{_CHAMMI_SUBSET_TABLE}" for subset in chosen)
        return open_tables(self.input, (), names)


def _of_split(splits: Mapping[str, tuple[str, str, str]], split: str) -> tuple[str, str, str]:
    if split.lower() not in splits:
        raise ImageError(f"--split {split}: expected one of {', '.join(splits)}")
    return splits[split.lower()]


def _present(wanted: str, present: set[str] | None) -> str | None:
    """Return the file of a folder that a table means: of this name, or with another suffix."""
    forms = [wanted] if PurePosixPath(wanted).suffix in (".png", ".tif", ".tiff", ".jpg") else [f"{wanted}.png"]
    if present is None:
        return forms[0]
    stem = forms[0].rpartition(".")[0]
    forms += [f"{stem}{suffix}" for suffix in (".tiff", ".tif", ".png")]
    return next((form for form in forms if form in present), None)


class _Rows:
    """Makes fields of the rows of one table; ``seen`` is shared with the other tables."""

    def __init__(self, table: Table, column: str, root: str, pixel_size_um: float | None, seen: set[str]) -> None:
        table.require(column)
        self._table, self._column, self._root, self._pixel_size_um = table, column, root, pixel_size_um
        self._seen = seen
        self._places = table.places()

    def field(
        self, line: int, row: Row, name: str, channels: tuple[str, ...], labels: Mapping[str, LabelValue] | None = None
    ) -> Field | Rejected:
        """Return the field; rejected where the path leads out of the input, is empty, or was there before."""
        where, cell = f"{base_name(self._table.address)}:{line}", row[self._column].strip()
        name = posixpath.normpath(name.replace("\\", "/"))
        if not cell or name.startswith(("../", "/")):
            reason = f"no file name in {self._column}" if not cell else f"{cell}: leads out of the input"
            return Rejected(input=where, kind="unmatched", reason=reason)
        if name in self._seen:
            return Rejected(input=where, kind="listed twice", reason=f"{name} is in an earlier row")
        self._seen.add(name)
        places = {place: row[column] for place, column in self._places.items() if row[column]}
        places = {**parse_hpa_id(posixpath.splitext(name)[0]), **places}
        return Field(
            id=name,
            files=(FieldFile(path=join(self._root, *name.split("/")), channels=channels, layout="side_by_side"),),
            plate=places.get("plate"),
            well=places.get("well"),
            site=places.get("site"),
            labels={**row_labels(row, without={self._column, *self._places.values()}), **(labels or {})},
            pixel_size_um=self._pixel_size_um,
        )
