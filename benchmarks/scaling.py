"""How many bytes does a step move, and what does that cost on 1 to 64 nodes? The formula, and the count that checks it.

    python benchmarks/scaling.py            # docs/scaling.md's tables, and bytes counted at 1 to 4 processes here
    python benchmarks/scaling.py --quick    # the count at 1 and 2 processes; writes nothing

The formula knows ring collectives: of n ranks each sends (n - 1) / n of what is gathered or scattered, and twice that
to reduce to all. Times are no measurement: bytes over the links' rates, and operations at a given share of the peak.
"""

import argparse
import math
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _harness import write_result

from dinocell.models.config import forward_flop, head_flop, variant_config
from dinocell.models.vit import VisionTransformer
from dinocell.runtime.distributed import Parallel, World, make_mesh, shard

# 8 A100 80 GB SXM a node: 300 GB/s each way through NVSwitch (NVIDIA's A100 data sheet: 600 GB/s both ways), 8 network
# cards of 200 Gb/s, so 25 GB/s a GPU between nodes; 312 TFLOP/s dense bf16, of which 40 % are reached.
PER_NODE, INSIDE, BETWEEN = 8, 300e9, 25e9
RATE = 0.40 * 312e12
# Tiles a GPU and step: what fits 80 GB (estimated; 7B with recomputation).
SETUPS = {"S/8": ("small", 64), "B/8": ("base", 32), "L/8": ("large", 12), "7B/16": ("7b", 4)}
PROTOTYPES = 8192


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a GPU sends in a step, by link."""

    inside: float
    between: float


def traffic(
    parameters: float, parallel: Parallel, nodes: int, *, gathered_bytes: int = 2, gpus: int = PER_NODE
) -> Traffic:
    """Return what a step moves: gradients in float32, parameters in ``gathered_bytes``.

    Sharded, the student is gathered for the forward and again for the backward pass, the teacher once.
    """
    world = nodes * gpus
    if parallel == "ddp":
        total = 2 * (world - 1) / world * 4 * parameters
        return _ring(total, nodes, gpus)
    if parallel == "fsdp":
        share = (world - 1) / world
        return _ring(share * parameters * (3 * gathered_bytes + 4), nodes, gpus)
    share = (gpus - 1) / gpus
    inside = share * parameters * (3 * gathered_bytes + 4)
    between = 2 * (nodes - 1) / nodes * 4 * parameters / gpus
    return Traffic(inside=inside, between=between)


def _ring(total: float, nodes: int, gpus: int) -> Traffic:
    """Of a ring over all GPUs one link in ``gpus`` leaves the node, and hierarchical rings share it among the cards."""
    if nodes == 1:
        return Traffic(inside=total, between=0.0)
    return Traffic(inside=total, between=total / gpus)


def step_flop(variant: str, patch: int) -> float:
    """Return an image's operations: teacher on 2 x 224, student on these and 8 x 96, backward twice forward."""
    config = variant_config(variant, patch_size=patch, in_channels=1)
    large, small = forward_flop(config, 224), forward_flop(config, 96)
    head = head_flop(config.width, 2048, 256, 3, PROTOTYPES)
    masked = 0.15 * 2 * (224 // patch) ** 2
    return 2 * large + (2 + masked) * head + 3 * (2 * large + 8 * small + (10 + masked) * head)


def parameters_of(variant: str, patch: int) -> float:
    with torch.device("meta"):
        vit = VisionTransformer(variant_config(variant, patch_size=patch, in_channels=1))
    width = vit.config.width
    head = width * 2048 + 2048 * 2048 + 2048 * 256 + 256 * PROTOTYPES
    return sum(p.numel() for p in vit.parameters()) + 2 * head


def tables() -> str:
    lines = []
    for name, (variant, batch) in SETUPS.items():
        patch = int(name.split("/")[1])
        parameters, flop = parameters_of(variant, patch), step_flop(variant, patch) * batch
        compute = flop / RATE
        lines += [
            f"## {name}: {parameters / 1e6:,.0f} M parameters with heads, {batch} tiles a GPU, a step computes for "
            f"{compute:.2f} s",
            "",
            "| | MB a GPU and step, inside one node | between 4 nodes | efficiency on 1, 4, 16, 64 nodes, nothing "
            "hidden | three quarters hidden |",
            "|---|---|---|---|---|",
        ]
        for parallel in ("ddp", "fsdp", "hsdp"):
            one, four = (traffic(parameters, parallel, nodes) for nodes in (1, 4))  # type: ignore[arg-type]
            cells = []
            for hidden in (0.0, 0.75):
                found = []
                for nodes in (1, 4, 16, 64):
                    moved = traffic(parameters, parallel, nodes)  # type: ignore[arg-type]
                    wait = (moved.inside / INSIDE + moved.between / BETWEEN + latency(parallel, nodes)) * (1 - hidden)
                    found.append(f"{compute / (compute + wait):.2f}")
                cells.append(", ".join(found))
            lines.append(
                f"| {parallel} | {one.inside / 1e6:,.0f} | {four.between / 1e6:,.0f} | {cells[0]} | {cells[1]} |"
            )
        lines.append("")
    return "\n".join(lines)


def latency(parallel: str, nodes: int) -> float:
    """Return the waiting that no bandwidth helps: 20 us a collective and hop between nodes, log2 hops.

    12 blocks' worth of collectives for ``ddp``, four times as many sharded (estimated).
    """
    collectives = 14 if parallel == "ddp" else 56
    return collectives * 20e-6 * (1 + math.log2(nodes)) if nodes > 1 else collectives * 10e-6


def count(rank: int, size: int, parallel: Parallel, place: str, results: Any) -> None:
    """Take a forward and backward pass of a small sharded backbone, and count what the collectives move."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    local = 2 if parallel == "hsdp" else size
    world = World(rank=rank, size=size, local_rank=rank % local, local_size=local)
    vit = VisionTransformer(variant_config("tiny", patch_size=8, in_channels=1))
    teacher = VisionTransformer(variant_config("tiny", patch_size=8, in_channels=1)).requires_grad_(False)
    number = sum(p.numel() for p in vit.parameters())
    mesh = make_mesh(parallel, world)
    for each in (vit, teacher):
        each.one_pass = True
        shard(each, mesh, blocks=list(each.blocks))
    sent = {"gathered": 0.0, "scattered": 0.0, "reduced": 0.0}
    _listen(sent)
    images = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        teacher(images)
    output = vit(images)
    (output.cls.sum() + output.patches.sum()).backward()
    if rank == 0:
        results[(parallel, size)] = (number, dict(sent))
    dist.destroy_process_group()


def _listen(sent: dict[str, float]) -> None:
    """Count, by the ring formula, what this rank sends in FSDP2's collectives (their names are those of torch 2.13)."""

    def counting(name: str, which: str, whole: int, factor: int) -> None:
        real = getattr(dist, name)

        def called(*arguments: Any, **named: Any) -> Any:
            n = dist.get_world_size(named.get("group"))
            tensors = [each for each in (*arguments, *named.values()) if isinstance(each, torch.Tensor)]
            tensor = max(tensors, key=torch.Tensor.numel) if whole else tensors[0]
            sent[which] += factor * (n - 1) / n * tensor.numel() * tensor.element_size()
            return real(*arguments, **named)

        setattr(dist, name, called)

    older, newer = ("all_gather_into_tensor", "reduce_scatter_tensor"), ("all_gather_single", "reduce_scatter_single")
    gather, scatter = newer if hasattr(dist, newer[0]) else older
    counting(gather, "gathered", 1, 1)
    counting(scatter, "scattered", 1, 1)
    counting("all_reduce", "reduced", 0, 2)


def counted(quick: bool) -> str:
    """Return a table of counted bytes beside those of the formula."""
    lines = ["| processes | way | counted MB a process | by the formula |", "|---|---|---|---|"]
    runs: list[tuple[int, Parallel]] = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (3, "fsdp"), (4, "fsdp"), (4, "hsdp")]
    with mp.Manager() as manager:
        results = manager.dict()
        for size, parallel in runs[:3] if quick else runs:
            place = os.path.join(tempfile.mkdtemp(), "meet")  # noqa: PTH118
            mp.spawn(count, args=(size, parallel, place, results), nprocs=size)
            number, sent = results[(parallel, size)]
            gpus = 2 if parallel == "hsdp" else size
            wanted = traffic(number, parallel, size // gpus, gathered_bytes=4, gpus=gpus)
            formula = wanted.inside + (wanted.between if parallel == "hsdp" else 0)
            total = sum(sent.values())
            lines.append(f"| {size} | {parallel} | {total / 1e6:.2f} | {formula / 1e6:.2f} |")
            if formula and abs(total / formula - 1) > 0.1:
                raise SystemExit(
                    f"{size} processes, {parallel}: counted {total:.0f} bytes, the formula says {formula:.0f}"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="count at 1 and 2 processes, write nothing")
    options = parser.parse_args()
    text = f"# Bytes a step moves\n\nCounted: ViT-tiny/8 in float32, gloo.\n\n{counted(options.quick)}\n\n{tables()}"
    print(text)
    if not options.quick:
        write_result("scaling", text, ["torch"])


if __name__ == "__main__":
    main()
