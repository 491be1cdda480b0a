"""``dinocell consistency``: measure whether features depend on the channel."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command
from dinocell.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from dinocell.eval.metrics.summary import Interval


def register(subparsers: Any) -> None:
    """Add ``consistency`` to the commands."""
    parser = add_command(
        subparsers,
        "consistency",
        "measure and compare the channel consistency of backbones of one channel",
        "dinocell consistency --weights runs/consistency/teacher.pth runs/average/teacher.pth random:small "
        "--data shards/unseen --output probes/consistency",
    )
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="CHECKPOINT", help="backbones; random:VARIANT is untrained")
    add("--data", required=True, metavar="SET", help="a shard set of several channels")
    add("--crop-size", type=int, default=224, metavar="PX", help="size of the central crop; 0: all (224)")
    add("--resize-size", type=int, default=0, metavar="PX", help="resize the shorter side; 0: unchanged (0)")
    add("--avgpool", action="store_true", help="append the mean patch token")
    add("--limit", type=int, metavar="N", help="maximum number of samples (all)")
    add("--batch-size", type=int, default=16, metavar="N", help="images per batch (16)")
    add("--patch-size", type=int, metavar="PX", help="resample the patch embedding")
    add("--device", default="auto", help="auto, cpu, cuda (auto)")
    add("--output", required=True, type=Path, metavar="FOLDER")
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
        backbone = load_weights(source, device, patch_size=options.patch_size)
        extracted = extract(backbone, images, settings, limit=options.limit)
        features = extracted.tensor()
        consistency = channel_consistency(features)
        intervals = _intervals(consistency_by_field(features))
        row: dict[str, Any] = {"weights": source, "fields": features.shape[0], "channels": features.shape[1]}
        for name, interval in intervals.items():
            row[name] = getattr(consistency, name)
            row[f"{name} 95 %"] = f"{interval.low:.4f} to {interval.high:.4f}"
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


def _intervals(by_field: "Tensor") -> "dict[str, Interval]":
    """Return bootstrap intervals of the columns of `consistency_by_field` over fields."""
    import numpy as np

    from dinocell.eval.metrics.summary import bootstrap

    names = ("same_field", "different_field", "margin", "retrieval")
    units = np.concatenate([by_field.double().numpy(), np.ones((len(by_field), 1))], axis=1)
    return bootstrap(units, lambda sums: dict(zip(names, (sums[:, :-1] / sums[:, -1:]).T, strict=True)))
