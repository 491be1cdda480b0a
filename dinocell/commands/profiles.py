"""``dinocell profiles``: retrieval of replicates across plates."""

import argparse
from itertools import compress
from pathlib import Path
from typing import Any

from dinocell.commands._parser import add_command
from dinocell.errors import require


def register(subparsers: Any) -> None:
    """Add ``profiles`` to the commands."""
    parser = add_command(
        subparsers,
        "profiles",
        "measure the retrieval of replicates across plates, on features written by 'dinocell features'",
        "dinocell profiles features/screen --treatment compound --control DMSO --whiten tvn --output probes/profiles",
    )
    add = parser.add_argument
    add("features", type=Path, metavar="FOLDER", help="output of 'dinocell features'")
    add("--treatment", required=True, metavar="COLUMN", help="label column of the treatment")
    add("--plate", default="plate", metavar="COLUMN", help="label column of the plate (plate)")
    add("--well", default="well", metavar="COLUMN", help="label column of the well, whose images are averaged (well)")
    add("--control", metavar="VALUE", help="the treatment of untreated wells: no queries, and the reference of tvn")
    add("--whiten", choices=("none", "pca", "tvn"), default="none", help="(none)")
    add("--same-plate", action="store_true", help="also count replicates on the same plate")
    add("--output", required=True, type=Path, metavar="FOLDER")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import numpy as np

    from dinocell.eval.probes.features import read_features, weights_of
    from dinocell.eval.probes.image_sets import labels_of
    from dinocell.eval.probes.profiles import check_wells, replicate_retrieval, to_wells, whiten
    from dinocell.eval.probes.report import log_to_run, write_scores

    features = read_features(options.features)
    name = str(options.features)
    columns = [labels_of(features.labels, column, name) for column in (options.treatment, options.plate, options.well)]
    complete = np.array([all(row) for row in zip(*columns, strict=True)])  # images without a well are skipped
    treatment, plate, well = (list(compress(column, complete)) for column in columns)
    control = options.control
    require(complete.any(), f"{name}: no image has {options.treatment}, {options.plate} and {options.well}")
    require(control in (None, *treatment), f"--control: no image has {options.treatment} {control!r}")
    values = np.asarray(features.values, np.float64).reshape(len(features.values), -1)[complete]
    check_wells(treatment, plate, well)
    profiles, first = to_wells(values, plate, well)
    treatments, plates = ([column[row] for row in first] for column in (treatment, plate))
    controls = None if control is None else np.asarray(treatments) == control
    profiles = whiten(profiles, method=options.whiten, plates=plates, controls=controls)
    result = replicate_retrieval(profiles, treatments, plates, control=control, across_plates=not options.same_plate)
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
    prefix = f"profiles/{options.treatment}_"
    numbers = {f"{prefix}mean_average_precision": mean, f"{prefix}retrieved": retrieved}
    log_to_run(weights_of(options.features), numbers, {})
    print(
        f"mean average precision {mean:.4f}, {100 * retrieved:.1f} % of {len(shown)} treatments retrieved; {paths[2]}"
    )
