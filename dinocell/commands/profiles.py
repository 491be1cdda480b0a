"""``dinocell profiles``: retrieval of replicates across plates."""

import argparse
from pathlib import Path
from typing import Any

from dinocell.errors import ConfigError, DinocellError


def register(subparsers: Any) -> None:
    """Add ``profiles`` to the commands."""
    summary = "measure the retrieval of replicates across plates (mean average precision)"
    parser = subparsers.add_parser(
        "profiles",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}, on features that 'dinocell features' has written.",
        epilog="example:\n  dinocell profiles features/screen --treatment compound --control DMSO --whiten tvn "
        "--output probes/profiles",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("features", type=Path, metavar="FOLDER", help="output of 'dinocell features'")
    parser.add_argument("--treatment", required=True, metavar="COLUMN", help="label column of the treatment")
    parser.add_argument("--plate", default="plate", metavar="COLUMN", help="label column of the plate (plate)")
    parser.add_argument(
        "--well", default="well", metavar="COLUMN", help="label column of the well, whose images are averaged (well)"
    )
    parser.add_argument(
        "--control", metavar="VALUE", help="the treatment of untreated wells: no queries, and the reference of tvn"
    )
    parser.add_argument("--whiten", choices=("none", "pca", "tvn"), default="none", help="(none)")
    parser.add_argument("--same-plate", action="store_true", help="also count replicates on the same plate")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import numpy as np

    from dinocell.eval.probes.feature_files import read_features, weights_of
    from dinocell.eval.probes.image_sets import labels_of
    from dinocell.eval.probes.profiles import check_wells, replicate_retrieval, to_wells, whiten
    from dinocell.eval.probes.report import log_to_run, write_scores

    features = read_features(options.features)
    name = str(options.features)
    columns = [labels_of(features.labels, column, name) for column in (options.treatment, options.plate, options.well)]
    complete = np.array([all(row) for row in zip(*columns, strict=True)])  # images without a well are skipped
    if not complete.any():
        raise DinocellError(f"{name}: no image has {options.treatment}, {options.plate} and {options.well}")
    treatment, plate, well = (
        [label for label, keep in zip(column, complete, strict=True) if keep] for column in columns
    )
    if options.control is not None and options.control not in treatment:
        raise ConfigError(f"--control: no image has {options.treatment} {options.control!r}")
    values = np.asarray(features.values, np.float64).reshape(len(features.values), -1)[complete]
    check_wells(treatment, plate, well)
    profiles, first = to_wells(values, plate, well)
    treatments, plates = ([column[row] for row in first] for column in (treatment, plate))
    controls = np.array([treatment == options.control for treatment in treatments])
    profiles = whiten(
        profiles, method=options.whiten, plates=plates, controls=controls if options.control is not None else None
    )
    result = replicate_retrieval(
        profiles, treatments, plates, control=options.control, across_plates=not options.same_plate
    )
    mean, retrieved = result.mean_average_precision, result.retrieved
    shown: list[dict[str, Any]] = [
        {"treatment": treatment_name, "mean_average_precision": float(score), "p": float(p), "corrected_p": float(q)}
        for treatment_name, score, p, q in zip(
            result.treatments, result.mean_precision, result.p_value, result.corrected, strict=True
        )
    ]
    about = {
        "features": name,
        "images": f"{int(complete.sum())}; {int((~complete).sum())} skipped without {options.treatment}, "
        f"{options.plate} or {options.well}",
        "wells": len(profiles),
        "plates": len(set(plates)),
        "whitening": options.whiten,
        "replicates": "on any plate" if options.same_plate else "on other plates",
        "mean average precision": f"{mean:.4f}",
        "treatments retrieved (corrected p < 0.05)": f"{retrieved:.4f}",
    }
    paths = write_scores(
        options.output, "profiles", about, sorted(shown, key=lambda row: -row["mean_average_precision"])
    )
    numbers = {"mean_average_precision": mean, "retrieved": retrieved}
    named = {f"profiles/{options.treatment}_{each}": value for each, value in numbers.items()}
    log_to_run(weights_of(options.features), named, {})
    print(
        f"mean average precision {mean:.4f}, {100 * retrieved:.1f} % of {len(shown)} treatments retrieved; {paths[2]}"
    )
