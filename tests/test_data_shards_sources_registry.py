"""The options of the command become sources; options that do not belong are refused; labels from a table."""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dinocell.data_shards.sources import registry as sources
from dinocell.data_shards.sources.field import Field, Rejected, Source
from dinocell.data_shards.sources.files import ImagesSource, MultichannelSource, PatternSource
from dinocell.data_shards.sources.hpa_chammi import ChammiSource, HpaFovSource, HpaOneSource, HpaSource
from dinocell.data_shards.sources.load_data import LoadDataSource
from dinocell.data_shards.sources.phenix import PhenixSource
from dinocell.data_shards.sources.registry import add_source_arguments, source_from
from dinocell.data_shards.sources.table import LabelledSource
from dinocell.errors import ImageError
from helpers.real_data import DATA, needs_data


def parsed(*arguments: str) -> Source:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_source_arguments(parser)
    return source_from(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "phenix --channels DNA,-,ER --pixel-size 0.6 --missing reject",
            PhenixSource(input="IN", channels=("DNA", "-", "ER"), pixel_size_um=0.6, missing="reject"),
        ),
        ("hpa --missing keep", HpaSource(input="IN")),
        ("hpaone --split val --table a.csv", HpaOneSource(input="IN", split="val", table=("a.csv",))),
        ("hpafov --path-column file", HpaFovSource(input="IN", path_column="file")),
        ("chammi --subset CP,HPA --split Train", ChammiSource(input="IN", subset=("CP", "HPA"), split="Train")),
        (
            "load-data --id-columns Plate,Well --table a.csv b.csv",
            LoadDataSource(input="IN", id_columns=("Plate", "Well"), table=("a.csv", "b.csv")),
        ),
        (
            "pattern --pattern {well}_{channel}.tif --channels d0=DNA",
            PatternSource(input="IN", pattern="{well}_{channel}.tif", channels=("d0=DNA",)),
        ),
        ("multichannel --frames-as channels", MultichannelSource(input="IN", frames_as="channels")),
        (
            "images --colour channels --frames-as fields",
            ImagesSource(input="IN", colour="channels", frames_as="fields"),
        ),
        (
            "images --labels map.csv --labels-key well,code=plate",
            LabelledSource(source=ImagesSource(input="IN"), labels="map.csv", labels_key=("well", "code=plate")),
        ),
    ],
)
def test_options_become_the_source(arguments: str, expected: Source) -> None:
    assert parsed("--input", "IN", "--source", *arguments.split()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("phenix --pattern {well}.tif", "--pattern: not an option of --source phenix"),
        ("images --missing keep", "--missing: not an option of --source images"),
        ("chammi --channels a,b", "--channels: not an option of --source chammi"),
        ("hpa --frames-as fields", "--frames-as: not an option"),
        ("multichannel --colour reject", "--colour: not an option"),
        ("hpa --id-columns a", "--id-columns: not an option"),
        ("pattern", "--source pattern: --pattern is missing"),
        ("images --frames-as channels", "--frames-as channels"),
        ("images --labels map.csv", "--labels and --labels-key"),
        ("images --labels-key well", "--labels and --labels-key"),
    ],
)
def test_options_of_other_sources_are_rejected(arguments: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        parsed("--input", "IN", "--source", *arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"--pixel-size {value}" for value in ("0", "-1", "nan", "inf", "x")),
        *(f"--channels {value}" for value in ("a,,b", "=a", "a=", ",")),
        "--missing drop",
    ],
)
def test_invalid_values_are_rejected(arguments: str) -> None:
    with pytest.raises((argparse.ArgumentError, ImageError), match=arguments.split()[0]):
        parsed("--input", "IN", "--source", "phenix", *arguments.split())


def test_every_attribute_of_every_source_has_its_option() -> None:
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    dests = {action.dest for action in parser._actions}
    used = set()
    for module, name in sources._SOURCES.values():
        imported = __import__(f"dinocell.data_shards.sources.{module}", fromlist=[name])
        attributes = {field.name for field in dataclasses.fields(getattr(imported, name))}
        assert attributes <= dests
        assert isinstance(parsed_default(name), Source)
        used |= attributes
    assert used - {"input"} == set(sources._OPTIONS)


def parsed_default(name: str) -> Source:
    (flag,) = (flag for flag, (_, known) in sources._SOURCES.items() if known == name)
    return parsed("--input", "IN", "--source", flag, *(("--pattern", "{well}.tif") if flag == "pattern" else ()))


