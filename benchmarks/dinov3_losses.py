"""Are our losses, gradients and steps those of DINOv3's own code, on the same weights, crops and masks?

    python benchmarks/dinov3_losses.py --dinov3 CHECKOUT          # writes a result file
    python benchmarks/dinov3_losses.py --dinov3 CHECKOUT --quick  # small crops, one step; writes nothing

DINOv3's ``SSLMetaArch`` runs on the CPU from a checkout, as in `pretrain_step.py`. Its random weights are read by our
reader of checkpoints, then each side takes its own steps with its own code: targets, losses, backward, clipping, AdamW
with layer-wise decay, moving average. Two things are set alike on both sides, so that there is something to compare:
LayerScale is 0.3 (at 1e-5 all CLS tokens are equal to 1e-10 and KoLeo's neighbours are rounding noise), and prototypes
have about unit length (at the first values every prediction is nearly uniform, whatever the code does). And one thing
on their side: rotary tables are float32. Their training code does not hand ``pos_embed_rope_dtype`` to the model, so
that coordinates and periods are always rounded to bfloat16, which alone moves CLS tokens by 2e-4.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _harness import write_result
from torch import Tensor, nn

from dinocell.models.formats import recognise
from dinocell.models.vit import VisionTransformer
from dinocell.runtime.optim import adamw, clip_gradients, parameter_groups, set_rates, update_ema
from dinocell.ssl.config import HeadsConfig, LossConfig
from dinocell.ssl.masking import PatchMasks
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.views import Views

_LAYER_SCALE = 0.3
# 256 weights of a deviation of 0.02 have a length of 0.32.
_PROTOTYPE_FACTOR = 3.0
_TEMPERATURE, _MOMENTUM, _CLIP, _RATE, _DECAY = 0.05, 0.9, 3.0, 1e-4, 0.04
# Their names for our losses, and what theirs times this is ours: they take the mean of KoLeo over the global crops.
_LOSSES = {
    "dino_global": ("dino_global_crops_loss", 1.0),
    "dino_local": ("dino_local_crops_loss", 1.0),
    "ibot": ("ibot_loss", 1.0),
    "koleo": ("koleo_loss", 2.0),
}
_GRADIENTS = (
    "backbone.patch_embed.proj.weight",
    "backbone.cls_token",
    "backbone.mask_token",
    "backbone.blocks.0.attn.qkv.weight",
    "backbone.blocks.0.ls1.gamma",
    "backbone.blocks.11.mlp.fc2.weight",
    "backbone.norm.weight",
    "dino_head.mlp.0.weight",
    "dino_head.last_layer.weight",
    "ibot_head.last_layer.weight",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dinov3", type=Path, help="a checkout of facebookresearch/dinov3")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prototypes", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not options.dinov3:
        print("nothing was compared: --dinov3 says where DINOv3's code is")
        sys.exit(0 if options.quick else 2)
    if options.quick:
        options.batch, options.prototypes, options.steps = 2, 256, 1
    sizes = (64, 32) if options.quick else (224, 96)
    from _dinov3 import Peer

    peer = Peer(options.dinov3, num_prototypes=options.prototypes)
    theirs = peer.model
    prepare(theirs)
    ours = copied(theirs, options.prototypes)
    optimizers = our_optimizer(ours), peer.optimizer
    losses, gradients, weights = [], [], []
    for step in range(1, options.steps + 1):
        # Other crops and masks in each step; the peer's own function seeds itself.
        data = peer.batch(options.batch, global_size=sizes[0], local_size=sizes[1])
        data = with_noise(data, step)
        found, wanted = our_losses(ours, data, sizes[0] // 8), their_losses(theirs, data)
        losses += [(step, name, wanted[name], found[name]) for name in wanted]
        gradients += [(step, *row) for row in differences(ours.student, theirs.student, gradient=True)]
        take_step(ours, theirs, optimizers)
        for side in ("student", "teacher"):
            rows = differences(getattr(ours, side), getattr(theirs, side), gradient=False)
            name, largest = max(rows, key=lambda row: row[1])
            middle = statistics.median(difference for _, difference in rows)
            weights.append((side, step, middle, largest, name))
    text = report(options, sizes, losses, gradients, weights)
    print(text)
    if not options.quick:
        write_result("dinov3_losses", text, ["torch"])


@torch.no_grad()
def prepare(theirs: Any) -> None:
    """Give LayerScale and prototypes values at which the losses say something, and the teacher weights of its own."""
    for side in (theirs.student, theirs.teacher):
        side["backbone"].rope_embed.dtype = torch.float32
        side["backbone"].rope_embed._init_weights()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.student.named_parameters():
        if name.endswith(".gamma"):
            parameter.fill_(_LAYER_SCALE)
        if name.endswith("last_layer.weight"):
            parameter *= _PROTOTYPE_FACTOR
    theirs.teacher.load_state_dict(theirs.student.state_dict())
    for parameter in theirs.teacher.parameters():
        parameter += 0.1 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)


def copied(theirs: Any, num_prototypes: int) -> StudentTeacher:
    """Return our model with the weights of theirs."""
    read = {side: recognise(getattr(theirs, side).state_dict()) for side in ("student", "teacher")}
    # Their plain LayerNorm has 1e-6; a file does not say so.
    backbone = VisionTransformer(replace(read["student"].config, norm_eps=1e-6))
    ours = StudentTeacher(backbone, HeadsConfig(num_prototypes=num_prototypes), LossConfig()).train()
    for side, found in read.items():
        modules = getattr(ours, side)
        modules["backbone"].load_state_dict(found.tensors)
        for name, tensors in found.heads.items():
            modules[name].load_state_dict(tensors)
    return ours


def our_optimizer(ours: StudentTeacher) -> torch.optim.Optimizer:
    optimizer = adamw(parameter_groups(dict(ours.student.items()), depth=12, layer_decay=0.9))
    set_rates(optimizer, learning_rate=_RATE, weight_decay=_DECAY)
    return optimizer


def with_noise(data: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the batch with other crops, and the masks dealt to other crops."""
    generator = torch.Generator().manual_seed(step)
    data = dict(data)
    for name in ("collated_global_crops", "collated_local_crops"):
        data[name] = torch.randn(data[name].shape, generator=generator)
    masks = data["collated_masks"][torch.randperm(len(data["collated_masks"]), generator=generator)]
    data["collated_masks"] = masks
    data["mask_indices_list"] = masks.flatten().nonzero().flatten()
    data["masks_weight"] = (1 / masks.sum(1).clamp(min=1.0))[data["mask_indices_list"] // masks.shape[1]]
    return data


def our_losses(ours: StudentTeacher, data: Mapping[str, Any], side: int) -> dict[str, float]:
    """Return our losses, and leave the gradients in the student."""
    views = Views(
        data["collated_global_crops"].unflatten(0, (2, -1)), data["collated_local_crops"].unflatten(0, (8, -1))
    )
    masks = PatchMasks(
        data["collated_masks"].unflatten(1, (side, side)), data["mask_indices_list"], data["masks_weight"]
    )
    ours.zero_grad(set_to_none=True)
    losses = ours(views, masks, teacher_temperature=_TEMPERATURE).losses
    losses.total.backward()
    return {name: float(value.detach()) for name, value in losses._asdict().items()}


def their_losses(theirs: Any, data: Mapping[str, Any]) -> dict[str, float]:
    """Return theirs under our names, and leave the gradients in the student."""
    # Their Sinkhorn sums this in place over ranks.
    data = {**data, "n_masked_patches": data["n_masked_patches"].clone()}
    theirs.zero_grad(set_to_none=True)
    total, found = theirs.forward_backward(data, teacher_temp=_TEMPERATURE, iteration=0)
    named = {name: factor * float(found[key].detach()) for name, (key, factor) in _LOSSES.items()}
    return {"total": float(total.detach()), **named}


def take_step(ours: StudentTeacher, theirs: Any, optimizers: tuple[Any, Any]) -> None:
    """Clip, update and average on both sides, each with its own code."""
    clip_gradients(dict(ours.student.items()), _CLIP)
    optimizers[0].step()
    update_ema(ours.teacher.parameters(), ours.student.parameters(), _MOMENTUM)
    for module in theirs.student.values():
        nn.utils.clip_grad_norm_(module.parameters(), max_norm=_CLIP)
    optimizers[1].step()
    theirs.update_ema(_MOMENTUM)


def differences(ours: nn.Module, theirs: nn.Module, *, gradient: bool) -> list[tuple[str, float]]:
    """Return the length of the difference over that of theirs, by parameter; those whose value is 0 are left out."""
    pairs = dict(theirs.named_parameters())
    rows = []
    for name, parameter in ours.named_parameters():
        one, other = (parameter.grad, pairs[name].grad) if gradient else (parameter, pairs[name])
        assert isinstance(one, Tensor), name
        assert isinstance(other, Tensor), name
        if other.norm() > 0:
            rows.append((name, float((one.detach() - other.detach()).norm() / other.detach().norm())))
    return rows


def report(
    options: argparse.Namespace,
    sizes: tuple[int, int],
    losses: list[tuple[int, str, float, float]],
    gradients: list[tuple[int, str, float]],
    weights: list[tuple[str, int, float, float, str]],
) -> str:
    worst = max(abs(found - wanted) / abs(wanted) for _, _, wanted, found in losses)
    lines = [
        "# Losses and gradients against DINOv3's own",
        "",
        f"ViT-S/8, 2 x {sizes[0]} + 8 x {sizes[1]} px, batch {options.batch}, K {options.prototypes:,}, float32, "
        f"LayerScale {_LAYER_SCALE}, prototypes of about unit length, rotary tables in float32, no drop path. "
        "Each side takes its own steps from the same weights (clipping, AdamW with layer-wise decay, moving average). "
        f"Largest relative difference of a loss: {worst:.1e}.",
        "",
        "| step | loss | DINOv3 | dinocell | relative difference |",
        "|---|---|---|---|---|",
    ]
    for step, name, wanted, found in losses:
        lines.append(f"| {step} | {name} | {wanted:.6f} | {found:.6f} | {abs(found - wanted) / abs(wanted):.1e} |")
    lines += ["", "Difference of the gradients: its length over that of DINOv3's gradient.", ""]
    steps = range(1, options.steps + 1)
    lines += [f"| parameter | {' | '.join(f'step {step}' for step in steps)} |", "|---" * (len(steps) + 1) + "|"]
    by_name: dict[str, list[float]] = {}
    for _, name, difference in gradients:
        by_name.setdefault(name, []).append(difference)
    lines += [f"| `{name}` | {' | '.join(f'{d:.1e}' for d in by_name[name])} |" for name in _GRADIENTS]
    each = list(zip(*by_name.values(), strict=True))
    lines.append(f"| largest of all {len(by_name)} | {' | '.join(f'{max(step):.1e}' for step in each)} |")
    names = [max(by_name, key=lambda name, k=k: by_name[name][k]) for k in range(len(each))]
    lines += ["", f"The largest are of {', '.join(f'`{name}`' for name in dict.fromkeys(names))}.", ""]
    lines += [
        "Weights after the step: the same difference. AdamW divides a gradient by its own size, so where a weight "
        "began at 0 and its gradient is near 0, rounding shows.",
        "",
        "| side | step | median | largest | of |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {side} | {step} | {m:.1e} | {most:.1e} | `{name}` |" for side, step, m, most, name in sorted(weights)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
