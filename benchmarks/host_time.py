"""How much of a pretraining step is the host's own work: Python, dispatcher, autograd, optimizer, launches?

    python benchmarks/host_time.py                       # writes results/host_time.md
    python benchmarks/host_time.py --against CHECKOUT    # and the same steps by another checkout of ours, in turns
    python benchmarks/host_time.py --quick               # one depth, not compiled, one round; writes nothing

The step of the trainer with the depth, crops, losses and parameter groups of the product, and next to no arithmetic:
width 32, 2 x 32 and 8 x 16 px at patch 8, K 64, 2 tiles, one thread. As on a GPU all crops go through each block
together, under autocast to bfloat16. What is left is what a GPU would have to wait for, but for kernels of a few
microseconds each, which a CPU runs where a GPU has them launched. So the counts are the measure:

``launches``      operators that call no other and are neither views nor allocations; kernels of the compiler; what
                  takes a list of tensors, once
``dispatched``    calls of operators, of whatever kind
``Python calls``  calls of Python functions, as the interpreter counts them

``wrapped`` is the plain step as each of several ranks takes it (FSDP2), in a group of one. A side that is not ours is
timed and counted by this script, too.

Every side is a process of its own, and they take their steps in turns. Times are those that the processor spent on the
process, so that others on the machine count little; of the first step with the compiler's, whose cache is empty.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple

import torch
from _harness import ratio, write_result
from torch.autograd.profiler_util import FunctionEvent

_PHASES = (
    "masks",
    "teacher forward",
    "targets",
    "student forward",
    "losses",
    "backward",
    "clip",
    "optimizer",
    "moving average",
    "the rest",
)
_DEPTHS = ("small", "large")  # 12 and 24 blocks; base has the depth of small
_WAYS = ("plain", "wrapped", "compiled")
_COUNTS = ("launches", "dispatched", "Python calls")
_MARK = "phase "
_LISTS = ("aten::_foreach", "aten::_fused")

# Operators that start nothing on a device: views and allocations.
_NO_LAUNCH = frozenset(
    "aten::" + name
    for name in (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "as_strided", "alias", "t"),
        *("transpose", "permute", "expand", "expand_as", "slice", "select", "narrow", "split", "split_with_sizes"),
        *("unsafe_split_with_sizes", "unsafe_split", "chunk", "unbind", "squeeze", "unsqueeze", "detach", "diagonal"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "result_type"),
        *("is_nonzero", "item", "_local_scalar_dense", "set_", "lift_fresh", "size", "movedim", "numpy_T", "view_as"),
        *("to", "contiguous", "detach_", "squeeze_", "unsqueeze_", "transpose_", "_conj", "resolve_conj", "conj"),
        *("promote_types", "resolve_neg", "swapaxes", "swapdims", "view_as_real", "T", "mT", "numpy_t", "broadcast_to"),
    )
)


class Case(NamedTuple):
    """A row of the table."""

    variant: str
    way: str

    def __str__(self) -> str:
        return f"{self.variant}, {self.way}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, such as of an earlier commit")
    parser.add_argument("--variants", nargs="+", default=list(_DEPTHS))
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a side in a round")
    parser.add_argument("--ways", nargs="+", choices=_WAYS, default=list(_WAYS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=_WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.variants, options.rounds, options.steps, options.ways = ["small"], 2, 1, ["plain"]
    if options.worker:
        sys.path.insert(0, options.root)
        work(Case(options.variants[0], options.worker), options)
        return
    found = {}
    for way in options.ways:
        for variant in options.variants:
            case = Case(variant, way)
            found[case] = measure(case, options)
            print("\n".join(report(options, found)), flush=True)
            if not options.quick:
                write_result("host_time", "\n".join(report(options, found)), ["torch"])


def report(options: argparse.Namespace, found: dict[Case, dict[str, Any]]) -> list[str]:
    """Return the tables: steps, and where one of ours goes."""
    lines = [
        "# The host's share of a pretraining step",
        "",
        f"2 x 32 + 8 x 16 px, patch 8, width 32, K 64, 2 tiles, bfloat16, drop path {options.drop_path:g}, one thread, "
        f"{options.rounds} alternated rounds of {options.steps} steps. Numbers are of one step; a ratio is the other "
        "checkout's over ours, of times its median and range over the rounds.",
        "",
        "| depth of | side | ms (range) | time / ours | launches | dispatched | Python calls | first step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, sides in found.items():
        for side, facts in sides.items():
            each = [1e3 * sum(round_.values()) for round_ in facts["rounds"]]
            times = ratio(
                [sum(r.values()) for r in facts["rounds"]], [sum(r.values()) for r in sides["ours"]["rounds"]]
            )
            counts = [sum(facts[name].values()) for name in _COUNTS]
            lines.append(
                f"| {case} | {side} | {statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f}) | {times} | "
                f"{' | '.join(f'{count:,.0f}' for count in counts)} | {facts['first']:.1f} s |"
            )
    names = [f"{case}, {side}" for case, sides in found.items() for side in sides]
    facts_of = [facts for sides in found.values() for facts in sides.values()]
    lines += ["", "By phase: median ms, launches / Python calls.", "", f"| phase | {' | '.join(names)} |"]
    lines.append(f"|---{'|---' * len(names)}|")
    for phase in _PHASES:
        cells = [
            f"{1e3 * statistics.median(round_.get(phase, 0.0) for round_ in facts['rounds']):.1f} ms, "
            f"{facts['launches'].get(phase, 0):,} / {facts['Python calls'].get(phase, 0):,}"
            for facts in facts_of
        ]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return lines


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Let the sides of a case take their turns; return what each says of itself."""
    roots = {"ours": Path(__file__).resolve().parent.parent}
    if options.against:
        roots = {"before": options.against.resolve(), **roots}
    found: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        workers = {}
        for side, root in roots.items():
            workers[side] = start(case, root, Path(scratch) / side, options)
            found[side] = {**answer(workers[side]), "rounds": []}
        for number in range(options.rounds + 1):
            for side, worker in workers.items():
                taken = ask(worker, "time")
                if number:  # the first is to warm up
                    found[side]["rounds"].append(taken)
        for side, worker in workers.items():
            found[side] |= ask(worker, "count")
            worker.communicate()
    return found


