"""``dinocell consistency`` and ``profiles``: do features depend on the stain, and do replicates find one another."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinocell.errors import ConfigError, DinocellError


def register(subparsers: Any) -> None:
    """Add the two commands."""
    _add_consistency(subparsers)
    _add_profiles(subparsers)


def _add_consistency(subparsers: Any) -> None:
    summary = "measure whether backbones know a field again through another channel, side by side"
    parser = subparsers.add_parser(
        "consistency",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. For backbones of one channel.",
        epilog="example:\n  dinocell consistency --weights runs/consistency/teacher.pth runs/average/teacher.pth "
        "random:small --data shards/unseen --output probes/consistency",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights", nargs="+", required=True, metavar="CHECKPOINT", help="backbones; random:VARIANT is untrained"
    )
    parser.add_argument("--data", required=True, metavar="SET", help="a shard set of several channels")
    parser.add_argument("--crop-size", type=int, default=224, metavar="PX", help="cut out the middle; 0: all (224)")
    parser.add_argument(
        "--resize-size", type=int, default=0, metavar="PX", help="scale the shorter side; 0: leave it (0)"
    )
    parser.add_argument("--avgpool", action="store_true", help="append the mean patch token")
    parser.add_argument("--limit", type=int, metavar="N", help="of the set's samples (all)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (16)")
    parser.add_argument("--patch-size", type=int, metavar="PX", help="resample the patch embedding")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.set_defaults(run=_run_consistency)


def _run_consistency(options: argparse.Namespace) -> None:
    from dinocell.eval.consistency import channel_consistency, consistency_by_field
    from dinocell.eval.features import FeatureSettings, extract
    from dinocell.eval.probe_report import draw_pairs, log_to_run, write_scores
    from dinocell.eval.probe_sets import load_weights, open_set
    from dinocell.runtime.distributed import start

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit: expected at least 1 sample, got {options.limit}")
    device = start(options.device).device
    images = open_set(options.data)
    settings = FeatureSettings(
        channels="each",
        crop_size=options.crop_size,
        resize_size=options.resize_size,
        avgpool=options.avgpool,
        batch_size=options.batch_size,
    )
    rows: list[dict[str, Any]] = []
    options.output.mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(options.weights, start=1):
        found = extract(
            load_weights(source, device, patch_size=options.patch_size), images, settings, limit=options.limit
        )
        features = found.tensor()
        if features.shape[0] < 2 or features.shape[1] < 2:
            raise DinocellError(
                f"{images.name}: expected two or more fields of two or more channels, got {features.shape[0]} of "
                f"{features.shape[1]}"
            )
        whole = channel_consistency(features)
        intervals = _intervals(consistency_by_field(features))
        row: dict[str, Any] = {"weights": source, "fields": features.shape[0], "channels": features.shape[1]}
        for name in ("same_field", "different_field", "margin", "retrieval"):
            row[name] = getattr(whole, name)
            row[f"{name} 95 %"] = "{:.4f} to {:.4f}".format(*intervals[name])
        rows.append(row)
        pictures = {}
        for name, pairs in (("same_field", whole.same_field_pairs), ("retrieval", whole.retrieval_pairs)):
            title = f"{name.replace('_', ' ')}: {Path(source).name if '/' in source else source}"
            pictures[f"consistency/{name}"] = options.output / f"{name}_{number}.png"
            draw_pairs(pictures[f"consistency/{name}"], found.channel_names, pairs.numpy(), title)
        numbers = {"consistency/margin": whole.margin, "consistency/retrieval": whole.retrieval}
        log_to_run(source, numbers, pictures)
        print(
            f"{source}: margin {row['margin']:.4f} ({row['margin 95 %']}), retrieval {row['retrieval']:.4f}", flush=True
        )
    about = {"data": options.data, "crop": options.crop_size, "chance of retrieval": f"1 / {rows[0]['fields']}"}
    paths = write_scores(options.output, "consistency", about, rows, note="Intervals: bootstrap over fields.")
    print(f"scores and pictures: {paths[2]}")


def _intervals(by_field: Any) -> Mapping[str, tuple[float, float]]:
    import numpy as np

    from dinocell.eval.bootstrap import bootstrap

    names = ("same_field", "different_field", "margin", "retrieval")
    units = np.concatenate([by_field.double().numpy(), np.ones((len(by_field), 1))], axis=1)

    def formula(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {name: sums[:, number] / sums[:, -1] for number, name in enumerate(names)}

    return {name: (found.low, found.high) for name, found in bootstrap(units, formula).items()}


def _add_profiles(subparsers: Any) -> None:
    summary = "measure whether replicates of a treatment find one another across plates (mean average precision)"
    parser = subparsers.add_parser(
        "profiles",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}, on features that 'dinocell features' has written.",
        epilog="example:\n  dinocell profiles features/screen --treatment compound --control DMSO --whiten tvn "
        "--output probes/profiles",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("features", type=Path, metavar="FOLDER", help="of 'dinocell features'")
    parser.add_argument("--treatment", required=True, metavar="COLUMN", help="what replicates have in common")
    parser.add_argument("--plate", default="plate", metavar="COLUMN", help="(plate)")
    parser.add_argument("--well", default="well", metavar="COLUMN", help="images of a well are averaged (well)")
    parser.add_argument("--control", metavar="VALUE", help="the treatment of untreated wells: never asked, for tvn")
    parser.add_argument("--whiten", choices=("none", "pca", "tvn"), default="none", help="(none)")
    parser.add_argument("--same-plate", action="store_true", help="replicates on the same plate count as found, too")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.set_defaults(run=_run_profiles)


def _run_profiles(options: argparse.Namespace) -> None:
    import numpy as np

    from dinocell.eval.feature_files import read_features, weights_of
    from dinocell.eval.image_sets import labels_of
    from dinocell.eval.probe_report import log_to_run, write_scores
    from dinocell.eval.profiles import check_wells, replicate_retrieval, to_wells, whiten

    found = read_features(options.features)
    name = str(options.features)
    columns = [labels_of(found.labels, column, name) for column in (options.treatment, options.plate, options.well)]
    known = np.array(
        [all(row) for row in zip(*columns, strict=True)]
    )  # an image of no well would be in one with all such
    if not known.any():
        raise DinocellError(f"{name}: no image has {options.treatment}, {options.plate} and {options.well}")
    treatment, plate, well = (
        [each for each, is_one in zip(column, known, strict=True) if is_one] for column in columns
    )
    if options.control is not None and options.control not in treatment:
        raise ConfigError(f"--control: no image has {options.treatment} {options.control!r}")
    values = np.asarray(found.values, np.float64).reshape(len(found.values), -1)[known]
    check_wells(treatment, plate, well)
    profiles, first = to_wells(values, plate, well)
    treatments, plates = ([column[row] for row in first] for column in (treatment, plate))
    controls = np.array([each == options.control for each in treatments])
    profiles = whiten(
        profiles, method=options.whiten, plates=plates, controls=controls if options.control is not None else None
    )
    result = replicate_retrieval(
        profiles, treatments, plates, control=options.control, across_plates=not options.same_plate
    )
    mean, retrieved = result.mean_average_precision, result.retrieved
    shown: list[dict[str, Any]] = [
        {"treatment": each, "mean_average_precision": float(score), "p": float(p), "corrected_p": float(q)}
        for each, score, p, q in zip(
            result.treatments, result.mean_precision, result.p_value, result.corrected, strict=True
        )
    ]
    about = {
        "features": name,
        "images": f"{int(known.sum())}; {int((~known).sum())} left out, of no {options.treatment}, {options.plate} or "
        f"{options.well}",
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