def test_the_options_load_no_array_library() -> None:
    code = (
        "import argparse, sys; from dinocell.data_shards.sources.registry import add_source_arguments as add;"
        "add(argparse.ArgumentParser()); print(sorted({'numpy', 'torch', 'tifffile', 'fsspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Labels from a table.


@dataclass(frozen=True, kw_only=True)
class Wells:
    wells: tuple[str, ...]

    def fields(self) -> Iterator[Field | Rejected]:
        yield Rejected(input="x", kind="unmatched", reason="y")
        for well in self.wells:
            yield Field(id=f"P1/{well}", files=(), plate="P1", well=well, labels={"dose": 1, "own": True})


def labelled(tmp_path: Path, table: str, *keys: str, wells: tuple[str, ...] = ("A1", "B02")) -> list[Field | Rejected]:
    (tmp_path / "map.csv").write_text(table, encoding="utf-8")
    return list(LabelledSource(source=Wells(wells=wells), labels=str(tmp_path / "map.csv"), labels_key=keys).fields())


@pytest.mark.parametrize("key", ["position=well", "Well", "Metadata_Well"])
def test_a_plate_map_labels_fields_by_their_wells(tmp_path: Path, key: str) -> None:
    column = key.split("=")[0]
    rejected, one, two, three = labelled(
        tmp_path, f"{column},dose,gene\na01,5,größe\nB2,,WT\n", key, wells=("A1", "B02", "C3")
    )
    assert isinstance(rejected, Rejected)
    assert isinstance(one, Field)
    assert one.labels == {"dose": 5, "own": True, "gene": "größe"}
    assert isinstance(two, Field)
    assert two.labels == {"dose": 1, "own": True, "gene": "WT"}
    assert isinstance(three, Field)
    assert three.labels == {"dose": 1, "own": True}


def test_several_columns_may_identify_the_field(tmp_path: Path) -> None:
    table = "barcode,well,gene\nP1,A1,x\nP2,A1,y\n"
    _, one, two = labelled(tmp_path, table, "barcode=plate", "well")
    assert isinstance(one, Field)
    assert one.labels["gene"] == "x"
    assert isinstance(two, Field)
    assert "gene" not in two.labels
    _, one, _ = labelled(tmp_path, "name,gene\nP1/A1,z\n", "name=id")
    assert isinstance(one, Field)
    assert one.labels["gene"] == "z"


@pytest.mark.parametrize(
    "source",
    [
        MultichannelSource(input="IN", channels=("DNA", "d1=ER")),
        ImagesSource(input="IN", channels=("grey=DNA",)),
        HpaOneSource(input="IN", channels=("a=b", "c", "d", "e")),
        HpaFovSource(input="IN", channels=("a=b", "c", "d", "e")),
        PatternSource(input="IN", pattern="{well}.tif", channels=("a=b", "c")),
    ],
)
def test_channels_of_multichannel_files_cannot_be_renamed(source: Source) -> None:
    with pytest.raises(ImageError, match=r"=.*without ="):
        list(source.fields())


@pytest.mark.parametrize(
    ("table", "keys", "message"),
    [
        ("well,gene\nH12,x\n", ("well",), "map.csv: no row matches any of the 2 fields"),
        ("well,gene\nA1,x\nA01,y\n", ("well",), "line 3: .*A01"),
        ("well,gene\nA1,x\n", ("position=well",), "no column position; it has well, gene"),
        ("well,gene\nA1,x\n", ("gene",), "expected COLUMN=id"),
        ("well,gene\nA1,x\n", ("well=gene",), "expected COLUMN=id"),
        ("well,gene\nA1,x\n", ("well", "gene=well"), "--labels-key gene=well"),
        ("site,gene\n9,x\n,\n,\n", ("site",), "map.csv: no row matches any of the 2 fields"),  # they have no site
    ],
)
def test_label_tables_that_match_no_field_are_an_error(
    tmp_path: Path, table: str, keys: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        labelled(tmp_path, table, *keys)
    assert "\n" not in str(caught.value)


@needs_data
def test_the_real_plate_map_labels_the_real_fields() -> None:
    folder = DATA / "nf1_schwann_cell_painting"
    source = parsed(
        *("--source", "pattern", "--input", str(folder), "--labels", str(folder / "platemap_NF1_plate2.csv")),
        *("--pattern", "Plate_2_images/{well}_01_*_{site}_{channel}_001.tif", "--labels-key", "well_position=well"),
    )
    genotypes = {field.well: field.labels["genotype"] for field in source.fields() if isinstance(field, Field)}
    assert genotypes == {"B7": "Null", "D6": "WT", "D7": "Null"}
