"""The sources of ``dinocell shards build``, and the options that describe them.

Light to import: what a source needs is loaded when one is made.
"""

import argparse
import dataclasses
import importlib
from typing import TYPE_CHECKING

from dinocell.errors import ImageError

if TYPE_CHECKING:
    from dinocell.data_shards.sources.field import Source

_SOURCES = {
    "phenix": ("phenix", "PhenixSource"),
    "hpa": ("hpa", "HpaSource"),
    "hpaone": ("chammi_hpa_tables", "HpaOneSource"),
    "hpafov": ("chammi_hpa_tables", "HpaFovSource"),
    "chammi": ("chammi_hpa_tables", "ChammiSource"),
    "load-data": ("load_data", "LoadDataSource"),
    "pattern": ("pattern", "PatternSource"),
    "multichannel": ("files", "MultichannelSource"),
    "images": ("files", "ImagesSource"),
}

# Options that not every source has: they are attributes of the sources that take them.
_OPTIONS = (
    "channels",
    "pixel_size_um",
    "missing",
    "pattern",
    "frames_as",
    "colour",
    "table",
    "split",
    "subset",
    "path_column",
    "id_columns",
)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--source``, ``--input`` and the options of all sources to a command."""
    group = parser.add_argument_group("source")
    group.add_argument(
        "--source",
        required=True,
        choices=tuple(_SOURCES),
        help="how the images are named: phenix: r01c01f01p01-ch1sk1fk1fl1.tiff; hpa: ID_red.jpg, _green, _blue, "
        "_yellow; hpaone, hpafov, chammi: these data sets with their CSVs; load-data: CellProfiler's load_data.csv; "
        "pattern: as --pattern says; multichannel: all channels of a field in one file (TIFF, OME-TIFF, OME-Zarr, "
        "npy); images: one grey image a field",
    )
    group.add_argument(
        "--input", required=True, metavar="IN", help="folder, s3://bucket/folder, or one file; tables also https://"
    )
    group.add_argument(
        "--pattern",
        metavar="PATTERN",
        help="for pattern: '{plate}/{well}_s{site}_w{channel}.tif'; {frame} and any other name become labels, * "
        "matches what does not matter, **/ in front any folders",
    )
    group.add_argument(
        "--channels",
        type=_names,
        metavar="A,B",
        help="channels to take, in order: NAME, or CHANNEL=NAME to rename. phenix: the names of ch1, ch2... (- leaves "
        "one out); multichannel: the names of a file's channels (default: all, as the files call them)",
    )
    group.add_argument(
        "--missing",
        choices=("keep", "reject"),
        help="fields that lack a channel: keep them with what they have (default), or reject them",
    )
    group.add_argument(
        "--pixel-size", dest="pixel_size_um", type=_positive, metavar="UM", help="micrometres (default: as files say)"
    )
    group.add_argument(
        "--frames-as",
        choices=("channels", "fields"),
        help="multichannel, images: what the frames of a stack are (default: stacks are rejected)",
    )
    group.add_argument(
        "--colour",
        choices=("reject", "channels"),
        help="images: pictures with real colour are rejected (default), or red, green and blue become channels",
    )
    group.add_argument(
        "--table",
        nargs="+",
        metavar="CSV",
        help="hpaone, hpafov, chammi, load-data: the table or tables, if not in --input under the usual name",
    )
    group.add_argument("--split", metavar="NAME", help="hpaone, hpafov, chammi: which part of the data set")
    group.add_argument("--subset", type=_names, metavar="A,B", help="chammi: only these of Allen, HPA, CP")
    group.add_argument("--path-column", metavar="COLUMN", help="hpaone, hpafov, chammi: the column with the file")
    group.add_argument(
        "--id-columns",
        type=_names,
        metavar="A,B",
        help="load-data: what makes a field's id (default: plate, well, site)",
    )
    group.add_argument(
        "--labels", metavar="CSV", help="a table whose columns become labels of the fields, such as a plate map"
    )
    group.add_argument(
        "--labels-key",
        type=_names,
        metavar="COLUMN=KEY",
        help="its columns that say which fields a row is for: 'barcode=plate,well_position=well' (also =site, =id)",
    )


def source_from(options: argparse.Namespace) -> "Source":
    """Return the source that the options of ``add_source_arguments`` describe.

    Raises
    ------
    ImageError
        If an option does not belong to the source, or one that it needs is missing.
    """
    module, name = _SOURCES[options.source]
    source_class = getattr(importlib.import_module(f"dinocell.data_shards.sources.{module}"), name)
    known = {field.name: field for field in dataclasses.fields(source_class)}
    given = {option: value for option in _OPTIONS if (value := getattr(options, option)) is not None}
    if "table" in given:
        given["table"] = tuple(given["table"])
    for option in given:
        if option not in known:
            raise ImageError(f"{_flag(option)}: not an option of --source {options.source}; leave it out")
    for option, field in known.items():
        if option != "input" and option not in given and field.default is dataclasses.MISSING:
            raise ImageError(f"--source {options.source}: {_flag(option)} is missing")
    if options.source == "images" and given.get("frames_as") == "channels":
        raise ImageError("--frames-as channels: images have one channel each; take --source multichannel")
    source: Source = source_class(input=options.input, **given)
    if (options.labels is None) != (options.labels_key is None):
        raise ImageError("--labels and --labels-key go together: a table, and its columns that name the field")
    if options.labels is None:
        return source
    from dinocell.data_shards.sources.table import LabelledSource

    return LabelledSource(source=source, labels=options.labels, labels_key=options.labels_key)


def _flag(option: str) -> str:
    return "--" + {"pixel_size_um": "pixel-size"}.get(option, option.replace("_", "-"))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or not all(part for name in names for part in name.split("=", 1)):
        raise argparse.ArgumentTypeError(f"expected names with commas between, got {text!r}")
    return names


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number
