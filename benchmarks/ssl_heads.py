"""What do heads, Sinkhorn-Knopp and losses cost, against the straightforward way with whole matrices of logits?

    python benchmarks/ssl_heads.py            # writes results/ssl_heads.md, about 6 minutes on 2 cores
    python benchmarks/ssl_heads.py --quick    # K 4,096, 2 rounds, writes nothing

A training step's share after the backbone, forward and backward, float32: batch 4, 2 global and 8 local crops, 1,096
masked patches, separate DINO and iBOT heads (2,048 hidden, 256 bottleneck), targets by 3 rounds of Sinkhorn-Knopp. Both
ways have the same weights; their losses and gradients are compared first. Memory is the rise of the process's peak over
what it held before the step (so weights do not count, gradients do), each side in a process of its own.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from _harness import alternate, ratio, write_result
from torch import Tensor, nn

from dinocell.ssl.heads import ProjectionHead
from dinocell.ssl.losses import dino_loss, ibot_loss
from dinocell.ssl.targets import TeacherLogits, sinkhorn_targets

BATCH, GLOBALS, LOCALS, MASKED, WIDTH, TEMPERATURE = 4, 2, 8, 1096, 384, 0.05
# The first frees each matrix as soon as the formulas allow; the second holds teacher and student logits to the end of
# the step, as a step does that collects the outputs of its parts first (DINOv3's); both compute the same.
PLAIN, HOLDING, KEPT, AGAIN = (
    "straightforward",
    "straightforward, logits held to the end",
    "ours, teacher logits kept",
    "ours, teacher logits made again",
)
SIDES = (PLAIN, HOLDING, KEPT, AGAIN)
# glibc gives memory above 128 KB back to the system each time; told not to, it keeps and reuses it.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"}


class Part(NamedTuple):
    """One of the two heads with its inputs."""

    student: ProjectionHead
    teacher: ProjectionHead
    student_tokens: Tensor
    teacher_tokens: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="K 4,096, 2 rounds, no result file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=("memory", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--prototypes", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    if options.worker == "memory":
        print(peak_mb(options.side, options.prototypes))
    elif options.worker == "time":
        print("\n".join(time_rows(options.prototypes, rounds)))
    else:
        report([4096] if options.quick else [65536, 8192], rounds, write=not options.quick)


def report(counts: list[int], rounds: int, *, write: bool) -> None:
    lines = [
        "# Heads, Sinkhorn-Knopp and losses",
        "",
        f"Batch {BATCH}, {GLOBALS} x 224 + {LOCALS} x 96 px, {MASKED:,} masked patches, bottleneck 256, float32,",
        f"forward and backward. Time: {rounds} rounds in turns; ratio = straightforward / ours, above 1 is faster.",
        "Memory: rise of the peak over what was held before; median of three processes a side.",
    ]
    for prototypes in counts:
        lines += ["", f"## K = {prototypes:,}", "", "| side | MB at the peak | share of the first | of the second |"]
        lines += ["|---|---|---|---|"]
        peaks = {side: statistics.median(measured(side, prototypes)) for side in SIDES}
        lines += [
            f"| {side} | {peak:,.0f} | {peak / peaks[PLAIN]:.2f} | {peak / peaks[HOLDING]:.2f} |"
            for side, peak in peaks.items()
        ]
        for name, environment in (("as it comes", {}), ("keeps its memory", KEEPING)):
            lines += ["", f"| allocator {name} | s | ratio: median (range) |", "|---|---|---|"]
            arguments = ["--worker", "time", "--prototypes", str(prototypes), "--rounds", str(rounds)]
            lines += run(arguments, environment).splitlines()
        print("\n".join(lines), flush=True)
    if write:
        print(write_result("ssl_heads", "\n".join(lines), ["torch"]))


def measured(side: str, prototypes: int) -> list[float]:
    return [float(run(["--worker", "memory", "--side", side, "--prototypes", str(prototypes)], {})) for _ in range(3)]


def run(arguments: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True).stdout


def peak_mb(side: str, prototypes: int) -> float:
    parts = build(prototypes)
    # One small step first, so that libraries and their work spaces are there.
    step(side, build(16))
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step(side, parts)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held) / 1e6


def time_rows(prototypes: int, rounds: int) -> list[str]:
    parts = build(prototypes)
    check_equal(parts)
    seconds = alternate({side: lambda s=side: step(s, parts) for side in SIDES}, rounds=rounds)
    return [
        f"| {side} | {statistics.median(seconds[side]):.2f} | {ratio(seconds[PLAIN], seconds[side])} |"
        for side in SIDES
    ]


def build(prototypes: int) -> tuple[Part, Part]:
    torch.manual_seed(0)
    parts = []
    for of_student, of_teacher in (((GLOBALS + LOCALS) * BATCH, GLOBALS * BATCH), (MASKED, MASKED)):
        student, teacher = ProjectionHead(WIDTH, prototypes), ProjectionHead(WIDTH, prototypes).requires_grad_(False)
        tokens = torch.randn(of_student, WIDTH, requires_grad=True)
        parts.append(Part(student, teacher, tokens, torch.randn(of_teacher, WIDTH)))
    return parts[0], parts[1]


def step(side: str, parts: tuple[Part, Part]) -> list[float]:
    for part in parts:
        part.student.zero_grad(set_to_none=True)
        part.student_tokens.grad = None
    held: list[Tensor] = []
    if side in (PLAIN, HOLDING):
        losses, held = straightforward(*parts, hold=side == HOLDING)
    else:
        losses = ours(*parts, keep=side == KEPT)
    sum(losses).backward()
    del held
    return [loss.item() for loss in losses]


def ours(tokens: Part, patches: Part, *, keep: bool) -> list[Tensor]:
    with torch.no_grad():
        logits = [TeacherLogits(part.teacher(part.teacher_tokens), keep=keep) for part in (tokens, patches)]
        of_tokens, of_patches = sinkhorn_targets(logits, TEMPERATURE)
    del logits
    student = patches.student(patches.student_tokens)
    ibot = ibot_loss(student, of_patches, weights(), num_images=GLOBALS * BATCH)
    del of_patches
    student = tokens.student(tokens.student_tokens)
    return [dino_loss(student, of_tokens, num_globals=GLOBALS, num_locals=LOCALS).total, ibot]


def straightforward(tokens: Part, patches: Part, *, hold: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Whole matrices, as the formulas are written, divisions in place; returns the losses, and what is to be held."""
    held: list[Tensor] = []

    def logits(head: ProjectionHead, rows: Tensor) -> Tensor:
        result = head(rows).logits()
        if hold:
            held.append(result)
        return result

    with torch.no_grad():
        q = balanced(logits(tokens.teacher, tokens.teacher_tokens)).unflatten(0, (GLOBALS, BATCH))
        q_patches = balanced(logits(patches.teacher, patches.teacher_tokens))
    log = (logits(tokens.student, tokens.student_tokens) / 0.1).log_softmax(1).unflatten(0, (-1, BATCH))
    of_global = -(q.flip(0) * log[:GLOBALS]).sum() / (GLOBALS * BATCH)
    of_local = -torch.einsum("vbk,lbk->", q, log[GLOBALS:]) / (GLOBALS * LOCALS * BATCH)
    log = (logits(patches.student, patches.student_tokens) / 0.1).log_softmax(1)
    ibot = -((q_patches * log).sum(1) * weights()).sum() / (GLOBALS * BATCH)
    return [(2 * of_global + 16 * of_local) / 18, ibot], held


def balanced(logits: Tensor) -> Tensor:
    q = (logits / TEMPERATURE).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    q *= q.shape[1]
    return q.T


def weights() -> Tensor:
    counts = torch.tensor([156, 235, 313, 392])
    return (1 / counts).repeat_interleave(counts)


def check_equal(parts: tuple[Part, Part]) -> None:
    found = []
    for side in SIDES:
        losses = step(side, parts)
        modules: list[nn.Module] = [part.student for part in parts]
        gradients = [p.grad.clone() for module in modules for p in module.parameters()]
        found.append((losses, gradients + [part.student_tokens.grad.clone() for part in parts]))
    for losses, gradients in found[1:]:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(found[0][0]), rtol=1e-4, atol=0)
        for mine, theirs in zip(gradients, found[0][1], strict=True):
            assert (mine - theirs).norm() <= 1e-3 * theirs.norm()


if __name__ == "__main__":
    main()
