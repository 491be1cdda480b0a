"""``dinocell consistency`` and ``profiles``: do features depend on the stain, and do replicates find one another."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinocell.errors import ConfigError, DinocellError


def register(subparsers: Any) -> None:
    """Add the two commands."""
    _add_consistency(subparsers)


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
    from dinocell.commands._probe_options import load_weights, open_set
    from dinocell.eval.probes.consistency import channel_consistency, consistency_by_field
    from dinocell.eval.probes.features import FeatureSettings, extract
    from dinocell.eval.probes.report import draw_pairs, log_to_run, write_scores
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

    from dinocell.eval.metrics.bootstrap import bootstrap

    names = ("same_field", "different_field", "margin", "retrieval")
    units = np.concatenate([by_field.double().numpy(), np.ones((len(by_field), 1))], axis=1)

    def formula(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {name: sums[:, number] / sums[:, -1] for number, name in enumerate(names)}

    return {name: (found.low, found.high) for name, found in bootstrap(units, formula).items()}