def start(case: Case, root: Path, cache: Path, options: argparse.Namespace) -> "subprocess.Popen[str]":
    """Start the process of a side."""
    command = [sys.executable, __file__, "--worker", case.way]
    command += ["--root", str(root), "--variants", case.variant]
    command += ["--steps", str(options.steps), "--drop-path", str(options.drop_path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: "subprocess.Popen[str]", what: str) -> dict[str, Any]:
    print(what, file=worker.stdin, flush=True)
    return answer(worker)


def answer(worker: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return the next answer of a side."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    sys.exit("a side has died")


def work(case: Case, options: argparse.Namespace) -> None:
    """Be a side: take the first steps, then time or count whenever asked to."""
    torch.set_num_threads(1)
    if case.way == "compiled":
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True  # its kernels are operators to the profiler
    phases = Phases()
    step = our_step(case, phases, options.drop_path)
    begin = os.times()
    step()
    first = sum(os.times()[:4]) - sum(begin[:4])
    for _ in range(2):
        step()
    print(json.dumps({"first": first}), flush=True)
    for line in sys.stdin:
        if line.strip() == "time":
            phases.seconds.clear()
            for _ in range(options.steps):
                step()
            print(json.dumps({name: s / options.steps for name, s in phases.seconds.items()}), flush=True)
        else:
            print(json.dumps({**count_operators(step), "Python calls": count_calls(step, phases)}), flush=True)


class Phases:
    """Which phase of the step is on; a phase inside of another interrupts it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._names: list[str] = []
        self._since = 0.0

    @property
    def now(self) -> str:
        """Name of the phase that is on."""
        return self._names[-1] if self._names else ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what happens in here to a phase."""
        self._turn()
        self._names.append(name)
        try:
            if torch.autograd.profiler._is_profiler_enabled:
                with torch.profiler.record_function(_MARK + name):
                    yield
            else:
                yield
        finally:
            self._turn()
            self._names.pop()

    def _turn(self) -> None:
        now = time.process_time()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Charge the calls of a function to a phase; a function that this checkout does not have is none."""
        if not hasattr(owner, attribute):
            return
        original = getattr(owner, attribute)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return original(*arguments, **keywords)

        setattr(owner, attribute, timed)


def count_operators(step: Callable[[], object]) -> dict[str, dict[str, int]]:
    """Count what the profiler sees of a step, by phase."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    launches: Counter[str] = Counter()
    dispatched: Counter[str] = Counter()
    events = [each for each in profiler.events() if each.name.startswith("aten::") or "fused" in each.name]
    starts = {id(event): event.name not in _NO_LAUNCH for event in events}
    places = [_place(event) for event in events]
    for event, (_, callers) in zip(events, places, strict=True):
        if starts[id(event)]:
            for caller in callers:
                starts[id(caller)] &= caller.name.startswith(_LISTS)
    for event, (phase, callers) in zip(events, places, strict=True):
        # A list of tensors is one launch on a GPU, whatever a CPU makes of it.
        within = any(caller.name.startswith(_LISTS) for caller in callers)
        dispatched[phase] += not within
        launches[phase] += starts[id(event)] and not within
    return {"launches": dict(launches), "dispatched": dict(dispatched)}


def _place(event: FunctionEvent) -> tuple[str, list[FunctionEvent]]:
    """Return the phase of an operator, and the operators that have called it."""
    callers, parent = [], event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_MARK):
            return parent.name.removeprefix(_MARK), callers
        if parent.name.startswith("aten::"):
            callers.append(parent)
        parent = parent.cpu_parent
    return "the rest", callers


def count_calls(step: Callable[[], object], phases: Phases) -> dict[str, int]:
    """Count the calls of Python functions in a step, by phase."""
    calls: Counter[str] = Counter()

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            calls[phases.now or "the rest"] += 1

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return dict(calls)


def our_step(case: Case, phases: Phases, drop_path: float) -> Callable[[], object]:
    """Return the step of the product's trainer, its phases marked."""
    from dinocell.models import config as models
    from dinocell.runtime.distributed import World
    from dinocell.runtime.optim import NonfiniteSteps
    from dinocell.ssl import trainer as module
    from dinocell.ssl.config import ComputeConfig, DataConfig, HeadsConfig, ModelConfig, PretrainConfig
    from dinocell.ssl.prepare import _spread, backbone_of, build_model
    from dinocell.ssl.student_teacher import StudentTeacher
    from dinocell.ssl.view_plan import ViewsConfig
    from dinocell.ssl.views import Views

    models.VARIANTS[case.variant] = replace(models.VARIANTS[case.variant], width=32, heads=2, mlp_hidden=64)
    tiles, sizes = 2, (32, 16)
    config = PretrainConfig(
        output=Path("none"),
        data=DataConfig(shards=("none",)),
        steps=1000,
        batch_size=tiles,
        views=ViewsConfig(policy="stack", channels=("a", "b", "c"), global_size=sizes[0], local_size=sizes[1]),
        model=ModelConfig(variant=case.variant, layer_scale=0.1, drop_path=drop_path),
        heads=HeadsConfig(num_prototypes=64, hidden=32, bottleneck=16),
        compute=ComputeConfig(device="cpu", dtype="bfloat16", compile="all" if case.way == "compiled" else "nothing"),
    )
    world = World()
    model = build_model(config, world)
    if case.way == "wrapped":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        _spread(config, model, world)
    sides = {"teacher forward": model.teacher, "student forward": model.student}
    for name, side in sides.items():
        backbone_of(side).one_pass = True
        for part in side.values():
            phases.wrap(part, "forward", name)
    for owner, attribute, name in (
        (StudentTeacher, "_targets", "targets"),
        (StudentTeacher, "forward", "losses"),
        (torch.Tensor, "backward", "backward"),
        (module, "clip_gradients", "clip"),
        (module, "set_rates", "optimizer"),
        (torch.optim.Optimizer, "zero_grad", "optimizer"),
        (NonfiniteSteps, "step", "optimizer"),
        (module, "release", "moving average"),
        (module, "update_teacher", "moving average"),
        (module.Trainer, "_masks", "masks"),
        (module.Trainer, "step", "the rest"),
    ):
        phases.wrap(owner, attribute, name)
    trainer = module.Trainer(config, model, world)
    crops = Views(torch.randn(2, tiles, 3, sizes[0], sizes[0]), torch.randn(8, tiles, 3, sizes[1], sizes[1]))
    draw = _masks_of(config)
    batches = [
        _Batch(tiles * i, draw and draw(range(tiles * i - tiles, tiles * i), slice(tiles)), draw) for i in range(1, 9)
    ]
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        batch: Any = batches[number % len(batches)]
        trainer.step(number, [(batch, crops)], watch=False)

    return step


class _Batch(NamedTuple):
    """What the trainer reads of a batch."""

    next_position: int
    drawn: object
    drawn_by: object

    def __len__(self) -> int:
        return 2


def _masks_of(config: Any) -> Any:
    """Return what draws masks ahead, as the reader's workers do; None where a checkout draws them in the step."""
    from dinocell.ssl import prepare

    found = getattr(prepare, "masks_of", None)
    return None if found is None else found(config)


if __name__ == "__main__":
    main()
