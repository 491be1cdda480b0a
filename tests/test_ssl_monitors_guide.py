"""The text beside the numbers of a run."""

import json
import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinocell.cli import main


def test_every_number_and_picture_of_a_run_is_explained_beside_it(shard_set: Path, tmp_path: Path) -> None:
    """Whatever is logged: a new number without a word about it fails here."""
    small = ["model.variant=nano", "views.global_size=32", "views.local_size=16", "heads.num_prototypes=64"]
    small += ["steps=2", "batch_size=4", "compute.workers=0", "log_every=1", "watch.every=1", "watch.tiles=4"]
    assert main(["pretrain", "debug", f"data.shards={shard_set}", f"output={tmp_path / 'run'}", *small]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (said,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("guide/text_summary"))
    explained = set(re.findall(r"`([\w/*]+)`", said))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"step", "time"}
    assert {name for name in logged if name not in explained and f"{name.split('/')[0]}/*" not in explained} == set()
    assert set(events.Tags()["images"]) <= explained
    assert "ln 64 = 4.16" in said
