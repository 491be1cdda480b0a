"""The estimate of a step's memory is what a step takes; what is too much is refused with what would fit."""

import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinocell.errors import ConfigError
from dinocell.runtime.distributed import World
from dinocell.runtime.optim import adamw, clip_gradients, parameter_groups, set_rates, update_ema
from dinocell.runtime.schedules import Schedule
from dinocell.ssl import memory
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    Recompute,
    Schedules,
)
from dinocell.ssl.masking import draw_masks
from dinocell.ssl.memory import check_memory, step_memory
from dinocell.ssl.prepare import build_model
from dinocell.ssl.view_plan import ViewsConfig
from dinocell.ssl.views import Views

GB = 1e9


def recipe(**changes: Any) -> PretrainConfig:
    base = PretrainConfig(
        output=Path("run"),
        data=DataConfig(shards=("set",)),
        batch_size=8,
        views=ViewsConfig(global_size=96, local_size=48, num_local=4),
        model=ModelConfig(variant="nano", drop_path=0.0),
        heads=HeadsConfig(num_prototypes=2048, hidden=512, bottleneck=128),
    )
    return replace(base, **changes)


def shipped_vits8(recompute: Recompute) -> PretrainConfig:
    """What benchmarks/results/pretrain_step_cpu.md measured, but for two of three channels."""
    return recipe(
        batch_size=4,
        views=ViewsConfig(),
        model=ModelConfig(drop_path=0.0),
        heads=HeadsConfig(num_prototypes=65_536),
        compute=ComputeConfig(recompute=recompute),
    )


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors that live, and its peak."""

    def __init__(self, existing: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in existing:
            self._see(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return found

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def measured(config: PretrainConfig) -> int:
    """Take a step, and return the peak."""
    model = build_model(config, World())
    optimizer = adamw(parameter_groups(dict(model.student.items()), depth=4))
    set_rates(optimizer, learning_rate=1e-4, weight_decay=0.04)
    views = config.views
    side = views.global_size // 8
    crops = Views(
        torch.randn(2, config.batch_size, 1, views.global_size, views.global_size),
        torch.randn(views.num_local, config.batch_size, 1, views.local_size, views.local_size),
    )
    masks = draw_masks(range(config.batch_size), (side, side), config.masking, seed=0, epoch=0)
    for parameter in model.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # there are moments now
    optimizer.zero_grad(set_to_none=True)
    moments = (value for state in optimizer.state.values() for value in state.values())
    with LiveBytes(iter([*model.parameters(), *crops, *moments])) as live:
        model(crops, masks, teacher_temperature=0.05).losses.total.backward()
        clip_gradients(dict(model.student.items()), 3.0)
        optimizer.step()
        update_ema(model.teacher.parameters(), model.student.parameters(), 0.9)
    return live.peak


@pytest.mark.parametrize(
    ("recompute", "drop_path"), [("nothing", 0.0), ("activations", 0.0), ("blocks", 0.0), ("nothing", 0.25)]
)
def test_the_estimate_is_what_a_step_takes(recompute: Recompute, drop_path: float) -> None:
    config = recipe(compute=ComputeConfig(recompute=recompute), model=ModelConfig(variant="nano", drop_path=drop_path))
    assert step_memory(config, World()).total == pytest.approx(measured(config), rel=0.12)


def test_many_prototypes_are_counted() -> None:
    heads = HeadsConfig(num_prototypes=65_536, hidden=64, bottleneck=32)
    config = recipe(heads=heads, batch_size=4, losses=LossConfig(centring="softmax"))
    assert step_memory(config, World()).total == pytest.approx(measured(config), rel=0.12)


@pytest.mark.parametrize(("recompute", "peak_gb"), [("nothing", 5.7), ("activations", 4.6), ("blocks", 2.3)])
def test_the_estimate_of_vits8_is_near_the_peaks_of_whole_processes(recompute: Recompute, peak_gb: float) -> None:
    """benchmarks/results/pretrain_step_cpu.md; a process with torch and nothing else has 0.4 GB."""
    assert step_memory(shipped_vits8(recompute), World()).total / GB + 0.4 == pytest.approx(peak_gb, rel=0.12)


def test_more_of_anything_takes_more() -> None:
    least = step_memory(recipe(), World()).total
    for changes in (
        {"batch_size": 9},
        {"heads": HeadsConfig(num_prototypes=4096, hidden=512, bottleneck=128)},
        {"schedules": Schedules(gram_weight=Schedule(peak=1.0))},
        {"views": ViewsConfig(global_size=96, local_size=48, num_local=5)},
    ):
        assert step_memory(recipe(**changes), World()).total > least, changes
    assert step_memory(recipe(optim=OptimConfig(accumulate=2)), World()).total < least
    assert step_memory(recipe(), World(size=2)).total < least


def limited(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: int(gigabytes * GB))


def settings(message: str) -> list[str]:
    return message.split("what would fit: ")[1].split("; ")


def test_every_setting_that_is_said_to_fit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(shipped_vits8("nothing"), batch_size=64)
    limited(monkeypatch, 16)
    with pytest.raises(ConfigError, match=r"a step takes about \d+\.\d GB .* cpu has 16\.0 GB left") as caught:
        check_memory(config, World())
    said = settings(str(caught.value))
    assert [each.split("=")[0] for each in said] == ["optim.accumulate", "compute.recompute", "batch_size"]
    number = {name: int(value) for name, value in (each.split("=") for each in said) if value.isdigit()}
    check_memory(replace(config, optim=OptimConfig(accumulate=number["optim.accumulate"])), World())
    check_memory(replace(config, batch_size=number["batch_size"]), World())
    check_memory(replace(config, compute=ComputeConfig(recompute="blocks")), World())
    more = replace(config, batch_size=number["batch_size"] + 1)
    assert step_memory(more, World()).total > 16 * GB, "the largest that fits is named"


def test_where_one_setting_is_not_enough_several_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 1.5)
    with pytest.raises(ConfigError) as caught:
        check_memory(shipped_vits8("nothing"), World())
    (said,) = settings(str(caught.value))
    assert re.fullmatch(
        r"compute.recompute=blocks together with optim.accumulate=\d+ together with heads.num_prototypes=\d+", said
    )
    limited(monkeypatch, 0.1)
    with pytest.raises(ConfigError, match="nothing but a smaller model"):
        check_memory(shipped_vits8("nothing"), World())


def test_what_fits_or_cannot_be_known_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 100)
    check_memory(shipped_vits8("nothing"), World())
    monkeypatch.setattr(memory, "available_bytes", lambda _: None)
    check_memory(replace(shipped_vits8("nothing"), batch_size=10**6), World())


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shipped_vits8("nothing")
    limited(monkeypatch, 6)
    check_memory(config, World())
    with pytest.raises(ConfigError, match=r"3\.0 GB left for each process"):
        check_memory(replace(config, batch_size=8), World(size=2, local_size=2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", ["nothing", "activations", "blocks"])
def test_the_estimate_is_what_a_gpu_allocates(recompute: Recompute) -> None:
    config = recipe(
        batch_size=16,
        views=ViewsConfig(),
        model=ModelConfig(drop_path=0.1),
        heads=HeadsConfig(),
        compute=ComputeConfig(device="cuda", recompute=recompute),
    )
    world = World(device=torch.device("cuda", 0))
    model = build_model(config, world)
    optimizer = adamw(parameter_groups(dict(model.student.items()), depth=12))
    set_rates(optimizer, learning_rate=1e-4, weight_decay=0.04)
    crops = Views(*(torch.randn(n, 16, 1, s, s, device="cuda") for n, s in ((2, 224), (8, 96))))
    masks = draw_masks(range(16), (28, 28), config.masking, seed=0, epoch=0)
    masks = type(masks)(*(each.cuda() for each in masks))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            total = model(crops, masks, teacher_temperature=0.05).losses.total
        total.backward()
        optimizer.step()
    assert step_memory(config, world).total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)
