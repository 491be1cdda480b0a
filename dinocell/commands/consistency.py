"""``dinocell consistency``: measure whether features depend on the channel."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinocell.errors import ConfigError, DinocellError


def register(subparsers: Any) -> None:
    """Add ``consistency`` to the commands."""
    summary = "measure and compare the channel consistency of backbones"
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
    parser.add_argument(
        "--crop-size", type=int, default=224, metavar="PX", help="size of the central crop; 0: all (224)"
    )
    parser.add_argument(
        "--resize-size", type=int, default=0, metavar="PX", help="resize the shorter side; 0: unchanged (0)"
    )
    parser.add_argument("--avgpool", action="store_true", help="append the mean patch token")
    parser.add_argument("--limit", type=int, metavar="N", help="maximum number of samples (all)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per batch (16)")
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
    for index, source in enumerate(options.weights, start=1):
        extracted = extract(
            load_weights(source, device, patch_size=options.patch_size), images, settings, limit=options.limit
        )
        features = extracted.tensor()
        if features.shape[0] < 2 or features.shape[1] < 2:
            raise DinocellError(
                f"{images.name}: expected two or more fields of two or more channels, got {features.shape[0]} of "
                f"{features.shape[1]}"
            )
        consistency = channel_consistency(features)
        intervals = _intervals(consistency_by_field(features))
        row: dict[str, Any] = {"weights": source, "fields": features.shape[0], "channels": features.shape[1]}
        for name in ("same_field", "different_field", "margin", "retrieval"):
            row[name] = getattr(consistency, name)
            row[f"{name} 95 %"] = "{:.4f} to {:.4f}".format(*intervals[name])
        rows.append(row)
        figures = {}
        for name, pairs in (("same_field", consistency.same_field_pairs), ("retrieval", consistency.retrieval_pairs)):
            title = f"{name.replace('_', ' ')}: {Path(source).name if '/' in source else source}"
            figures[f"consistency/{name}"] = options.output / f"{name}_{index}.png"
            draw_pairs(figures[f"consistency/{name}"], extracted.channel_names, pairs.numpy(), title)
        metrics = {"consistency/margin": consistency.margin, "consistency/retrieval": consistency.retrieval}
        log_to_run(source, metrics, figures)
        print(
            f"{source}: margin {row['margin']:.4f} ({row['margin 95 %']}), retrieval {row['retrieval']:.4f}", flush=True
        )
    about = {"data": options.data, "crop": options.crop_size, "chance level of retrieval": f"1 / {rows[0]['fields']}"}
    paths = write_scores(options.output, "consistency", about, rows, note="Intervals: bootstrap over fields.")
    print(f"scores and figures: {paths[2]}")


def _intervals(by_field: Any) -> Mapping[str, tuple[float, float]]:
    import numpy as np

    from dinocell.eval.metrics.bootstrap import bootstrap

    names = ("same_field", "different_field", "margin", "retrieval")
    units = np.concatenate([by_field.double().numpy(), np.ones((len(by_field), 1))], axis=1)

    def formula(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {name: sums[:, index] / sums[:, -1] for index, name in enumerate(names)}

    return {name: (interval.low, interval.high) for name, interval in bootstrap(units, formula).items()}
