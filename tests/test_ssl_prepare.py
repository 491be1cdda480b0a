"""The estimate of a step's memory is near the measured one; what clearly exceeds the memory is refused."""

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
from dinocell.ssl import prepare
from dinocell.ssl.config import (
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    LossConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    Recompute,
    ReconstructionConfig,
    Schedules,
    TargetChannels,
    ViewsConfig,
)
from dinocell.ssl.masking import draw_masks
from dinocell.ssl.prepare import build_model, check_memory, step_bytes
from dinocell.ssl.views import Views

GB = 10**9


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


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all live tensors, and its peak."""

    def __init__(self, existing: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._counted: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in existing:
            self._count(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._counted:
            return
        self._counted.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def measured(config: PretrainConfig) -> int:
    """Take a step, and return the peak."""
    model = build_model(config, World())
    optimizer = adamw(parameter_groups(dict(model.student.items()), depth=4))
    set_rates(optimizer, learning_rate=1e-4, weight_decay=0.04)
    crops = Views(*(torch.randn(len(views), config.batch_size, 1, side, side) for views, side in config.views.kinds))
    if config.target_channels != "same":
        crops = crops._replace(target_views=torch.randn_like(crops.global_views))
    masks = draw_masks(range(config.batch_size), config.mask_grid, config.masking, seed=0)
    for parameter in model.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates the moments
    optimizer.zero_grad(set_to_none=True)
    moments = (value for state in optimizer.state.values() for value in state.values())
    with LiveBytes(iter([*model.parameters(), *(each for each in crops if each is not None), *moments])) as live:
        model(crops, masks, teacher_temperature=0.05).losses.total.backward()
        clip_gradients(dict(model.student.items()), 3.0)
        optimizer.step()
        student = [each for name in model.teacher for each in model.student[name].parameters()]
        update_ema(model.teacher.parameters(), student, 0.9)
    return live.peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compute": ComputeConfig(recompute="activations")},
        {"compute": ComputeConfig(recompute="blocks")},
        {"model": ModelConfig(variant="nano", drop_path=0.25)},
        {
            "heads": HeadsConfig(num_prototypes=65_536, hidden=64, bottleneck=32),
            "batch_size": 4,
            "losses": LossConfig(centring="softmax"),
        },
    ],
)
def test_the_estimate_is_near_the_memory_of_a_step(changes: dict[str, Any]) -> None:
    config = recipe(**changes)
    assert step_bytes(config, World()) == pytest.approx(measured(config), rel=0.25)


@pytest.mark.parametrize("target", ["same", "other"])
def test_reconstruction_is_counted(target: TargetChannels) -> None:
    losses = LossConfig(reconstruction=ReconstructionConfig(weight=1.0, target=target, hidden_dim=4096))
    config = recipe(losses=losses, masking=MaskingConfig(image_share=1.0, min_patch_share=0.6, max_patch_share=0.6))
    without = replace(config, losses=LossConfig())
    assert step_bytes(config, World()) == pytest.approx(measured(config), rel=0.25)
    more = measured(config) - measured(without)
    assert step_bytes(config, World()) - step_bytes(without, World()) == pytest.approx(more, rel=0.25)


@pytest.mark.parametrize(("recompute", "peak_gb"), [("nothing", 5.7), ("activations", 4.6), ("blocks", 2.3)])
def test_the_estimate_of_vits8_is_near_the_peaks_of_whole_processes(recompute: Recompute, peak_gb: float) -> None:
    """benchmarks/results/pretrain_step_cpu.md; a process that has only imported torch has 0.4 GB."""
    config = recipe(
        batch_size=4,
        views=ViewsConfig(),
        model=ModelConfig(drop_path=0.0),
        heads=HeadsConfig(num_prototypes=65_536),
        compute=ComputeConfig(recompute=recompute),
    )
    assert step_bytes(config, World()) / GB + 0.4 == pytest.approx(peak_gb, rel=0.25)


def test_more_of_anything_takes_more() -> None:
    least = step_bytes(recipe(), World())
    for changes in (
        {"batch_size": 9},
        {"heads": HeadsConfig(num_prototypes=4096, hidden=512, bottleneck=128)},
        {"schedules": Schedules(gram_weight=Schedule(peak=1.0))},
        {"views": ViewsConfig(global_size=96, local_size=48, num_local=5)},
    ):
        assert step_bytes(recipe(**changes), World()) > least, changes
    assert step_bytes(recipe(optim=OptimConfig(accumulate=2)), World()) < least
    assert step_bytes(recipe(), World(size=2)) < least


def test_what_fits_is_accepted_and_what_exceeds_the_memory_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of one machine share its memory."""
    config, needed = recipe(), step_bytes(recipe(), World())
    monkeypatch.setattr(prepare, "available_bytes", lambda _: needed)
    check_memory(config, World())
    larger = replace(config, batch_size=16)
    with pytest.raises(ConfigError, match=r"compute\.device: .*optim\.accumulate.*batch_size from 16"):
        check_memory(larger, World(size=2, local_size=2))
    check_memory(larger, World(size=2, local_size=1))
    monkeypatch.setattr(prepare, "available_bytes", lambda _: None)
    check_memory(replace(config, batch_size=10**6), World())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", ["nothing", "activations", "blocks"])
def test_the_estimate_is_near_what_a_gpu_allocates(recompute: Recompute) -> None:
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
    masks = draw_masks(range(16), (28, 28), config.masking, seed=0).to(world.device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            total = model(crops, masks, teacher_temperature=0.05).losses.total
        total.backward()
        optimizer.step()
    assert step_bytes(config, world) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.25)
