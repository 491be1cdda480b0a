"""Collapse monitors at states with known values, and the help text of all metrics."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinocell.cli import main
from dinocell.runtime.schedules import Freeze, Schedule
from dinocell.ssl.config import LossConfig, MaskingConfig, Schedules
from dinocell.ssl.heads import Projection
from dinocell.ssl.targets import Targets, TeacherLogits, sinkhorn_targets
from dinocell.ssl.train import pretrain
from dinocell.ssl.trainer import PlateauMonitor, feature_spread, target_use
from helpers.pretraining import small_pretraining


def targets_of(logits: torch.Tensor) -> Targets:
    """Targets that are the softmax of given logits."""
    projection = Projection(torch.eye(len(logits), dtype=logits.dtype), logits.T.contiguous())
    zero = torch.zeros(logits.shape[1], dtype=logits.dtype)
    return Targets(TeacherLogits(projection), torch.ones((), dtype=logits.dtype), zero)


@pytest.mark.parametrize("chunk_elements", [None, 1, 24])
def test_target_use_equals_scipys_entropy(chunk_elements: int | None) -> None:
    logits = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    rows = logits.softmax(1).numpy()
    use = target_use(targets_of(logits), chunk_elements=chunk_elements)
    assert use.entropy.item() == pytest.approx(entropy(rows, axis=1).mean())
    assert use.mean_entropy.item() == pytest.approx(entropy(rows.mean(0)))
    assert use.used.item() == len(set(rows.argmax(1))) / 12


def test_one_prototype_each_all_the_same_and_no_opinion() -> None:
    each = target_use(targets_of(torch.eye(5) * 200))
    assert (each.entropy.item(), each.used.item()) == (pytest.approx(0), 1)
    assert each.mean_entropy.item() == pytest.approx(math.log(5))
    same = torch.zeros(5, 8)
    same[:, 3] = 200
    collapsed = target_use(targets_of(same))
    assert collapsed.mean_entropy.item() == pytest.approx(0)
    assert collapsed.used.item() == 1 / 8
    assert target_use(targets_of(torch.zeros(5, 8))).entropy.item() == pytest.approx(math.log(8))


def test_real_targets_lie_between() -> None:
    projection = Projection(torch.nn.functional.normalize(torch.randn(40, 8), dim=1), torch.randn(64, 8))
    (targets,) = sinkhorn_targets([TeacherLogits(projection)], 0.1)
    use = target_use(targets)
    assert 0 < use.entropy < use.mean_entropy <= math.log(64) + 1e-5
    assert 0 < use.used <= 40 / 64


def test_spread_of_even_features_is_one_and_their_rank_full() -> None:
    spread = feature_spread(torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)))
    assert spread.std.item() == pytest.approx(1, abs=0.01)
    assert spread.effective_rank.item() == pytest.approx(16, abs=0.1)


def test_collapsed_features_have_no_spread_and_rank_one() -> None:
    spread = feature_spread(torch.full((9, 16), 0.5))
    assert spread.std.item() == pytest.approx(0, abs=1e-6)
    assert spread.effective_rank.item() == pytest.approx(1, abs=1e-3)


def test_features_on_a_line_through_zero_have_rank_one() -> None:
    spread = feature_spread(torch.randn(50, 1) * torch.randn(1, 16))
    assert spread.effective_rank.item() == pytest.approx(1, abs=1e-3)
    assert spread.std.item() == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_equal_singular_values_is_their_number(rank: int) -> None:
    left = torch.linalg.qr(torch.randn(30, rank, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(16, rank, dtype=torch.float64))[0]
    assert feature_spread(left @ right.T).effective_rank.item() == pytest.approx(rank)


def test_effective_rank_equals_the_plain_formula_under_autocast_too() -> None:
    features = torch.randn(12, 8)
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    with torch.autocast("cpu", torch.bfloat16):
        spread = feature_spread(features)
    assert spread.effective_rank.item() == pytest.approx(np.exp(entropy(values)), rel=1e-5)
    assert feature_spread(features.bfloat16()).std.dtype == torch.float32


def test_zero_features_are_finite() -> None:
    assert [value.item() for value in feature_spread(torch.zeros(4, 3))] == [0, 1]
    assert feature_spread(torch.zeros(1, 3)).std == 0


def test_every_metric_and_image_of_a_run_is_explained_in_tensorboard(
    shard_set: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    """A new metric without an explanation fails here."""
    small = ["model.variant=nano", "views.global_size=32", "views.local_size=16", "heads.num_prototypes=64"]
    small += [
        "steps=2",
        "batch_size=4",
        "compute.workers=0",
        "log_every=1",
        "online_eval.every=1",
        "online_eval.tiles=4",
        "losses.reconstruction.weight=1",
        f"online_eval.patch_set={labelled_folder / 'set'}",
    ]
    assert main(["pretrain", "debug", f"data.shards={shard_set}", f"output={tmp_path / 'run'}", *small]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("help/text_summary"))
    explained = set(re.findall(r"`([\w/*]+)`", text))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"step", "time"}
    assert {"probe/patch_r2", "probe/retrieval"} <= logged
    assert {name for name in logged if name not in explained and f"{name.split('/')[0]}/*" not in explained} == set()
    assert {"patch_pca", "reconstruction"} <= set(events.Tags()["images"]) <= explained
    assert "ln 64 = 4.16" in text


def plateau_monitor(steps: int, **changes: object) -> PlateauMonitor:
    return PlateauMonitor(small_pretraining(Path("set"), Path("run"), steps=steps, **changes))


def advices(monitor: PlateauMonitor, dino: list[float], ibot: float = 0.0, *, every: int = 10) -> list[int]:
    """Return the steps at which a run of these logged losses is warned."""
    rows = [(1 + every * index, {"loss/dino_global": loss, "loss/ibot": ibot}) for index, loss in enumerate(dino)]
    return [step for step, row in rows if monitor.advice(step, row) is not None]


def test_a_loss_near_that_of_uniform_targets_for_a_fifth_of_the_run_is_noticed_once() -> None:
    uniform = math.log(64)
    assert advices(plateau_monitor(1000), [uniform * 1.009] * 50) == [201]
    assert advices(plateau_monitor(100), [uniform * 0.995] * 10) == [51]
    assert advices(plateau_monitor(40), [uniform] * 4) == []
    assert advices(plateau_monitor(1000), [uniform * 0.98] * 50) == []
    assert advices(plateau_monitor(1000), [math.nan] * 3 + [uniform] * 19 + [1.0] + [uniform] * 30) == [431]
    text = plateau_monitor(100)
    text.advice(1, {"loss/dino_global": uniform, "loss/ibot": 0})
    said = text.advice(60, {"loss/dino_global": uniform, "loss/ibot": 0})
    assert said is not None
    assert said.startswith("loss/dino_global has been within 1 % of 4.16 since step 1: the targets are still uniform")
    assert "heads.num_prototypes=8 (about twice the batch)" in said


def test_the_plateau_of_ibot_is_that_of_its_masked_crops() -> None:
    learning = [1.0] * 50
    half = 0.5 * math.log(64)
    assert advices(plateau_monitor(1000), learning, ibot=half) == [201]
    assert advices(plateau_monitor(1000), learning, ibot=math.log(64)) == []
    quarter = MaskingConfig(image_share=0.25)
    assert advices(plateau_monitor(1000, masking=quarter), learning, ibot=half / 2) == [201]
    without = LossConfig(ibot_weight=0.0)
    assert advices(plateau_monitor(1000, losses=without), learning, ibot=half) == []


def test_without_a_dino_loss_no_plateau_is_noticed() -> None:
    monitor = plateau_monitor(1000, losses=LossConfig(dino_weight=0.0))
    assert advices(monitor, [math.log(64)] * 50, ibot=0.5 * math.log(64)) == []


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_what_to_change(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = Schedules(learning_rate=Schedule(peak=0.0), last_layer=Freeze(freeze=1))
    pretrain(small_pretraining(shard_set, tmp_path / "run", steps=60, schedules=still, image_every=100))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("the targets are still uniform") == 1
    assert capsys.readouterr().out.count("the targets are still uniform") == 1
