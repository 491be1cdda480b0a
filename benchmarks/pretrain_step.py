"""How fast is a pretraining step, against DINOv3's own and against a straight version of ours?

    python benchmarks/pretrain_step.py                       # against the straight version; writes a result file
    python benchmarks/pretrain_step.py --dinov3 CHECKOUT     # and against DINOv3's step, run on the CPU
    python benchmarks/pretrain_step.py --quick               # small crops, one round; writes nothing

ViT-S/8, 2 x 224 and 8 x 96 px, float32. A step is forward, backward, clipping, AdamW and the teacher's average. All
sides run in turns in one process; memory is the peak of a process of its own. On a GPU: `pretrain_step_gpu.py`.

The allocator counts on a CPU: ``--allocator`` takes ``default``, or ``kept``, with which glibc never gives memory back
(MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_), for all sides alike.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import alternate, ratio, write_result
from torch import Tensor, nn

from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.runtime.optim import adamw, clip_gradients, parameter_groups, set_rates, update_ema
from dinocell.ssl.config import HeadsConfig, LossConfig
from dinocell.ssl.losses import koleo_loss
from dinocell.ssl.masking import MaskingConfig, PatchMasks, draw_masks
from dinocell.ssl.prepare import backbone_of, recompute
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.views import Views

# glibc caps the threshold from which it maps memory at 32 MB, so mapping is switched off.
_KEPT = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": "268435456"}

# Our own sides, and their ``compute.recompute``.
_RECOMPUTE = {"dinocell": "nothing", "dinocell, low memory": "activations", "dinocell, least memory": "blocks"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dinov3", type=Path, help="a checkout of facebookresearch/dinov3")
    parser.add_argument("--allocator", choices=("default", "kept"), default="default")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.prototypes, options.rounds, options.dinov3 = 2, 1024, 1, None
    if options.allocator == "kept" and os.environ.get("MALLOC_MMAP_MAX_") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_KEPT})
    if options.side:
        step = make(options.side, options)
        for _ in range(2):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    names = [*_RECOMPUTE, "straight", *(["DINOv3"] if options.dinov3 else [])]
    memory = {name: peak_bytes(name) for name in names}
    sides = {name: make(name, options) for name in names}
    seconds = alternate(sides, rounds=options.rounds)
    lines = [
        "# A pretraining step on the CPU",
        "",
        f"ViT-S/8, {'2 x 64 + 8 x 32' if options.quick else '2 x 224 + 8 x 96'} px, batch {options.batch}, K "
        f"{options.prototypes:,}, float32, {options.rounds} alternated rounds after one to warm up, allocator "
        f"{options.allocator}. A ratio is a side's time over that of dinocell in the same round: median and range.",
        "",
        "| side | s/step (median) | others' time / dinocell's | peak memory | memory of dinocell / of this |",
        "|---|---|---|---|---|",
    ]
    ours = memory["dinocell"]
    for name in names:
        median = sorted(seconds[name])[len(seconds[name]) // 2]
        lines.append(
            f"| {name} | {median:.2f} | {ratio(seconds[name], seconds['dinocell'])} | {memory[name] / 1e9:.2f} GB | "
            f"{ours / memory[name]:.2f} |"
        )
    text = "\n".join(lines)
    print(text)
    if not options.quick:
        suffix = "" if options.allocator == "default" else "_kept"
        write_result(f"pretrain_step_cpu{suffix}", text, ["torch", "numpy"])


def peak_bytes(name: str) -> int:
    """Return the peak memory of a process that takes two steps of one side."""
    arguments = [each for each in sys.argv[1:] if each]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--side", name], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def make(name: str, options: argparse.Namespace) -> Callable[[], object]:
    """Return a function that takes a step of a side."""
    if name == "DINOv3":
        from _dinov3 import step_of

        return step_of(options.dinov3, num_prototypes=options.prototypes, batch_size=options.batch)
    return our_step(options, straight=name == "straight", again=_RECOMPUTE.get(name, "nothing"))


def our_step(options: argparse.Namespace, *, straight: bool, again: Any) -> Callable[[], object]:
    """Return a step of the product's model and optimizer, or of the straight version of the same model."""
    torch.manual_seed(0)
    sizes = (64, 32) if options.quick else (224, 96)
    backbone = VisionTransformer(variant_config("small", patch_size=8, in_channels=3))
    backbone.init_weights(layer_scale=1e-5)
    heads = HeadsConfig(num_prototypes=options.prototypes)
    model = StudentTeacher(backbone, heads, LossConfig(), keep_logits=again != "blocks").train()
    recompute(backbone_of(model.student), again)
    groups = parameter_groups(dict(model.student.items()), depth=12, layer_decay=0.9)
    optimizer = adamw(groups)
    set_rates(optimizer, learning_rate=1e-4, weight_decay=0.04)
    views = Views(
        torch.randn(2, options.batch, 3, sizes[0], sizes[0]), torch.randn(8, options.batch, 3, sizes[1], sizes[1])
    )
    side = sizes[0] // 8
    masks = draw_masks(range(options.batch), (side, side), MaskingConfig(), seed=0, epoch=0)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        if straight:
            loss = straight_loss(model, views, masks)
        else:
            loss = model(views, masks, teacher_temperature=0.05).losses.total
        loss.backward()
        clip_gradients(dict(model.student.items()), 3.0)
        optimizer.step()
        update_ema(model.teacher.parameters(), model.student.parameters(), 0.996)
        return float(loss.detach())

    return step


def straight_loss(model: StudentTeacher, views: Views, masks: PatchMasks) -> Tensor:
    """Write the step down as the papers do: all patches, whole logits, exponentials, a pair at a time."""
    images, batch = views.global_views.flatten(0, 1), views.global_views.shape[1]
    with torch.no_grad():
        seen = model.teacher["backbone"](images)
        cls_targets = sinkhorn(model.teacher["dino_head"](seen.cls).logits() / 0.05)
        chosen = seen.patches.flatten(0, 1)[masks.indices]
        patch_targets = sinkhorn(model.teacher["ibot_head"](chosen).logits() / 0.05)
    student: nn.Module = model.student["backbone"]
    large = student(images, masks.masks.flatten(1))
    small = student(views.local_views.flatten(0, 1))
    logits = model.student["dino_head"](torch.cat((large.cls, small.cls))).logits() / 0.1
    crops, targets = logits.unflatten(0, (10, batch)), cls_targets.unflatten(0, (2, batch))
    pairs = [(s, t) for s in range(10) for t in range(2) if s != t]
    dino = sum(cross_entropy(crops[s], targets[t]).mean() for s, t in pairs) / len(pairs)
    masked = model.student["ibot_head"](large.patches.flatten(0, 1)[masks.indices]).logits() / 0.1
    ibot = (cross_entropy(masked, patch_targets) * masks.weights).sum() / (2 * batch)
    koleo = sum(koleo_loss(view) for view in large.cls.split(batch))
    total: Any = dino + ibot + 0.1 * koleo
    assert isinstance(total, Tensor)
    return total


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1)


def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    q = torch.exp(logits.float()).T
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * prototypes
        q /= q.sum(0, keepdim=True) * rows
    return (q * rows).T


if __name__ == "__main__":
    main()
