"""A rough estimate of the memory of a step, to refuse a run that cannot fit before anything is allocated.

On a CPU such a run would not fail with an error: the system kills the process, or starts to swap.
"""

from functools import lru_cache

import torch

from dinocell.errors import ConfigError
from dinocell.models.config import ViTConfig
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.runtime.device import available_bytes, uses_bfloat16
from dinocell.runtime.distributed import World, choose_parallel, max_over_ranks, num_shards
from dinocell.ssl.chunks import row_chunks
from dinocell.ssl.config import HeadsConfig, PretrainConfig
from dinocell.ssl.heads import ProjectionHead

# Estimates are within a quarter of measured values; only what clearly exceeds the memory is refused.
_MARGIN = 1.25


def check_memory(config: PretrainConfig, world: World) -> None:
    """Refuse a run whose step clearly needs more memory than a device has left; called by all ranks.

    Raises
    ------
    ConfigError
        If so; it names the settings that reduce memory.
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
