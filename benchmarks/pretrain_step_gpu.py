"""How many images a second does a pretraining step take on a GPU, and how does DINOv3's own code do on the same card?

    python benchmarks/pretrain_step_gpu.py --dinov3 CHECKOUT     # writes results/pretrain_step_gpu.md
    python benchmarks/pretrain_step_gpu.py --quick               # on a CPU as well: small crops, nothing is compiled
    python benchmarks/pretrain_step_gpu.py --cases small/8/32/65536 large/16/32/8192
    python benchmarks/pretrain_step_gpu.py --parts               # and what the time of our steps goes to

A case is variant/patch/batch/prototypes. A step is forward, backward, clipping, AdamW and the teacher's average, on
crops that lie on the device (2 x 224 + 8 x 96 px, 3 channels). Every side is a process of its own, all resident at
once, and they take their steps in turns. DINOv3 runs as its trainer runs it: compiled, FSDP2 in a group of one,
bfloat16 weights. MFU: operations of the plain step by the formula (models/config.py) over the card's dense bfloat16
peak.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _harness import ratio, write_result
from torch.profiler import ProfilerActivity, profile

from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.runtime.device import peak_flop_per_s
from dinocell.runtime.distributed import World
from dinocell.runtime.optim import adamw, clip_gradients, parameter_groups, set_rates, update_ema
from dinocell.ssl.config import (
    Compile,
    ComputeConfig,
    DataConfig,
    HeadsConfig,
    ModelConfig,
    PretrainConfig,
    ViewsConfig,
)
from dinocell.ssl.masking import draw_masks
from dinocell.ssl.prepare import build_model, flop_per_image, step_bytes
from dinocell.ssl.views import Views

_CASES = (
    "small/8/32/65536",
    "small/8/32/8192",
    "base/8/16/65536",
    "base/8/16/8192",
    "large/16/32/65536",
    "large/16/32/8192",
)
_SIDES = ("dinocell, compiled", "dinocell, all compiled", "dinocell", "DINOv3")
# What is compiled of ours, see `ComputeConfig`.
_COMPILED: dict[str, Compile] = {"dinocell, compiled": "blocks", "dinocell, all compiled": "all", "dinocell": "nothing"}
_CHANNELS = ("a", "b", "c")


class Case(NamedTuple):
    """A row of the table."""

    variant: str
    patch_size: int
    batch_size: int
    num_prototypes: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read variant/patch/batch/prototypes."""
        variant, *numbers = text.split("/")
        patch_size, batch_size, num_prototypes = map(int, numbers)
        return cls(variant, patch_size, batch_size, num_prototypes)

    def config(self, device: str, *, compiled: Compile, quick: bool) -> PretrainConfig:
        """Return what the product would train by."""
        sizes = {"global_size": 32, "local_size": 16} if quick else {}
        return PretrainConfig(
            output=Path("none"),
            data=DataConfig(shards=("none",)),
            steps=1,
            batch_size=self.batch_size,
            views=ViewsConfig(policy="stack", channels=_CHANNELS, **sizes),
            model=ModelConfig(variant=self.variant, patch_size=self.patch_size, drop_path=0.0),
            heads=HeadsConfig(num_prototypes=self.num_prototypes),
            compute=ComputeConfig(device=device, compile=compiled),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dinov3", type=Path, help="a checkout of facebookresearch/dinov3")
    parser.add_argument("--cases", nargs="+", default=list(_CASES))
    parser.add_argument("--sides", nargs="+", default=list(_SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of a side in a round")
    parser.add_argument("--parts", action="store_true", help="profile our sides as well")
    parser.add_argument("--together", action="store_true", help="get all cases ready at once: memory for time")
    parser.add_argument("--wait-for", type=Path, help="time nothing before this file exists: other work may go on")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quick:
        options.cases, options.rounds, options.steps = ["tiny/8/2/64"], 2, 1
        options.sides = ["dinocell"]
    if options.worker:
        work(options, Case.parse(options.cases[0]), device)
        return
    if device == "cpu" and not options.quick:
        sys.exit("no CUDA device: pretrain_step.py measures on the CPU")
    if options.dinov3 is None:
        options.sides = [side for side in options.sides if side != "DINOv3"]
    rows: list[str] = []
    parts: list[str] = []
    runs = [Run(options, text) for text in options.cases] if options.together else []
    for run in runs:
        run.get_ready()
    while options.wait_for and not options.wait_for.exists():
        time.sleep(0.2)
    for text in options.cases:
        run = runs.pop(0) if options.together else Run(options, text)
        run.get_ready()
        rows += run.measure(device)
        parts += run.parts
        print("\n".join([*rows, *parts]), flush=True)
        if not options.quick:
            write_result("pretrain_step_gpu", report(options, rows, parts), ["torch"])


def report(options: argparse.Namespace, rows: Sequence[str], parts: Sequence[str]) -> str:
    lines = [
        "# A pretraining step on a GPU",
        "",
        f"2 x 224 + 8 x 96 px, 3 channels, bfloat16, {options.rounds} alternated rounds of {options.steps} steps after "
        "a warm-up. A ratio is a side's time over that of `dinocell, compiled` in the same round: median and range.",
        "",
        "| variant / patch / batch / K | side | images/s | MFU | times dinocell's, compiled | peak memory | estimate |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    if parts:
        lines += [
            "",
            "Milliseconds of a step: until the host is done, and what the device spends by kind of kernel.",
            "",
            f"| variant / patch / batch / K | side | host | {' | '.join(_KINDS)} |",
            f"|---|---|---|{'---|' * len(_KINDS)}",
            *parts,
        ]
    return "\n".join(lines)


class Run:
    """The sides of a case, each a process."""

    def __init__(self, options: argparse.Namespace, text: str) -> None:
        self._options, self._text = options, text
        command = [sys.executable, __file__, "--cases", text]
        if options.dinov3:
            command += ["--dinov3", str(options.dinov3)]
        command += ["--quick"] if options.quick else ["--steps", str(options.steps)]
        self._workers = {
            side: subprocess.Popen(
                [*command, "--worker", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for side in options.sides
        }
        self._ready: dict[str, dict[str, Any] | None] = {}
        self.parts: list[str] = []

    def get_ready(self) -> None:
        """Wait until every side has taken its first steps, or died."""
        if not self._ready:
            self._ready = {side: answer(worker) for side, worker in self._workers.items()}

    def measure(self, device: str) -> list[str]:
        """Let all sides take their turns, and return a line of the table for each."""
        options, case = self._options, Case.parse(self._text)
        seconds: dict[str, list[float]] = {side: [] for side, facts in self._ready.items() if facts}
        for number in range(options.rounds + 1):
            for side, found in seconds.items():
                print("go", file=self._workers[side].stdin, flush=True)
                taken = answer(self._workers[side])
                if number:  # the first is to warm up
                    found.append(taken["seconds"] if taken else float("nan"))
        for side, worker in self._workers.items():
            if options.parts and side in seconds and side != "DINOv3":
                print("parts", file=worker.stdin, flush=True)
                found = answer(worker) or {}
                cells = " | ".join(f"{found.get(kind, float('nan')):.1f}" for kind in ("host", *_KINDS))
                self.parts.append(f"| {self._text} | {side} | {cells} |")
            worker.communicate()
        flop = case_flop(case, options.quick)
        peak = peak_flop_per_s(torch.cuda.get_device_name()) if device == "cuda" else None
        rows, first = [], options.sides[0]
        for side, facts in self._ready.items():
            if not facts:
                rows.append(f"| {self._text} | {side} | failed | | | | |")
                continue
            rate = case.batch_size * options.steps / statistics.median(seconds[side])
            mfu = f"{rate * flop / peak:.0%}" if peak else ""
            estimate = f"{facts['estimate'] / 1e9:.1f} GB" if "estimate" in facts else ""
            times = ratio(seconds[side], seconds[first]) if first in seconds else ""
            rows.append(
                f"| {self._text} | {side} | {rate:.0f} | {mfu} | {times} | {facts['peak'] / 1e9:.1f} GB | {estimate} |"
            )
        return rows


def answer(worker: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """Return the next answer of a side, None if it has died."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def work(options: argparse.Namespace, case: Case, device: str) -> None:
    """Be a side: get ready, then take steps whenever asked to."""
    facts: dict[str, float] = {}
    if options.worker == "DINOv3":
        from _dinov3 import step_of

        step: Callable[[], torch.Tensor] = step_of(
            options.dinov3,
            num_prototypes=case.num_prototypes,
            batch_size=case.batch_size,
            variant=case.variant,
            patch_size=case.patch_size,
            device=device,
        )
    else:
        config = case.config(device, compiled=_COMPILED[options.worker], quick=options.quick)
        facts["estimate"] = step_bytes(config, World(device=torch.device(device)))
        step = our_step(config, device)
    for _ in range(3):
        loss = step()
    if not bool(torch.isfinite(loss)):
        sys.exit(f"{options.worker}: the loss is {float(loss)}")
    facts["peak"] = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() == "parts":
            print(json.dumps(parts_of(step, device)), flush=True)
            continue
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(options.steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def parts_of(step: Callable[[], torch.Tensor], device: str) -> dict[str, float]:
    """Return the milliseconds after which the host is done with a step, and those of the device by kind of kernel."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    host = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
    wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        for _ in range(_PROFILED):
            step()
        wait()
    found = {"host": 1e3 * statistics.median(host), **dict.fromkeys(_KINDS, 0.0)}
    for event in profiled.events() or ():
        # The optimizer marks its span, which is no kernel.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer."):
            found[kind_of(event.name)] += event.device_time_total / 1e3 / _PROFILED
    return found


_PROFILED = 2

# Kinds of kernels, and what their names hold; the first that fits.
_KINDS = {
    "attention": ("sdpa", "flash", "fmha", "cudnn"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitk", "cublas"),
    "compiled": ("triton",),
    "optimizer, clipping, average": ("multi_tensor",),
    "other": ("",),
}


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    name = kernel.lower()
    return next(kind for kind, marks in _KINDS.items() if any(mark in name for mark in marks))


def our_step(config: PretrainConfig, device: str) -> Callable[[], torch.Tensor]:
    """Return the step of the product's model and optimizer."""
    world = World(device=torch.device(device))
    model = build_model(config, world)
    depth = variant_config(config.model.variant).depth
    optimizer = adamw(parameter_groups(dict(model.student.items()), depth=depth, layer_decay=0.9))
    set_rates(optimizer, learning_rate=1e-4, weight_decay=0.04)
    views, batch = config.views, config.batch_size
    crops = Views(
        torch.randn(2, batch, 3, views.global_size, views.global_size, device=device),
        torch.randn(8, batch, 3, views.local_size, views.local_size, device=device),
    )
    masks = draw_masks(range(batch), config.mask_grid, config.masking, seed=0).to(torch.device(device))

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(crops, masks, teacher_temperature=0.05).losses.total
        loss.backward()
        clip_gradients(dict(model.student.items()), 3.0)
        optimizer.step()
        update_ema(model.teacher.parameters(), model.student.parameters(), 0.996)
        result: torch.Tensor = loss.detach()
        return result

    return step


def case_flop(case: Case, quick: bool) -> float:
    """Return the operations of a step by image."""
    config = case.config("cpu", compiled="nothing", quick=quick)
    with torch.device("meta"):
        backbone = VisionTransformer(variant_config(case.variant, patch_size=case.patch_size, in_channels=3))
    return flop_per_image(config, _Shape(backbone))  # type: ignore[arg-type]


class _Shape:
    """What the formula reads of a model."""

    def __init__(self, backbone: VisionTransformer) -> None:
        self.student = torch.nn.ModuleDict({"backbone": backbone})


if __name__ == "__main__":
    main()
