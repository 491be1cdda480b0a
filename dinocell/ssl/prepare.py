"""Preparing a pretraining run: build its model, estimate the memory and the operations of a step, describe the run.

The estimate refuses a run that cannot fit before anything is allocated. On a CPU such a run would not fail with an
error: the system kills the process, or starts to swap.
"""

import warnings
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from typing import cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dinocell.data_shards.read import SampleStream
from dinocell.errors import ConfigError
from dinocell.models.config import ViTConfig, forward_flop, head_flop
from dinocell.models.layers import Block
from dinocell.models.positions import TrainingNoise
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import load_backbone
from dinocell.runtime.device import available_bytes, uses_bfloat16
from dinocell.runtime.distributed import World, choose_parallel, make_mesh, max_over_ranks, num_shards, shard
from dinocell.runtime.optim import scaled_learning_rate
from dinocell.ssl.config import HeadsConfig, PretrainConfig, Recompute
from dinocell.ssl.heads import ProjectionHead, row_chunks
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.view_plan import PERCENTILES

# Warnings of torch's compiler about itself: a setting that is off on purpose, and a deprecated function that it calls.
_COMPILER_WARNINGS = ("TensorFloat32 tensor cores", "`torch._prims_common.check` is deprecated")

# Estimates are within a quarter of measured values; only what clearly exceeds the memory is refused.
_MARGIN = 1.25


def build_model(config: PretrainConfig, world: World) -> StudentTeacher:
    """Return student and teacher on this rank's device, distributed over the ranks if there are several.

    Every rank first builds the same model in main memory, so random weights do not depend on the number of ranks.

    Raises DinocellError if weights cannot be read or do not fit, or the attention kernel is not installed or not
    supported on the device.
    """
    compute, device = config.compute, world.device
    if compute.attention == "varlen" and not (device.type == "cuda" and uses_bfloat16(compute.dtype, device)):
        raise ConfigError(
            f"compute.attention: varlen needs CUDA and bfloat16, got {device.type} and compute.dtype={compute.dtype}; "
            "use sdpa"
        )
    if compute.attention == "xformers" and find_spec("xformers") is None:
        raise ConfigError("compute.attention: xformers is not installed; install it, or use varlen or sdpa")
    torch.manual_seed(config.seed)
    model = StudentTeacher(
        _backbone(config),
        config.heads,
        config.losses,
        with_gram=config.uses_gram,
        keep_logits=compute.recompute != "blocks",
        compiled=compute.compile == "all",
    ).train()
    backbones = [backbone_of(side) for side in (model.student, model.teacher, model.gram) if "backbone" in side]
    for backbone in backbones:
        backbone.set_kernel(compute.attention)
    recompute(backbone_of(model.student), compute.recompute)
    if compute.compile != "nothing":
        for message in _COMPILER_WARNINGS:
            warnings.filterwarnings("ignore", message=message, module=r"torch\._inductor\.")
        for backbone in backbones:
            # Several ranks gather parameters block by block, and the number of masked patches may differ between steps.
            if compute.compile == "all" and world.size == 1 and compute.recompute != "blocks":
                backbone.compile_pass()
                continue
            for block in backbone.blocks:
                # Shapes are static; dynamic ones, chosen because the teacher's differ, would give slower code.
                block.compile(dynamic=False)
    if world.size > 1:
        _distribute(config, model, world)
    return model.to(device)


def recompute(student: VisionTransformer, what: Recompute) -> None:
    """Let the backward pass of the student recompute parts of the forward pass, see `ComputeConfig`."""
    for index, block in enumerate(student.blocks):
        assert isinstance(block, Block)
        block.recompute_activations = what == "activations"
        if what == "blocks":
            student.blocks[index] = checkpoint_wrapper(block)


def _distribute(config: PretrainConfig, model: StudentTeacher, world: World) -> None:
    parallel = choose_parallel(config.compute.parallel, sum(p.numel() for p in model.student.parameters()), world)
    mesh = make_mesh(parallel, world)
    dtype = torch.bfloat16 if uses_bfloat16(config.compute.dtype, world.device) else None
    for side in (model.student, model.teacher, model.gram):
        for name, module in side.items():
            if name == "backbone":
                backbone = cast("VisionTransformer", module)
                backbone.one_pass = True
                shard(backbone, mesh, blocks=list(backbone.blocks), dtype=dtype)
            else:
                # The losses use a head's prototypes after its forward pass.
                shard(module, mesh, dtype=dtype, keep_gathered=True)


def backbone_of(side: nn.ModuleDict) -> VisionTransformer:
    """Return the backbone of the student, the teacher or the Gram teacher."""
    backbone = side["backbone"]
    assert isinstance(backbone, VisionTransformer)
    return backbone


