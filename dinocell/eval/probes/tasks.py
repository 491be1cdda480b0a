"""Targets of probes: one label column of classes, or several boolean columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import DinocellError
from dinocell.eval.probes.image_sets import labels_of

PROTEIN, CELL_TYPE = "PROTEIN_LOCALIZATION", "CELL_TYPE"

# Parts of the location names of the Human Protein Atlas; its tables also have one column per cell line.
_PLACES = (
    "nucle", "cyto", "golgi", "mitochond", "mitotic", "vesicle", "plasma", "centr", "actin", "tubule", "aggresome",
    "filament", "reticulum", "peroxi", "endosome", "lysosome", "lipid", "staining", "negative", "rods", "junction",
    "focal", "spindle", "midbody", "chromosome", "body", "bodies", "multi-location", "unspecific",
)  # fmt: skip
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0", "")


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Targets of two sets: class indices, (n,), or rows of zeros and ones, (n c).

    Unlabelled images of either set are excluded; the masks select the labelled ones.
    """

    classes: tuple[str, ...]
    train: Tensor
    test: Tensor
    train_kept: Tensor
    test_kept: Tensor
    multilabel: bool


def make_task(
    name: str,
    train: Sequence[Mapping[str, LabelValue]],
    test: Sequence[Mapping[str, LabelValue]],
    *,
    train_name: str,
    test_name: str,
    columns: Sequence[str] = (),
) -> Task:
    """Read the targets of a task from the label columns of two sets.

    Parameters
    ----------
    name
        A column of classes; or ``PROTEIN_LOCALIZATION``: the boolean columns that are named after cell compartments; or
        ``CELL_TYPE``: the column ``cell_type``, else the other boolean columns, one of which is true. Images without a
        true compartment are unlabelled.
    columns
        For several labels per image: their columns, with any names; ``name`` is then only the name of the task.

    Raises
    ------
    DinocellError
        If a column is missing or has invalid values.
    """
    sets, set_names = (train, test), (train_name, test_name)
    multilabel = bool(columns) or name == PROTEIN
    if multilabel:
        classes = list(columns) or [column for column in _boolean_columns(train) if _is_place(column)]
        if not classes:
            raise DinocellError(
                f"{train_name}: no boolean columns named after cell compartments; select columns with --columns"
            )
        rows = [_rows(labels, classes, where) for labels, where in zip(sets, set_names, strict=True)]
        # In the Human Protein Atlas an image without a location is not annotated. Columns selected by the caller
        # may all be false.
        kept = [torch.ones(len(row), dtype=torch.bool) if columns else row.bool().any(1) for row in rows]
        targets = [row[labelled] for row, labelled in zip(rows, kept, strict=True)]
        lacking = "has a true cell compartment"
    else:
        named = [_classes(name, labels, where) for labels, where in zip(sets, set_names, strict=True)]
        classes = sorted({label for labels in named for label in labels if label})
        index_of = {label: index for index, label in enumerate(classes)}
        kept = [torch.tensor([bool(label) for label in labels]) for labels in named]
        targets = [torch.tensor([index_of[label] for label in labels if label]) for labels in named]
        lacking = f"has a label {name!r}"
    for target, where in zip(targets, set_names, strict=True):
        if not len(target):
            raise DinocellError(f"{where}: no image {lacking}")
    return Task(
        classes=tuple(classes),
        train=targets[0],
        test=targets[1],
        train_kept=kept[0],
        test_kept=kept[1],
        multilabel=multilabel,
    )


def _classes(name: str, rows: Sequence[Mapping[str, LabelValue]], where: str) -> list[str]:
    if name != CELL_TYPE or any(name in row for row in rows):
        return labels_of(rows, name, where)
    if any("cell_type" in row for row in rows):
        return labels_of(rows, "cell_type", where)
    columns = [column for column in _boolean_columns(rows) if not _is_place(column)]
    if not columns:
        raise DinocellError(f"{where}: no column cell_type and no boolean columns of cell lines")
    classes = []
    for index, row in enumerate(rows):
        true = [column for column in columns if _is_true(row.get(column, ""), column, where)]
        if len(true) > 1:
            raise DinocellError(f"{where}: image {index + 1} has several cell types: {', '.join(true)}")
        classes.append(true[0] if true else "")
    return classes


def _rows(rows: Sequence[Mapping[str, LabelValue]], columns: Sequence[str], where: str) -> Tensor:
    existing = {key for row in rows for key in row}
    missing = [column for column in columns if column not in existing]
    if missing:
        raise DinocellError(
            f"{where}: no label column {', '.join(missing)}; existing columns: {', '.join(sorted(existing)) or 'none'}"
        )
    return torch.tensor([[float(_is_true(row.get(column, ""), column, where)) for column in columns] for row in rows])


def _boolean_columns(rows: Sequence[Mapping[str, LabelValue]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [column for column in columns if all(str(row.get(column, "")).lower() in _TRUE + _FALSE for row in rows)]


def _is_true(value: LabelValue, column: str, where: str) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise DinocellError(f"{where}: column {column}: expected true or false, got {value!r}")
    return text in _TRUE


def _is_place(column: str) -> bool:
    return any(word in column.lower() for word in _PLACES)
