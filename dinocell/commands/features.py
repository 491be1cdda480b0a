"""``dinocell features``: extract features of images for custom analyses."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command
from dinocell.commands._probe_options import add_feature_arguments, add_set_arguments, extractor, open_one
from dinocell.errors import DinocellError

if TYPE_CHECKING:
    from dinocell.eval.probes.features import Features


def register(subparsers: Any) -> None:
    """Add ``features`` to the commands."""
    parser = add_command(
        subparsers,
        "features",
        "extract the features of images with a backbone, as .npy and a table, for your own analysis",
        "dinocell features --weights teacher_checkpoint.pth --data shards/screen --crop-size 0 --output features/s",
    )
    add_feature_arguments(parser)
    add_set_arguments(parser, pair=False)
    parser.add_argument("--parquet", action="store_true", help="also rows.parquet (needs pyarrow)")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.set_defaults(run=_run_features)


def _run_features(options: argparse.Namespace) -> None:
    if options.parquet:
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise DinocellError("--parquet: needs pyarrow; install 'dinocell-toolkit[parquet]'") from error
    images = open_one(options)
    with extractor(options) as (extract, _, world):
        features = extract(options.output, images)
        if not world.is_main:
            return
    if options.parquet:
        _write_parquet(options.output / "rows.parquet", features)
    shape = " x ".join(str(size) for size in features.values.shape)
    print(f"{options.output}: {shape} features, features.npy and rows.csv; {len(features.problems)} images skipped")


def _write_parquet(path: Path, features: "Features") -> None:
    import pyarrow
    from pyarrow import parquet

    from dinocell.runtime.files import replacing

    columns = sorted({key for row in features.labels for key in row})
    table = {"id": list(features.ids)} | {key: [str(row.get(key, "")) for row in features.labels] for key in columns}
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table(table), temporary)