def _backbone(config: PretrainConfig) -> VisionTransformer:
    model, channels = config.model, config.views.in_channels
    noise = TrainingNoise(drop_path=model.drop_path)
    if model.weights is not None:
        vit = load_backbone(
            model.weights,
            patch_size=model.patch_size,
            in_channels=channels,
            input="standardised",
            variant=model.variant,
            noise=noise,
        )
    else:
        vit = VisionTransformer(
            variant_config(model.variant, patch_size=model.patch_size, in_channels=channels), noise=noise
        )
        vit.init_weights(layer_scale=model.layer_scale)
    low, high = map(float, PERCENTILES)
    settings = replace(
        vit.card.input,
        convention="standardised",
        channel_policy=config.views.policy,
        channel_names=config.views.channels,
        percentiles=(low, high),
    )
    vit.card = replace(vit.card, input=settings)
    return vit


def initial_backbone(config: PretrainConfig) -> VisionTransformer:
    """Return the backbone with which a run starts, for evaluation; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return _backbone(config).eval().requires_grad_(False)


def check_memory(config: PretrainConfig, world: World) -> None:
    """Refuse a run whose step clearly needs more memory than a device has left; called by all ranks.

    Raises ConfigError if so; it names the settings that reduce memory.
    """
    available = available_bytes(world.device)
    share = torch.inf if available is None else float(available)
    if world.device.type == "cpu":
        share /= world.local_size
    share = -float(max_over_ranks(torch.tensor(-share, dtype=torch.float64, device=world.device)))
    needed = step_bytes(config, world)
    if needed > _MARGIN * share:
        raise ConfigError(
            f"compute.device: a step needs about {needed / 1e9:.1f} GB of memory, and {world.device} has "
            f"{share / 1e9:.1f} GB left per process: {what_would_fit(config)}"
        )


def what_would_fit(config: PretrainConfig) -> str:
    """Return advice for a step that needs too much memory."""
    return (
        f"raise optim.accumulate from {config.optim.accumulate}, set compute.recompute=activations or blocks, or lower "
        f"batch_size from {config.batch_size} or heads.num_prototypes from {config.heads.num_prototypes}"
    )


def step_bytes(config: PretrainConfig, world: World) -> int:
    """Estimate the peak memory of a step on one rank, without that of the process itself."""
    views, heads, recompute = config.views, config.heads, config.compute.recompute
    vit = variant_config(config.model.variant, patch_size=config.model.patch_size, in_channels=views.in_channels)
    half = uses_bfloat16(config.compute.dtype, world.device)
    size = 2 if half else 4  # bytes of a number in activations and logits
    part = config.batch_size / (world.size * config.optim.accumulate)
    rows = part * views.num_global + part * config.mean_masked  # of the teacher's logits

    # Student with gradient and two moments, teacher, Gram teacher; bfloat16 copies of the weights.
    backbone, head = _num_parameters(vit, heads)
    student = backbone + (1 if heads.shared else 2) * head
    shards = num_shards(choose_parallel(config.compute.parallel, student, world), world) if world.size > 1 else 1
    state = 4 * (5 * student + (backbone if config.uses_gram else 0)) / shards + (2 * student if half else 0)

    reconstruction = config.losses.reconstruction.hidden_dim if config.uses_reconstruction else 0
    pixels = views.in_channels * vit.patch_size**2
    if reconstruction:  # the student's head only
        parameters = reconstruction * (vit.width + pixels + 1) + pixels
        state += 4 * 4 * parameters / shards + (2 * parameters if half else 0)

    # Kept for the backward pass per token and block: inputs and outputs of two norms, queries, keys, values, attention
    # output, inputs and outputs of the activation. The last block computes a few tokens only.
    kinds = [part * len(kind) * ((side // vit.patch_size) ** 2 + vit.num_prefix) for kind, side in views.kinds]
    tokens = sum(kinds)
    gates = (2 if vit.mlp == "swiglu" else 1) * vit.mlp_hidden
    whole = 8 * vit.width + 2 * gates
    kept: int = {"nothing": whole, "activations": 6 * vit.width + gates, "blocks": vit.width}[recompute]
    activations = tokens * kept * size * (vit.depth - 0.5) * (1 - config.model.drop_path)
    # The crops, and the hidden layers of the heads.
    activations += 2 * 4 * part * views.in_channels * sum(len(kind) * side**2 for kind, side in views.kinds)
    hidden = vit.width + 2 * (heads.layers - 1) * heads.hidden + 3 * heads.bottleneck
    activations += (part * views.num_views + part * config.mean_masked) * hidden * size
    if reconstruction:
        # Hidden layer, predictions and targets of the masked patches; the targets' crops, and those in other channels.
        activations += part * config.mean_masked * (size * (2 * reconstruction + pixels) + 4 * 3 * pixels)
        crops = 1 if config.target_channels == "same" else 2
        activations += crops * 4 * part * views.in_channels * views.num_global * views.global_size**2
    if config.uses_gram:
        activations += 4 * 4 * part * views.num_global * (views.global_size // vit.patch_size) ** 4

    # The teacher's logits, DINO's targets, and the gradients of the prototypes.
    logits = (0 if recompute == "blocks" else rows * size) + 4 * (3 * views.num_global + 1) * part
    logits = (logits + 2 * 4 * heads.bottleneck) * heads.num_prototypes
    # The largest temporaries: chunks of logits, or the backward pass of a block (on the CPU of one kind of views).
    chunk = next(row_chunks(max(1, round(rows)), heads.num_prototypes, world.device)).stop
    chunks = (5 if half else 3) * 4 * chunk * heads.num_prototypes
    in_pass = max(kinds) if world.device.type == "cpu" else tokens
    backward = in_pass * size * (vit.mlp_hidden + 2 * vit.width + (whole if recompute == "blocks" else 0))
    return int(state + activations + logits + max(chunks, backward))


@lru_cache(maxsize=4)
def _num_parameters(vit: ViTConfig, heads: HeadsConfig) -> tuple[int, int]:
    """Return the numbers of parameters of a backbone and of a head."""
    with torch.device("meta"):
        backbone = VisionTransformer(vit)
        head = ProjectionHead(
            vit.width,
            heads.num_prototypes,
            hidden=heads.hidden,
            bottleneck=heads.bottleneck,
            layers=heads.layers,
            weight_norm=heads.weight_norm,
        )
    num_backbone, num_head = (sum(p.numel() for p in module.parameters()) for module in (backbone, head))
    return num_backbone, num_head


def flop_per_image(config: PretrainConfig, model: StudentTeacher) -> float:
    """Return the operations of one image's share of a step: teacher forward, student forward and backward (twice that).

    Savings by drop path and the pruned last block, and additional work by recomputation, are not counted.
    """
    vit, heads, views = backbone_of(model.student).config, config.heads, config.views
    global_flop, local_flop = (forward_flop(vit, size) for size in (views.global_size, views.local_size))
    head = head_flop(vit.width, heads.hidden, heads.bottleneck, heads.layers, heads.num_prototypes)
    masked = config.mean_masked
    teacher = views.num_global * (global_flop + head) + masked * head
    student = views.num_global * global_flop + views.num_local * local_flop + (views.num_views + masked) * head
    gram = views.num_global * global_flop if config.uses_gram else 0.0
    if config.uses_reconstruction:
        pixels = views.in_channels * vit.patch_size**2
        student += masked * 2.0 * config.losses.reconstruction.hidden_dim * (vit.width + pixels)
    return teacher + 3 * student + gram


def describe_run(config: PretrainConfig, samples: SampleStream, model: StudentTeacher, world: World) -> list[str]:
    """Return lines that summarise model, data and costs of a run."""
    rate = scaled_learning_rate(config.schedules.learning_rate.peak, config.batch_size, rule=config.optim.rule)
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in model.student.items()}
    sizes = ", ".join(f"{name} {size / 1e6:.1f} M" for name, size in parameters.items())
    epochs = config.steps * config.batch_size / samples.num_samples
    lines = [
        f"student: {sizes}; from {config.model.weights or 'random weights'}",
        f"{samples.num_samples:,} tiles, {config.steps:,} steps of {config.batch_size}: {epochs:.1f} epochs; "
        f"policy {config.views.policy}; peak learning rate {rate:.3g}",
        f"{flop_per_image(config, model) / 1e9:.0f} GFLOP per image",
        f"estimated memory per process: {step_bytes(config, world) / 1e9:.1f} GB",
    ]
    available = {name for shard_set in samples.sets for name in shard_set.manifest.channels}
    blank = [name for name in config.views.channels if name not in available]
    if config.views.policy == "stack" and blank:
        lines.append(f"views.channels: no set has {', '.join(blank)}; the model sees zeros there in every view")
    if config.optim.accumulate > 1:
        lines.append(f"{config.optim.accumulate} parts per step: targets and KoLeo see one part at a time")
    if world.size > 1:
        parallel = choose_parallel(config.compute.parallel, sum(parameters.values()), world)
        lines.append(f"{world.size} processes, {parallel}")
    return lines
