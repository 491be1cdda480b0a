"""What a probe has to predict: one label column of classes, or several columns of true and false."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinocell.data_shards.sources.field import LabelValue
from dinocell.errors import DinocellError
from dinocell.eval.probes.image_sets import labels_of

PROTEIN, CELL_TYPE = "PROTEIN_LOCALIZATION", "CELL_TYPE"

# Words of the Human Protein Atlas's names of locations; its tables hold cell lines as columns beside them.
_PLACES = (
    "nucle", "cyto", "golgi", "mitochond", "mitotic", "vesicle", "plasma", "centr", "actin", "tubule", "aggresome",
    "filament", "reticulum", "peroxi", "endosome", "lysosome", "lipid", "staining", "negative", "rods", "junction",
    "focal", "spindle", "midbody", "chromosome", "body", "bodies", "multi-location", "unspecific",
)  # fmt: skip
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0", "")


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Targets of two sets: class numbers, (n,), or rows of zeros and ones, (n c).

    ``unlabelled`` images of either set are left out; the masks say which stay.
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
        A column of classes; or ``PROTEIN_LOCALIZATION``, the columns of true and false that name places of a cell; or
        ``CELL_TYPE``: a column of that name (in small letters), else the other columns of true and false, one of which
        is true. Images of which no place is true are unlabelled.
    columns
        For several labels an image: the columns, whatever their names; ``name`` then only names the task.

    Raises
    ------
    DinocellError
        If the columns are not there, or their values are not what they should be.
    """
    sets, wheres = (train, test), (train_name, test_name)
    multilabel = bool(columns) or name == PROTEIN
    if multilabel:
        classes = list(columns) or [each for each in _boolean_columns(train) if _is_place(each)]
        if not classes:
            raise DinocellError(
                f"{train_name}: no columns of true and false that name a place of the cell; name them with --columns"
            )
        rows = [_rows(each, classes, where) for each, where in zip(sets, wheres, strict=True)]
        # Every protein is somewhere: an image of the Human Protein Atlas without a place was not looked at. Columns
        # that the caller names may well be all false.
        kept = [torch.ones(len(each), dtype=torch.bool) if columns else each.bool().any(1) for each in rows]
        targets = [each[labelled] for each, labelled in zip(rows, kept, strict=True)]
        lacking = "has a place of the cell that is true"
    else:
        named = [_classes(name, each, where) for each, where in zip(sets, wheres, strict=True)]
        classes = sorted({label for labels in named for label in labels if label})
        number = {label: index for index, label in enumerate(classes)}
        kept = [torch.tensor([bool(label) for label in labels]) for labels in named]
        targets = [torch.tensor([number[label] for label in labels if label]) for labels in named]
        lacking = f"has a label {name!r}"
    for target, where in zip(targets, wheres, strict=True):
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
    columns = [each for each in _boolean_columns(rows) if not _is_place(each)]
    if not columns:
        raise DinocellError(f"{where}: no column cell_type, and no columns of true and false that name cell lines")
    found = []
    for number, row in enumerate(rows):
        true = [column for column in columns if _is_true(row.get(column, ""), column, where)]
        if len(true) > 1:
            raise DinocellError(f"{where}: image {number + 1} is of several cell types: {', '.join(true)}")
        found.append(true[0] if true else "")
    return found


def _rows(rows: Sequence[Mapping[str, LabelValue]], columns: Sequence[str], where: str) -> Tensor:
    known = {key for row in rows for key in row}
    missing = [column for column in columns if column not in known]
    if missing:
        raise DinocellError(
            f"{where}: no label column {', '.join(missing)}; there are {', '.join(sorted(known)) or 'none'}"
        )
    return torch.tensor([[float(_is_true(row.get(each, ""), each, where)) for each in columns] for row in rows])


def _boolean_columns(rows: Sequence[Mapping[str, LabelValue]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [each for each in columns if all(str(row.get(each, "")).lower() in _TRUE + _FALSE for row in rows)]


def _is_true(value: LabelValue, column: str, where: str) -> bool:
    said = str(value).lower()
    if said not in _TRUE + _FALSE:
        raise DinocellError(f"{where}: column {column}: expected true or false, got {value!r}")
    return said in _TRUE


def _is_place(column: str) -> bool:
    return any(word in column.lower() for word in _PLACES)
