"""The sources of ``dinocell shards build``, and their command-line options.

Light to import: the module of a source is loaded when the source is made.
"""

import argparse
import dataclasses
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dinocell.errors import ImageError

if TYPE_CHECKING:
    from dinocell.data_shards.sources.field import Source

_SOURCES = {
    "phenix": ("phenix", "PhenixSource"),
    "hpa": ("hpa_chammi", "HpaSource"),
    "hpaone": ("hpa_chammi", "HpaOneSource"),
    "hpafov": ("hpa_chammi", "HpaFovSource"),
    "chammi": ("hpa_chammi", "ChammiSource"),
    "load-data": ("load_data", "LoadDataSource"),
    "pattern": ("files", "PatternSource"),
    "multichannel": ("files", "MultichannelSource"),
    "images": ("files", "ImagesSource"),
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


# Options that only some sources have, by the attribute of these sources.
_OPTIONS: dict[str, dict[str, Any]] = {
    "pattern": {
        "metavar": "PATTERN",
        "help": "for pattern: '{plate}/{well}_s{site}_w{channel}.tif'; {frame} and any other name become labels, * "
        "matches any part of a name, a leading **/ any folders",
    },
    "channels": {
        "type": _names,
        "metavar": "A,B",
        "help": "channels to use, in order: NAME, or CHANNEL=NAME to rename. phenix: the names of ch1, ch2... (- skips "
        "one); multichannel: the names of a file's channels (default: all, with the names in the files)",
    },
    "missing": {
        "choices": ("keep", "reject"),
        "help": "keep fields that lack a channel, with the channels they have (default), or reject them",
    },
    "pixel_size_um": {"type": float, "metavar": "UM", "help": "micrometres (default: from the files)"},
    "frames_as": {
        "choices": ("channels", "fields"),
        "help": "multichannel, images: what the frames of a stack are (default: stacks are rejected)",
    },
    "colour": {
        "choices": ("reject", "channels"),
        "help": "images: reject colour images (default), or make red, green and blue channels",
    },
    "table": {
        "nargs": "+",
        "metavar": "CSV",
        "help": "hpaone, hpafov, chammi, load-data: the table or tables, if not in --input under the usual name",
    },
    "split": {"metavar": "NAME", "help": "hpaone, hpafov, chammi: part of the data set"},
    "subset": {"type": _names, "metavar": "A,B", "help": "chammi: only these of Allen, HPA, CP"},
    "path_column": {"metavar": "COLUMN", "help": "hpaone, hpafov, chammi: the column with the file"},
    "id_columns": {
        "type": _names,
        "metavar": "A,B",
        "help": "load-data: columns that make a field's id (default: plate, well, site)",
    },
}


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--source``, ``--input`` and the options of all sources to a command."""
    group = parser.add_argument_group("source")
    group.add_argument(
        "--source",
        required=True,
        choices=tuple(_SOURCES),
        help="how the images are stored: phenix: r01c01f01p01-ch1sk1fk1fl1.tiff; hpa: ID_red.jpg, _green, _blue, "
        "_yellow; hpaone, hpafov, chammi: these data sets with their CSVs; load-data: CellProfiler's load_data.csv; "
        "pattern: file names that match --pattern; multichannel: all channels of a field in one file (TIFF, OME-TIFF, "
        "OME-Zarr, npy); images: one grey image per field",
    )
    group.add_argument(
        "--input", required=True, metavar="IN", help="folder, s3://bucket/folder, or one file; tables also https://"
    )
    for option, settings in _OPTIONS.items():
        group.add_argument(_flag(option), dest=option, **settings)
    group.add_argument(
        "--labels", metavar="CSV", help="a table whose columns become labels of the fields, such as a plate map"
    )
    group.add_argument(
        "--labels-key",
        type=_names,
        metavar="COLUMN=KEY",
        help="its columns that identify the fields of a row: 'barcode=plate,well_position=well' (also =site, =id)",
    )


def source_from(options: argparse.Namespace) -> "Source":
    """Return the source that the options describe; raise ImageError if they do not fit together."""
    module, name = _SOURCES[options.source]
    source_class = getattr(importlib.import_module(f"dinocell.data_shards.sources.{module}"), name)
    given = {option: value for option in _OPTIONS if (value := getattr(options, option)) is not None}
    if "table" in given:
        given["table"] = tuple(given["table"])
    for problem in _problems(options, source_class, given):
        raise ImageError(problem)
    source: Source = source_class(input=options.input, **given)
    if options.labels is None:
        return source
    from dinocell.data_shards.sources.table import LabelledSource

    return LabelledSource(source=source, labels=options.labels, labels_key=options.labels_key)


def _problems(options: argparse.Namespace, source_class: Any, given: dict[str, Any]) -> Iterator[str]:
    fields = {field.name: field for field in dataclasses.fields(source_class)}
    for option in given.keys() - fields.keys():
        yield f"{_flag(option)}: not an option of --source {options.source}"
    for option, field in fields.items():
        if option != "input" and option not in given and field.default is dataclasses.MISSING:
            yield f"--source {options.source}: {_flag(option)} is missing"
    for option, value in {**given, "labels_key": options.labels_key or ()}.items():
        if isinstance(value, tuple) and not all(part for name in value for part in name.split("=", 1)):
            yield f"{_flag(option)}: expected names separated by commas, got {','.join(value)!r}"
    if not 0 < given.get("pixel_size_um", 1.0) < float("inf"):
        yield f"--pixel-size: expected micrometres above 0, got {given['pixel_size_um']}"
    if options.source == "images" and given.get("frames_as") == "channels":
        yield "--frames-as channels: images have one channel each; use --source multichannel"
    if (options.labels is None) != (options.labels_key is None):
        yield "--labels and --labels-key must be given together: a table, and its columns that identify the fields"


def _flag(option: str) -> str:
    return "--" + option.removesuffix("_um").replace("_", "-")
